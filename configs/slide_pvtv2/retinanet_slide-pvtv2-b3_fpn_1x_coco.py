_base_ = 'retinanet_slide-pvtv2-b1_fpn_1x_coco.py'
pretrained = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b3.pth'
model = dict(backbone=dict(arch='b3', init_cfg=dict(checkpoint=pretrained)))
