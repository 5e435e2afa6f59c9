import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    GOLDEN,
    assert_golden,
    assert_golden_logits,
    golden_image,
    golden_state,
    randomize,
    relative_error,
)
from mmcv.cnn.bricks.scale import LayerScale
from torch import nn

from mmslide.deploy import fuse
from mmslide.flops import count_macs
from mmslide.models import SlideNAT
from mmslide.models.attention import NeighborhoodAttention, SlideAttention
from mmslide.ops.reference import neighborhood_reference
from mmslide.weights import load_pretrained
from mmslide.weights.layouts import from_mmslide, to_mmslide

SMALL = dict(embed_dims=(16, 32, 48, 64), depths=(1, 2, 2, 1), num_heads=(1, 2, 3, 4), mlp_ratios=2)
SCALED = dict(SMALL, layer_scales=1e-5)
TRANSFORMERS = dict(embed_dims=16, depths=(1, 2, 2, 1), num_heads=(1, 2, 2, 4), mlp_ratios=2, layer_scales=1e-5)


def outputs(model, image):
    with torch.no_grad():
        return model.eval()(image)


@pytest.mark.parametrize(('name', 'stage_norm'), [('nat_mini_cls_224', None), ('nat_mini_detection_192x256', 'output')])
def test_the_authors_numbers(name, stage_norm):
    model = SlideNAT('mini', slide_stages=(), stage_norm=stage_norm)
    layout, state = to_mmslide(golden_state(name))
    assert layout == "authors' NAT"
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing
    assert sorted(unexpected) == (
        ['head.bias', 'head.weight', 'norm.bias', 'norm.weight'] if stage_norm is None else []
    )
    outs = outputs(model, golden_image(name))
    assert_golden(name, outs)
    if 'cls' in name:
        assert_golden_logits(name, outs[-1], eps=1e-5)


@pytest.mark.parametrize('name', ['neighborhood_attention_k7', 'neighborhood_attention_k7_5x6'])
def test_the_module_gives_the_authors_numbers(name):
    golden = np.load(GOLDEN / f'{name}.npz')
    meta = json.loads(str(golden['meta']))
    module = NeighborhoodAttention(meta['dim'], meta['num_heads'], window_size=meta['kernel'])
    module.load_state_dict(golden_state(name))
    height, width = meta['H'], meta['W']
    tokens = np.random.default_rng(meta['token_seed']).standard_normal((2, height * width, meta['dim']))
    out = module(torch.from_numpy(tokens.astype(np.float32)).unflatten(1, (height, width)))
    assert relative_error(out.flatten(1, 2), torch.from_numpy(golden['output'])) < 1e-5


def test_transformers_numbers():
    name = 'transformers_nat'
    layout, state = to_mmslide(golden_state(name))
    assert layout == 'transformers NAT'
    model = SlideNAT(TRANSFORMERS, slide_stages=())
    model.load_state_dict(state)
    assert_golden(name, outputs(model, golden_image(name)))


@pytest.mark.parametrize('size', [(1, 1), (3, 9), (9, 3), (7, 6), (7, 7), (20, 15)])
def test_module_against_its_equation(size):
    """A map smaller than the window has zeros at its right and bottom, which have keys and values: the bias of qkv."""
    module = randomize(NeighborhoodAttention(16, 2, 7)).double()
    x = torch.randn(2, *size, 16, dtype=torch.float64).requires_grad_()
    padded = F.pad(x, (0, 0, 0, max(0, 7 - size[1]), 0, max(0, 7 - size[0])))
    q, k, v = module.qkv(padded).unflatten(-1, (3, 2, 8)).unbind(3)
    attended = neighborhood_reference(q, k, v, module.rpb, scale=8**-0.5).flatten(3)
    wanted = module.proj(attended[:, : size[0], : size[1]])
    out = module(x)
    assert relative_error(out, wanted) < 1e-12
    grad = torch.randn_like(out)
    inputs = [x, *module.parameters()]
    for value, other in zip(*(torch.autograd.grad(y, inputs, grad) for y in (out, wanted)), strict=True):
        assert relative_error(value, other) < 1e-11


