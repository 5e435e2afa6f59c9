"""Slide Attention tap by tap over whole maps, in plain tensor operations: the form that inference engines run fastest.

The arithmetic is that of `tapwise`; without its blocks and its backward, what remains is a graph of a few nodes a tap.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor


def unrolled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: Tensor,
    scale: float,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """See `mmslide.ops.slide_attention` for shapes. No copy is larger than q, but autograd keeps 6·k²."""
    kernel_size = weight.shape[-1]
    kernels = weight.flatten(2).unbind(-1)  # (d, k²) for each tap
    logits = q @ bias + q.sum(-1, keepdim=True) * rpb  # (B, H, W, heads, k²)
    for kernel, keys in zip(kernels, _shifted(k, kernel_size), strict=True):
        logits = logits + (q * keys) @ kernel
    attention = (scale * logits).softmax(dim=-1)
    if dropout_mask is not None:
        attention = attention * dropout_mask
    out = attention @ bias.t()
    for kernel, values in zip(kernels, _shifted(v, kernel_size), strict=True):
        out = out + (attention @ kernel.t()) * values
    return out


def _shifted(x: Tensor, kernel_size: int) -> Iterator[Tensor]:
    """The map as each tap sees it, zero-padded, in row-major order: (B, H, W, heads, d)."""
    height, width = x.shape[1:3]
    pad = kernel_size // 2
    padded = F.pad(x, (0, 0, 0, 0, pad, pad, pad, pad))
    for row in range(kernel_size):
        for column in range(kernel_size):
            yield padded[:, row : row + height, column : column + width]
