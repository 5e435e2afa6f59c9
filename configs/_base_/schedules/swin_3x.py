# Swin's setting for 36 epochs, 8 GPUs with 2 images each.
max_epochs = 36
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # Parts of parameter names. relative_position_bias is Slide Attention's and begins the name of the windows' table.
    paramwise_cfg=dict(
        custom_keys={
            'norm': dict(decay_mult=0.0),
            'relative_position_bias': dict(decay_mult=0.0),
            'rpb': dict(decay_mult=0.0),  # NAT's
            'position_embedding': dict(decay_mult=0.0),
            'peg': dict(decay_mult=0.0),  # Twins' position encoding
        }
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=max_epochs, milestones=[27, 33], gamma=0.1),
]
auto_scale_lr = dict(enable=False, base_batch_size=8 * 2)
