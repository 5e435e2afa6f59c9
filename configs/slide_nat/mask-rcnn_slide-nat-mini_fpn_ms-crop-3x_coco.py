_base_ = '../_base_/recipes/mask-rcnn_fpn_ms-crop-3x_coco.py'
pretrained = 'https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth'
model = dict(
    backbone=dict(
        type='mmslide.SlideNAT',
        arch='mini',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(type='AmpOptimWrapper')
