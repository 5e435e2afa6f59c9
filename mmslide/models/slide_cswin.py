from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from torch import nn

from mmslide.registry import MODELS

from .attention import CrossShapedWindowAttention
from .layers import OverlappedPatchEmbed
from .pyramid import Arch, Pyramid, StageNorm

CSWIN = dict(embed_dims=(64, 128, 256, 512), num_heads=(2, 4, 8, 16), mlp_ratios=(4, 4, 4, 4), split_sizes=(1, 2, 7, 7))
VARIANTS = {
    'tiny': dict(CSWIN, depths=(1, 2, 21, 1)),
    'small': dict(CSWIN, depths=(2, 4, 32, 2)),
    'base': dict(CSWIN, depths=(2, 4, 32, 2), embed_dims=(96, 192, 384, 768), num_heads=(4, 8, 16, 32)),
    'large': dict(CSWIN, depths=(2, 4, 32, 2), embed_dims=(144, 288, 576, 1152), num_heads=(6, 12, 24, 24)),
}


@MODELS.register_module()
@dataclass(eq=False, repr=False)
class SlideCSWin(Pyramid):
    """CSWin Transformer (CVPR 2022, arXiv 2107.00652) with Slide Attention in its first stages.

    The last stage attends over its whole map. The blocks that Slide-CSWin replaces are not published: here, all blocks
    of the first two stages, including LePE, as in the other hosts and within rounding of the paper's parameters and
    FLOPs.

    Args:
        arch: 'tiny', 'small', 'base', 'large', or a dict with embed_dims, depths, num_heads, mlp_ratios, split_sizes
            (widths of the strips in pixels of the stage's map; the last stage's is not used).
        drop_rate: dropout after attention and MLPs; CSWin's embeddings have none.

    Other arguments and errors: see `Pyramid`. num_heads must be even wherever attention is in strips.
    """

    variants = VARIANTS

    arch: Arch = 'tiny'
    _: KW_ONLY
    slide_stages: Sequence[int] = (0, 1)
    stage_norm: StageNorm = 'output'
    norm_cfg: dict = field(default_factory=lambda: dict(type='LN'))

    def build_embedding(self, stage: int, in_channels: int, embed_dims: int) -> nn.Module:
        kernel_size, stride, padding = (3, 2, 1) if stage else (7, 4, 2)
        return OverlappedPatchEmbed(in_channels, embed_dims, kernel_size, stride, padding, self.norm_cfg)

    def build_mixer(self, stage: int, index: int, **shared: Any) -> nn.Module:
        return CrossShapedWindowAttention(split_size=self.split_size(stage), **shared)

    def split_size(self, stage: int) -> int | None:
        """None for the last stage, which attends over its whole map."""
        return None if stage == self.num_stages - 1 else int(self.row['split_sizes'][stage])
