# Swin's and Slide-Swin's setting for ImageNet-1K, 8 GPUs with 128 images each: a longer warm-up, and clipped gradients.
_base_ = 'deit_300e.py'
optim_wrapper = dict(type='OptimWrapper', clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=True, begin=20, end=300),
]
