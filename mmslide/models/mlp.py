from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmslide.ops.mlp import mlp_in_blocks

from .plain import is_plain


class MLP(BaseModule):
    """The MLP of a pre-norm transformer block: linear, GELU, dropout, linear, dropout.

    On a CPU plain layers are computed together, some pixels at a time: see `mmslide.ops.mlp`. The state dict's keys
    are those of mmcv's FFN.

    Args:
        embed_dims: C of the map (..., C).
        hidden_dims: channels between the two linear layers.
        drop_rate: of both dropouts.
    """

    def __init__(self, embed_dims: int, hidden_dims: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.layers: Any = nn.Sequential(
            nn.Sequential(nn.Linear(embed_dims, hidden_dims), nn.GELU(), nn.Dropout(drop_rate)),
            nn.Linear(hidden_dims, embed_dims),
            nn.Dropout(drop_rate),
        )

    def forward(self, x: Tensor, norm: Any) -> Tensor:
        """The MLP of norm(x), (..., C) to the same, without the residual."""
        if not self._pays_in_blocks(x, norm):
            return self.layers(norm(x))
        expand, contract = self.layers[0][0], self.layers[1]
        return mlp_in_blocks(
            x, norm.weight, norm.bias, expand.weight, expand.bias, contract.weight, contract.bias, norm.eps
        )

    def _pays_in_blocks(self, x: Tensor, norm: Any) -> bool:
        """Whether `mlp_in_blocks` computes the same as the layers one after another, faster, and nobody can notice."""
        if x.device.type != 'cpu' or torch.is_autocast_enabled('cpu'):
            return False
        layers: list[Any] = [norm, *self.layers.modules()]
        if not is_plain(x, *layers) or any(isinstance(y, nn.Dropout) and y.training and y.p for y in layers):
            return False
        layers = [y for y in layers if not isinstance(y, nn.Dropout | nn.Identity)]
        return (
            [type(y) for y in layers] == [nn.LayerNorm, nn.Sequential, nn.Sequential, nn.Linear, nn.GELU, nn.Linear]
            and layers[4].approximate == 'none'
            and norm.normalized_shape == x.shape[-1:]
            and all(y.weight is not None and y.bias is not None for y in (layers[0], layers[3], layers[5]))
            and all(parameter.dtype == x.dtype for y in layers for parameter in y.parameters(recurse=False))
        )
