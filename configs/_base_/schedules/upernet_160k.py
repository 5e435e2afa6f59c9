# Swin's setting, 8 GPUs with 2 images each: 160,000 × 16 / 20,210 images of ADE20K are 127 epochs.
max_iters = 160_000
warmup_iters = 1500
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=8000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
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
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=warmup_iters),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=warmup_iters, end=max_iters),
]
auto_scale_lr = dict(enable=False, base_batch_size=8 * 2)
