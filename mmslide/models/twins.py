from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, nn

from mmslide.registry import MODELS

from .arguments import per_stage
from .attention import LocallyGroupedAttention, SubsampledAttention
from .layers import PatchEmbed
from .pyramid import Arch, Pyramid, Stage, StageNorm, reduction_norm

PCPVT = dict(embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4), sr_ratios=(8, 4, 2, 1))
PCPVT_VARIANTS = {
    'small': dict(PCPVT, depths=(3, 4, 6, 3)),
    'base': dict(PCPVT, depths=(3, 4, 18, 3)),
    'large': dict(PCPVT, depths=(3, 8, 27, 3)),
}
SVT = dict(mlp_ratios=(4, 4, 4, 4), sr_ratios=(8, 4, 2, 1))
SVT_VARIANTS = {
    'small': dict(SVT, embed_dims=(64, 128, 256, 512), num_heads=(2, 4, 8, 16), depths=(2, 2, 10, 4)),
    'base': dict(SVT, embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24), depths=(2, 2, 18, 2)),
    'large': dict(SVT, embed_dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32), depths=(2, 2, 18, 2)),
}


@dataclass(eq=False, repr=False)
class Twins(Pyramid):
    """The common base of both Twins (NeurIPS 2021, arXiv 2104.13840): everything except their local attention.

    Sides that are not divisible by the patch size or sr_ratio are cropped, as in the authors' code.
    """

    _: KW_ONLY
    drop_path_rate: float = 0.2

    def build_embedding(self, stage: int, in_channels: int, embed_dims: int) -> nn.Module:
        return PatchEmbed(
            in_channels,
            embed_dims,
            patch_size=2 if stage else 4,
            pad=False,
            norm_cfg=reduction_norm(self.norm_cfg),
            drop_rate=self.drop_rate,
        )

    def build_mixer(self, stage: int, index: int, **shared: Any) -> nn.Module:
        norm_cfg = reduction_norm(self.norm_cfg)
        return SubsampledAttention(sr_ratio=self.row['sr_ratios'][stage], norm_cfg=norm_cfg, **shared)

    def build_stage(self, embed: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module, embed_dims: int) -> Stage:
        return TwinsStage(embed, blocks, norm, PEG(embed_dims))


@MODELS.register_module()
@dataclass(eq=False, repr=False)
class TwinsPCPVT(Twins):
    """Twins-PCPVT (NeurIPS 2021, arXiv 2104.13840, section 3.1): PVT with conditional position encodings.

    Args:
        arch: 'small', 'base', 'large', or a dict with embed_dims, depths, num_heads, mlp_ratios, sr_ratios.
        norm_cfg: of the norms in the blocks and after the stages. Those of patch embeddings and subsampled keys
            always have eps 1e-5.

    Other arguments and errors: see `Pyramid`.
    """

    variants = PCPVT_VARIANTS

    arch: Arch = 'small'


@MODELS.register_module()
@dataclass(eq=False, repr=False)
class TwinsSVT(Twins):
    """Twins-SVT (NeurIPS 2021, arXiv 2104.13840, section 3.2): alternating local and global attention.

    Even blocks of every stage use window attention (LSA), or Slide Attention in slide_stages; odd blocks attend
    globally to a subsampled map (GSA). Maps are padded to whole windows.

    Args:
        arch: 'small', 'base', 'large', or a dict with embed_dims, depths, num_heads, mlp_ratios, sr_ratios.
        window_size: in pixels of the stage's map, one number, or one per stage.
        mask_padding: whether to mask the padding of the windows. False reproduces the authors' detection code, for
            weights that were trained with it.
        norm_cfg: of the norms in the blocks and after the stages. Those of patch embeddings and subsampled keys
            always have eps 1e-5.

    Other arguments and errors: see `Pyramid`.
    """

    variants = SVT_VARIANTS

    arch: Arch = 'small'
    _: KW_ONLY
    stage_norm: StageNorm = 'next'
    window_size: int | Sequence[int] = 7
    mask_padding: bool = True

    def check_arguments(self) -> None:
        super().check_arguments()
        self.window_sizes = per_stage('window_size', self.window_size, self.num_stages)

    def has_slide_attention(self, stage: int, index: int) -> bool:
        return is_local(index) and super().has_slide_attention(stage, index)

    def build_mixer(self, stage: int, index: int, **shared: Any) -> nn.Module:
        if is_local(index):
            return LocallyGroupedAttention(
                window_size=self.window_sizes[stage], mask_padding=self.mask_padding, **shared
            )
        return super().build_mixer(stage, index, **shared)


class TwinsStage(Stage):
    """A stage with a position encoding after its first block."""

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module, peg: nn.Module) -> None:
        super().__init__(embed, blocks, norm)
        self.peg = peg

    def forward_block(self, index: int, x: Tensor, with_cp: bool) -> Tensor:
        x = super().forward_block(index, x, with_cp)
        return self.peg(x) if index == 0 else x


class PEG(BaseModule):
    """Position encoding generator (ICLR 2023, arXiv 2102.10882, section 3.2): (B, H, W, C) to the same shape.

    Adds a depthwise 3×3 convolution, whose zero padding encodes the position of the borders.
    """

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(embed_dims, embed_dims, kernel_size=3, padding=1, groups=embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def is_local(index: int) -> bool:
    """Whether a block of Twins-SVT, by its index in the stage, attends locally."""
    return index % 2 == 0
