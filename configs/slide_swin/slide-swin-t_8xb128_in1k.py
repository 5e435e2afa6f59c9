_base_ = '../_base_/recipes/swin_in1k.py'
model = dict(
    backbone=dict(type='mmslide.SlideSwin', arch='tiny', drop_path_rate=0.2),
    head=dict(in_channels=768),
)
