from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmslide.registry import MODELS

from .attention import LocallyGroupedAttention, SlideAttention, SubsampledAttention
from .layers import Block, PatchEmbed
from .pyramid import InitCfg, Pyramid, Stage, build_blocks, check_stages, per_stage, pick_arch

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


class Twins(Pyramid):
    """What both Twins share: all but the token mixers.

    Args:
        row: a variant of the table.
        mixer: the attention of a block from its stage and its index in there.
    """

    def __init__(
        self,
        row: Mapping[str, Any],
        mixer: Callable[[int, int], nn.Module],
        *,
        in_channels: int,
        norm_after_stage: bool,
        drop_rate: float,
        drop_path_rate: float,
        norm_cfg: dict,
        **pyramid: Any,
    ) -> None:
        dims = row['embed_dims']

        def block(stage: int, index: int, rate: float) -> Block:
            return Block(mixer(stage, index), dims[stage], row['mlp_ratios'][stage], drop_rate, rate, norm_cfg)

        stages = []
        for i, blocks in enumerate(build_blocks(row['depths'], drop_path_rate, block)):
            embed = PatchEmbed(
                dims[i - 1] if i else in_channels,
                dims[i],
                patch_size=2 if i else 4,
                pad=False,
                norm_cfg=reduction_norm(norm_cfg),
                drop_rate=drop_rate,
            )
            norm = build_norm_layer(norm_cfg, dims[i])[1] if norm_after_stage else None
            stages.append(Stage(embed, blocks, norm, norm_feeds_next=True, peg=PEG(dims[i])))
        super().__init__(stages, **pyramid)


@MODELS.register_module()
class TwinsPCPVT(Twins):
    """Twins-PCPVT (NeurIPS 2021, arXiv 2104.13840, section 3.1): PVT with conditional position encodings.

    Sides that do not divide by a patch or by sr_ratio are cropped, as the authors do.

    Args:
        arch: 'small', 'base', 'large', or a dict with one value a stage for embed_dims, depths, num_heads,
            mlp_ratios, sr_ratios.
        norm_after_stage: put a LayerNorm behind every stage; the next stage sees the normed map. ImageNet weights have
            none of these norms.
        drop_rate: dropout behind patch embeddings, attention and MLPs.
        drop_path_rate: of the last block; rises linearly from 0 in the first.
        norm_cfg: of the blocks' norms and those behind the stages. The norms of patch embeddings and subsampled keys
            have eps 1e-5 in any case.
        out_indices, frozen_stages, with_cp, init_cfg, deploy: see `Pyramid`.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'small',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_after_stage: bool = False,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        with_cp: bool = False,
        norm_cfg: dict = dict(type='LN', eps=1e-6),
        init_cfg: InitCfg = None,
        deploy: bool = False,
    ) -> None:
        row = pick_arch(arch, PCPVT_VARIANTS)

        def mixer(stage: int, index: int) -> nn.Module:
            return SubsampledAttention(
                row['embed_dims'][stage],
                row['num_heads'][stage],
                row['sr_ratios'][stage],
                qkv_bias=qkv_bias,
                attn_drop_rate=attn_drop_rate,
                proj_drop_rate=drop_rate,
                norm_cfg=reduction_norm(norm_cfg),
            )

        super().__init__(
            row,
            mixer,
            in_channels=in_channels,
            norm_after_stage=norm_after_stage,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            norm_cfg=norm_cfg,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
            deploy=deploy,
        )


@MODELS.register_module()
class TwinsSVT(Twins):
    """Twins-SVT (NeurIPS 2021, arXiv 2104.13840, section 3.2): local and global attention in turn.

    Even blocks of every stage attend in windows (LSA), odd ones globally to a subsampled map (GSA). Sides that do not
    divide by a patch or by sr_ratio are cropped, as the authors do; for the windows maps are padded.

    Args:
        arch: 'small', 'base', 'large', or a dict with one value a stage for embed_dims, depths, num_heads,
            mlp_ratios, sr_ratios.
        slide_stages: stages (from 0) whose local half is Slide Attention (CVPR 2023, arXiv 2304.04237) instead of
            windows; () is Twins-SVT itself.
        kernel_size: of Slide Attention, one number or one a stage.
        window_size: in pixels of the stage's map, one number or one a stage.
        mask_padding: nobody attends to the padding of the windows. False reproduces the authors' detection code, for
            weights that were trained with it.
        norm_after_stage: put a LayerNorm behind every stage; the next stage sees the normed map. ImageNet weights have
            none of these norms.
        drop_rate: dropout behind patch embeddings, attention and MLPs.
        drop_path_rate: of the last block; rises linearly from 0 in the first.
        attn_backend: backend of `mmslide.ops.slide_attention` in every Slide block.
        norm_cfg: of the blocks' norms and those behind the stages. The norms of patch embeddings and subsampled keys
            have eps 1e-5 in any case.
        out_indices, frozen_stages, with_cp, init_cfg, deploy: see `Pyramid`.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'small',
        in_channels: int = 3,
        slide_stages: Sequence[int] = (),
        kernel_size: int | Sequence[int] = 3,
        window_size: int | Sequence[int] = 7,
        mask_padding: bool = True,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_after_stage: bool = True,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        attn_backend: str | None = None,
        with_cp: bool = False,
        norm_cfg: dict = dict(type='LN', eps=1e-6),
        init_cfg: InitCfg = None,
        deploy: bool = False,
    ) -> None:
        row = pick_arch(arch, SVT_VARIANTS)
        count = len(row['depths'])
        check_stages('slide_stages', slide_stages, count)
        kernel_sizes = per_stage('kernel_size', kernel_size, count)
        window_sizes = per_stage('window_size', window_size, count)

        def mixer(stage: int, index: int) -> nn.Module:
            dims, heads = row['embed_dims'][stage], row['num_heads'][stage]
            common: dict[str, Any] = dict(qkv_bias=qkv_bias, attn_drop_rate=attn_drop_rate, proj_drop_rate=drop_rate)
            if index % 2:
                ratio = row['sr_ratios'][stage]
                return SubsampledAttention(dims, heads, ratio, norm_cfg=reduction_norm(norm_cfg), **common)
            if stage in slide_stages:
                return SlideAttention(dims, heads, kernel_sizes[stage], backend=attn_backend, **common)
            return LocallyGroupedAttention(dims, heads, window_sizes[stage], mask_padding, **common)

        super().__init__(
            row,
            mixer,
            in_channels=in_channels,
            norm_after_stage=norm_after_stage,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            norm_cfg=norm_cfg,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
            deploy=deploy,
        )


class PEG(BaseModule):
    """Position encoding generator (ICLR 2023, arXiv 2102.10882, section 3.2): (B, H, W, C) to the same.

    A depthwise 3×3 convolution is added; its zero padding tells where the borders are.
    """

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(embed_dims, embed_dims, kernel_size=3, padding=1, groups=embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def reduction_norm(norm_cfg: dict) -> dict:
    """The authors give PatchEmbed's and sr's norms another eps than those of the blocks."""
    return dict(norm_cfg, eps=1e-5)
