_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/deit_300e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(
    backbone=dict(type='mmslide.TwinsPCPVT', arch='small', drop_path_rate=0.2),
    head=dict(in_channels=512),
)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
