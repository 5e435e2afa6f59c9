from dataclasses import KW_ONLY, dataclass, field

import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from mmslide.models.arguments import check_integer

from .base import Attention


@dataclass(eq=False, repr=False)
class SubsampledAttentionBase(Attention):
    """Global attention to a map that `subsample` makes smaller.

    Args:
        norm_cfg: of the subsampled map.

    The other arguments, and what is raised: see `Attention`.
    """

    _: KW_ONLY
    norm_cfg: dict = field(default_factory=lambda: dict(type='LN'))

    def __post_init__(self) -> None:
        super().__post_init__()
        channels = self.embed_dims
        self.q = nn.Linear(channels, channels, bias=self.qkv_bias)
        self.kv = nn.Linear(channels, 2 * channels, bias=self.qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(self.proj_drop_rate)

    def subsample(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the map (B, h, w, C) of keys and values."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        kv = self.kv(self.subsample(x))
        k, v = kv.flatten(1, 2).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop_rate if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, height, width, channels)))


@dataclass(eq=False, repr=False)
class SubsampledAttention(SubsampledAttentionBase):
    """Spatial-reduction attention: PVT (ICCV 2021, arXiv 2102.12122, Eq. 1-3) and PVTv2.

    Args:
        sr_ratio: keys and values come from patches of sr_ratio × sr_ratio pixels; what does not fill one is cropped.

    The other arguments, and what is raised: see `SubsampledAttentionBase`.
    """

    sr_ratio: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer('sr_ratio', self.sr_ratio)
        self.min_size = self.sr_ratio
        if self.sr_ratio > 1:
            self.sr = nn.Conv2d(self.embed_dims, self.embed_dims, kernel_size=self.sr_ratio, stride=self.sr_ratio)
            self.norm = build_norm_layer(self.norm_cfg, self.embed_dims)[1]

    def subsample(self, x: Tensor) -> Tensor:
        return self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)) if self.sr_ratio > 1 else x


@dataclass(eq=False, repr=False)
class PooledAttention(SubsampledAttentionBase):
    """Linear spatial-reduction attention: PVTv2 (CVMJ 2022, arXiv 2106.13797, section 3.2).

    Args:
        pool_size: keys and values come from an adaptive average pool to pool_size × pool_size.

    The other arguments, and what is raised: see `SubsampledAttentionBase`.
    """

    pool_size: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer('pool_size', self.pool_size)
        self.sr = nn.Conv2d(self.embed_dims, self.embed_dims, kernel_size=1)
        self.norm = build_norm_layer(self.norm_cfg, self.embed_dims)[1]

    def subsample(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.pool_size)
        return F.gelu(self.norm(self.sr(pooled).permute(0, 2, 3, 1)))
