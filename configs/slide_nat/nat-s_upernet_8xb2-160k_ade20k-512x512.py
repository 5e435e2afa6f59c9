_base_ = 'slide-nat-s_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(backbone=dict(slide_stages=()))
