_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/swin_300e.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(
    backbone=dict(type='mmslide.SlideSwin', arch='tiny', drop_path_rate=0.2),
    head=dict(in_channels=768),
)
