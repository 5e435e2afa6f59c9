_base_ = 'mask-rcnn_pvtv2-b4_fpn_8xb1-1x_coco.py'
pretrained = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b5.pth'
model = dict(backbone=dict(arch='b5', init_cfg=dict(checkpoint=pretrained)))
