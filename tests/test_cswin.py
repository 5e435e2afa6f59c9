import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    GOLDEN,
    NEEDS_MODERN,
    assert_golden,
    assert_golden_logits,
    golden_image,
    golden_state,
    randomize,
    relative_error,
)

from mmslide.flops import count_macs
from mmslide.models import SlideCSWin
from mmslide.models.attention import CrossShapedWindowAttention
from mmslide.weights.layouts import to_mmslide


def outputs(model, image):
    with torch.no_grad():
        return model.eval()(image)


def load_golden(model, name):
    """The keys of the file that the model has no place for."""
    layout, state = to_mmslide(golden_state(name))
    assert layout == "authors' CSWin"
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing
    return unexpected


def test_the_authors_classifier():
    name = 'cswin_tiny_cls_224'
    model = SlideCSWin('tiny', slide_stages=(), stage_norm=None)
    assert load_golden(model, name) == ['norm.weight', 'norm.bias', 'head.weight', 'head.bias']
    outs = outputs(model, golden_image(name))
    assert_golden(name, outs)
    assert_golden_logits(name, outs[-1], eps=1e-5)


def test_the_authors_segmentation_copy():
    name = 'cswin_tiny_segmentation_192x256'
    model = SlideCSWin('tiny', slide_stages=())
    assert not load_golden(model, name)
    assert_golden(name, outputs(model, golden_image(name)))


@pytest.mark.parametrize('name', ['s7', 's2', 'whole'])
def test_the_authors_attention(name):
    golden = np.load(GOLDEN / f'cswin_attention_{name}.npz')
    meta = json.loads(str(golden['meta']))
    split_size = None if meta['whole_map'] else meta['split_size']
    attention = CrossShapedWindowAttention(meta['dim'], meta['num_heads'], split_size)
    state = golden_state(f'cswin_attention_{name}')
    attention.load_state_dict(
        {key.replace('attns.', 'lepe.').replace('.get_v', ''): value for key, value in state.items()}
    )
    size = meta['H'], meta['W']
    tokens = np.random.default_rng(meta['token_seed']).standard_normal((2, math.prod(size), meta['dim']))
    out = attention(torch.from_numpy(tokens.astype(np.float32)).unflatten(1, size))
    assert relative_error(out.flatten(1, 2), torch.from_numpy(golden['output'])) < 1e-4


