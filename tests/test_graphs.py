"""Backbones and token mixers as graphs: compiled and traced."""

import contextlib
import copy

import pytest
import torch
from helpers import randomize, relative_error
from mmengine.analysis import get_model_complexity_info
from test_zoo import EVERY

from mmslide.models.attention import (
    CrossShapedWindowAttention,
    LocallyGroupedAttention,
    NeighborhoodAttention,
    PooledAttention,
    SlideAttention,
    SubsampledAttention,
    WindowAttention,
)

SIZE = 64, 100  # the second maps are larger than a window, and do not divide by one


def small(backbone):
    """Two stages, with every mixer that the class has; for CSWin, whose last stage has one of its own, three."""
    row = dict(backbone.row, embed_dims=(16, 32), num_heads=(1, 2), depths=(2, 2))
    if 'sr_ratios' in row:
        row['sr_ratios'] = (2, 1)
    if 'split_sizes' in row:
        row.update(embed_dims=(16, 32, 48), num_heads=(1, 2, 3), depths=(1, 1, 1), split_sizes=(1, 3, 3))
    stages = range(len(row['depths']))
    return randomize(backbone.cls(row, out_indices=stages, drop_path_rate=0.0, slide_stages=(0,)))


def step(function, model, x, precision):
    """Outputs and the gradients of all parameters, by name."""
    around = torch.autocast('cpu', dtype=torch.bfloat16) if precision == 'autocast' else contextlib.nullcontext()
    with around:
        outs = function(x)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = torch.autograd.grad(sum(out.float().square().mean() for out in outs), list(model.parameters()))
    return outs, dict(zip(dict(model.named_parameters()), grads, strict=True))


def assert_compiled_is_eager(model, x, precision, backend):
    torch.compiler.reset()
    outs, grads = step(model, model, x, precision)
    found_outs, found_grads = step(torch.compile(model, backend=backend, fullgraph=True), model, x, precision)
    # In bfloat16, each differs from float64 by 0.12 to 0.17 here, and they round in a different order: they differ by
    # 0.02 on a processor with bfloat16 arithmetic, by up to 0.07 on one without.
    tolerance = 1e-5 if precision == 'float32' else 0.1
    for found, out in zip(found_outs, outs, strict=True):
        assert found.dtype == out.dtype
        assert relative_error(found, out) < tolerance
    floor = 1e-3 * max(grad.abs().max() for grad in grads.values())  # of noise: a bias of keys has no influence
    for name, grad in grads.items():
        assert (found_grads[name] - grad).abs().max() < tolerance * max(grad.abs().max(), floor), name


@pytest.mark.parametrize(
    'precision',
    ['float32', *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ('bfloat16', 'autocast'))],
)
@EVERY
def test_compiled_backbones(backbone, precision):
    dtype = torch.bfloat16 if precision == 'bfloat16' else torch.float32
    assert_compiled_is_eager(small(backbone).to(dtype), torch.randn(2, 3, *SIZE, dtype=dtype), precision, 'aot_eager')


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    'mixer',
    [
        SlideAttention(16, 2),
        SlideAttention(12, 2),  # tap-wise, since native takes no heads of 6 channels
        LocallyGroupedAttention(16, 2, 7),
        SubsampledAttention(16, 2, 2),
        PooledAttention(16, 2, 7),
        WindowAttention(16, 2, 7, 3),
        CrossShapedWindowAttention(16, 2, 5),
        NeighborhoodAttention(16, 2, 7),
    ],
    ids=[
        'slide',
        'slide tap-wise',
        'locally grouped',
        'subsampled',
        'pooled',
        'window',
        'cross-shaped',
        'neighborhood',
    ],
)
def test_compiled_mixers(mixer):
    mixer = randomize(copy.deepcopy(mixer))
    assert_compiled_is_eager(mixer, torch.randn(2, 9, 12, mixer.proj.in_features), 'float32', 'inductor')


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@EVERY
def test_traced_backbones(backbone):
    model, image = small(backbone).eval(), torch.randn(1, 3, *SIZE)
    for out, wanted in zip(torch.jit.trace(model, image)(image), model(image), strict=True):
        assert relative_error(out, wanted) < 1e-5


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@EVERY
def test_mmengine_counts_backbones(backbone):
    model = small(backbone).eval()
    counts = get_model_complexity_info(model, (3, *SIZE), show_table=False, show_arch=False)
    assert counts['params'] == sum(parameter.numel() for parameter in model.parameters())
    assert counts['flops'] > 1e6
