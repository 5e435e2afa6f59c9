_base_ = [
    '../models/upernet.py',
    '../datasets/ade20k.py',
    '../schedules/upernet_160k.py',
    '../default_runtime_seg.py',
]
train_dataloader = dict(batch_size=2, num_workers=2)
