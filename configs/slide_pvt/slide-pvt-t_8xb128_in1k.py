_base_ = [
    '../_base_/models/classifier.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/swin_300e.py',
    '../_base_/default_runtime_cls.py',
]
# The mean over the pixels, where PVT itself has a class token in stage 4.
model = dict(
    backbone=dict(type='mmslide.SlidePVT', arch='tiny', drop_path_rate=0.1),
    head=dict(in_channels=512),
)
