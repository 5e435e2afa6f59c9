from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mmslide.compat import has_any_global_hook, is_compiling


def is_plain(x: Tensor, layers: Sequence[nn.Module], types: Sequence[Collection[type[nn.Module]]]) -> bool:
    """Whether the layers may be computed from their parameters instead of being called, without a visible difference.

    Not if a layer replaces another (quantized, parametrized, with an adapter) or has hooks, for tensor subclasses, and
    while a function transform or a torch mode is active.

    Args:
        x: the input of the layers.
        types: for each layer, the exact types that are allowed.
    """
    return (
        not is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and not has_any_global_hook()
        and type(x) in (Tensor, nn.Parameter)
        and len(layers) == len(types)
        and all(type(layer) in allowed and _is_plain(layer) for layer, allowed in zip(layers, types, strict=True))
    )


def _is_plain(layer: nn.Module) -> bool:
    parameters = [getattr(layer, name) for name in ('weight', 'bias') if hasattr(layer, name)]
    return (
        'forward' not in vars(layer)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
        and all(type(parameter) in (Tensor, nn.Parameter, type(None)) for parameter in parameters)
    )
