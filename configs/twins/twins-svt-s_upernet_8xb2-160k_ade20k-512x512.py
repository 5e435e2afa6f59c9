_base_ = 'twins-pcpvt-s_upernet_8xb2-160k_ade20k-512x512.py'
pretrained = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/twins/alt_gvt_small_20220308-7e1c3695.pth'
model = dict(
    backbone=dict(type='mmslide.TwinsSVT', init_cfg=dict(checkpoint=pretrained)),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
