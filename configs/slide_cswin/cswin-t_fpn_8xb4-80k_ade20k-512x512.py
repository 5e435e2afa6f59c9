_base_ = '../_base_/recipes/fpn_8xb4-80k_ade20k-512x512.py'
pretrained = 'https://github.com/microsoft/CSWin-Transformer/releases/download/v0.1.0/cswin_tiny_224.pth'
model = dict(
    backbone=dict(
        type='mmslide.SlideCSWin',
        arch='tiny',
        slide_stages=(),
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
