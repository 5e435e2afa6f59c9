_base_ = 'retinanet_twins-pcpvt-s_fpn_1x_coco.py'
pretrained = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/twins/pcpvt_large_20220308-37579dc6.pth'
model = dict(backbone=dict(arch='large', init_cfg=dict(checkpoint=pretrained)))
