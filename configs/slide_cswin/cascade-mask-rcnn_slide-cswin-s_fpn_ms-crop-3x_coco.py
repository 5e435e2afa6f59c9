_base_ = 'cascade-mask-rcnn_slide-cswin-t_fpn_ms-crop-3x_coco.py'
pretrained = 'https://github.com/microsoft/CSWin-Transformer/releases/download/v0.1.0/cswin_small_224.pth'
model = dict(backbone=dict(arch='small', drop_path_rate=0.4, init_cfg=dict(checkpoint=pretrained)))
