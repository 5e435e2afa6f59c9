_base_ = 'retinanet_twins-pcpvt-s_fpn_1x_coco.py'
pretrained = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/twins/alt_gvt_small_20220308-7e1c3695.pth'
model = dict(
    backbone=dict(type='mmslide.TwinsSVT', init_cfg=dict(checkpoint=pretrained)),
    neck=dict(in_channels=[128, 256, 512]),
)
