# Fine-tunes a detector that was trained on COCO for other classes: those of the generated data set,
# `tools/make_mini_dataset.py data/mini`. For your own data in COCO's layout change data_root and name all classes, in
# the order of the annotation file.
_base_ = '../slide_pvt/mask-rcnn_slide-pvt-t_fpn_1x_coco.py'
# Its heads for 80 classes do not fit and start fresh, with a warning that names them.
load_from = 'work_dirs/mask-rcnn_slide-pvt-t_fpn_1x_coco/epoch_12.pth'
data_root = 'data/mini/coco/'
metainfo = dict(classes=('sports ball', 'kite', 'tv'))
num_classes = len(metainfo['classes'])

model = dict(
    backbone=dict(init_cfg=None),
    roi_head=dict(bbox_head=dict(num_classes=num_classes), mask_head=dict(num_classes=num_classes)),
)
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator
