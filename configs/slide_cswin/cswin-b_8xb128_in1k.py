_base_ = 'slide-cswin-b_8xb128_in1k.py'
model = dict(backbone=dict(slide_stages=()))
