_base_ = 'slide-nat-s_8xb128_in1k.py'
model = dict(backbone=dict(slide_stages=()))
