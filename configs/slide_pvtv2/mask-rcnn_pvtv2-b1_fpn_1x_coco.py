_base_ = 'mask-rcnn_slide-pvtv2-b1_fpn_1x_coco.py'
model = dict(backbone=dict(slide_stages=()))
