"""What mmslide needs and PyTorch before 2.6 lacks: the only place that depends on PyTorch's version."""

from pathlib import Path
from typing import Any

import torch
from mmengine.utils import digit_version
from torch import Tensor

# Since this version, torch.load(weights_only=True) is safe (CVE-2025-32434), and torch has everything below.
MODERN = digit_version(torch.__version__) >= digit_version('2.6')

if MODERN:
    from torch.compiler import is_compiling, is_exporting
    from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook
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
        has_any_global_hook,
        is_autocast_enabled,
        is_batched,
        is_compiling,
        is_exporting,
        register_custom_op,
        register_flop_formula,
        safe_load,
        statically_known_true,
    )

__all__ = [
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
]
