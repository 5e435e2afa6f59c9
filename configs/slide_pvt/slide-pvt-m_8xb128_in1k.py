_base_ = 'slide-pvt-t_8xb128_in1k.py'
model = dict(backbone=dict(arch='medium', drop_path_rate=0.3))
