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
    """Attention in horizontal and vertical strips: CSWin (CVPR 2022, arXiv 2107.00652, section 3.2 and Eq. 7).

    The first half of the channels and heads attends in vertical strips, as high as the map and split_size wide, the
    second half in horizontal ones. Values get a locally-enhanced positional encoding (LePE), a depthwise convolution
    that does not look beyond the strip. A side that split_size does not divide is padded with zeros at both ends; the
    padding is not masked, as in the authors' code.

    Args:
        split_size: width of a strip in pixels of the map; None attends over the whole map, with all heads.

    The other arguments, and what is raised: see `Attention`. num_heads must be even unless split_size is None.
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
        parts = self.qkv(x).chunk(3 * self.branches, dim=-1)  # q, k, v, of each the halves of its channels
        if self.split_size is None:
            out = self._attend(*parts, self.lepe[0])
        else:
            out = torch.cat(
                [
                    self._attend_in_strips(*parts[0::2], self.lepe[0], axis=2),
                    self._attend_in_strips(*parts[1::2], self.lepe[1], axis=1),
                ],
                dim=-1,
            )
        return self.proj_drop(self.proj(out))

    def _attend_in_strips(self, q: Tensor, k: Tensor, v: Tensor, lepe: nn.Module, axis: int) -> Tensor:
        """Attention inside the strips that split an axis of maps (B, H, W, c)."""
        size, side = self.split_size, q.shape[axis]
        count = (side + size - 1) // size
        padding = count * size - side
        start = padding // 2
        fits = is_true(padding == 0)

        def strips(x: Tensor) -> Tensor:
            """To (B · strips, h, w, c)."""
            if not fits:
                x = F.pad(x, (0, 0) * (3 - axis) + (start, padding - start))
            return x.unflatten(axis, (count, size)).movedim(axis, 1).flatten(0, 1)

        out = self._attend(strips(q), strips(k), strips(v), lepe)
        out = out.unflatten(0, (len(q), count)).movedim(1, axis).flatten(axis, axis + 1)
        return out if fits else out.narrow(axis, start, side)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lepe: nn.Module) -> Tensor:
        """Attention among all pixels of each map (N, h, w, c), plus the values' positional encoding."""
        heads = self.num_heads // self.branches
        queries, keys, values = (x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout_p = self.attn_drop_rate if self.training else 0.0
        out = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout_p)
        return out.transpose(1, 2).reshape(q.shape) + lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
