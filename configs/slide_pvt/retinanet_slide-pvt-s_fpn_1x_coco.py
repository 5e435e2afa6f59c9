_base_ = 'retinanet_slide-pvt-t_fpn_1x_coco.py'
pretrained = 'https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth'
model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint=pretrained)))
