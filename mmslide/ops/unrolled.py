"""Slide Attention tap by tap in plain tensor operations: the fastest form in inference engines.

The arithmetic is the same as in `tapwise`; without its backward, this is a graph with a few nodes per tap. Shifting a
map costs as much as multiplying it, so rows and columns are shifted separately, each once: keys and values by rows;
queries by columns towards the keys, and the results, which are smaller, back again.

A map of known size is processed in strips of rows, one after another in the graph, so that the products of a tap stay
in the processor's cache.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of a strip's queries: see docs/performance.md.
STRIP_BYTES = 5 << 19


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
    """See `mmslide.ops.slide_attention` for shapes. No copy is larger than q, but autograd keeps 6·k² of them."""
    height, kernel_size = q.shape[1], weight.shape[-1]
    reach = kernel_size // 2
    k, v = (F.pad(x, (0, 0, 0, 0, 0, 0, reach, reach)) for x in (k, v))
    outs = []
    for top, rows in _strips(q):
        keys, values = ([x.narrow(1, top + row, rows) for row in range(kernel_size)] for x in (k, v))
        mask = None if dropout_mask is None else dropout_mask.narrow(1, top, rows)
        queries = q if rows is height else q.narrow(1, top, rows)
        outs.append(_attend(queries, keys, values, weight, bias, rpb, scale, mask))
    return torch.cat(outs, 1) if len(outs) > 1 else outs[0]


def _strips(q: Tensor) -> list[tuple[int, int]]:
    """First row and number of rows of each strip; one strip if a size is known only at run time."""
    height = q.shape[1]
    if any(isinstance(side, torch.SymInt) for side in q.shape):
        return [(0, height)]
    rows = max(1, STRIP_BYTES // max(1, q[:, :1].nbytes))
    return [(top, min(rows, height - top)) for top in range(0, height, rows)]


def _attend(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    rpb: Tensor,
    scale: float,
    dropout_mask: Tensor | None,
) -> Tensor:
    """The output of one strip; keys and values are shifted by each row of the kernel."""
    kernel_size = weight.shape[-1]
    kernels = [row.unbind(-1) for row in weight.unbind(-2)]  # (d, k²) for each row and column of a tap
    logits = q @ bias + q.sum(-1, keepdim=True) * rpb  # (B, rows, W, heads, k²)
    for column, queries in enumerate(reversed(moved(q, kernel_size))):
        parts = ((queries * key) @ row[column] for key, row in zip(keys, kernels, strict=True))
        logits = logits + moved(reduce(add, parts), kernel_size)[column]
    attention = (scale * logits).softmax(dim=-1)
    if dropout_mask is not None:
        attention = attention * dropout_mask
    out = attention @ bias.t()
    for column, weights in enumerate(reversed(moved(attention, kernel_size))):
        parts = ((weights @ row[column].t()) * value for value, row in zip(values, kernels, strict=True))
        out = out + moved(reduce(add, parts), kernel_size)[column]
    return out


def moved(x: Tensor, kernel_size: int) -> list[Tensor]:
    """x(p + offset) for each offset along the columns of (B, H, W, heads, n), with zeros outside."""
    reach, width = kernel_size // 2, x.shape[2]
    padded = F.pad(x, (0, 0, 0, 0, reach, reach))
    return [x if column == reach else padded.narrow(2, column, width) for column in range(kernel_size)]
