_base_ = 'mask-rcnn_twins-pcpvt-s_fpn_ms-crop-3x_coco.py'
pretrained = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/twins/pcpvt_large_20220308-37579dc6.pth'
model = dict(backbone=dict(arch='large', init_cfg=dict(checkpoint=pretrained)))
