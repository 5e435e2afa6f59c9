import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn


class SubsampledAttention(BaseModule):
    """Global attention to a subsampled map: PVT's spatial-reduction attention (ICCV 2021, arXiv 2102.12122, Eq. 1-3).

    Args:
        embed_dims: C of the map (B, H, W, C), divisible by num_heads.
        sr_ratio: keys and values come from patches of sr_ratio × sr_ratio pixels; what does not fill one is cropped.
        attn_drop_rate: dropout of the attention weights.
        proj_drop_rate: dropout of the output.

    Raises:
        ValueError: embed_dims is not divisible by num_heads.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        norm_cfg: dict = dict(type='LN'),
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if embed_dims % num_heads:
            raise ValueError(f'embed_dims must be divisible by num_heads, got {embed_dims=}, {num_heads=}')
        self.num_heads = num_heads
        self.sr_ratio = self.min_size = sr_ratio
        self.attn_drop_rate = attn_drop_rate
        self.q = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop_rate)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(embed_dims, embed_dims, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = build_norm_layer(norm_cfg, embed_dims)[1]

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        source = x
        if self.sr_ratio > 1:
            source = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(source).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop_rate if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, height, width, channels)))
