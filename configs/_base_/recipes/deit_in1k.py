_base_ = [
    '../models/classifier.py',
    '../datasets/imagenet_224.py',
    '../schedules/deit_300e.py',
    '../default_runtime_cls.py',
]
