"""Slide Attention's own parameters."""

import warnings

from mmslide.checkpoints import StateDict
from mmslide.ops import fixed_shift, merge_paths


def slide_attention(state: StateDict) -> StateDict:
    """One Slide Attention module from the authors' layout, whose qkv channels are ordered (head, [q, k, v], d).

    If the fixed kernels deviate from the shift, the difference is added to the learned kernels.
    """
    weight, table = state['dep_conv1.weight'], state['relative_position_bias_table']
    kernel_size, heads = weight.shape[-1], table.shape[1]
    slots = kernel_size**2
    # Depthwise with groups: channel c owns the outputs c·k² to c·k² + k² - 1.
    weight = weight.view(-1, slots, kernel_size, kernel_size)
    if 'dep_conv.weight' in state:
        # In float32, where the difference from the shift's 1 is exact.
        moved = state['dep_conv.weight'].view(weight.shape).float() - fixed_shift(kernel_size).to(weight.device)
        if moved.any():
            warnings.warn(
                f'dep_conv.weight is not the fixed shift (largest difference {float(moved.abs().max()):.1e}): the '
                'difference is added to the deformed kernels',
                stacklevel=2,
            )
            weight = weight + moved
    out = {
        'deform_weight': weight,
        'deform_bias': state['dep_conv1.bias'].view(-1, slots),
        'shift_bias': state['dep_conv.bias'].view(-1, slots),
        'relative_position_bias': table.view(heads, slots),
    }
    for name, value in state.items():
        if name.startswith('qkv.'):
            out[name] = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        elif name.startswith('proj.'):
            out[name] = value
    return out


def fuse_slide_attention(state: StateDict) -> StateDict:
    """Our layout with the two paths of every Slide Attention merged, as in `SlideAttention.switch_to_deploy`."""
    out = dict(state)
    for key in state:
        prefix, found, _ = key.partition('deform_weight')
        names = [f'{prefix}{name}' for name in ('shift_bias', 'deform_weight', 'deform_bias')]
        if found and all(name in state for name in names):
            shift_bias, weight, bias = (out.pop(name) for name in names)
            shift = fixed_shift(weight.shape[-1]).to(weight.device)
            out[f'{prefix}fused_weight'], out[f'{prefix}fused_bias'] = merge_paths(shift, shift_bias, weight, bias)
    return out
