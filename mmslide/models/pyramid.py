"""The base class of all backbones."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import ModuleList
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmslide.ops import check_backend
from mmslide.weights import is_pretrained, load_pretrained

from .arguments import check_integer, check_rate, check_stages, per_stage, pick_arch
from .attention import SlideAttention
from .base import BaseModule, InitCfg
from .layers import Block
from .mlp import MLP

Arch = str | Mapping[str, Any]
Variants = Mapping[str, Mapping[str, Sequence[int | float]]]
StageNorm = Literal['next', 'output'] | None


class Stage(BaseModule):
    """Embedding, blocks and norm of one stage, on channels-last maps.

    Args:
        embed: (B, H, W, C_in) to (B, H', W', C).
        blocks: each (B, H', W', C) to the same shape.
        norm: of the stage's map.
    """

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor, with_cp: bool) -> tuple[Tensor, Tensor]:
        """The stage's map, before and after the norm."""
        x = self.embed(x)
        for index in range(len(self.blocks)):
            x = self.forward_block(index, x, with_cp)
        return x, self.norm(x)

    def forward_block(self, index: int, x: Tensor, with_cp: bool) -> Tensor:
        block = self.blocks[index]
        return checkpoint(block, x, use_reentrant=False) if with_cp and torch.is_grad_enabled() else block(x)


