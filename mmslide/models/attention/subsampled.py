from dataclasses import KW_ONLY, dataclass, field

import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from mmslide.models.arguments import check_integer

from .base import Attention


@dataclass(eq=False, repr=False)
class SubsampledAttention(Attention):
    """Global attention to a subsampled map: PVT's spatial-reduction attention (ICCV 2021, arXiv 2102.12122, Eq. 1-3).

    Args:
        sr_ratio: keys and values come from patches of sr_ratio × sr_ratio pixels; what does not fill one is cropped.
        norm_cfg: of the subsampled map.

    The other arguments, and what is raised: see `Attention`.
    """

    sr_ratio: int = 1
    _: KW_ONLY
    norm_cfg: dict = field(default_factory=lambda: dict(type='LN'))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer('sr_ratio', self.sr_ratio)
        channels, ratio = self.embed_dims, self.sr_ratio
        self.min_size = ratio
        self.q = nn.Linear(channels, channels, bias=self.qkv_bias)
        self.kv = nn.Linear(channels, 2 * channels, bias=self.qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(self.proj_drop_rate)
        if ratio > 1:
            self.sr = nn.Conv2d(channels, channels, kernel_size=ratio, stride=ratio)
            self.norm = build_norm_layer(self.norm_cfg, channels)[1]

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        source = x
        if self.sr_ratio > 1:
            source = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(source).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop_rate if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, height, width, channels)))
