default_scope = 'mmpretrain'
# Lets torch >= 2.6 read mmengine's checkpoints on resume and test; the registry finds the backbones without it.
custom_imports = dict(imports=['mmslide'], allow_failed_imports=False)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100),
    param_scheduler=dict(type='ParamSchedulerHook'),
    # Two at least: mmengine deletes the old checkpoint before it writes the new one.
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
    non_finite=dict(type='mmslide.CheckNonFiniteHook'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='VisualizationHook'),
)
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
log_level = 'INFO'
load_from = None
resume = False

tta_model = dict(type='AverageClsScoreTTA')
