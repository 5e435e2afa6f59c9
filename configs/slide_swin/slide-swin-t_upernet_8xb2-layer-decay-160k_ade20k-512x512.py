_base_ = 'slide-swin-t_upernet_8xb2-160k_ade20k-512x512.py'
# The further a block of the backbone is from the head, the smaller its steps. 0.9 is a usual value, not one tuned here.
optim_wrapper = dict(
    constructor='mmslide.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=0.9),
)
