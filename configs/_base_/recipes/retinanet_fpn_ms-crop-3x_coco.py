_base_ = [
    '../models/retinanet.py',
    '../datasets/coco_detection_ms-crop.py',
    '../schedules/swin_3x.py',
    '../default_runtime_det.py',
]
