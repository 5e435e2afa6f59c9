from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from mmslide.models.arguments import check_integer
from mmslide.models.layers import pad_to_patches

from .base import Attention


@dataclass(eq=False, repr=False)
class WindowAttentionBase(Attention):
    """The shared arguments of window attention.

    Args:
        window_size: side of a window in pixels of the map.

    Other arguments and errors: see `Attention`.
    """

    window_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer('window_size', self.window_size)
        self.qkv = nn.Linear(self.embed_dims, 3 * self.embed_dims, bias=self.qkv_bias)
        self.proj = nn.Linear(self.embed_dims, self.embed_dims)
        self.proj_drop = nn.Dropout(self.proj_drop_rate)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        """The number of rows and columns of windows that cover (B, H, W, C); symbols if a dynamic size is exported."""
        size = self.window_size
        return (x.shape[1] + size - 1) // size, (x.shape[2] + size - 1) // size

    def _pad(self, x: Tensor) -> Tensor:
        """Zero-pads at the right and bottom to whole windows."""
        return pad_to_patches(x, self.window_size)

    def _partition(self, x: Tensor) -> Tensor:
        """(B, rows · size, columns · size, C) to (B · rows · columns, size, size, C)."""
        rows, columns = self._grid(x)
        windows = x.reshape(len(x), rows, self.window_size, columns, self.window_size, x.shape[-1])
        return windows.transpose(2, 3).flatten(0, 2)

    def _attend_in_windows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attention among the pixels of each window of a padded map (B, H, W, C), to the same shape."""
        out = self._attend(self._partition(x), mask).unflatten(0, (len(x), *self._grid(x)))
        return out.transpose(2, 3).reshape(x.shape)

    def _attend(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Attention among all pixels of each map of (windows, h, w, C).

        The mask broadcasts to (windows, heads, h·w, h·w): True to attend, or numbers to add to the logits.
        """
        count, height, width, channels = windows.shape
        parts = self.qkv(windows.flatten(1, 2)).chunk(3, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in parts)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        dropout_p = self.attn_drop_rate if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
        return out.transpose(1, 2).reshape(count, height, width, channels)


@dataclass(eq=False, repr=False)
class WindowAttention(WindowAttentionBase):
    """Attention in (shifted) windows with a relative position bias: Swin (ICCV 2021, arXiv 2103.14030, section 3.2).

    A window that covers both axes of the map is neither shifted nor padded. Any other map is padded with zeros on the
    right and bottom to a multiple of the window; the padding is not masked, as in the host.

    Args:
        shift_size: number of pixels by which the windows are shifted, less than window_size; 0 for no shift.

    Other arguments and errors: see `WindowAttentionBase`.
    """

    shift_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        window_size, shift_size = self.window_size, self.shift_size
        if shift_size not in range(window_size):
            raise ValueError(f'shift_size must be in [0, window_size), got {shift_size=}, {window_size=}')
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, self.num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.relative_position_index: Tensor  # (query y, query x, key y, key x)
        self._register_constants()

    def constants(self) -> dict[str, Tensor]:
        offset = torch.arange(self.window_size)
        distance = offset[:, None] - offset[None, :] + self.window_size - 1  # query minus key, from 0
        index = distance[:, None, :, None] * (2 * self.window_size - 1) + distance[None, :, None, :]
        return {'relative_position_index': index}

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        rows, columns = self._grid(x)
        count = rows * columns
        known = not isinstance(count, torch.SymInt)
        if known and count == 1:
            return self.proj_drop(self.proj(self._attend(x, self._bias(height, width))))

        size, shift = self.window_size, self.shift_size
        x = self._pad(x)
        own = bias = self._bias(size, size)
        if shift:
            x = x.roll((-shift, -shift), dims=(1, 2))
            bias = (bias + self._shift_mask(rows, columns, x).unsqueeze(1)).repeat(len(x), 1, 1, 1)
        if not known:
            bias = torch.where(torch.scalar_tensor(count) == 1, self._bias_alone(own, height, width), bias)
        out = self._attend_in_windows(x, bias)
        if shift:
            out = out.roll((shift, shift), dims=(1, 2))
        return self.proj_drop(self.proj(out[:, :height, :width]))

    def _bias(self, height: int, width: int) -> Tensor:
        """The relative position bias among the pixels of an h×w map inside one window: (1, heads, h·w, h·w).

        Four dimensions and contiguous: scaled_dot_product_attention has no fused kernel for a mask with three, and
        before PyTorch 2.8 none for other strides.
        """
        index = self.relative_position_index[:height, :width, :height, :width].flatten(2).flatten(0, 1)
        return self.relative_position_bias_table.t()[:, index].unsqueeze(0)

    def _bias_alone(self, bias: Tensor, height: int, width: int) -> Tensor:
        """The mask that makes a padded and rolled window equal to one that covers the map: (1, heads, pixels, pixels).

        For sizes known only at run time, which cannot branch. The padding is masked, and the roll, which inside a
        single window only reorders its pixels, is undone in the bias.
        """
        position = (torch.arange(self.window_size, device=bias.device) + self.shift_size) % self.window_size
        order = (position[:, None] * self.window_size + position).flatten()
        inside = (position < height)[:, None] & (position < width)
        return bias[..., order, :][..., order].masked_fill(~inside.flatten(), float('-inf'))

    def _shift_mask(self, rows: int, columns: int, x: Tensor) -> Tensor:
        """-100 between pixels that the roll moved into the same window from two ends of the map: (windows, n, n)."""
        size, shift = self.window_size, self.shift_size

        def region(count: int) -> Tensor:
            """0 in all windows of an axis except the last; there, 1 before the seam and 2 after it: (count, size)."""
            position = torch.arange(count * size, device=x.device)
            in_last, after = position >= (count - 1) * size, position >= count * size - shift
            return (in_last.long() + after.long()).view(count, size)

        region_y, region_x = region(rows), region(columns)
        ids = (region_y[:, None, :, None] * 3 + region_x[None, :, None, :]).flatten(2).flatten(0, 1)
        return torch.zeros(1, dtype=x.dtype, device=x.device).where(ids[:, :, None] == ids[:, None, :], -100.0)
