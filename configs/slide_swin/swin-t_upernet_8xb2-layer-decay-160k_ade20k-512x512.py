_base_ = 'slide-swin-t_upernet_8xb2-layer-decay-160k_ade20k-512x512.py'
model = dict(backbone=dict(slide_stages=()))
