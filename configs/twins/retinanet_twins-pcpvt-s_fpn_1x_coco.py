_base_ = '../_base_/recipes/retinanet_fpn_1x_coco.py'
pretrained = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/twins/pcpvt_small_20220308-e638c41c.pth'
model = dict(
    backbone=dict(
        type='mmslide.TwinsPCPVT',
        arch='small',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    neck=dict(in_channels=[128, 320, 512]),
)
