from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmslide.registry import MODELS

from .arguments import per_stage
from .attention import NeighborhoodAttention
from .layers import OverlappedPatchEmbed
from .pyramid import Arch, Pyramid, StageNorm, Variants

SCALED = dict(depths=(3, 4, 18, 5), mlp_ratios=(2, 2, 2, 2), layer_scales=(1e-5, 1e-5, 1e-5, 1e-5))
VARIANTS: Variants = {
    'mini': dict(embed_dims=(64, 128, 256, 512), depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratios=(3, 3, 3, 3)),
    'tiny': dict(
        embed_dims=(64, 128, 256, 512), depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratios=(3, 3, 3, 3)
    ),
    'small': dict(SCALED, embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24)),
    'base': dict(SCALED, embed_dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32)),
}


@MODELS.register_module()
@dataclass(eq=False, repr=False)
class SlideNAT(Pyramid):
    """NAT (CVPR 2023, arXiv 2204.07143) with Slide Attention in its first stages.

    The blocks of NAT that the Slide-Transformer paper replaces are not published: by default all blocks of the first
    two stages, as in its other hosts, each replacing the host's attention including its relative position bias. A side
    n becomes ⌈n/4⌉ after the stem, then ⌈n/2⌉ from stage to stage.

    Args:
        arch: 'mini', 'tiny', 'small', 'base', or a dict with embed_dims, depths, num_heads, mlp_ratios, and
            optionally layer_scales, the initial value of the learned factor of each branch and channel (0 for none).
        window_size: of neighborhood attention, odd, in pixels of the stage's map, one number, or one per stage.

    Other arguments and errors: see `Pyramid`.
    """

    variants = VARIANTS
    optional: ClassVar[Mapping[str, float]] = {'layer_scales': 0.0}

    arch: Arch = 'mini'
    _: KW_ONLY
    slide_stages: Sequence[int] = (0, 1)
    stage_norm: StageNorm = 'output'
    drop_path_rate: float = 0.2
    norm_cfg: dict = field(default_factory=lambda: dict(type='LN'))
    window_size: int | Sequence[int] = 7

    def check_arguments(self) -> None:
        super().check_arguments()
        self.window_sizes = per_stage('window_size', self.window_size, self.num_stages, odd=True)

    def build_embedding(self, stage: int, in_channels: int, embed_dims: int) -> nn.Module:
        if stage == 0:
            return ConvStem(in_channels, embed_dims, self.norm_cfg, self.drop_rate)
        return OverlappedPatchEmbed(
            in_channels,
            embed_dims,
            kernel_size=3,
            stride=2,
            padding=1,
            norm_cfg=self.norm_cfg,
            bias=False,
            drop_rate=self.drop_rate,
        )

    def build_mixer(self, stage: int, index: int, **shared: Any) -> nn.Module:
        return NeighborhoodAttention(window_size=self.window_sizes[stage], **shared)


class ConvStem(BaseModule):
    """Two consecutive 3×3 convolutions with stride 2, followed by norm and dropout.

    (B, H, W, in_channels) to (B, ⌈H/4⌉, ⌈W/4⌉, embed_dims).
    """

    stride = 4

    def __init__(self, in_channels: int, embed_dims: int, norm_cfg: dict, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.projection = nn.Sequential(
            nn.Conv2d(in_channels, embed_dims // 2, kernel_size=3, stride=2, padding=1),
            nn.Conv2d(embed_dims // 2, embed_dims, kernel_size=3, stride=2, padding=1),
        )
        self.norm = build_norm_layer(norm_cfg, embed_dims)[1]
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.projection(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))
