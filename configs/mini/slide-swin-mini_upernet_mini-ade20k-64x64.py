# A light UperNet with a small Slide-Swin, trained from scratch on a CPU with drawn shapes:
# `tools/make_mini_dataset.py data/mini`. For another data set in ADE20K's layout change data_root and nothing else.
_base_ = ['../_base_/models/upernet.py', '../_base_/datasets/ade20k.py', '../_base_/default_runtime_seg.py']
data_root = 'data/mini/ade/'
# Small images, for many steps: in a trial one at 96 pixels took more than twice the time and taught no more.
image_scale = (256, 64)  # the short side gets 64 pixels, the long one at most 256
crop_size = (64, 64)
embed_dims = [32, 64, 128, 192]

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        type='mmslide.SlideSwin',
        arch=dict(embed_dims=embed_dims, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 6], mlp_ratios=[4, 4, 4, 4]),
        drop_path_rate=0.0,
        init_cfg=[
            # At these widths the usual standard deviation of 0.02 starts slowly.
            dict(type='Xavier', layer='Linear', distribution='uniform'),
            # Colours say nothing of a shape. In trials this halved the steps until figures stood out from the ground.
            dict(type='mmslide.ZeroSumPatches'),
        ],
    ),
    # A shape is told by its mask, so layers are needed behind those that find the mask: a pyramid before UperNet's own.
    neck=dict(
        type='FPN',
        in_channels=embed_dims,
        out_channels=64,
        num_outs=4,
        norm_cfg=dict(type='BN'),
        act_cfg=dict(type='ReLU'),
    ),
    decode_head=dict(
        in_channels=[64, 64, 64, 64],
        channels=64,
        # The coarsest map has four pixels: nothing to pool.
        pool_scales=(),
        dropout_ratio=0.0,
        norm_cfg=dict(type='BN'),
    ),
    auxiliary_head=None,
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomRotate', prob=0.5, degree=180.0),
    # No smaller than the crop: padding would not fit the rescaled maps below.
    dict(type='RandomResize', scale=image_scale, ratio_range=(1.0, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=[0.5, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PhotoMetricDistortion'),
    # The loss at the head's own stride: 150 classes at full size would be half of a training step.
    dict(type='SegRescale', scale_factor=0.25),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),  # after Resize: annotations keep their size
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(4 * side, side), keep_ratio=True) for side in (64, 80, 96)],
            [
                dict(type='RandomFlip', prob=0.0, direction='horizontal'),
                dict(type='RandomFlip', prob=1.0, direction='horizontal'),
            ],
            [dict(type='LoadAnnotations', reduce_zero_label=True)],
            [dict(type='PackSegInputs')],
        ],
    ),
]

train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    dataset=dict(data_root=data_root, pipeline=train_pipeline),
)
val_dataloader = dict(num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader

max_iters = 5500
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(checkpoint=dict(interval=1500))
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        # Slide Attention's own parameters start at zero and have far to go.
        custom_keys=dict(
            deform_weight=dict(lr_mult=10.0),
            deform_bias=dict(lr_mult=10.0, decay_mult=0.0),
            shift_bias=dict(lr_mult=10.0, decay_mult=0.0),
            relative_position_bias=dict(lr_mult=10.0, decay_mult=0.0),
            # Of neck and head: in front of a BatchNorm only a step's size relative to the weights counts, and these
            # start two to five times larger than PyTorch's default.
            **{'conv.weight': dict(lr_mult=4.0)},
        ),
    ),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=50, end=max_iters),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
randomness = dict(seed=0)
