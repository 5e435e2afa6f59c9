"""Slide Attention as the paper writes it (CVPR 2023, arXiv 2304.04237, section 4); all else is tested against it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: Tensor,
    scale: float,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """See `mmslide.ops.slide_attention` for shapes. Any dtype, any device; stores K and V k² times over."""
    keys = deformed_shift(k, weight, bias) + rpb.unsqueeze(1)  # (B, H, W, heads, d, k²)
    values = deformed_shift(v, weight, bias)
    logits = scale * torch.einsum('bhwnc,bhwncj->bhwnj', q, keys)
    attention = logits.softmax(dim=-1)
    if dropout_mask is not None:
        attention = attention * dropout_mask
    return torch.einsum('bhwnj,bhwncj->bhwnc', attention, values)


def deformed_shift(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """X_j(p) = Σ_t W[c, j, t] · x[c, p + t] + b[c, j]: (B, H, W, heads, d) to (B, H, W, heads, d, k²)."""
    height, width = x.shape[1:3]
    kernel_size = weight.shape[-1]
    pad = kernel_size // 2
    padded = F.pad(x, (0, 0, 0, 0, pad, pad, pad, pad))
    taps = [padded[:, i : i + height, j : j + width] for i in range(kernel_size) for j in range(kernel_size)]
    return torch.einsum('bhwnct,cjt->bhwncj', torch.stack(taps, dim=-1), weight.flatten(2)) + bias
