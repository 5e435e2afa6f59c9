from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mmengine.model import ModuleList
from torch import Tensor, nn

from mmslide.models.arguments import check_integer

from .base import Attention
from .locally_grouped import is_true


@dataclass(eq=False, repr=False)
class CrossShapedWindowAttention(Attention):
    """Attention in horizontal and vertical strips: CSWin (CVPR 2022, arXiv 2107.00652, section 3.2).

    The first half of the channels and heads attends in vertical strips, as high as the map and split_size wide, the
    second half in horizontal ones. Values get a locally-enhanced positional encoding (LePE), a depthwise convolution
    restricted to the strip. Sides that are not divisible by split_size are padded with zeros at both ends; the padding
    is not masked, as in the authors' code.

    Args:
        split_size: width of a strip in pixels of the map; None attends over the whole map, with all heads.

    Other arguments and errors: see `Attention`. num_heads must be even unless split_size is None.
    """

    split_size: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.branches = 1 if self.split_size is None else 2
        if self.split_size is not None:
            check_integer('split_size', self.split_size)
            if self.num_heads % 2:
                raise ValueError(
                    f'num_heads must be even, for as many vertical as horizontal strips, got num_heads={self.num_heads}'
                )
        channels = self.embed_dims // self.branches
        self.qkv = nn.Linear(self.embed_dims, 3 * self.embed_dims, bias=self.qkv_bias)
        self.lepe = ModuleList(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels) for _ in range(self.branches)
        )
        self.proj = nn.Linear(self.embed_dims, self.embed_dims)
        self.proj_drop = nn.Dropout(self.proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3 * self.branches, dim=-1)  # q, k and v, each with one part per branch
        if self.split_size is None:
            out = self._attend(*parts) + self._encode(self.lepe[0], parts[-1])
        else:
            vertical = self._attend_in_strips(parts[0::2], self.lepe[0], self.split_size, axis=2)
            horizontal = self._attend_in_strips(parts[1::2], self.lepe[1], self.split_size, axis=1)
            out = torch.cat([vertical, horizontal], dim=-1)
        return self.proj_drop(self.proj(out))

    def _attend_in_strips(self, parts: Sequence[Tensor], lepe: nn.Module, size: int, axis: int) -> Tensor:
        """One branch: q, k and v are maps (B, H, W, c), split into strips along an axis."""
        batch, side = len(parts[0]), parts[0].shape[axis]
        count = (side + size - 1) // size
        padding = count * size - side
        before = (size - 1 - (side - 1) % size) // 2  # padding // 2 of a positive number: ONNX would round towards zero
        fits = is_true(padding == 0)
        if not fits:
            parts = [F.pad(x, (*(0, 0) * (3 - axis), before, padding - before)) for x in parts]
        q, k, v = (
            x.unflatten(axis, (count, size)).movedim(axis, 1).flatten(0, 1) for x in parts
        )  # strips (N, h, w, c)
        out = self._attend(q, k, v)
        if isinstance(count, torch.SymInt):
            out = out + self._encode_apart(lepe, parts[-1], count, axis)
        else:
            out = out + self._encode(lepe, v)
        out = out.unflatten(0, (batch, count)).movedim(1, axis).flatten(axis, axis + 1)
        return out if fits else out.narrow(axis, before, side)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention among all pixels of each map (N, h, w, c)."""
        heads = self.num_heads // self.branches
        queries, keys, values = (x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout_p = self.attn_drop_rate if self.training else 0.0
        out = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout_p)
        return out.transpose(1, 2).reshape(q.shape)

    def _encode(self, lepe: nn.Module, v: Tensor) -> Tensor:
        return lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _encode_apart(self, lepe: nn.Module, v: Tensor, count: int, axis: int) -> Tensor:
        """`_encode` of the strips that a map (B, H, W, c) is split into, with a line of zeros after each: (N, h, w, c).

        For sizes known only at run time: with strips in the batch, PyTorch would export either for one strip or for
            several.
        """
        apart = F.pad(v.unflatten(axis, (count, -1)), (*(0, 0) * (3 - axis), 0, 1))
        out = self._encode(lepe, apart.flatten(axis, axis + 1)).unflatten(axis, (count, apart.shape[axis + 1]))
        return out.narrow(axis + 1, 0, apart.shape[axis + 1] - 1).movedim(axis, 1).flatten(0, 1)
