_base_ = 'slide-pvtv2-b0_8xb128_in1k.py'
model = dict(backbone=dict(slide_stages=()))
