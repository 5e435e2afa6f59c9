from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmslide.models.pyramid import Pyramid
from mmslide.registry import OPTIM_WRAPPER_CONSTRUCTORS

PARAMWISE_KEYS = {
    'decay_rate',
    # DefaultOptimWrapperConstructor's
    *('custom_keys', 'bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'dwconv_decay_mult', 'flat_decay_mult'),
    *('dcn_offset_lr_mult', 'bypass_duplicate'),
}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning-rate decay (as in ELECTRA, ICLR 2020, arXiv 2003.10555) for the backbones of mmslide.

    In a backbone with N blocks over all stages, the first patch embedding is layer 0 and the blocks are layers 1 to N.
    A later stage's embedding and position encoding belong to the stage's first block, its norm to the last. A layer's
    learning rate is lr · decay_rate^(N + 1 - layer); everything outside the backbone has the learning rate lr.

    In a config of mmdet or mmseg, without importing anything:

        optim_wrapper = dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
            constructor='mmslide.LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(decay_rate=0.9, norm_decay_mult=0.0),
        )

    Args:
        optim_wrapper_cfg: config of the optimizer wrapper, with the optimizer and its lr.
        paramwise_cfg: decay_rate, in (0, 1], and all options of mmengine's `DefaultOptimWrapperConstructor`, such as
            norm_decay_mult or custom_keys, whose lr_mult multiplies the decayed rate.

    Raises:
        ValueError: decay_rate is missing or out of range, paramwise_cfg has unknown keys, or the optimizer has no lr;
            when called: the model has no mmslide backbone.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        unknown = set(self.paramwise_cfg) - PARAMWISE_KEYS
        if unknown:
            raise ValueError(f'paramwise_cfg can have the keys {sorted(PARAMWISE_KEYS)}, got {sorted(unknown)}')
        decay_rate = self.paramwise_cfg.get('decay_rate')
        if not isinstance(decay_rate, int | float) or not 0 < decay_rate <= 1:
            raise ValueError(f'paramwise_cfg must have a decay_rate above 0 and at most 1, got {decay_rate=}')
        if self.base_lr is None:
            raise ValueError(f'the optimizer must have an lr, got {self.optimizer_cfg}')
        self.decay_rate = decay_rate

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module: int | float | None = None
    ) -> None:
        super().add_params(params, module, prefix, is_dcn_module)
        if not prefix:  # the base class calls this for every submodule; an empty prefix is the whole model, at the end
            params[:] = self._decay(params, module)

    def _decay(self, params: list[dict], model: nn.Module) -> list[dict]:
        """The base class's single-parameter groups with decayed rates; groups with the same settings are merged."""
        backbones = [module for module in model.modules() if isinstance(module, Pyramid)]
        if not backbones:
            raise ValueError(f'layer-wise decay needs a model with a backbone of mmslide, got {type(model).__name__}')
        scales: dict[nn.Parameter, float] = {}
        for backbone in backbones:
            layers = layer_ids(backbone)
            scales |= {x: self.decay_rate ** (max(layers.values()) + 1 - layer) for x, layer in layers.items()}

        groups: dict[str, dict[str, Any]] = {}
        for group in params:
            (parameter,) = group.pop('params')
            settings = {key: value for key, value in group.items() if key not in ('lr_mult', 'decay_mult')}
            settings.setdefault('lr', self.base_lr)
            settings['lr'] *= scales.get(parameter, 1.0)
            if self.base_wd is not None:
                settings.setdefault('weight_decay', self.base_wd)
            groups.setdefault(repr(sorted(settings.items())), dict(settings, params=[]))['params'].append(parameter)
        print_log(self._table(list(groups.values()), model), logger='current')
        return list(groups.values())

    def _table(self, groups: list[dict], model: nn.Module) -> str:
        names = {parameter: name for name, parameter in model.named_parameters()}
        lines = [
            f'Layer-wise learning rates, decay_rate={self.decay_rate}:',
            '      lr  weight decay  parameters  the first of them',
        ]
        for group in groups:
            count = sum(parameter.numel() for parameter in group['params'])
            decay = group.get('weight_decay', 'default')
            lines.append(f'{group["lr"]:8.2e}  {decay:>12}  {count:>10,}  {names[group["params"][0]]}')
        return '\n'.join(lines)


def layer_ids(backbone: Pyramid) -> dict[nn.Parameter, int]:
    """The layer of every parameter: see `LayerDecayOptimWrapperConstructor`."""
    layers: dict[nn.Parameter, int] = {}
    first = 1
    for stage in backbone.stages:
        layers |= dict.fromkeys(stage.parameters(), first)
        for layer, block in enumerate(stage.blocks, first):
            layers |= dict.fromkeys(block.parameters(), layer)
        first += len(stage.blocks)
        layers |= dict.fromkeys(stage.norm.parameters(), first - 1)
    return layers | dict.fromkeys(backbone.stages[0].embed.parameters(), 0)
