import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import DefaultOptimWrapperConstructor, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmslide.layer_decay import PARAMWISE_KEYS
from mmslide.models import SlidePVT, SlideSwin, TwinsSVT

ROOT = Path(__file__).parents[1]
ARCH = dict(embed_dims=(16, 32), depths=(1, 2), num_heads=(1, 2), mlp_ratios=2)
ARCH_SR = dict(ARCH, sr_ratios=(2, 1))
BACKBONES = {
    'SlideSwin': lambda: SlideSwin(ARCH, out_indices=(0, 1)),
    'SlidePVT': lambda: SlidePVT(ARCH_SR, out_indices=(0, 1)),
    'TwinsSVT': lambda: TwinsSVT(ARCH_SR, out_indices=(0, 1)),
}
LR, WEIGHT_DECAY = 0.01, 0.05
# By hand, for three blocks: rate to the power of 4 - layer.
POWERS = {
    'stages.0.embed': 4,
    'stages.0.blocks.0': 3,
    'stages.0.peg': 3,
    'stages.0.norm': 3,
    'stages.1.embed': 2,
    'stages.1.blocks.0': 2,
    'stages.1.peg': 2,
    'stages.1.blocks.1': 1,
    'stages.1.norm': 1,
}


class Classifier(BaseModel):
    """A backbone under another name, and a head."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(32, 10)

    def forward(self, inputs):
        return self.head(self.trunk(inputs)[-1].mean((2, 3)))


def build(model, lr=LR, **paramwise_cfg):
    """The optimizer, as a Runner builds it."""
    wrapper = dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', weight_decay=WEIGHT_DECAY, **({} if lr is None else dict(lr=lr))),
        constructor='mmslide.LayerDecayOptimWrapperConstructor',
        paramwise_cfg=paramwise_cfg,
    )
    return build_optim_wrapper(model, wrapper).optimizer


def settings(model, optimizer):
    """(lr, weight decay) of each parameter by its name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group['lr'], group['weight_decay'])
        for group in optimizer.param_groups
        for parameter in group['params']
    }


def expected_rate(name, prefix, decay_rate):
    powers = [power for part, power in POWERS.items() if name.startswith(f'{prefix}{part}.')]
    assert len(powers) == name.startswith(prefix)
    return LR * decay_rate ** sum(powers)


@pytest.mark.parametrize('backbone', BACKBONES)
def test_rates_by_hand(backbone, log):
    model = Classifier(BACKBONES[backbone]())
    optimizer = build(model, decay_rate=0.5)
    found = settings(model, optimizer)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, (lr, weight_decay) in found.items():
        assert lr == pytest.approx(expected_rate(name, 'trunk.', 0.5)), name
        assert weight_decay == WEIGHT_DECAY
    assert len(optimizer.param_groups) == 5  # one for each of four layers, one for the head
    table = next(record.message for record in log.records if 'decay_rate=0.5' in record.message).splitlines()
    assert [line.split()[0] for line in table[-5:]] == ['6.25e-04', '1.25e-03', '2.50e-03', '5.00e-03', '1.00e-02']
    assert table[-1].endswith('head.weight')


def config_of(scope):
    """A RetinaNet or a Semantic FPN, on a mini backbone."""
    path = {'mmdet': 'retinanet', 'mmseg': 'semantic-fpn'}[scope]
    model = Config.fromfile(ROOT / f'configs/_base_/models/{path}.py').model
    model.backbone = dict(type='mmslide.SlideSwin', arch=ARCH, out_indices=(0, 1))
    model.neck.in_channels = [16, 32]
    return model


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_in_a_detector_and_in_a_segmentor(scope):
    pytest.importorskip(scope)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config_of(scope))
        found = settings(model, build(model, decay_rate=0.8))
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, (lr, _) in found.items():
        assert lr == pytest.approx(expected_rate(name, 'backbone.', 0.8)), name


