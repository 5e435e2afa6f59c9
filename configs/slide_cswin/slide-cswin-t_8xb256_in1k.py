_base_ = '../_base_/recipes/deit_in1k.py'
model = dict(
    backbone=dict(type='mmslide.SlideCSWin', arch='tiny', drop_path_rate=0.2),
    head=dict(in_channels=512),
)
train_dataloader = dict(batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
# Ten more epochs at the lowest rate.
max_epochs = 310
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=5e-4, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=20, end=300),
]
custom_hooks = [dict(type='EMAHook', momentum=1.6e-4, priority='ABOVE_NORMAL')]  # decay 0.99984
auto_scale_lr = dict(base_batch_size=8 * 256)
