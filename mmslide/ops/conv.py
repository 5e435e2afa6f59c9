"""Slide Attention with the merged kernels as one depthwise convolution, without a loop in Python."""

import torch.nn.functional as F
from torch import Tensor


def conv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: Tensor,
    scale: float,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """See `mmslide.ops.slide_attention` for shapes. Stores K and V k² times."""
    keys = depthwise(k, weight, bias) + rpb.view(-1, 1, rpb.shape[-1], 1, 1)  # (B, heads, d, k², H, W)
    values = depthwise(v, weight, bias)
    # One (1, d) by (d, k²) product per pixel and head.
    attention = (scale * q.unsqueeze(-2) @ keys.permute(0, 4, 5, 1, 2, 3)).softmax(dim=-1)  # (B, H, W, heads, 1, k²)
    if dropout_mask is not None:
        attention = attention * dropout_mask.unsqueeze(-2)
    return (attention @ values.permute(0, 4, 5, 1, 3, 2)).squeeze(-2)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, H, W, heads, d) to (B, heads, d, k², H, W); heads share the kernels, so they are folded into the batch."""
    batch, height, width, heads, head_dims = x.shape
    kernel_size = weight.shape[-1]
    maps = x.permute(0, 3, 4, 1, 2).reshape(batch * heads, head_dims, height, width)
    shifted = F.conv2d(
        maps, weight.flatten(0, 1).unsqueeze(1), bias.flatten(), padding=kernel_size // 2, groups=head_dims
    )
    return shifted.view(batch, heads, head_dims, kernel_size**2, height, width)
