from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from mmslide.registry import MODELS

from .arguments import check_size
from .attention import SubsampledAttention
from .layers import PatchEmbed
from .pyramid import Arch, Pyramid

PVT = dict(embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4), sr_ratios=(8, 4, 2, 1))
VARIANTS = {
    'tiny': dict(PVT, depths=(2, 2, 2, 2)),
    'small': dict(PVT, depths=(3, 4, 6, 3)),
    'medium': dict(PVT, depths=(3, 4, 18, 3)),
    'large': dict(PVT, depths=(3, 8, 27, 3)),
}


@MODELS.register_module()
@dataclass(eq=False, repr=False)
class SlidePVT(Pyramid):
    """PVT (ICCV 2021, arXiv 2102.12122) with Slide Attention in its first stages.

    Sides that are not divisible by the patch size or sr_ratio are cropped, as in the authors' code.

    Args:
        arch: 'tiny', 'small', 'medium', 'large', or a dict with embed_dims, depths, num_heads, mlp_ratios, sr_ratios.
        pretrain_img_size: pixels, one number or (height, width); sets the size of the learned position embeddings,
            which are interpolated for other input sizes.

    Other arguments and errors: see `Pyramid`.
    """

    variants = VARIANTS

    arch: Arch = 'tiny'
    _: KW_ONLY
    slide_stages: Sequence[int] = (0, 1)
    pretrain_img_size: int | Sequence[int] = 224

    def check_arguments(self) -> None:
        super().check_arguments()
        self.image_size = check_size('pretrain_img_size', self.pretrain_img_size, least=2 ** (self.num_stages + 1))

    def build_embedding(self, stage: int, in_channels: int, embed_dims: int) -> nn.Module:
        height, width = self.image_size
        stride = 2 ** (stage + 2)
        return PositionedPatchEmbed(
            in_channels,
            embed_dims,
            patch_size=2 if stage else 4,
            map_size=(height // stride, width // stride),
            drop_rate=self.drop_rate,
            norm_cfg=self.norm_cfg,
        )

    def build_mixer(self, stage: int, index: int, **shared: Any) -> nn.Module:
        return SubsampledAttention(sr_ratio=self.row['sr_ratios'][stage], norm_cfg=self.norm_cfg, **shared)


class PositionedPatchEmbed(PatchEmbed):
    """Patch embedding plus a learned position embedding: (B, H, W, C) to (B, H', W', embed_dims)."""

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        patch_size: int,
        map_size: Sequence[int],
        drop_rate: float,
        norm_cfg: dict,
    ) -> None:
        super().__init__(in_channels, embed_dims, patch_size, pad=False, norm_cfg=norm_cfg, drop_rate=drop_rate)
        self.position_embedding = nn.Parameter(torch.zeros(1, *map_size, embed_dims))
        trunc_normal_(self.position_embedding, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        # Also exact at its own size, which avoids a branch that export would specialize to the traced size.
        position = F.interpolate(self.position_embedding.permute(0, 3, 1, 2), size=x.shape[1:3], mode='bilinear')
        return self.drop(x + position.permute(0, 2, 3, 1))
