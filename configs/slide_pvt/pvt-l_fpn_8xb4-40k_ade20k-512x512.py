_base_ = 'pvt-t_fpn_8xb4-40k_ade20k-512x512.py'
pretrained = 'https://github.com/whai362/PVT/releases/download/v2/pvt_large.pth'
model = dict(backbone=dict(arch='large', init_cfg=dict(checkpoint=pretrained)))
