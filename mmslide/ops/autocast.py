from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mmslide.compat import is_autocast_enabled


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Disables autocast, which would cast x's arithmetic back to half precision."""
    if not x.is_meta and is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
