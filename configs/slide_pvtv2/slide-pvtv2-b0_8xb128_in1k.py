_base_ = '../_base_/recipes/deit_in1k.py'
model = dict(
    # PVTv2's norms after each stage are passed on, and the last one is the classifier's.
    backbone=dict(type='mmslide.SlidePVTv2', arch='b0', stage_norm='next', drop_path_rate=0.1),
    head=dict(in_channels=256),
)
train_dataloader = dict(sampler=dict(type='RepeatAugSampler'))
