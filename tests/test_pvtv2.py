"""SlidePVTv2 against the authors' numbers, mmdet's class, and arithmetic; what all backbones share is in test_zoo."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    NEEDS_EXPORT,
    assert_golden,
    golden_image,
    golden_logits,
    golden_state,
    load_host,
    randomize,
    relative_error,
)
from torch import nn

from mmslide.flops import DETECTION_SHAPE, SEGMENTATION_SHAPE, count_macs
from mmslide.models import SlidePVTv2
from mmslide.models.attention import PooledAttention, SubsampledAttention, subsampled
from mmslide.models.mlp import ConvMLP
from mmslide.weights.layouts import from_mmslide, to_mmslide

SMALL = dict(
    embed_dims=(16, 32, 48, 64), depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 4), mlp_ratios=2, sr_ratios=(8, 4, 2, 1)
)
LINEAR = dict(SMALL, pool_sizes=7)
# Of the classifier at 224×224: parameters (M) and multiply-adds (G), the host's and with Slide Attention in stages 1
# and 2; of the host's backbone alone at 1280×800 and 512×2048: multiply-adds (G).
COUNTS = {
    'b0': ((3.67, 0.57), (3.42, 0.60), (26.6, 27.7)),
    'b1': ((14.01, 2.11), (12.99, 2.20), (73.2, 75.7)),
    'b2': ((25.36, 4.03), (23.57, 4.19), (138.6, 143.4)),
    'b2-li': ((22.55, 3.89), None, (75.1, 76.9)),
    'b3': ((45.24, 6.90), (43.45, 7.06), (226.4, 234.1)),
    'b4': ((62.56, 10.10), (59.74, 10.34), (329.3, 340.4)),
    'b5': ((81.96, 11.72), None, (386.2, 399.2)),
}
SLIDE_SAVES = {'b1': (21.4, 22.5), 'b2': (35.6, 37.5), 'b3': (35.6, None), 'b4': (49.6, None)}  # G, at the same sizes


def small(row=SMALL, **kwargs):
    return SlidePVTv2(row, **{'slide_stages': (), **kwargs})


def outputs(model, image):
    with torch.no_grad():
        return model.eval()(image)


def with_eps(model, eps):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return model


@pytest.mark.parametrize('name', ['pvt_v2_b1_cls_224', 'pvt_v2_b1_detection_192x256'])
def test_the_authors_numbers(name):
    state = golden_state(name)
    layout, ours = to_mmslide(state)
    assert layout == "authors' PVTv2"
    model = SlidePVTv2('b1', slide_stages=())
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert not missing
    outs = outputs(model, golden_image(name))
    assert_golden(name, outs)
    if 'cls' in name:
        assert sorted(unexpected) == ['head.bias', 'head.weight']
        logits = F.linear(outs[-1].mean((2, 3)), state['head.weight'], state['head.bias'])
        assert relative_error(logits, golden_logits(name)) < 1e-4
    else:
        assert not unexpected


@pytest.mark.parametrize(('name', 'row'), [('timm_pvt_v2_li', LINEAR), ('transformers_pvt_v2', SMALL)])
def test_timms_and_transformers_numbers(name, row):
    model = small(row)
    missing, _ = model.load_state_dict(to_mmslide(golden_state(name))[1], strict=False)
    assert not missing
    if name.startswith('transformers'):
        with_eps(model, 1e-6)
    assert_golden(name, outputs(model, golden_image(name)))


def mmdet_host(row, **kwargs):
    backbones = pytest.importorskip('mmdet.models.backbones')
    return backbones.PyramidVisionTransformerV2(
        embed_dims=row['embed_dims'][0],
        num_layers=row['depths'],
        **{key: row[key] for key in ('num_heads', 'mlp_ratios', 'sr_ratios')},
        **kwargs,
    )


@pytest.mark.parametrize(('arch', 'size'), [('b0', (101, 150)), ('b2', (96, 129)), ('b5', (65, 35))])
def test_equals_mmdet(arch, size, tmp_path):
    row = dict(SlidePVTv2.variants[arch], depths=(1, 2, 1, 1))
    host = mmdet_host(row)
    model = with_eps(load_host(small(row), host, tmp_path), 1e-6)
    image = torch.randn(2, 3, *size)
    for out, wanted in zip(outputs(model, image), outputs(host, image), strict=True):
        assert relative_error(out, wanted) < 1e-5
    host.load_state_dict(from_mmslide(model.state_dict(), 'mmdet'))


def test_gradients_equal_mmdets(tmp_path):
    host = mmdet_host({key: (value,) * 4 if value == 2 else value for key, value in SMALL.items()}, drop_path_rate=0.0)
    model = with_eps(load_host(small(drop_path_rate=0.0), host, tmp_path), 1e-6)
    image = torch.randn(2, 3, 75, 97)
    grads = []
    for backbone in (model, host):
        sum(out.square().mean() for out in backbone(image)).backward()
        grads.append({key: parameter.grad for key, parameter in backbone.named_parameters()})
    found, wanted = from_mmslide(grads[0], 'mmdet'), grads[1]
    assert found.keys() == wanted.keys()
    largest = max(grad.abs().max() for grad in wanted.values())
    for key, grad in wanted.items():
        assert (found[key] - grad).abs().max() < 1e-5 * largest, key


def compare_with_arithmetic(module, function, x, *args):
    """The module's output and gradients against those of a function of the same parameters."""
    x = x.requires_grad_()
    out, wanted = module(x, *args), function(x)
    assert relative_error(out, wanted) < 1e-12
    inputs = [x, *module.parameters()]
    grad = torch.randn_like(out)
    found, expected = (torch.autograd.grad(y, inputs, grad) for y in (out, wanted))
    scale = max(value.abs().max() for value in expected)
    for value, reference in zip(found, expected, strict=True):
        assert (value - reference).abs().max() < 1e-12 * scale


