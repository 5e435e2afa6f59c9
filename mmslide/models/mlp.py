from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmslide.compat import get_autocast_dtype, is_autocast_enabled
from mmslide.ops.autocast import without_autocast
from mmslide.ops.mlp import mlp_in_blocks

from .plain import is_plain

DROP: list[type[nn.Module]] = [nn.Dropout, nn.Identity]  # a deployed model has no dropout
LAYERS: list[list[type[nn.Module]]] = [
    [nn.LayerNorm],
    [nn.Sequential],
    [nn.Sequential],
    [nn.Linear],
    [nn.GELU],
    DROP,
    [nn.Linear],
    DROP,
]  # the norm, then all modules in `MLP.layers`


class MLP(BaseModule):
    """The MLP of a pre-norm transformer block: linear, GELU, dropout, linear, dropout.

    On a CPU, plain layers are computed together in blocks of pixels: see `mmslide.ops.mlp`. The state dict has the same
        keys as mmcv's FFN.

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
        """The MLP of norm(x), (..., C) to the same shape, without the residual."""
        if not self._pays_in_blocks(x, norm):
            return self.layers(norm(x))
        expand, contract = self.layers[0][0], self.layers[1]
        dtype = get_autocast_dtype('cpu') if is_autocast_enabled('cpu') else expand.weight.dtype
        weight1, bias1 = expand.weight.to(dtype), expand.bias.to(dtype)
        weight2, bias2 = contract.weight.to(dtype), contract.bias.to(dtype)
        with without_autocast(x):
            return mlp_in_blocks(x, norm.weight, norm.bias, weight1, bias1, weight2, bias2, norm.eps)

    def _pays_in_blocks(self, x: Tensor, norm: Any) -> bool:
        """Whether `mlp_in_blocks` is faster than calling the layers and otherwise equivalent."""
        if x.device.type != 'cpu':
            return False
        layers: list[Any] = [norm, *self.layers.modules()]
        if not is_plain(x, layers, LAYERS) or any(y.training and y.p for y in layers if isinstance(y, nn.Dropout)):
            return False
        _, _, _, expand, activation, _, contract, _ = layers
        parameters = [parameter for y in (norm, expand, contract) for parameter in (y.weight, y.bias)]
        if any(parameter is None for parameter in parameters):
            return False
        # Under autocast, the same rules as in the layers: the norm in x's dtype, the products in autocast's.
        dtypes = {parameter.dtype for parameter in parameters}
        wanted = {torch.float32} if is_autocast_enabled('cpu') else {x.dtype}
        return activation.approximate == 'none' and norm.normalized_shape == x.shape[-1:] and dtypes == wanted


class ConvMLP(BaseModule):
    """PVTv2's MLP (arXiv 2106.13797, section 3.3), with a depthwise 3×3 convolution between the linear layers.

    Args:
        embed_dims: C of the map (B, H, W, C).
        hidden_dims: channels between the two linear layers.
        drop_rate: of both dropouts.
        relu: whether to add an activation before the depthwise convolution, as in the linear variant.
    """

    def __init__(self, embed_dims: int, hidden_dims: int, drop_rate: float = 0.0, relu: bool = False) -> None:
        super().__init__()
        self.layers: Any = nn.Sequential(
            nn.Sequential(
                nn.Linear(embed_dims, hidden_dims),
                nn.ReLU() if relu else nn.Identity(),
                DepthwiseConv(hidden_dims),
                nn.GELU(),
                nn.Dropout(drop_rate),
            ),
            nn.Linear(hidden_dims, embed_dims),
            nn.Dropout(drop_rate),
        )

    def forward(self, x: Tensor, norm: Any) -> Tensor:
        """The MLP of norm(x), (B, H, W, C) to the same shape, without the residual."""
        return self.layers(norm(x))


class DepthwiseConv(nn.Conv2d):
    """A depthwise 3×3 convolution on channels-last maps: (B, H, W, C) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
