"""What mmslide needs and older versions of PyTorch lack: the only place that depends on PyTorch's version."""

from pathlib import Path
from typing import Any

import torch
from mmengine.utils import digit_version
from torch import Tensor
from torch.nn.modules import module

torch_version = digit_version(torch.__version__)
# From here on torch.load(weights_only=True) is safe (CVE-2025-32434), and custom operators can be compiled.
MODERN = torch_version >= digit_version('2.6')
# From here on torch.export has what mmslide.deploy asks for.
CAN_EXPORT = torch_version >= digit_version('2.9')

if CAN_EXPORT:
    from torch.compiler import is_exporting
else:

    def is_exporting() -> bool:
        return False


if MODERN:
    from torch.compiler import is_compiling
    from torch.utils.flop_counter import register_flop_formula

    add_safe_globals = torch.serialization.add_safe_globals
    register_custom_op = torch.library.custom_op
    is_autocast_enabled = torch.is_autocast_enabled
    get_autocast_dtype = torch.get_autocast_dtype

    def statically_known_true(condition: Any) -> bool:
        from torch.fx.experimental import symbolic_shapes  # takes seconds to import

        return symbolic_shapes.statically_known_true(condition)

    def is_batched(x: Tensor) -> bool:
        """Whether x is a batched tensor, in vmap or for `torch.autograd.grad(..., is_grads_batched=True)`."""
        return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)

    def safe_load(file: Path, map_location: Any, globals_: dict[str, Any]) -> Any:
        with torch.serialization.safe_globals([(value, name) for name, value in globals_.items()]):
            return torch.load(file, map_location=map_location, weights_only=True)

else:
    from .substitutes import (  # type: ignore[assignment]
        add_safe_globals,
        get_autocast_dtype,
        is_autocast_enabled,
        is_batched,
        is_compiling,
        register_custom_op,
        register_flop_formula,
        safe_load,
        statically_known_true,
    )


def has_any_global_hook() -> bool:
    return bool(
        module._global_forward_pre_hooks
        or module._global_forward_hooks
        or module._global_backward_pre_hooks
        or module._global_backward_hooks
    )


__all__ = [
    'CAN_EXPORT',
    'MODERN',
    'add_safe_globals',
    'get_autocast_dtype',
    'has_any_global_hook',
    'is_autocast_enabled',
    'is_batched',
    'is_compiling',
    'is_exporting',
    'register_custom_op',
    'register_flop_formula',
    'safe_load',
    'statically_known_true',
    'torch_version',
]
