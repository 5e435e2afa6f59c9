_base_ = 'slide-swin-t_8xb128_in1k.py'
model = dict(backbone=dict(slide_stages=()))
