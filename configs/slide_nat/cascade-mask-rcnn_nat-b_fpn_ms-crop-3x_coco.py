_base_ = 'cascade-mask-rcnn_slide-nat-b_fpn_ms-crop-3x_coco.py'
model = dict(backbone=dict(slide_stages=()))
