# Fine-tunes a segmentor that was trained on ADE20K for other classes: those of the generated data set,
# `tools/make_mini_dataset.py data/mini`, which are some of ADE20K's. For your own data in ADE20K's layout change
# data_root and metainfo (classes and palette), and set type='BaseSegDataset' and reduce_zero_label=True.
_base_ = '../slide_swin/slide-swin-t_upernet_8xb2-160k_ade20k-512x512.py'
# Its heads for 150 classes do not fit and start fresh, with a warning that names them.
load_from = 'work_dirs/slide-swin-t_upernet_8xb2-160k_ade20k-512x512/iter_160000.pth'
data_root = 'data/mini/ade/'
metainfo = dict(classes=('wall', 'box', 'ball', 'flag'))
num_classes = len(metainfo['classes'])

model = dict(
    backbone=dict(init_cfg=None),
    decode_head=dict(num_classes=num_classes),
    auxiliary_head=dict(num_classes=num_classes),
)
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader

max_iters = 20_000
train_cfg = dict(max_iters=max_iters, val_interval=2000)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=500, end=max_iters),
]
default_hooks = dict(checkpoint=dict(interval=2000))
