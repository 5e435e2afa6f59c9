_base_ = '../_base_/recipes/mask-rcnn_fpn_ms-crop-3x_coco.py'
pretrained = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/twins/pcpvt_small_20220308-e638c41c.pth'
model = dict(
    backbone=dict(
        type='mmslide.TwinsPCPVT',
        arch='small',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(type='AmpOptimWrapper')
