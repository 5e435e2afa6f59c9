_base_ = [
    '../models/mask-rcnn.py',
    '../datasets/coco_instance_ms-crop.py',
    '../schedules/swin_3x.py',
    '../default_runtime_det.py',
]
