_base_ = 'cascade-mask-rcnn_slide-nat-mini_fpn_ms-crop-3x_coco.py'
pretrained = 'https://shi-labs.com/projects/nat/checkpoints/CLS/nat_tiny.pth'
model = dict(backbone=dict(arch='tiny', drop_path_rate=0.3, init_cfg=dict(checkpoint=pretrained)))
