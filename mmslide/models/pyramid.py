"""What every backbone here does the same way, written once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmslide.weights import load_pretrained

from .attention import SlideAttention

InitCfg = dict | list[dict] | None


class Stage(BaseModule):
    """Embedding, blocks and norm of one stage, on channels-last maps.

    Args:
        embed: (B, H, W, C_in) to (B, H', W', C).
        norm: of the stage's map; None for none.
        norm_feeds_next: whether the next stage sees the normed map, or only the outputs are normed.
        peg: a position encoding generator behind the first block, (B, H, W, C) to the same; None for none.
    """

    def __init__(
        self,
        embed: nn.Module,
        blocks: Sequence[nn.Module],
        norm: nn.Module | None,
        norm_feeds_next: bool,
        peg: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = ModuleList(blocks)
        self.peg = nn.Identity() if peg is None else peg
        self.norm = nn.Identity() if norm is None else norm
        self.norm_feeds_next = norm_feeds_next

    def forward(self, x: Tensor, with_cp: bool) -> Tensor:
        x = self.embed(x)
        for index, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if with_cp and torch.is_grad_enabled() else block(x)
            if index == 0:
                x = self.peg(x)
        return self.norm(x) if self.norm_feeds_next else x

    def output(self, x: Tensor) -> Tensor:
        return x if self.norm_feeds_next else self.norm(x)


class Pyramid(BaseModule):
    """A hierarchical backbone: (B, in_channels, H, W), both sides at least the coarsest stride, to one map a stage.

    Args:
        out_indices: stages (from 0) whose maps are put out.
        frozen_stages: -1 freezes nothing, 0 the first patch embedding, n also the first n stages whole.
        with_cp: recompute each block in backward instead of keeping its activations.
        init_cfg: mmengine's. `dict(type='Pretrained', checkpoint=FILE_OR_URL, prefix=None)` reads every layout that
            `mmslide.weights` knows; None draws linear weights from a truncated normal distribution with std 0.02.
        deploy: the form for inference, see `mmslide.deploy.fuse`; fused checkpoints load into it, and all others.

    Raises:
        ValueError: out_indices or frozen_stages do not fit the number of stages, or an image is smaller than the
            coarsest stride.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        out_indices: Sequence[int],
        frozen_stages: int,
        with_cp: bool,
        init_cfg: InitCfg,
        deploy: bool,
    ) -> None:
        super().__init__(init_cfg or dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0))
        self.init_cfg: Any
        check_stages('out_indices', out_indices, len(stages))
        if not out_indices:
            raise ValueError('out_indices must name at least one stage, got ()')
        if not -1 <= frozen_stages <= len(stages):
            raise ValueError(f'frozen_stages must be in -1..{len(stages)}, got {frozen_stages=}')
        self.stages = ModuleList(stages)
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        if deploy:
            self.switch_to_deploy()
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        stride = 2 ** (len(self.stages) + 1)
        if x.shape[-2] < stride or x.shape[-1] < stride:  # min() would compare height and width under export
            raise ValueError(f'images must be at least {stride} pixels a side, got {tuple(x.shape[-2:])}')
        x = x.permute(0, 2, 3, 1)
        outs = []
        for index, stage in enumerate(self.stages[: max(self.out_indices) + 1]):
            x = stage(x, self.with_cp)
            if index in self.out_indices:
                # Contiguous: mmcv's RoIAlign reads the memory of a channels-last view in the wrong order.
                outs.append(stage.output(x).permute(0, 3, 1, 2).contiguous())
        return tuple(outs)

    def switch_to_deploy(self) -> None:
        """Merges the paths of every Slide Attention and takes out what acts in training only, in place."""
        for module in list(self.modules()):
            if isinstance(module, SlideAttention):
                module.switch_to_deploy()
            if hasattr(module, 'attn_drop_rate'):
                module.attn_drop_rate = 0.0
            for name, child in module.named_children():
                if isinstance(child, nn.Dropout | DropPath):
                    setattr(module, name, nn.Identity())

    def init_weights(self) -> None:
        configs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg]
        pretrained = [x for x in configs if x['type'] in ('Pretrained', 'PretrainedInit')]
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


def pick_arch(arch: str | Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The table row of a variant by name, or a row of the user's own with the same keys, checked.

    In a user's row one number stands for all stages, and for embed_dims it doubles from stage to stage.

    Raises:
        ValueError: the name is unknown, keys are missing or unknown, or the values do not fit together.
    """
    if isinstance(arch, str):
        if arch not in variants:
            raise ValueError(f'arch must be one of {list(variants)} or a dict, got {arch=}')
        return dict(variants[arch])
    keys = set(next(iter(variants.values())))
    if set(arch) != keys:
        raise ValueError(f'an arch dict must have the keys {sorted(keys)}, got {sorted(arch)}')
    count = len(arch['depths'])
    row = {
        key: [value * 2**i if key == 'embed_dims' else value for i in range(count)] if isinstance(value, int) else value
        for key, value in arch.items()
    }
    for key, value in row.items():
        if len(value) != count:
            raise ValueError(f'arch must give one value for each of its {count} stages, got {key}={value}')
    for embed_dims, num_heads in zip(row['embed_dims'], row['num_heads'], strict=True):
        if embed_dims % num_heads:
            raise ValueError(
                f'embed_dims must be divisible by num_heads in each stage, got {embed_dims=}, {num_heads=}'
            )
    return row


def check_stages(name: str, stages: Sequence[int], count: int) -> None:
    if isinstance(stages, int) or len(set(stages)) != len(stages) or not set(stages) <= set(range(count)):
        raise ValueError(f'{name} must be a list of different stages from 0 to {count - 1}, got {name}={stages}')


def per_stage(name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    values = (value,) * count if isinstance(value, int) else tuple(value)
    if len(values) != count:
        raise ValueError(f'{name} must be one number or one for each of the {count} stages, got {name}={value}')
    return values


def build_blocks(depths: Sequence[int], drop_path_rate: float, build: Callable[[int, int, float], nn.Module]) -> list:
    """For each stage its blocks: `build(stage, index, rate)`, the drop path rate rising linearly over all blocks."""
    rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
    return [[build(stage, index, next(rates)) for index in range(depth)] for stage, depth in enumerate(depths)]
