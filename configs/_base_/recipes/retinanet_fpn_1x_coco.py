_base_ = [
    '../models/retinanet.py',
    '../datasets/coco_detection.py',
    '../schedules/pvt_1x.py',
    '../default_runtime_det.py',
]
optim_wrapper = dict(optimizer=dict(lr=1e-4))
