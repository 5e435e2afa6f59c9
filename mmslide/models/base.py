"""mmengine's BaseModule, for mypy a class of torch's: mmengine has no types.

Below a class of type Any mypy would let unknown names of arguments pass.
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
