_base_ = 'pvtv2-b3_8xb128_in1k.py'
model = dict(backbone=dict(arch='b4'))
