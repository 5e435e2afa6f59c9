_base_ = '../_base_/recipes/mask-rcnn_fpn_ms-crop-3x_coco.py'
pretrained = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b2.pth'
model = dict(
    backbone=dict(
        type='mmslide.SlidePVTv2',
        arch='b2',
        slide_stages=(),
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(type='AmpOptimWrapper')
