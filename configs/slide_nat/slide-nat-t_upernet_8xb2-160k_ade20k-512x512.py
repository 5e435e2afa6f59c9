_base_ = 'slide-nat-mini_upernet_8xb2-160k_ade20k-512x512.py'
pretrained = 'https://shi-labs.com/projects/nat/checkpoints/CLS/nat_tiny.pth'
model = dict(backbone=dict(arch='tiny', drop_path_rate=0.3, init_cfg=dict(checkpoint=pretrained)))