@pytest.mark.parametrize('size', [(17, 23), (7, 14), (5, 3), (1, 1)])
def test_linear_attention_is_attention_to_the_means_of_7_by_7_parts(size):
    attention = randomize(PooledAttention(16, 2)).double()
    height, width = size

    def plain(x):
        rows, columns = ([(i * n // 7, -(-(i + 1) * n // 7)) for i in range(7)] for n in size)
        means = torch.stack([x[:, a:b, c:d].mean((1, 2)) for a, b in rows for c, d in columns], dim=1)
        reduced = F.linear(means, attention.sr.weight[:, :, 0, 0], attention.sr.bias)
        normed = F.layer_norm(reduced, (16,), attention.norm.weight, attention.norm.bias, 1e-5)
        activated = normed * (1 + torch.erf(normed / 2**0.5)) / 2
        q = attention.q(x).view(2, height * width, 2, 8)
        k, v = attention.kv(activated).view(2, 49, 2, 2, 8).unbind(2)
        weights = (torch.einsum('bnhd,bmhd->bhnm', q, k) / 8**0.5).softmax(-1)
        return attention.proj(torch.einsum('bhnm,bmhd->bnhd', weights, v).reshape(2, height, width, 16))

    compare_with_arithmetic(attention, plain, torch.randn(2, *size, 16, dtype=torch.float64))


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('size', [(6, 9), (1, 5)])
def test_mlp(relu, size):
    module, norm = randomize(ConvMLP(12, 20, relu=relu)).double(), nn.LayerNorm(12).double()
    expand, conv, contract = module.layers[0][0], module.layers[0][2], module.layers[1]
    height, width = size

    def plain(x):
        hidden = expand(norm(x))
        padded = F.pad(hidden.clamp(min=0) if relu else hidden, (0, 0, 1, 1, 1, 1))
        taps = [padded[:, i : i + height, j : j + width] * conv.weight[:, 0, i, j] for i in range(3) for j in range(3)]
        before = sum(taps) + conv.bias
        return contract(before * (1 + torch.erf(before / 2**0.5)) / 2)

    compare_with_arithmetic(module, plain, torch.randn(2, *size, 12, dtype=torch.float64), norm)


@NEEDS_EXPORT
@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_pooling_is_exported_for_any_size():
    module, sides = randomize(PooledAttention(16, 2)), {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(module, (torch.randn(2, 9, 12, 16),), dynamic_shapes=(sides,))
    # As for ONNX: PyTorch's decomposition of its own operator is right at the traced size alone.
    table = torch.export.default_decompositions()
    table.update(torch._decomp.get_decompositions([torch.ops.aten._adaptive_avg_pool2d]))
    lowered = exported.run_decompositions(table).module()
    for size in ((23, 31), (7, 14), (5, 3)):
        x = torch.randn(2, *size, 16)
        assert relative_error(lowered(x), module(x)) < 1e-5


@pytest.mark.parametrize(('size', 'parts'), [((6, 10), 4), ((5, 5), 5), ((1, 11), 11), ((1, 37), 1), ((1, 1), 1)])
def test_queries_in_parts_are_the_same_attention(size, parts, monkeypatch):
    module = randomize(SubsampledAttention(16, 1)).double()
    x = torch.randn(1, *size, 16, dtype=torch.float64, requires_grad=True)
    shapes, attend = [], F.scaled_dot_product_attention

    def record(q, *args, **kwargs):
        shapes.append(q.shape)
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', record)
    results = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, 'get_num_threads', lambda threads=threads: threads)
        out = module(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
        with torch.no_grad():
            assert relative_error(module(x), out) < 1e-12
    count = size[0] * size[1]
    assert [tuple(shape) for shape in shapes] == [(n, 1, count // n, 16) for n in (1, 1, parts, 1)]
    scale = max(value.abs().max() for value in results[0])
    for whole, split in zip(*results, strict=True):
        assert (whole - split).abs().max() < 1e-12 * scale


def test_enough_images_and_heads_need_no_parts(monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    queries = torch.randn(2, 12, 2, 8, requires_grad=True)
    assert subsampled.query_parts(queries) == 1
    assert subsampled.query_parts(queries[:, :, :1]) == 2
    assert subsampled.query_parts(queries[:, :, :1].detach()) == 1


def test_norms_have_the_authors_eps():
    for row in (SMALL, LINEAR):
        for name, module in small(row).named_modules():
            if isinstance(module, nn.LayerNorm):
                assert module.eps == (1e-5 if name.endswith(('embed.norm', 'attn.norm')) else 1e-6), name


def test_init():
    model = small(dict(SMALL, embed_dims=(32, 64, 128, 256), num_heads=1, pool_sizes=(0, 0, 7, 7)))
    model.init_weights()
    counts = {}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.kernel_size[0] ** 2 * module.out_channels // module.groups
            counts.setdefault(fan, []).append(module.weight.flatten())
            assert not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
    assert set(counts) == {9, 49 * 32, *(9 * c for c in (64, 128, 256)), 64 * 32, 16 * 64, 128, 256}
    for fan, weights in counts.items():
        assert torch.cat(weights).std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.1)


def test_a_users_init_cfg_stands_alone():
    model = small(init_cfg=dict(type='Constant', layer='Conv2d', val=3.0))
    before = model.stages[0].blocks[0].attn.q.weight.clone()
    model.init_weights()
    assert (model.stages[0].blocks[0].ffn.layers[0][0].weight != 3).all()
    assert all((m.weight == 3).all() for m in model.modules() if isinstance(m, nn.Conv2d))
    assert torch.equal(model.stages[0].blocks[0].attn.q.weight, before)


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        (dict(pool_sizes=-1), r'only non-negative integers, got pool_sizes=\[-1, -1, -1, -1\]'),
        (dict(pool_sizes=(7, 7)), r'one value for each of its 4 stages, got pool_sizes=\(7, 7\)'),
        (dict(sr_ratios=(8, 4, 2, 0)), r'only positive integers, got sr_ratios=\(8, 4, 2, 0\)'),
    ],
)
def test_wrong_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        small(dict(SMALL, **row))


def macs(model, shape):
    return count_macs(model.eval(), torch.empty(1, 3, *shape, device='meta'))[1] / 1e9


@pytest.mark.slow
@pytest.mark.parametrize('arch', COUNTS)
def test_parameters_and_flops(arch):
    host, slide, alone = COUNTS[arch]
    with torch.device('meta'):
        models = [SlidePVTv2(arch, slide_stages=stages) for stages in ((), (0, 1))]
    head = 1000 * (models[0].row['embed_dims'][-1] + 1)
    for model, wanted in zip(models, (host, slide), strict=True):
        if wanted:
            params = sum(parameter.numel() for parameter in model.parameters())
            assert (params + head) / 1e6 == pytest.approx(wanted[0], abs=0.006)
            assert macs(model, (224, 224)) + head / 1e9 == pytest.approx(wanted[1], abs=0.006)
    for index, shape in enumerate((DETECTION_SHAPE, SEGMENTATION_SHAPE)):
        count = macs(models[0], shape)
        assert count == pytest.approx(alone[index], abs=0.06)
        saved = SLIDE_SAVES.get(arch, (None, None))[index]
        if saved:
            assert count - macs(models[1], shape) == pytest.approx(saved, abs=0.06)
