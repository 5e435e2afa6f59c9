from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from mmslide.models.arguments import check_integer
from mmslide.ops import neighborhood_attention

from .base import Attention


@dataclass(eq=False, repr=False)
class NeighborhoodAttention(Attention):
    """Attention to the nearest pixels: neighborhood attention (CVPR 2023, arXiv 2204.07143, section 3.1).

    At the border, the window is shifted inside the map. A map smaller than the window is padded with zeros on the right
    and bottom; the padding is not masked, as in the host.

    Args:
        window_size: side of the window around a pixel, odd, in pixels of the map.

    Other arguments and errors: see `Attention`.
    """

    window_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer('window_size', self.window_size, odd=True)
        self.qkv = nn.Linear(self.embed_dims, 3 * self.embed_dims, bias=self.qkv_bias)
        side = 2 * self.window_size - 1
        self.rpb = nn.Parameter(torch.zeros(self.num_heads, side, side))
        trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(self.embed_dims, self.embed_dims)
        self.proj_drop = nn.Dropout(self.proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        padded = F.pad(x, (0, 0, 0, self._missing(width), 0, self._missing(height)))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in self.qkv(padded).chunk(3, dim=-1))
        out = self.attend(q, k, v).flatten(3)
        return self.proj_drop(self.proj(out[:, :height, :width]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout_p = self.attn_drop_rate if self.training else 0.0
        return neighborhood_attention(q, k, v, self.rpb, dropout_p=dropout_p)

    def _missing(self, side: int) -> int:
        """The number of pixels by which a side of the map is smaller than the window."""
        lacking = self.window_size - side
        # max() would specialize a dynamic size at export.
        return torch.sym_max(lacking, 0) if isinstance(lacking, torch.SymInt) else max(lacking, 0)
