_base_ = [
    '../models/semantic-fpn.py',
    '../datasets/ade20k.py',
    '../schedules/semantic-fpn_80k.py',
    '../default_runtime_seg.py',
]