def strips(side, size):
    """Of each strip, the positions on an axis that it covers; those below 0 or beyond the side are padding."""
    start = -((-side % size) // 2)
    return [range(first, first + size) for first in range(start, side, size)]


def attention_pixel_by_pixel(attention, x):
    """Strip by strip, with padding appended to the keys and LePE as a sum over the taps inside the strip."""
    batch, height, width, _ = x.shape
    heads, size = attention.num_heads, attention.split_size
    q, k, v = attention.qkv(x).view(batch, height, width, 3, heads, -1).unbind(3)
    if size is None:
        branches = [(heads, [range(height)], [range(width)])]
    else:
        branches = [
            (heads // 2, [range(height)], strips(width, size)),
            (heads // 2, strips(height, size), [range(width)]),
        ]
    outs, first_head = [], 0
    for (count, all_rows, all_columns), lepe in zip(branches, attention.lepe, strict=True):
        part = slice(first_head, first_head + count)
        first_head += count
        weight, bias = lepe.weight.view(count, -1, 3, 3), lepe.bias.view(count, -1)
        out = torch.zeros_like(q[:, :, :, part])
        for rows in all_rows:
            for columns in all_columns:
                inside_rows = [i for i in rows if 0 <= i < height]
                inside_columns = [j for j in columns if 0 <= j < width]
                inside = [(i, j) for i in inside_rows for j in inside_columns]
                padding = len(rows) * len(columns) - len(inside)
                keys, values = (
                    F.pad(torch.stack([y[:, i, j, part] for i, j in inside], 1), (0, 0, 0, 0, 0, padding))
                    for y in (k, v)
                )  # (B, pixels, heads, d)
                for i, j in inside:
                    logits = torch.einsum('bhd,bnhd->bnh', q[:, i, j, part], keys) / q.shape[-1] ** 0.5
                    attended = torch.einsum('bnh,bnhd->bhd', logits.softmax(1), values)
                    taps = [
                        v[:, i + di, j + dj, part] * weight[:, :, di + 1, dj + 1]
                        for di in (-1, 0, 1)
                        for dj in (-1, 0, 1)
                        if i + di in inside_rows and j + dj in inside_columns
                    ]
                    out[:, i, j] = attended + sum(taps) + bias
        outs.append(out.flatten(3))
    return attention.proj(torch.cat(outs, -1))


@pytest.mark.parametrize(
    ('size', 'split_size'),
    [
        ((6, 8), 2),  # nothing to pad
        ((5, 7), 3),  # one row too few, two columns
        ((9, 6), 4),  # three rows, two columns
        ((3, 2), 7),  # a map smaller than the strips
        ((1, 11), 2),
        ((4, 3), 1),
        ((5, 4), None),
    ],
)
def test_the_mixer_against_plain_arithmetic(size, split_size):
    attention = randomize(CrossShapedWindowAttention(12, 2, split_size)).double()
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    results = []
    for function in (attention, lambda x: attention_pixel_by_pixel(attention, x)):
        out = function(x)
        results.append([out, *torch.autograd.grad(out, [x, *attention.parameters()], grad)])
    for value, wanted in zip(*results, strict=True):
        assert relative_error(value, wanted) < 1e-12


@pytest.mark.parametrize(
    ('dtype', 'tolerance'),
    [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), pytest.param(torch.float16, 4e-3, marks=NEEDS_MODERN)],
)
@pytest.mark.parametrize('split_size', [3, None])
def test_the_mixer_in_every_dtype(dtype, tolerance, split_size):
    attention, x = (
        randomize(CrossShapedWindowAttention(32, 4, split_size)).to(dtype),
        torch.randn(2, 7, 9, 32).to(dtype),
    )
    out = attention(x)
    assert out.dtype == dtype
    assert relative_error(out, attention.double()(x.double())) < tolerance


@NEEDS_MODERN
@pytest.mark.exhaustive
def test_the_mixer_with_sizes_known_at_run_time_only():
    attention = randomize(CrossShapedWindowAttention(16, 2, 7))
    torch.compiler.reset()
    compiled = torch.compile(attention, backend='aot_eager', dynamic=True, fullgraph=True)
    for size in ((22, 37), (16, 31)):
        x = torch.randn(2, *size, 16)
        assert relative_error(compiled(x), attention(x)) < 1e-5


def test_dropout_of_the_attention_weights():
    attention = CrossShapedWindowAttention(8, 2, 2, attn_drop_rate=0.999999)
    x = torch.randn(1, 4, 4, 8)
    with torch.no_grad():
        for lepe in attention.lepe:
            lepe.weight.zero_(), lepe.bias.zero_()
    assert torch.equal(attention(x), attention.proj.bias.expand_as(x))
    assert not torch.equal(attention.eval()(x), attention.proj.bias.expand_as(x))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((12, 3, 7), 'num_heads must be even, .* got num_heads=3'),
        ((12, 2, 0), 'split_size must be a positive integer, got split_size=0'),
        ((12, 2, 7.0), r'split_size must be a positive integer, got split_size=7\.0'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossShapedWindowAttention(*arguments)


def test_the_last_stage_of_every_arch_attends_to_its_whole_map():
    row = dict(embed_dims=8, depths=(1, 2, 1), num_heads=(2, 2, 1), mlp_ratios=2, split_sizes=(1, 3, 3))
    sizes = [
        [block.attn.split_size for block in stage.blocks]
        for stage in SlideCSWin(row, slide_stages=(), out_indices=(0, 1, 2)).stages
    ]
    assert sizes == [[1], [3, 3], [None]]
    # Without it, the last one that is built keeps its strips.
    model = SlideCSWin(row, slide_stages=(), out_indices=(1,))
    assert model.stages[-1].blocks[0].attn.split_size == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ('arch', 'slide_stages', 'params', 'macs', 'backbone_macs'),
    [
        ('tiny', (), 22.32, 4.32, (109.7, 118.2)),
        ('small', (), 34.64, 6.80, (173.6, 187.1)),
        ('base', (), 77.38, 14.96, (357.4, 380.1)),
        ('tiny', (0, 1), 22.33, 4.35, None),
        ('small', (0, 1), 34.66, 6.85, None),
        ('base', (0, 1), 77.39, 15.03, None),
    ],
)
def test_parameters_and_flops_of_the_archs(arch, slide_stages, params, macs, backbone_macs):
    """Of the classifier at 224 px, in 10⁶ and 10⁹; of the backbone alone at 800×1280 and 512×2048."""
    with torch.device('meta'):
        model = SlideCSWin(arch, slide_stages=slide_stages, stage_norm=None).eval()
    dims = model.row['embed_dims'][-1]
    classifier = 2 * dims + 1000 * (dims + 1)
    assert (sum(p.numel() for p in model.parameters()) + classifier) / 1e6 == pytest.approx(params, abs=0.005)

    def count(*size):
        return count_macs(model, torch.empty(1, 3, *size, device='meta'))[1]

    assert (count(224, 224) + 1000 * dims) / 1e9 == pytest.approx(macs, abs=0.005)
    if backbone_macs:
        assert [count(800, 1280) / 1e9, count(512, 2048) / 1e9] == pytest.approx(backbone_macs, abs=0.051)
