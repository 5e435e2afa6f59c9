_base_ = 'mask-rcnn_pvtv2-b1_fpn_1x_coco.py'
pretrained = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b2_li.pth'
model = dict(backbone=dict(arch='b2-li', init_cfg=dict(checkpoint=pretrained)))
