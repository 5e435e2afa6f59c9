_base_ = [
    '../models/classifier.py',
    '../datasets/imagenet_224.py',
    '../schedules/swin_300e.py',
    '../default_runtime_cls.py',
]
