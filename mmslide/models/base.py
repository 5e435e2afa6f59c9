"""mmengine's BaseModule; for mypy, torch's Module, since mmengine has no types.

With a base class of type Any, mypy would accept unknown argument names.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    class BaseModule(nn.Module):
        def init_weights(self) -> None: ...
else:
    from mmengine.model import BaseModule

__all__ = ['BaseModule', 'InitCfg']

InitCfg = dict | list[dict] | None
