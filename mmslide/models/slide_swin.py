from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from torch import nn

from mmslide.registry import MODELS

from .arguments import per_stage
from .attention import WindowAttention
from .layers import PatchEmbed, PatchMerging
from .pyramid import Arch, Pyramid, StageNorm

VARIANTS = {
    'tiny': dict(
        embed_dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), mlp_ratios=(4, 4, 4, 4)
    ),
    'small': dict(
        embed_dims=(96, 192, 384, 768), depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), mlp_ratios=(4, 4, 4, 4)
    ),
    'base': dict(
        embed_dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), mlp_ratios=(4, 4, 4, 4)
    ),
}


@MODELS.register_module()
@dataclass(eq=False, repr=False)
class SlideSwin(Pyramid):
    """Swin Transformer (ICCV 2021, arXiv 2103.14030) with Slide Attention in its first stages.

    Sides that are not divisible by the patch size are padded with zeros.

    Args:
        arch: 'tiny', 'small', 'base', or a dict with embed_dims, depths, num_heads, mlp_ratios.
        window_size: in pixels of the stage's map, one number, or one per stage; every second block shifts its windows.
        drop_rate: dropout after attention and MLPs; Swin's embeddings have none.

    Other arguments and errors: see `Pyramid`.
    """

    variants = VARIANTS

    arch: Arch = 'tiny'
    _: KW_ONLY
    slide_stages: Sequence[int] = (0, 1)
    stage_norm: StageNorm = 'output'
    norm_cfg: dict = field(default_factory=lambda: dict(type='LN'))
    window_size: int | Sequence[int] = 7

    def check_arguments(self) -> None:
        super().check_arguments()
        self.window_sizes = per_stage('window_size', self.window_size, self.num_stages)

    def build_embedding(self, stage: int, in_channels: int, embed_dims: int) -> nn.Module:
        if stage == 0:
            return PatchEmbed(in_channels, embed_dims, patch_size=4, pad=True, norm_cfg=self.norm_cfg)
        return PatchMerging(in_channels, embed_dims, self.norm_cfg)

    def build_mixer(self, stage: int, index: int, **shared: Any) -> nn.Module:
        size = self.window_sizes[stage]
        return WindowAttention(window_size=size, shift_size=size // 2 if index % 2 else 0, **shared)
