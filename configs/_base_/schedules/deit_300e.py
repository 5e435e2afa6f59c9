# DeiT's setting for ImageNet-1K in mixed precision, 8 GPUs with 128 images each; of PVT, PVTv2 and Twins too.
max_epochs = 300
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        # Parts of the names of what the authors' rules leave out too, but has several axes here.
        custom_keys={
            'relative_position_bias': dict(decay_mult=0.0),  # Slide Attention's, and the windows' table
            'shift_bias': dict(decay_mult=0.0),
            'deform_bias': dict(decay_mult=0.0),
            'rpb': dict(decay_mult=0.0),  # of neighborhood attention
            'peg': dict(decay_mult=0.0),  # Twins' position encoding
        },
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=True, begin=5, end=max_epochs),
]
auto_scale_lr = dict(enable=False, base_batch_size=8 * 128)
