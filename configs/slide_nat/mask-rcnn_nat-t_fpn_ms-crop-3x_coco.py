_base_ = 'mask-rcnn_slide-nat-t_fpn_ms-crop-3x_coco.py'
model = dict(backbone=dict(slide_stages=()))
