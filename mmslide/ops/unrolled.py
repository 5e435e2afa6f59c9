"""Slide Attention tap by tap over whole maps, in plain tensor operations: the form that inference engines run fastest.

The arithmetic is that of `tapwise`; without its blocks and its backward, what remains is a graph of a few nodes a tap.
Moving a map by a tap costs as much as multiplying it, so a tap's rows and columns are moved apart, each once: keys and
values by rows; queries by columns to meet the keys, and what they gave, which is smaller, back again.
"""

from functools import reduce
from operator import add

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
    kernels = [row.unbind(-1) for row in weight.unbind(-2)]  # (d, k²) for each row and column of a tap
    offsets = range(-(kernel_size // 2), kernel_size // 2 + 1)
    keys, values = ([moved(x, 1, offset) for offset in offsets] for x in (k, v))

    logits = q @ bias + q.sum(-1, keepdim=True) * rpb  # (B, H, W, heads, k²)
    for column, offset in enumerate(offsets):
        queries = moved(q, 2, -offset)
        parts = ((queries * key) @ row[column] for key, row in zip(keys, kernels, strict=True))
        logits = logits + moved(reduce(add, parts), 2, offset)
    attention = (scale * logits).softmax(dim=-1)
    if dropout_mask is not None:
        attention = attention * dropout_mask
    out = attention @ bias.t()
    for column, offset in enumerate(offsets):
        weights = moved(attention, 2, -offset)
        parts = ((weights @ row[column].t()) * value for value, row in zip(values, kernels, strict=True))
        out = out + moved(reduce(add, parts), 2, offset)
    return out


def moved(x: Tensor, axis: int, offset: int) -> Tensor:
    """x(p + offset) along an axis of (B, H, W, heads, n), zeros from outside."""
    if not offset:
        return x
    side = x.shape[axis]
    pads = [0] * 2 * (x.ndim - axis)
    pads[-1 if offset > 0 else -2] = abs(offset)
    return F.pad(x, pads).narrow(axis, max(0, offset), side)
