_base_ = '../_base_/recipes/swin_in1k.py'
model = dict(
    backbone=dict(type='mmslide.SlideNAT', arch='mini', drop_path_rate=0.2),
    head=dict(in_channels=512),
)
optim_wrapper = dict(type='AmpOptimWrapper')
# Ten more epochs at the lowest rate.
max_epochs = 310
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=5e-6, by_epoch=True, begin=20, end=300),
]
