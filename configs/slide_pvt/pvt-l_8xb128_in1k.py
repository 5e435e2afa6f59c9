_base_ = 'pvt-m_8xb128_in1k.py'
model = dict(backbone=dict(arch='large'))
