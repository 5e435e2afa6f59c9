_base_ = '../_base_/recipes/deit_in1k.py'
model = dict(
    backbone=dict(type='mmslide.TwinsPCPVT', arch='small', drop_path_rate=0.2),
    head=dict(in_channels=512),
)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