@dataclass(eq=False, repr=False)
class Pyramid(BaseModule):
    """A hierarchical backbone: images (B, in_channels, H, W) to one map (B, C, H / stride, W / stride) per stage.

    A backbone is a dataclass derived from this one: `variants` is its table (`optional` has keys that a row may omit,
        with their defaults), its fields are its own arguments and the shared ones with a different default, and it
        overrides `build_embedding`, `build_mixer` and, if necessary, other methods.

    Args:
        arch: name of a variant in the table, or a dict with the table's keys and a list with one value per stage for
            each; a single number is used for all stages, and for embed_dims it doubles from stage to stage.
        in_channels: channels of the images.
        slide_stages: stages (from 0) with Slide Attention (CVPR 2023, arXiv 2304.04237) in place of the host's own
            attention; () is the host itself.
        kernel_size: k of Slide Attention, odd; one number, or one per stage.
        attn_backend: backend of Slide Attention, see `mmslide.ops.slide_attention`; None selects the best.
        out_indices: stages (from 0) whose maps are returned, finest first. Stages after the last one are not built;
            drop path rates are those of the whole backbone, whose checkpoints still load through `init_cfg`.
        frozen_stages: -1 freezes nothing, 0 the first patch embedding, n the first n stages as well.
        stage_norm: 'next' adds a norm after each stage, whose result is passed to the next stage; 'output' normalizes
            only the outputs; None adds no norms.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        drop_rate: dropout after embeddings, attention and MLPs.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth rate of the last block; the rate increases linearly from 0 in the first.
        with_cp: whether to recompute each block in the backward pass instead of storing its activations.
        norm_cfg: config of all norms, see mmcv's `build_norm_layer`.
        init_cfg: see mmengine. `dict(type='Pretrained', checkpoint=FILE_OR_URL, prefix=None)` reads every layout in
            `mmslide.weights.layouts`; None is `default_init_cfg`, which draws linear weights from a truncated normal
            distribution with std 0.02.
        deploy: whether to build the fused form for inference, see `mmslide.deploy.fuse`; it loads both fused and other
            checkpoints.

    Raises:
        ValueError: an argument is invalid (the message names it), or an image is smaller than the coarsest stride or
            the patch that a mixer needs.
    """

    variants: ClassVar[Variants]
    optional: ClassVar[Mapping[str, float]] = {}
    default_init_cfg: ClassVar[list[dict]] = [dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0)]

    arch: Arch
    _: KW_ONLY
    in_channels: int = 3
    slide_stages: Sequence[int] = ()
    kernel_size: int | Sequence[int] = 3
    attn_backend: str | None = None
    out_indices: Sequence[int] = (0, 1, 2, 3)
    frozen_stages: int = -1
    stage_norm: StageNorm = None
    qkv_bias: bool = True
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.1
    with_cp: bool = False
    norm_cfg: dict = field(default_factory=lambda: dict(type='LN', eps=1e-6))
    init_cfg: InitCfg = None
    deploy: bool = False

    def __post_init__(self) -> None:
        super().__init__(self.init_cfg or self.default_init_cfg)
        self.row = pick_arch(self.arch, self.variants, self.optional)
        self.check_arguments()
        depths = self.row['depths']
        rates = iter(torch.linspace(0, self.drop_path_rate, sum(depths), device='cpu').tolist())
        # Parameters after the last output would get no gradient, and distributed training would fail.
        built = depths[: max(self.out_indices) + 1]
        blocks = [
            [self._build_block(stage, index, next(rates)) for index in range(depth)]
            for stage, depth in enumerate(built)
        ]
        self.stages: Any = ModuleList([self._build_stage(stage, blocks[stage]) for stage in range(len(built))])
        self.min_size = self._min_size()
        if self.deploy:
            self.switch_to_deploy()
        self._freeze()

    def check_arguments(self) -> None:
        """Checks the arguments and derives those of each stage; hosts extend it for their own arguments."""
        self.num_stages = len(self.row['depths'])
        self.kernel_sizes = per_stage('kernel_size', self.kernel_size, self.num_stages, odd=True)
        check_integer('in_channels', self.in_channels)
        check_stages('slide_stages', self.slide_stages, self.num_stages)
        check_stages('out_indices', self.out_indices, self.num_stages)
        if not self.out_indices:
            raise ValueError('out_indices must have at least one stage, got ()')
        if type(self.frozen_stages) is not int or not -1 <= self.frozen_stages <= self.num_stages:
            raise ValueError(
                f'frozen_stages must be in -1..{self.num_stages}, got frozen_stages={self.frozen_stages!r}'
            )
        if self.stage_norm not in ('next', 'output', None):
            raise ValueError(f"stage_norm must be 'next', 'output' or None, got stage_norm={self.stage_norm!r}")
        for name in ('drop_rate', 'attn_drop_rate', 'drop_path_rate'):
            check_rate(name, getattr(self, name))
        check_backend('attn_backend', self.attn_backend)

    def build_embedding(self, stage: int, in_channels: int, embed_dims: int) -> nn.Module:
        """(B, H, W, in_channels) to (B, H / stride, W / stride, embed_dims), with that `stride` as an attribute."""
        raise NotImplementedError

    def build_mixer(self, stage: int, index: int, **shared: Any) -> nn.Module:
        """The host's own attention in a block; its `min_size` is the minimum side of the map, if there is one.

        Args:
            shared: embed_dims, num_heads, qkv_bias, attn_drop_rate and proj_drop_rate.
        """
        raise NotImplementedError

    def has_slide_attention(self, stage: int, index: int) -> bool:
        """Whether Slide Attention replaces the host's own attention in a block."""
        return stage in self.slide_stages

    def build_mlp(self, stage: int, embed_dims: int) -> nn.Module:
        return MLP(embed_dims, round(self.row['mlp_ratios'][stage] * embed_dims), self.drop_rate)

    def build_stage(self, embed: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module, embed_dims: int) -> Stage:
        return Stage(embed, blocks, norm)

    def _build_block(self, stage: int, index: int, drop_path_rate: float) -> Block:
        embed_dims = self.row['embed_dims'][stage]
        shared: dict[str, Any] = dict(
            embed_dims=embed_dims,
            num_heads=self.row['num_heads'][stage],
            qkv_bias=self.qkv_bias,
            attn_drop_rate=self.attn_drop_rate,
            proj_drop_rate=self.drop_rate,
        )
        mixer: nn.Module
        if self.has_slide_attention(stage, index):
            mixer = SlideAttention(kernel_size=self.kernel_sizes[stage], backend=self.attn_backend, **shared)
        else:
            mixer = self.build_mixer(stage, index, **shared)
        return Block(
            mixer,
            self.build_mlp(stage, embed_dims),
            embed_dims,
            drop_path_rate,
            self.norm_cfg,
            layer_scale=self.row['layer_scales'][stage] if 'layer_scales' in self.row else 0.0,
        )

    def _build_stage(self, stage: int, blocks: Sequence[nn.Module]) -> Stage:
        dims = self.row['embed_dims']
        embed = self.build_embedding(stage, dims[stage - 1] if stage else self.in_channels, dims[stage])
        # If a stage's map is not returned, the parameters of an output norm would be unused.
        normed = self.stage_norm == 'next' or (self.stage_norm == 'output' and stage in self.out_indices)
        norm = build_norm_layer(self.norm_cfg, dims[stage])[1] if normed else nn.Identity()
        return self.build_stage(embed, blocks, norm, dims[stage])

    @property
    def strides(self) -> tuple[int, ...]:
        """The stride of each stage's map, in pixels of the image."""
        return tuple(accumulate((stage.embed.stride for stage in self.stages), operator.mul))

    def _min_size(self) -> int:
        """The minimum side of an image: each stage's map needs at least one pixel and the mixers' min_size."""
        return max(
            stride * getattr(block.attn, 'min_size', 1)
            for stride, stage in zip(self.strides, self.stages, strict=True)
            for block in stage.blocks
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.shape[-2] < self.min_size or x.shape[-1] < self.min_size:  # min() would compare the two under export
            raise ValueError(f'images must have at least {self.min_size} pixels per side, got {tuple(x.shape[-2:])}')
        x = x.permute(0, 2, 3, 1)
        outs = []
        for index, stage in enumerate(self.stages):
            x, normed = stage(x, self.with_cp)
            if index in self.out_indices:
                # Contiguous, since mmcv's RoIAlign reads channels-last views in the wrong order.
                outs.append(normed.permute(0, 3, 1, 2).contiguous())
            if self.stage_norm == 'next':
                x = normed
        return tuple(outs)

    def switch_to_deploy(self) -> None:
        """Merges the paths of every Slide Attention and removes modules used only in training, in place."""
        modules: list[Any] = list(self.modules())
        for module in modules:
            if isinstance(module, SlideAttention):
                module.switch_to_deploy()
            if hasattr(module, 'attn_drop_rate'):
                module.attn_drop_rate = 0.0
            for name, child in module.named_children():
                if isinstance(child, nn.Dropout | DropPath):
                    setattr(module, name, nn.Identity())
        self.deploy = True

    def init_weights(self) -> None:
        configs: list[Any] = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg]
        pretrained = [x for x in configs if is_pretrained(x)]
        self.init_cfg = [x for x in configs if x not in pretrained]
        super().init_weights()
        self.init_cfg = configs
        for config in pretrained:
            load_pretrained(self, **{key: value for key, value in config.items() if key != 'type'})

    def train(self, mode: bool = True) -> 'Pyramid':
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        frozen = [self.stages[0].embed] if self.frozen_stages == 0 else self.stages[: max(0, self.frozen_stages)]
        for module in frozen:
            module.eval().requires_grad_(False)


def reduction_norm(norm_cfg: dict) -> dict:
    """The norm of patch embeddings and subsampled keys, where PVTv2 and Twins use a different eps than in blocks."""
    return dict(norm_cfg, eps=1e-5)
