from dataclasses import KW_ONLY, dataclass, field

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from mmslide.compat import is_compiling
from mmslide.models.arguments import check_integer

from .base import Attention


@dataclass(eq=False, repr=False)
class SubsampledAttentionBase(Attention):
    """Global attention to a map subsampled by `subsample`.

    Args:
        norm_cfg: config of the norm of the subsampled map.

    Other arguments and errors: see `Attention`.
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
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        kv = self.kv(self.subsample(x)).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1))
        parts = query_parts(q)
        if parts > 1:
            q = q.unflatten(1, (parts, -1)).flatten(0, 1)
            kv = kv.unsqueeze(1).expand(-1, parts, -1, -1, -1, -1).flatten(0, 1)
        k, v = kv.permute(2, 0, 3, 1, 4)
        dropout_p = self.attn_drop_rate if self.training else 0.0
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, dropout_p=dropout_p)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))


def query_parts(q: Tensor) -> int:
    """Number of parts to split the queries (B, N, heads, d) into, which are then batched as images.

    On a CPU, the backward of scaled_dot_product_attention uses one thread per image and head; if there are fewer than
    threads, it is many times slower.
    """
    if is_compiling() or torch.jit.is_tracing() or q.device.type != 'cpu' or not q.requires_grad:
        return 1
    batch, count, heads, _ = q.shape
    least = -(-torch.get_num_threads() // max(1, batch * heads))
    return next((parts for parts in range(least, 8 * least) if count % parts == 0), 1)


@dataclass(eq=False, repr=False)
class SubsampledAttention(SubsampledAttentionBase):
    """Spatial-reduction attention: PVT (ICCV 2021, arXiv 2102.12122, Eq. 1-3) and PVTv2.

    Args:
        sr_ratio: keys and values come from patches of sr_ratio × sr_ratio pixels; an incomplete patch is cropped.

    Other arguments and errors: see `SubsampledAttentionBase`.
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

    Other arguments and errors: see `SubsampledAttentionBase`.
    """

    pool_size: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer('pool_size', self.pool_size)
        self.sr = nn.Conv2d(self.embed_dims, self.embed_dims, kernel_size=1)
        self.norm = build_norm_layer(self.norm_cfg, self.embed_dims)[1]

    def subsample(self, x: Tensor) -> Tensor:
        pooled = average_pool(x, self.pool_size)
        return F.gelu(self.norm(self.sr(pooled.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))


def average_pool(x: Tensor, size: int) -> Tensor:
    """Adaptive average pooling of a map (B, H, W, C) to (B, size, size, C)."""
    if not any(isinstance(side, torch.SymInt) for side in x.shape[1:3]):
        return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    # As products for sizes known only at run time: PyTorch's decomposition keeps the windows of the traced size.
    rows, columns = (_pool_weights(side, size, x) for side in x.shape[1:3])
    return columns @ (rows @ x.flatten(2)).unflatten(-1, x.shape[2:])


def _pool_weights(side: int, size: int, x: Tensor) -> Tensor:
    """The weight of each of `side` pixels in each of `size` means: (size, side)."""
    index, position = (torch.arange(count, device=x.device) for count in (size, side))
    start, end = index * side // size, ((index + 1) * side + size - 1) // size
    inside = (position >= start[:, None]) & (position < end[:, None])
    return inside.to(x.dtype) / (end - start)[:, None].to(x.dtype)
