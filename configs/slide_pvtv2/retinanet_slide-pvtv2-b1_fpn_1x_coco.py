_base_ = '../_base_/recipes/retinanet_fpn_1x_coco.py'
pretrained = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b1.pth'
model = dict(
    backbone=dict(
        type='mmslide.SlidePVTv2',
        arch='b1',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    neck=dict(in_channels=[128, 320, 512]),
)
