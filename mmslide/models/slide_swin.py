from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from torch import nn

from mmslide.registry import MODELS

from .attention import SlideAttention, WindowAttention
from .layers import Block, PatchEmbed, PatchMerging
from .pyramid import InitCfg, Pyramid, Stage, build_blocks, check_stages, per_stage, pick_arch

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
class SlideSwin(Pyramid):
    """Swin Transformer (ICCV 2021, arXiv 2103.14030) with Slide Attention (CVPR 2023, arXiv 2304.04237) in its first
    stages.

    Args:
        arch: 'tiny', 'small', 'base', or a dict with one value a stage for embed_dims, depths, num_heads,
            mlp_ratios.
        slide_stages: stages (from 0) with Slide Attention in all blocks; the others keep Swin's windows, shifted in
            every second block. () is Swin itself.
        kernel_size: of Slide Attention, one number or one a stage.
        window_size: in pixels of the stage's map, one number or one a stage.
        output_norm: put a LayerNorm on each output; the next stage sees the map without it. ImageNet weights of Swin
            have none of these norms.
        drop_rate: dropout behind attention and MLPs.
        drop_path_rate: of the last block; rises linearly from 0 in the first.
        attn_backend: backend of `mmslide.ops.slide_attention` in every Slide block.
        out_indices, frozen_stages, with_cp, init_cfg, deploy: see `Pyramid`.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        in_channels: int = 3,
        slide_stages: Sequence[int] = (0, 1),
        kernel_size: int | Sequence[int] = 3,
        window_size: int | Sequence[int] = 7,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        output_norm: bool = True,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        attn_backend: str | None = None,
        with_cp: bool = False,
        norm_cfg: dict = dict(type='LN'),
        init_cfg: InitCfg = None,
        deploy: bool = False,
    ) -> None:
        row = pick_arch(arch, VARIANTS)
        dims = row['embed_dims']
        count = len(dims)
        check_stages('slide_stages', slide_stages, count)
        kernel_sizes = per_stage('kernel_size', kernel_size, count)
        window_sizes = per_stage('window_size', window_size, count)

        def block(stage: int, index: int, rate: float) -> Block:
            mixer: nn.Module
            heads = row['num_heads'][stage]
            common: dict[str, Any] = dict(qkv_bias=qkv_bias, attn_drop_rate=attn_drop_rate, proj_drop_rate=drop_rate)
            if stage in slide_stages:
                mixer = SlideAttention(dims[stage], heads, kernel_sizes[stage], backend=attn_backend, **common)
            else:
                window = window_sizes[stage]
                mixer = WindowAttention(dims[stage], heads, window, window // 2 if index % 2 else 0, **common)
            return Block(mixer, dims[stage], row['mlp_ratios'][stage], drop_rate, rate, norm_cfg)

        blocks = build_blocks(row['depths'], drop_path_rate, block)
        stages = []
        for i in range(count):
            embed: nn.Module
            if i == 0:
                embed = PatchEmbed(in_channels, dims[0], patch_size=4, pad=True, norm_cfg=norm_cfg)
            else:
                embed = PatchMerging(dims[i - 1], dims[i], norm_cfg)
            # Only outputs are normed, so a stage that is none has no norm whose parameters would go unused.
            norm = build_norm_layer(norm_cfg, dims[i])[1] if output_norm and i in out_indices else None
            stages.append(Stage(embed, blocks[i], norm, norm_feeds_next=False))
        super().__init__(
            stages,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
            deploy=deploy,
        )