def test_the_stem_and_the_downsampling():
    model = randomize(SlideNAT(SMALL))
    stem, down = model.stages[0].embed, model.stages[1].embed
    x = torch.randn(1, 37, 50, 3)
    convs = stem.projection
    embedded = convs[1](convs[0](x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    assert torch.equal(stem(x), stem.norm(embedded))
    assert [conv.out_channels for conv in convs] == [8, 16]
    assert down.projection.bias is None
    assert down(embedded).shape == (1, 5, 7, 32)


def test_norms_have_the_authors_eps():
    assert {module.eps for module in SlideNAT(SMALL).modules() if isinstance(module, nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize('slide_stages', [(), (0, 1)])
def test_layer_scale(slide_stages):
    model = SlideNAT(SCALED, slide_stages=slide_stages)
    scales = [module.weight for module in model.modules() if isinstance(module, LayerScale)]
    assert len(scales) == 2 * sum(SMALL['depths'])
    assert all((scale == 1e-5).all() for scale in scales)
    block = randomize(model).eval().stages[-1].blocks[0]
    assert isinstance(block.attn, NeighborhoodAttention)
    x = torch.randn(1, 8, 9, 64)
    y = x + block.scale1.weight * block.attn(block.norm1(x))
    assert relative_error(block(x), y + block.scale2.weight * block.ffn.layers(block.norm2(y))) < 1e-5
    image = torch.randn(1, 3, 65, 96)
    fused = fuse(model)
    for out, wanted in zip(outputs(fused, image), outputs(model, image), strict=True):
        assert relative_error(out, wanted) < 1e-5


def test_the_large_variants_have_a_layer_scale():
    with torch.device('meta'):
        found = {
            arch: any(isinstance(module, LayerScale) for module in SlideNAT(arch).modules())
            for arch in SlideNAT.variants
        }
    assert found == {'mini': False, 'tiny': False, 'small': True, 'base': True}


@pytest.mark.parametrize(
    ('window_size', 'message'),
    [
        (6, r'window_size must be a positive odd integer, got window_size=6'),
        ((7, 7), r'window_size must be one number or one for each of the 4 stages'),
    ],
)
def test_wrong_windows_are_named(window_size, message):
    with pytest.raises(ValueError, match=message):
        SlideNAT(SMALL, window_size=window_size)


def test_windows_for_each_stage():
    model = randomize(SlideNAT(SMALL, slide_stages=(), window_size=(3, 5, 7, 9)))
    assert [stage.blocks[0].attn.rpb.shape[-1] for stage in model.stages] == [5, 9, 13, 17]
    assert [out.shape[-1] for out in outputs(model, torch.randn(1, 3, 64, 64))] == [16, 8, 4, 2]


def test_zero_sum_patches_reach_the_stems_first_convolution():
    model = SlideNAT(SMALL, init_cfg=dict(type='mmslide.ZeroSumPatches', std=0.3))
    model.init_weights()
    first, second = model.stages[0].embed.projection
    assert first.weight.sum((2, 3)).abs().max() < 1e-5
    assert second.weight.sum((2, 3)).abs().max() > 1e-2


def test_slide_attention_trains():
    torch.manual_seed(1)
    model = randomize(SlideNAT(SCALED, drop_path_rate=0.1))
    image, target = torch.randn(2, 3, 64, 75), torch.randn(2, 64, 2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        outs = model(image)
        loss = (outs[-1] - target).square().mean() + sum(out.mean().square() for out in outs[:-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# Arch: M parameters, G multiply-adds of the classifier at 224 px; of the backbone at 1280×800 and 512×2048.
HOST = {
    'mini': (19.98, 2.69, 55.0, 56.3),
    'tiny': (27.90, 4.30, 87.6, 89.8),
    'small': (50.74, 7.77, 158.6, 162.4),
    'base': (89.77, 13.68, 279.1, 285.8),
}
# The same with Slide Attention, and by how much the backbone changes at the larger sizes.
SLIDE = {'mini': (20.00, 2.78, 1.7, None), 'tiny': (27.92, 4.38, 1.7, 1.7), 'small': (50.76, 7.90, 2.5, 2.6)}


def complexity(arch, slide_stages):
    """Parameters and multiply-adds of a classifier at 224 px, multiply-adds of the backbone at the larger sizes."""
    with torch.device('meta'):
        model = SlideNAT(arch, slide_stages=slide_stages, stage_norm=None).eval()
        head = nn.Linear(SlideNAT.variants[arch]['embed_dims'][-1], 1000)
        params = sum(p.numel() for p in [*model.parameters(), *head.parameters()]) + 2 * head.in_features
        macs = [count_macs(model, torch.empty(1, 3, *size))[1] for size in ((224, 224), (800, 1280), (512, 2048))]
    return params / 1e6, (macs[0] + head.weight.numel()) / 1e9, macs[1] / 1e9, macs[2] / 1e9


@pytest.mark.slow
@pytest.mark.parametrize('arch', HOST)
def test_parameters_and_flops(arch):
    params, classifier, *detection = complexity(arch, ())
    assert (round(params, 2), round(classifier, 2), *(round(x, 1) for x in detection)) == HOST[arch]
    if arch in SLIDE:
        params, classifier, *slide = complexity(arch, (0, 1))
        wanted = SLIDE[arch]
        assert (round(params, 2), round(classifier, 2)) == wanted[:2]
        for ours, host, change in zip(slide, detection, wanted[2:], strict=True):
            assert change is None or round(ours - host, 1) == change


GOLDEN_NAT = ('nat_mini_cls_224', 'nat_mini_detection_192x256')


@pytest.fixture
def save(tmp_path):
    def save(state):
        torch.save(state, tmp_path / 'checkpoint.pth')
        return str(tmp_path / 'checkpoint.pth')

    return save


@pytest.mark.parametrize('name', GOLDEN_NAT)
def test_round_trip_from_the_authors(name):
    state = golden_state(name)
    back = from_mmslide(to_mmslide(state)[1], 'authors')
    assert list(back) == list(state)
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_round_trip_through_the_authors_layout_with_layer_scale():
    state = randomize(SlideNAT(SCALED, slide_stages=())).state_dict()
    theirs = from_mmslide(state, 'authors')
    gammas = [key for key in theirs if 'gamma' in key]
    assert len(gammas) == 2 * sum(SMALL['depths'])
    assert torch.equal(theirs['levels.2.blocks.1.gamma2'], state['stages.2.blocks.1.scale2.weight'])
    assert all(torch.equal(value, state[key]) for key, value in to_mmslide(theirs)[1].items())


@pytest.mark.parametrize('prefix', ['', 'nat.'])
def test_round_trip_from_transformers(prefix):
    """A backbone; of a model or classifier all keys but the head's begin with nat."""
    state = golden_state('transformers_nat')
    _, ours = to_mmslide({prefix + key: value for key, value in state.items()})
    back = from_mmslide(ours, 'transformers')
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_incomplete_weights_name_the_missing_key():
    state = golden_state('transformers_nat')
    _, ours = to_mmslide(state)
    state.pop(next(key for key in state if key.endswith('.self.value.weight')))
    with pytest.raises(ValueError, match=r'transformers NAT weights are incomplete: .*attn\.value\.weight is missing'):
        to_mmslide(state)
    ours.pop(next(key for key in ours if key.endswith('.scale2.weight')))
    with pytest.raises(ValueError, match=r'mmslide weights are incomplete: .*scale2\.weight is missing'):
        from_mmslide(ours, 'transformers')


@pytest.mark.parametrize('target', ['authors', 'transformers'])
def test_slide_weights_have_no_place_in_the_hosts_layouts(target):
    message = rf"layout '{target}' does not support Slide Attention.*stages\.0\.blocks\.0\.attn\.deform_weight"
    for slide_stages in ((0, 1), (0, 1, 2, 3)):
        with pytest.raises(ValueError, match=message):
            from_mmslide(SlideNAT(SMALL, slide_stages=slide_stages).state_dict(), target)


@pytest.mark.parametrize('layout', ['authors', 'transformers', 'mmslide'])
def test_slide_attention_starts_from_neighborhood_attention(layout, save, log):
    host = randomize(SlideNAT(SCALED, slide_stages=()))
    model = SlideNAT(SCALED)
    load_pretrained(model, save(from_mmslide(host.state_dict(), layout)))
    assert 'stages.*.blocks.*.attn.rpb' in log.text  # unexpected
    assert 'stages.*.blocks.*.attn.deform_weight' in log.text  # missing
    ours, theirs = model.stages[1].blocks[1], host.stages[1].blocks[1]
    assert torch.equal(ours.scale1.weight, theirs.scale1.weight)
    # Plain attention in 3×3 windows, which away from the border is that of the host without its bias.
    attention = NeighborhoodAttention(32, 2, 3)
    attention.load_state_dict({**theirs.attn.state_dict(), 'rpb': torch.zeros(2, 5, 5)})
    assert isinstance(ours.attn, SlideAttention)
    x = torch.randn(1, 9, 10, 32)
    assert relative_error(ours.attn(x)[:, 1:-1, 1:-1], attention(x)[:, 1:-1, 1:-1]) < 1e-5
    for stage, other in zip(model.stages[2:], host.stages[2:], strict=True):
        for key, value in stage.state_dict().items():
            assert torch.equal(value, other.state_dict()[key])


def test_layer_scale_has_to_be_there(save):
    checkpoint = save(SlideNAT(SCALED).state_dict())
    with pytest.raises(ValueError, match=r'does not fit this SlideNAT: it has stages\.\*\.blocks\.\*\.scale1\.weight'):
        load_pretrained(SlideNAT(SMALL), checkpoint)
