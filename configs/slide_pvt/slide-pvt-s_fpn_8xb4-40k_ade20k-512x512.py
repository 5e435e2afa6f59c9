_base_ = 'slide-pvt-t_fpn_8xb4-40k_ade20k-512x512.py'
pretrained = 'https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth'
model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint=pretrained)))
