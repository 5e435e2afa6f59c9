_base_ = '../_base_/recipes/swin_in1k.py'
# The mean over the pixels, where PVT itself has a class token in stage 4.
model = dict(
    backbone=dict(type='mmslide.SlidePVT', arch='tiny', drop_path_rate=0.1),
    head=dict(in_channels=512),
)
