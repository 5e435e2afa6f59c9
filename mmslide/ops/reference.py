"""Slide Attention and neighborhood attention as in the papers; all other implementations are tested against these."""

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
    """Slide Attention (CVPR 2023, arXiv 2304.04237, section 4). Any dtype, any device; stores K and V k² times.

    See `mmslide.ops.slide_attention` for shapes.
    """
    attention = attention_weights(q, k, weight, bias, rpb, scale)
    if dropout_mask is not None:
        attention = attention * dropout_mask
    return torch.einsum('bhwnj,bhwncj->bhwnc', attention, deformed_shift(v, weight, bias))


def attention_weights(q: Tensor, k: Tensor, weight: Tensor, bias: Tensor, rpb: Tensor, scale: float) -> Tensor:
    """The attention weight of each slot for each pixel: (B, H, W, heads, k²), with sum 1 over the slots.

    Args:
        q, k, weight, bias, rpb, scale: see `mmslide.ops.slide_attention`.
    """
    keys = deformed_shift(k, weight, bias) + rpb.unsqueeze(1)  # (B, H, W, heads, d, k²)
    logits = scale * torch.einsum('bhwnc,bhwncj->bhwnj', q, keys)
    return logits.softmax(dim=-1)


def deformed_shift(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """X_j(p) = Σ_t W[c, j, t] · x[c, p + t] + b[c, j]: (B, H, W, heads, d) to (B, H, W, heads, d, k²)."""
    height, width = x.shape[1:3]
    kernel_size = weight.shape[-1]
    pad = kernel_size // 2
    padded = F.pad(x, (0, 0, 0, 0, pad, pad, pad, pad))
    taps = [padded[:, i : i + height, j : j + width] for i in range(kernel_size) for j in range(kernel_size)]
    return torch.einsum('bhwnct,cjt->bhwncj', torch.stack(taps, dim=-1), weight.flatten(2)) + bias


def neighborhood_reference(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, scale: float, dropout_mask: Tensor | None = None
) -> Tensor:
    """Neighborhood attention (CVPR 2023, arXiv 2204.07143, section 3.1), with all windows gathered: stores K and V k²
    times.

    See `mmslide.ops.neighborhood_attention` for shapes.

    Args:
        dropout_mask: (B, H, W, heads, k²), factors of the attention weights.
    """
    kernel_size = (rpb.shape[-1] + 1) // 2
    (y, rows), (x, columns) = (window(side, kernel_size, q.device) for side in q.shape[1:3])
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]  # (H, 1, k, 1), (1, W, 1, k)
    keys, values = (z[:, rows, columns].flatten(3, 4) for z in (k, v))  # (B, H, W, k², heads, d)
    offset_y, offset_x = rows - y[:, None, None, None], columns - x[:, None, None]  # key minus query
    bias = rpb[:, offset_y + kernel_size - 1, offset_x + kernel_size - 1].flatten(3)  # (heads, H, W, k²)
    logits = scale * torch.einsum('bhwnc,bhwsnc->bhwns', q, keys) + bias.permute(1, 2, 0, 3)
    attention = logits.softmax(dim=-1)
    if dropout_mask is not None:
        attention = attention * dropout_mask
    return torch.einsum('bhwns,bhwsnc->bhwnc', attention, values)


def window(side: int, kernel_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The positions on an axis, and the positions that each attends to: (side) and (side, k)."""
    position = torch.arange(side, device=device)
    start = (position - kernel_size // 2).clamp(0, side - kernel_size)
    return position, start[:, None] + torch.arange(kernel_size, device=device)
