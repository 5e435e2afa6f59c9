_base_ = 'cascade-mask-rcnn_slide-nat-s_fpn_ms-crop-3x_coco.py'
model = dict(backbone=dict(slide_stages=()))
