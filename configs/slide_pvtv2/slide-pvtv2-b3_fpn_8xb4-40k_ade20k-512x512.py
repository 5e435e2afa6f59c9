_base_ = 'slide-pvtv2-b1_fpn_8xb4-40k_ade20k-512x512.py'
pretrained = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b3.pth'
model = dict(backbone=dict(arch='b3', init_cfg=dict(checkpoint=pretrained)))