def test_inside_a_wrapper_for_distributed_training(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = Classifier(BACKBONES['SlidePVT']())
        found = settings(model, build(MMDistributedDataParallel(model, device_ids=None), decay_rate=0.5))
    finally:
        torch.distributed.destroy_process_group()
    assert found == settings(model, build(model, decay_rate=0.5))


def test_the_other_rules_hold_too():
    model = Classifier(BACKBONES['SlideSwin']())
    optimizer = build(
        model,
        decay_rate=0.5,
        norm_decay_mult=0.0,
        bias_decay_mult=0.5,
        bias_lr_mult=2.0,
        custom_keys={
            'relative_position_bias': dict(decay_mult=0.0),
            'deform_weight': dict(lr_mult=10.0),
            'head': dict(lr_mult=3.0, betas=(0.8, 0.9)),
        },
    )
    found = settings(model, optimizer)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, (lr, weight_decay) in found.items():
        module, parameter = name.rsplit('.', 1)
        lr_mult, decay_mult = 1.0, 1.0
        if 'relative_position_bias' in name:
            decay_mult = 0.0
        elif 'deform_weight' in name:
            lr_mult = 10.0
        elif module == 'head':
            lr_mult = 3.0
        elif module in norms:
            decay_mult = 0.0
        elif parameter == 'bias':
            lr_mult, decay_mult = 2.0, 0.5
        assert lr == pytest.approx(lr_mult * expected_rate(name, 'trunk.', 0.5)), name
        assert weight_decay == decay_mult * WEIGHT_DECAY, name
    assert optimizer.param_groups[-1]['betas'] == (0.8, 0.9)
    groups = [(group['lr'], group['weight_decay']) for group in optimizer.param_groups]
    assert len(set(groups)) == len(groups)


def test_frozen_parameters_are_left_out_and_count_as_layers():
    model = Classifier(BACKBONES['SlideSwin']())
    whole = settings(model, build(model, decay_rate=0.5))
    model.trunk.frozen_stages = 1
    model.train()
    found = settings(model, build(model, decay_rate=0.5))
    assert set(found) == {name for name in whole if not name.startswith('trunk.stages.0.')}
    assert found == {name: whole[name] for name in found}


@pytest.mark.parametrize(
    ('paramwise_cfg', 'message'),
    [
        (dict(norm_decay_mult=0.0), 'must have a decay_rate above 0 and at most 1, got decay_rate=None'),
        (dict(decay_rate=0), 'got decay_rate=0'),
        (dict(decay_rate=1.5), r'got decay_rate=1\.5'),
        (dict(decay_rate=float('nan')), 'got decay_rate=nan'),
        (dict(decay_rate='0.9'), "got decay_rate='0.9'"),
        (dict(decay_rate=0.9, num_layers=6), r"can have the keys .*'norm_decay_mult'.*, got \['num_layers'\]"),
        (dict(decay_rate=0.9, lr=None), 'the optimizer must have an lr'),
    ],
)
def test_wrong_arguments_are_named(paramwise_cfg, message):
    with pytest.raises(ValueError, match=message):
        build(Classifier(BACKBONES['SlideSwin']()), **paramwise_cfg)


def test_a_model_without_our_backbone_is_refused():
    with pytest.raises(ValueError, match='needs a model with a backbone of mmslide, got Sequential'):
        build(nn.Sequential(nn.Linear(2, 2)), decay_rate=0.9)


def test_keys_are_those_that_mmengine_reads():
    source = inspect.getsource(DefaultOptimWrapperConstructor.add_params)
    assert set(re.findall(r"paramwise_cfg\.get\('(\w+)'", source)) == PARAMWISE_KEYS - {'decay_rate'}


@pytest.mark.slow
@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_nothing_need_be_imported(scope):
    pytest.importorskip(scope)
    script = f"""
import sys
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, DefaultScope
with DefaultScope.overwrite_default_scope({scope!r}):
    assert 'mmslide' not in sys.modules
    cfg = dict(optimizer=dict(type='AdamW', lr=1.0))
    kind = 'mmslide.LayerDecayOptimWrapperConstructor'
    OPTIM_WRAPPER_CONSTRUCTORS.build(dict(type=kind, optim_wrapper_cfg=cfg, paramwise_cfg=dict(decay_rate=0.9)))
"""
    subprocess.run([sys.executable, '-c', script], check=True, cwd=ROOT)
