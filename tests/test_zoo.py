"""What every backbone has to pass. A new one is a line in ZOO; its numbers are compared in a file of its own."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomize, relative_error
from mmcv.cnn.bricks import DropPath
from torch import nn

from mmslide.deploy import fuse
from mmslide.models import SlideCSWin, SlideNAT, SlidePVT, SlidePVTv2, SlideSwin, TwinsPCPVT, TwinsSVT
from mmslide.models.attention import SlideAttention

DIMS, DEPTHS = (16, 32, 48, 64), (1, 2, 3, 2)
ROW = dict(embed_dims=DIMS, depths=DEPTHS, num_heads=(1, 2, 3, 4), mlp_ratios=2)
SR_ROW = dict(ROW, sr_ratios=(8, 4, 2, 1))
STRIP_ROW = dict(ROW, num_heads=(2, 4, 6, 4), split_sizes=(1, 2, 3, 7))
STAGES = range(4)


@dataclass(frozen=True)
class Backbone:
    cls: Callable[..., Any]
    row: dict  # of a mini model
    side: Callable[[int, int], int]  # of the map at a stage, for an image of that side
    slides: Callable[[int], bool] = lambda index: True  # the blocks of a stage that Slide Attention can be put in


def cropped(side, stage):
    return side // 2 ** (stage + 2)


def padded(side, stage):
    return math.ceil(side / 2 ** (stage + 2))


def strided(side, stage):
    """A 7×7 convolution with stride 4 and padding 2, then 3×3 ones with stride 2 and padding 1."""
    return math.ceil((side + 1) // 4 / 2**stage)


ZOO = [
    Backbone(SlidePVT, SR_ROW, cropped),
    Backbone(SlidePVTv2, SR_ROW, padded),
    Backbone(SlideSwin, ROW, padded),
    Backbone(SlideCSWin, STRIP_ROW, strided),
    Backbone(TwinsPCPVT, SR_ROW, cropped),
    Backbone(TwinsSVT, SR_ROW, cropped, slides=lambda index: index % 2 == 0),
    Backbone(SlideNAT, ROW, padded),
]
ARCHS = [(backbone, arch) for backbone in ZOO for arch in backbone.cls.variants]


def name(value):
    return value.cls.__name__ if isinstance(value, Backbone) else None


EVERY = pytest.mark.parametrize('backbone', ZOO, ids=name)


def mini(backbone, **kwargs):
    """A small model with random parameters, whose first two stages have Slide Attention."""
    return randomize(backbone.cls(backbone.row, **{'slide_stages': (0, 1), 'drop_path_rate': 0.0, **kwargs}))


def outputs(model, image):
    with torch.no_grad():
        return model.eval()(image)


def assert_close(outs, wanted, tolerance):
    for out, reference in zip(outs, wanted, strict=True):
        assert relative_error(out, reference) < tolerance


@pytest.mark.parametrize(
    'slide_stages',
    [pytest.param((), marks=pytest.mark.slow), (0, 1), pytest.param((0, 1, 2, 3), marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(('backbone', 'arch'), ARCHS, ids=name)
def test_every_arch(backbone, arch, slide_stages):
    row = backbone.cls.variants[arch]
    with torch.device('meta'):
        model = backbone.cls(arch, slide_stages=slide_stages)
        image = torch.empty(2, 3, 224, 256)
    for form in (model, fuse(model)):
        outs = outputs(form, image)
        sides = [(224 // stride, 256 // stride) for stride in (4, 8, 16, 32)]
        assert [out.shape for out in outs] == [(2, c, *s) for c, s in zip(row['embed_dims'], sides, strict=True)]
    assert [len(stage.blocks) for stage in model.stages] == list(row['depths'])
    slides = [[isinstance(block.attn, SlideAttention) for block in stage.blocks] for stage in model.stages]
    assert slides == [
        [stage in slide_stages and backbone.slides(index) for index in range(depth)]
        for stage, depth in enumerate(row['depths'])
    ]


@EVERY
@pytest.mark.parametrize('size', [(32, 32), (33, 63), (65, 97), (120, 129), (32, 260)])
@pytest.mark.parametrize('slide_stages', [(), (0, 1), (0, 1, 2, 3)])
def test_any_size_trains(backbone, size, slide_stages):
    model = mini(backbone, slide_stages=slide_stages, in_channels=4)
    outs = model(torch.randn(2, 4, *size))
    for stage, out in enumerate(outs):
        assert out.shape == (2, DIMS[stage], *(backbone.side(side, stage) for side in size))
        assert out.is_contiguous()
    sum(out.square().mean() for out in outs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if min(size) > 64:  # below, a query may have one key alone and no say
        assert all(p.grad.any() for p in model.parameters())


@EVERY
def test_images_below_the_coarsest_stride_are_refused(backbone):
    with pytest.raises(ValueError, match=r'at least 32 pixels per side, got \(31, 64\)'):
        mini(backbone)(torch.randn(1, 3, 31, 64))


@EVERY
@pytest.mark.parametrize('training', [True, False])
def test_an_empty_batch(backbone, training):
    model = mini(backbone).train(training)
    outs = model(torch.randn(0, 3, 64, 96))
    assert [out.shape for out in outs] == [(0, c, 16 // 2**i, 24 // 2**i) for i, c in enumerate(DIMS)]
    sum(out.sum() for out in outs).backward()
    for key, parameter in model.named_parameters():
        # scaled_dot_product_attention leaves its mask out when there are no queries.
        if not key.endswith('relative_position_bias_table'):
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), key


@EVERY
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_other_dtypes(backbone, dtype):
    model, image = mini(backbone), torch.randn(1, 3, 72, 100)
    wanted = outputs(model.double(), image.double())
    outs = outputs(model.to(dtype), image.to(dtype))
    assert {out.dtype for out in outs} == {dtype}
    assert_close(outs, wanted, 1e-12 if dtype == torch.float64 else 0.1)


@EVERY
def test_autocast(backbone):
    model, image = mini(backbone), torch.randn(1, 3, 72, 100)
    wanted = outputs(model, image)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outs = outputs(model, image)
    assert_close(outs, wanted, 0.1)


@EVERY
def test_checkpointing_changes_nothing_but_memory(backbone):
    image = torch.randn(1, 3, 64, 100)
    grads, saved = [], []
    for with_cp in (False, True):
        model = mini(backbone, with_cp=with_cp)
        count = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, count=count: count.append(x.nbytes) or x, lambda x: x):
            outs = model(image)
        saved.append(sum(count))
        sum(out.square().sum() for out in outs).backward()
        grads.append([p.grad for p in model.parameters()])
    assert_close(*grads, 1e-5)
    assert saved[1] < 0.7 * saved[0]


@EVERY
@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 4])
def test_frozen_stages_stay_as_they_are(backbone, frozen_stages):
    model = mini(backbone, frozen_stages=frozen_stages, drop_rate=0.5).train()
    for index, stage in enumerate(model.stages):
        frozen = index < frozen_stages
        for child_name, child in stage.named_children():
            fixed = frozen or (child_name == 'embed' and index == frozen_stages == 0)
            assert all(p.requires_grad != fixed for p in child.parameters())
            assert all(m.training != fixed for m in child.modules())


@EVERY
@pytest.mark.parametrize('out_indices', [(0,), (0, 2), (1, 3)])
@pytest.mark.parametrize('stage_norm', [None, 'next', 'output'])
def test_only_what_is_put_out_is_built(backbone, out_indices, stage_norm):
    # All stages of the arch may be named, built or not.
    options = dict(slide_stages=(0, 3), stage_norm=stage_norm, drop_path_rate=0.3)
    whole = mini(backbone, **options)
    model = mini(backbone, out_indices=out_indices, **options)
    model.load_state_dict({key: value for key, value in whole.state_dict().items() if key in model.state_dict()})
    assert len(model.stages) == out_indices[-1] + 1
    for stage, other in zip(model.stages, whole.stages, strict=False):
        for block, reference in zip(stage.blocks, other.blocks, strict=True):
            assert block.drop_path.drop_prob == reference.drop_path.drop_prob
    image = torch.randn(1, 3, 96, 96)
    wanted = outputs(whole, image)
    outs = model.eval()(image)
    assert_close(outs, [wanted[index] for index in out_indices], 1e-5)
    sum(out.square().mean() for out in outs).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())  # else DDP stops
    assert len(mini(backbone, out_indices=out_indices, frozen_stages=4).stages) == out_indices[-1] + 1


@EVERY
@pytest.mark.parametrize('stage_norm', [None, 'next', 'output'])
def test_what_the_norms_of_stages_are_put_on(backbone, stage_norm):
    model, image = mini(backbone, stage_norm=stage_norm), torch.randn(1, 3, 64, 64)
    assert [isinstance(stage.norm, nn.LayerNorm) for stage in model.stages] == [stage_norm is not None] * 4
    if stage_norm is not None:
        before = outputs(model, image)
        nn.init.constant_(model.stages[0].norm.weight, 3.0)
        after = outputs(model, image)
        assert not torch.equal(after[0], before[0])
        assert torch.equal(after[1], before[1]) == (stage_norm == 'output')


@EVERY
def test_drop_path_rises_linearly_to_its_rate_and_acts_once_a_branch(backbone):
    model = mini(backbone, drop_path_rate=0.3)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.3, sum(DEPTHS)))
    block = model.stages[-1].blocks[-1].train()
    x = torch.randn(4000, 1, 1, 64)
    nn.init.zeros_(block.ffn.layers[1].weight), nn.init.zeros_(block.ffn.layers[1].bias)
    dropped = (block(x) == x).flatten(1).all(1).double().mean()
    assert abs(dropped - 0.3) < 0.03


@EVERY
def test_dropout_reaches_mixers_and_mlps(backbone):
    model = mini(backbone, slide_stages=(0, 3), drop_rate=0.25, attn_drop_rate=0.5)
    for block in (block for stage in model.stages for block in stage.blocks):
        assert (block.attn.proj_drop.p, block.attn.attn_drop_rate) == (0.25, 0.5)
        assert {m.p for m in block.ffn.modules() if isinstance(m, nn.Dropout)} == {0.25}


@EVERY
def test_kernel_size_for_each_stage(backbone):
    model = mini(backbone, kernel_size=(3, 7, 3, 3))
    assert model.stages[1].blocks[0].attn.shift.shape == (49, 7, 7)
    assert mini(backbone, kernel_size=5).stages[0].blocks[0].attn.shift.shape == (25, 5, 5)


@EVERY
@pytest.mark.parametrize('attn_backend', ['reference', 'conv'])
def test_backend_is_the_users_choice(backbone, attn_backend):
    model, image = mini(backbone, attn_backend=attn_backend), torch.randn(1, 3, 48, 64)
    assert model.stages[0].blocks[0].attn.backend == attn_backend
    assert_close(outputs(model, image), outputs(mini(backbone), image), 1e-5)


@EVERY
@pytest.mark.parametrize('qkv_bias', [True, False])
def test_qkv_bias(backbone, qkv_bias):
    names = [key for key, _ in mini(backbone, qkv_bias=qkv_bias).named_parameters()]
    assert any(key.endswith(('.qkv.bias', '.q.bias', '.kv.bias')) for key in names) == qkv_bias


@EVERY
def test_fused_is_the_same(backbone):
    model, image = mini(backbone, drop_path_rate=0.3, drop_rate=0.1, attn_drop_rate=0.1), torch.randn(1, 3, 65, 96)
    fused = fuse(model)
    assert_close(outputs(fused, image), outputs(model, image), 1e-5)
    assert not [m for m in fused.modules() if isinstance(m, DropPath | nn.Dropout) or hasattr(m, 'shift')]
    built = backbone.cls(backbone.row, slide_stages=(0, 1), deploy=True)
    built.load_state_dict(fused.state_dict())
    assert_close(outputs(built, image), outputs(fused, image), 1e-6)


@EVERY
def test_init_weights(backbone):
    model = mini(backbone)
    model.init_weights()
    weights = [m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear)]
    assert torch.cat(weights).std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None)


@EVERY
def test_arguments_have_names_that_tools_see(backbone):
    parameters = inspect.signature(backbone.cls).parameters
    assert next(iter(parameters)) == 'arch'
    assert {x.kind for key, x in parameters.items() if key != 'arch'} == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError, match='slide_stage'):
        backbone.cls(slide_stage=(0,))


@EVERY
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(arch='huge'), r"arch must be one of \['.*'\] or a dict, got arch='huge'"),
        (dict(arch=None), r'arch must be one of .* or a dict, got arch=None'),
        (dict(arch=dict(embed_dims=(8,))), r'an arch dict must have the keys'),
        (dict(in_channels=0), r'in_channels must be a positive integer, got in_channels=0'),
        (dict(slide_stages=(0, 4)), r'slide_stages must be a list of different stages from 0 to 3.*\(0, 4\)'),
        (dict(slide_stages=(1, 1)), r'slide_stages must be a list of different stages'),
        (dict(slide_stages=1), r'slide_stages must be a list'),
        (dict(slide_stages=None), r'slide_stages must be a list .*got slide_stages=None'),
        (dict(slide_stages=(True,)), r'slide_stages must be a list'),
        (dict(out_indices=(4,)), r'out_indices must be a list of different stages from 0 to 3'),
        (dict(out_indices=None), r'out_indices must be a list .*got out_indices=None'),
        (dict(out_indices=()), r'out_indices must have at least one stage'),
        (dict(out_indices=(0,), frozen_stages=5), r'frozen_stages must be in -1..4, got frozen_stages=5'),
        (dict(frozen_stages=None), r'frozen_stages must be in -1..4, got frozen_stages=None'),
        (dict(frozen_stages=True), r'frozen_stages must be in -1..4, got frozen_stages=True'),
        (dict(kernel_size=(3, 3)), r'kernel_size must be one number or one for each of the 4 stages'),
        (dict(kernel_size=4), r'kernel_size must be a positive odd integer, got kernel_size=4'),
        (dict(kernel_size=(3, 3, 3, 4)), r'kernel_size must be a positive odd integer, got kernel_size=4'),
        (dict(kernel_size=True), r'kernel_size must be a positive odd integer, got kernel_size=True'),
        (dict(kernel_size=3.0), r'kernel_size must be a positive odd integer, got kernel_size=3\.0'),
        (dict(kernel_size=None), r'kernel_size must be a positive odd integer, got kernel_size=None'),
        (dict(attn_backend='natve'), r"attn_backend must be one of .*'native'.* or None, got attn_backend='natve'"),
        (dict(stage_norm=True), r"stage_norm must be 'next', 'output' or None, got stage_norm=True"),
        (dict(drop_rate=1.0), r'drop_rate must be a number in \[0, 1\), got drop_rate=1\.0'),
        (dict(attn_drop_rate=-0.1), r'attn_drop_rate must be a number in \[0, 1\), got attn_drop_rate=-0\.1'),
        (dict(drop_path_rate=1.5), r'drop_path_rate must be a number in \[0, 1\), got drop_path_rate=1\.5'),
        (dict(drop_path_rate=float('nan')), r'drop_path_rate must be a number in \[0, 1\), got drop_path_rate=nan'),
        (dict(drop_path_rate=None), r'drop_path_rate must be a number in \[0, 1\), got drop_path_rate=None'),
    ],
)
def test_wrong_arguments_are_named(backbone, arguments, message):
    with pytest.raises(ValueError, match=message):
        backbone.cls(**arguments)


@EVERY
@pytest.mark.parametrize(
    ('row', 'message'),
    [
        (dict(num_heads=(1, 2)), r'one value for each of its 4 stages, got num_heads=\(1, 2\)'),
        (dict(num_heads=(1, 3, 3, 4)), r'embed_dims must be divisible by num_heads, got embed_dims=32, num_heads=3'),
        (dict(num_heads=0), r'only positive integers, got num_heads=\[0, 0, 0, 0\]'),
        (dict(num_heads=None), r'one value for each of its 4 stages, got num_heads=None'),
        (dict(embed_dims=16.0), r'only positive integers, got embed_dims=\[16\.0, '),
        (dict(depths=1), r'depths as a list with one number for each stage, got depths=1'),
        (dict(depths=()), r'depths as a list with one number for each stage, got depths=\(\)'),
        (dict(depths=(1, 0, 1, 1)), r'only positive integers, got depths=\(1, 0, 1, 1\)'),
        (dict(depths=None), r'depths as a list with one number for each stage, got depths=None'),
        (dict(mlp_ratios=0), r'only positive numbers, got mlp_ratios=\[0, 0, 0, 0\]'),
        (dict(mlp_ratios='4444'), r"only positive numbers, got mlp_ratios='4444'"),
    ],
)
def test_wrong_arch_rows_are_named(backbone, row, message):
    with pytest.raises(ValueError, match=message):
        backbone.cls(dict(backbone.row, **row))
