_base_ = 'slide-pvtv2-b1_8xb128_in1k.py'
model = dict(backbone=dict(arch='b3', drop_path_rate=0.3))
optim_wrapper = dict(clip_grad=dict(max_norm=1.0))
