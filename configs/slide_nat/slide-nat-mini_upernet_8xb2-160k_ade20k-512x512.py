_base_ = '../_base_/recipes/upernet_8xb2-160k_ade20k-512x512.py'
pretrained = 'https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth'
model = dict(
    backbone=dict(
        type='mmslide.SlideNAT',
        arch='mini',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(type='AmpOptimWrapper')
