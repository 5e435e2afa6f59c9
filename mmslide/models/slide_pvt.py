from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from mmslide.registry import MODELS

from .attention import SlideAttention, SubsampledAttention
from .layers import Block, PatchEmbed
from .pyramid import InitCfg, Pyramid, Stage, build_blocks, check_stages, per_stage, pick_arch

PVT = dict(embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4), sr_ratios=(8, 4, 2, 1))
VARIANTS = {
    'tiny': dict(PVT, depths=(2, 2, 2, 2)),
    'small': dict(PVT, depths=(3, 4, 6, 3)),
    'medium': dict(PVT, depths=(3, 4, 18, 3)),
    'large': dict(PVT, depths=(3, 8, 27, 3)),
}


@MODELS.register_module()
class SlidePVT(Pyramid):
    """PVT (ICCV 2021, arXiv 2102.12122) with Slide Attention (CVPR 2023, arXiv 2304.04237) in its first stages.

    Args:
        arch: 'tiny', 'small', 'medium', 'large', or a dict with one value a stage for embed_dims, depths,
            num_heads, mlp_ratios, sr_ratios.
        slide_stages: stages (from 0) with Slide Attention in all blocks; the others keep PVT's spatial-reduction
            attention. () is PVT itself.
        kernel_size: of Slide Attention, one number or one a stage.
        pretrain_img_size: pixels, one number or (height, width); sets the size of the learned position embeddings,
            which are resampled to other inputs.
        norm_after_stage: put a LayerNorm behind every stage; the next stage sees the normed map. ImageNet weights of
            PVT have none of these norms.
        drop_rate: dropout behind position embeddings, attention and MLPs.
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
        pretrain_img_size: int | Sequence[int] = 224,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_after_stage: bool = True,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        attn_backend: str | None = None,
        with_cp: bool = False,
        norm_cfg: dict = dict(type='LN', eps=1e-6),
        init_cfg: InitCfg = None,
        deploy: bool = False,
    ) -> None:
        row = pick_arch(arch, VARIANTS)
        dims = row['embed_dims']
        count = len(dims)
        check_stages('slide_stages', slide_stages, count)
        kernel_sizes = per_stage('kernel_size', kernel_size, count)
        image_size = (pretrain_img_size,) * 2 if isinstance(pretrain_img_size, int) else tuple(pretrain_img_size)

        def block(stage: int, index: int, rate: float) -> Block:
            mixer: nn.Module
            common: dict[str, Any] = dict(qkv_bias=qkv_bias, attn_drop_rate=attn_drop_rate, proj_drop_rate=drop_rate)
            if stage in slide_stages:
                mixer = SlideAttention(
                    dims[stage], row['num_heads'][stage], kernel_sizes[stage], backend=attn_backend, **common
                )
            else:
                mixer = SubsampledAttention(
                    dims[stage], row['num_heads'][stage], row['sr_ratios'][stage], norm_cfg=norm_cfg, **common
                )
            return Block(mixer, dims[stage], row['mlp_ratios'][stage], drop_rate, rate, norm_cfg)

        blocks = build_blocks(row['depths'], drop_path_rate, block)
        stages = []
        for i in range(count):
            embed = PositionedPatchEmbed(
                dims[i - 1] if i else in_channels,
                dims[i],
                patch_size=2 if i else 4,
                map_size=[side // 2 ** (i + 2) for side in image_size],
                drop_rate=drop_rate,
                norm_cfg=norm_cfg,
            )
            norm = build_norm_layer(norm_cfg, dims[i])[1] if norm_after_stage else None
            stages.append(Stage(embed, blocks[i], norm, norm_feeds_next=True))
        super().__init__(
            stages,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
            deploy=deploy,
        )


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
        # Exact at its own size too, so no branch that export would settle at the traced size.
        position = F.interpolate(self.position_embedding.permute(0, 3, 1, 2), size=x.shape[1:3], mode='bilinear')
        return self.drop(x + position.permute(0, 2, 3, 1))
