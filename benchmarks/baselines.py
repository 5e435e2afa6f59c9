"""Other implementations of attention: the baselines of `tools/benchmark.py`, also used in tests."""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmslide.models import SlideCSWin, SlideNAT
from mmslide.models.attention import CrossShapedWindowAttention, NeighborhoodAttention, SlideAttention
from mmslide.ops.conv import depthwise
from mmslide.ops.reference import neighborhood_reference


def two_path(
    q: Tensor, k: Tensor, v: Tensor, shift: Tensor, shift_bias: Tensor, deform: Tensor, deform_bias: Tensor, rpb: Tensor
) -> Tensor:
    """As trained in the paper (CVPR 2023, arXiv 2304.04237, section 4.3): the sum of a fixed and a learned convolution.

    Args:
        q, k, v: (B, H, W, heads, d).
        shift: (k², k, k), the same for all channels.
        deform: (d, k², k, k).
        shift_bias, deform_bias: (d, k²).
        rpb: (heads, k²).
    """
    fixed = shift.expand_as(deform)

    def shifted(x: Tensor) -> Tensor:
        return depthwise(x, fixed, shift_bias) + depthwise(x, deform, deform_bias)  # (B, heads, d, k², H, W)

    return _attend(q, shifted(k), shifted(v), rpb)


class TwoPathAttention(SlideAttention):
    """The module with `two_path` inside."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        learned = self.shift_bias, self.deform_weight, self.deform_bias, self.relative_position_bias
        return two_path(q, k, v, self.shift, *learned)


def im2col(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, rpb: Tensor) -> Tensor:
    """The usual implementation of local attention without special kernels: unfolds every neighborhood, then deforms it.

    Args:
        weight, bias, rpb: as for `mmslide.ops.slide_attention`.
    """
    _, height, width, heads, head_dims = q.shape
    kernel_size = weight.shape[-1]

    def shifted(x: Tensor) -> Tensor:
        columns = F.unfold(x.flatten(3).permute(0, 3, 1, 2), kernel_size, padding=kernel_size // 2)
        # (B, heads, d, 1, t, H·W) and (d, k², t, 1): slots are sums over the taps t of each channel.
        columns = columns.unflatten(1, (heads, head_dims, kernel_size**2))
        slots = weight.flatten(2) @ columns + bias.unsqueeze(-1)
        return slots.unflatten(-1, (height, width))

    return _attend(q, shifted(k), shifted(v), rpb)


def flex(kernel_size: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's compiled FlexAttention over the same k×k neighbors, without deformation and biases.

    Pixels outside the map are zero keys, as in Slide Attention.
    """
    height, width = q.shape[1:3]
    pad = kernel_size // 2
    queries, keys, values = (
        F.pad(x, (0, 0, 0, 0, side, side, side, side)).flatten(1, 2).transpose(1, 2)
        for x, side in ((q, 0), (k, pad), (v, pad))
    )
    mask = _neighbours(height, width, kernel_size, q.device)
    return _compiled_flex()(queries, keys, values, block_mask=mask).transpose(1, 2).unflatten(1, (height, width))


@lru_cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache
def _neighbours(height: int, width: int, kernel_size: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    padded_width = width + kernel_size - 1

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = key // padded_width - query // width, key % padded_width - query % width
        return (row >= 0) & (row < kernel_size) & (column >= 0) & (column < kernel_size)

    size = height * width, (height + kernel_size - 1) * padded_width
    return create_block_mask(near, None, None, *size, device=device, _compile=True)


def natten(kernel_size: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """NATTEN's fused neighborhood attention: nothing deformed, no biases. At the border it moves windows inside."""
    return import_module('natten').na2d(q, k, v, kernel_size)


def _attend(q: Tensor, keys: Tensor, values: Tensor, rpb: Tensor) -> Tensor:
    """q (B, H, W, heads, d), keys and values (B, heads, d, k², H, W), to (B, H, W, heads, d)."""
    queries = q.shape[-1] ** -0.5 * q.permute(0, 3, 4, 1, 2).unsqueeze(3)
    attention = (queries * (keys + rpb[:, None, :, None, None])).sum(2, keepdim=True).softmax(3)
    return (attention * values).sum(3).permute(0, 3, 4, 1, 2)


class PlainCrossShapedAttention(CrossShapedWindowAttention):
    """The straightforward implementation: copies windows and computes softmax(q kᵀ) v in separate steps."""

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        parts = self.qkv(x).chunk(3 * self.branches, dim=-1)
        size = self.split_size
        windows = [(height, width)] if size is None else [(height, size), (size, width)]
        outs = [
            self._in_windows(parts[i :: self.branches], lepe, *window)
            for i, (lepe, window) in enumerate(zip(self.lepe, windows, strict=True))
        ]
        return self.proj_drop(self.proj(torch.cat(outs, -1)))

    def _in_windows(self, parts: tuple[Tensor, ...], lepe: nn.Module, h: int, w: int) -> Tensor:
        """Attention in windows of h×w pixels of maps (B, H, W, c), padded on all sides."""
        height, width = parts[0].shape[1:3]
        top, left = -height % h // 2, -width % w // 2
        pad = (0, 0, left, -width % w - left, top, -height % h - top)
        # To (B, rows, columns, h, w, c)
        q, k, v = (F.pad(x, pad).unflatten(2, (-1, w)).unflatten(1, (-1, h)).transpose(2, 3) for x in parts)
        encoding = lepe(v.flatten(0, 2).permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
        heads = self.num_heads // self.branches
        q, k, v = (x.flatten(0, 2).flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        attention = (q.shape[-1] ** -0.5 * q @ k.mT).softmax(-1)
        out = (attention @ v).transpose(1, 2).flatten(2).unflatten(1, (h, w)) + encoding
        rows, columns = -(-height // h), -(-width // w)
        out = out.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return out[:, top : top + height, left : left + width]


class GatheringNeighborhoodAttention(NeighborhoodAttention):
    """Gathers every window."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_reference(q, k, v, self.rpb, scale=q.shape[-1] ** -0.5)


class PlainNAT(SlideNAT):
    """NAT with `GatheringNeighborhoodAttention`; NATTEN, which the authors' code needs, no longer runs on a CPU."""

    def build_mixer(self, stage: int, index: int, **shared: Any) -> nn.Module:
        return GatheringNeighborhoodAttention(window_size=self.window_sizes[stage], **shared)


class PlainCSWin(SlideCSWin):
    """CSWin with `PlainCrossShapedAttention`; the authors' code does not run on today's OpenMMLab."""

    def build_mixer(self, stage: int, index: int, **shared: Any) -> nn.Module:
        return PlainCrossShapedAttention(split_size=self.split_size(stage), **shared)
