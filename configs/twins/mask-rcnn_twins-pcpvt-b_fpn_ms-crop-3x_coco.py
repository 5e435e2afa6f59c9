_base_ = 'mask-rcnn_twins-pcpvt-s_fpn_ms-crop-3x_coco.py'
pretrained = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/twins/pcpvt_base_20220308-0621964c.pth'
model = dict(backbone=dict(arch='base', init_cfg=dict(checkpoint=pretrained)))
