"""Mixed precision on a CPU, which mmengine's AmpOptimWrapper does not support."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from torch import nn
from torch.utils._pytree import tree_map

from mmslide.registry import OPTIM_WRAPPERS


def bfloat16_pays() -> bool:
    """Whether the CPU multiplies matrices much faster in bfloat16 than in float32, measured in a few milliseconds.

    This is so with AVX512-BF16, AMX or Arm's BF16; other processors emulate it, several times slower.
    """

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(4):
            start = perf_counter()
            x @ x
            times.append(perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < 0.75 * seconds(torch.float32)


@OPTIM_WRAPPERS.register_module()
class BackboneAmpOptimWrapper(OptimWrapper):
    """Trains in mixed precision on a CPU: the backbone under autocast in bfloat16, everything after it in float32.

    Necks and heads stay in float32, since mmcv has no bfloat16 operators on a CPU and boxes need more precision.
    bfloat16 has the range of float32, so loss scaling is not needed.

    Args:
        optimizer, accumulative_counts, clip_grad: see `mmengine.optim.OptimWrapper`.

    Raises:
        ValueError: in training, the model has no `backbone`.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        backbone = getattr(model.module if is_model_wrapper(model) else model, 'backbone', None)
        if backbone is None:
            raise ValueError(f'{type(self).__name__} trains models with a backbone, got {type(model).__name__}')
        with super().optim_context(model), _autocast(backbone):
            yield


@contextmanager
def _autocast(module: Any) -> Iterator[None]:
    forward, replaced = module.forward, 'forward' in vars(module)

    def in_bfloat16(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast('cpu', dtype=torch.bfloat16):
            outs = forward(*args, **kwargs)
        return tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, outs)

    module.forward = in_bfloat16
    try:
        yield
    finally:
        if replaced:
            module.forward = forward
        else:
            del module.forward
