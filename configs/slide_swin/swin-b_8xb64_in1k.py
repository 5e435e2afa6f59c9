_base_ = 'slide-swin-b_8xb64_in1k.py'
model = dict(backbone=dict(slide_stages=()))
