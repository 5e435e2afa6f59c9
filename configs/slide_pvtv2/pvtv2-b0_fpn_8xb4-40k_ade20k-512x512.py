_base_ = 'pvtv2-b1_fpn_8xb4-40k_ade20k-512x512.py'
pretrained = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b0.pth'
model = dict(
    backbone=dict(arch='b0', init_cfg=dict(checkpoint=pretrained)),
    neck=dict(in_channels=[32, 64, 160, 256]),
)
