from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import nn

from mmslide.registry import MODELS

from .attention import PooledAttention, SubsampledAttention
from .layers import OverlappedPatchEmbed
from .mlp import ConvMLP
from .pyramid import Arch, Pyramid, StageNorm, reduction_norm

SHARED = dict(num_heads=(1, 2, 5, 8), sr_ratios=(8, 4, 2, 1))
PVTV2 = dict(SHARED, embed_dims=(64, 128, 320, 512), mlp_ratios=(8, 8, 4, 4))
VARIANTS = {
    'b0': dict(SHARED, embed_dims=(32, 64, 160, 256), mlp_ratios=(8, 8, 4, 4), depths=(2, 2, 2, 2)),
    'b1': dict(PVTV2, depths=(2, 2, 2, 2)),
    'b2': dict(PVTV2, depths=(3, 4, 6, 3)),
    'b2-li': dict(PVTV2, depths=(3, 4, 6, 3), pool_sizes=(7, 7, 7, 7)),
    'b3': dict(PVTV2, depths=(3, 4, 18, 3)),
    'b4': dict(PVTV2, depths=(3, 8, 27, 3)),
    'b5': dict(PVTV2, depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
}


@MODELS.register_module()
@dataclass(eq=False, repr=False)
class SlidePVTv2(Pyramid):
    """PVTv2 (CVMJ 2022, arXiv 2106.13797) with Slide Attention in its first stages.

    Patches overlap, and a map's side n becomes ⌈n / stride⌉. Incomplete patches of sr_ratio are cropped.

    Args:
        arch: 'b0' to 'b5', 'b2-li', or a dict with embed_dims, depths, num_heads, mlp_ratios, sr_ratios, and for the
            linear variant pool_sizes: a stage with pool_size > 0 attends to an average pool of that side instead of
            patches of sr_ratio, and its MLPs have a ReLU before their depthwise convolution.
        norm_cfg: of the norms in the blocks and after the stages. Those of patch embeddings and subsampled keys always
            have eps 1e-5.

    Other arguments and errors: see `Pyramid`.
    """

    variants = VARIANTS
    optional: ClassVar[Mapping[str, float]] = dict(pool_sizes=0)
    default_init_cfg: ClassVar[list[dict]] = [
        *Pyramid.default_init_cfg,
        dict(type='Kaiming', layer='Conv2d', mode='fan_out'),
        # mmengine's fan_out is not divided by the groups; fan_in, with one channel per group, is equivalent.
        dict(type='Kaiming', layer='DepthwiseConv', mode='fan_in'),
    ]

    arch: Arch = 'b1'
    _: KW_ONLY
    slide_stages: Sequence[int] = (0, 1)
    stage_norm: StageNorm = 'next'

    def build_embedding(self, stage: int, in_channels: int, embed_dims: int) -> nn.Module:
        return OverlappedPatchEmbed(
            in_channels,
            embed_dims,
            kernel_size=3 if stage else 7,
            stride=2 if stage else 4,
            padding=1 if stage else 3,
            norm_cfg=reduction_norm(self.norm_cfg),
            drop_rate=self.drop_rate,
        )

    def build_mixer(self, stage: int, index: int, **shared: Any) -> nn.Module:
        norm_cfg, pool_size = reduction_norm(self.norm_cfg), self.row['pool_sizes'][stage]
        if pool_size:
            return PooledAttention(pool_size=pool_size, norm_cfg=norm_cfg, **shared)
        return SubsampledAttention(sr_ratio=self.row['sr_ratios'][stage], norm_cfg=norm_cfg, **shared)

    def build_mlp(self, stage: int, embed_dims: int) -> nn.Module:
        hidden_dims = round(self.row['mlp_ratios'][stage] * embed_dims)
        return ConvMLP(embed_dims, hidden_dims, self.drop_rate, relu=self.row['pool_sizes'][stage] > 0)
