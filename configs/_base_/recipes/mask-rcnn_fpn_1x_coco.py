_base_ = [
    '../models/mask-rcnn.py',
    '../datasets/coco_instance.py',
    '../schedules/pvt_1x.py',
    '../default_runtime_det.py',
]
