_base_ = 'twins-pcpvt-s_fpn_8xb4-80k_ade20k-512x512.py'
pretrained = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/twins/pcpvt_base_20220308-0621964c.pth'
model = dict(backbone=dict(arch='base', init_cfg=dict(checkpoint=pretrained)))
