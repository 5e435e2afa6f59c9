import argparse
import copy
import logging
import pickle
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import golden_state, randomize, relative_error
from mmengine.model import PretrainedInit
from mmengine.runner.checkpoint import CheckpointLoader
from test_backbones import SMALL, SMALL_PVT, small
from test_pvtv2 import LINEAR
from test_pvtv2 import SMALL as SMALL_PVTV2
from test_pvtv2 import mmdet_host as mmdet_pvtv2
from test_pvtv2 import small as small_pvtv2
from test_twins import mmseg_host
from test_twins import small as small_twins

from mmslide.models import SlideCSWin, SlidePVT, SlidePVTv2, SlideSwin, TwinsPCPVT, TwinsSVT
from mmslide.models.attention import SlideAttention
from mmslide.ops import fixed_shift
from mmslide.weights import load_pretrained, read_state_dict
from mmslide.weights.layouts import from_mmslide, slide_attention, to_mmslide


@pytest.fixture
def save(tmp_path):
    def save(content, name='checkpoint.pth'):
        path = tmp_path / name
        torch.save(content, path)
        return str(path)

    return save


def outputs(model, size=(64, 96)):
    with torch.no_grad():
        return model.eval()(torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)))


def assert_same(model, other):
    for out, wanted in zip(outputs(model), outputs(other), strict=True):
        assert torch.equal(out, wanted)


@pytest.mark.parametrize('cls', [SlidePVT, SlideSwin])
@pytest.mark.parametrize('wrapper', [None, 'model', 'state_dict'])
@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.backbone.'])
def test_own_layout_in_every_wrapping(cls, wrapper, prefix, save, log):
    source = randomize(small(cls))
    state = {f'{prefix}{key}': value for key, value in source.state_dict().items()}
    if prefix:
        state['neck.weight'] = torch.zeros(3)
    model = small(
        cls, init_cfg=dict(type='Pretrained', checkpoint=save(state if wrapper is None else {wrapper: state}))
    )
    model.init_weights()
    assert_same(model, source)
    assert 'all keys match' in log.text


def test_prefix_of_init_cfg(save):
    source = randomize(small(SlidePVT))
    checkpoint = save({f'encoder.{key}': value for key, value in source.state_dict().items()})
    model = small(SlidePVT, init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='encoder.'))
    model.init_weights()
    assert_same(model, source)
    with pytest.raises(ValueError, match=r"no key of .* begins with prefix='decoder\.'"):
        load_pretrained(model, checkpoint, prefix='decoder.')


def test_pretrained_inside_a_list_of_init_cfgs(save):
    """The checkpoint comes last, whatever the list's order."""
    source = randomize(small(SlideSwin))
    init_cfg = [
        dict(type='Pretrained', checkpoint=save(source.state_dict())),
        dict(type='Constant', layer='LayerNorm', val=7.0),
    ]
    model = small(SlideSwin, init_cfg=init_cfg)
    model.init_weights()
    assert_same(model, source)


@pytest.mark.parametrize('kind', [PretrainedInit, 'mmengine.Pretrained', 'mmengine.model.weight_init.PretrainedInit'])
def test_pretrained_by_every_name_of_mmengines_class(kind, save):
    """Python configs have the class itself, and their dumps its path; mmengine's own loader knows no layouts."""
    row = dict(embed_dims=8, depths=(1, 1), num_heads=(2, 2), mlp_ratios=2, split_sizes=(3, 3))
    source = SlideCSWin(row, slide_stages=(), out_indices=(0, 1))
    checkpoint = save(from_mmslide(randomize(source).state_dict(), 'authors'))
    init_cfg = dict(type=kind, checkpoint=checkpoint)
    model = SlideCSWin(row, slide_stages=(), out_indices=(0, 1), init_cfg=init_cfg)
    model.init_weights()
    assert_same(model, source)


@pytest.mark.parametrize('wrapper', [None, 'model', 'state_dict'])
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_authors_slide_swin_layout(wrapper, prefix, save, log):
    """The numbers are compared in test_backbones; here the way from the file."""
    state = golden_state('slide_swin_tiny_224')
    state = {f'{prefix}{key}': value for key, value in state.items()}
    model = SlideSwin(window_size=(7, 7, 14, 7))
    load_pretrained(model, save(state if wrapper is None else {wrapper: state}))
    weight = model.stages[1].blocks[1].attn.deform_weight.flatten()
    assert torch.equal(weight, state[f'{prefix}layers.1.blocks.1.attn.dep_conv1.weight'].flatten())
    assert "authors' Slide-Swin layout" in log.text
    assert 'head.weight' in log.text  # unexpected
    assert 'stages.*.norm.weight' in log.text  # missing


def test_shift_kernels_that_were_trained_are_folded_into_the_deformed_ones(save):
    """As in the authors' training, where nothing but a missing gradient keeps them; against the two convolutions."""
    heads, head_dims, kernel_size = 2, 8, 3
    slots, dims = kernel_size**2, heads * head_dims
    module = randomize(SlideAttention(dims, heads, kernel_size))
    shift = fixed_shift(kernel_size).repeat(head_dims, 1, 1).unsqueeze(1)
    moved = shift + 0.3 * torch.randn(shift.shape)
    state = {
        'dep_conv.weight': moved,
        'dep_conv.bias': module.shift_bias.flatten(),
        'dep_conv1.weight': module.deform_weight.reshape(-1, 1, kernel_size, kernel_size),
        'dep_conv1.bias': module.deform_bias.flatten(),
        'relative_position_bias_table': module.relative_position_bias.view(1, heads, 1, slots, 1, 1),
        'proj.weight': module.proj.weight,
        'proj.bias': module.proj.bias,
    }
    for name in ('weight', 'bias'):
        value = getattr(module.qkv, name)
        state[f'qkv.{name}'] = value.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
    with pytest.warns(UserWarning, match=r'dep_conv\.weight is not the fixed shift .largest difference 1\.'):
        converted = slide_attention({key: value.detach() for key, value in state.items()})
    x = torch.randn(2, 7, 5, dims)
    wanted = copy.deepcopy(module).double()
    wanted.shift = moved.double().view(head_dims, slots, kernel_size, kernel_size)  # a kernel of its own a channel
    module.load_state_dict(converted)
    assert relative_error(module(x), wanted(x.double())) < 1e-6


def test_trained_shift_kernels_load_with_a_warning(save):
    state = golden_state('slide_swin_tiny_224')
    state['layers.0.blocks.0.attn.dep_conv.weight'][5, 0, 1, 1] += 0.5
    model = SlideSwin(window_size=(7, 7, 14, 7))
    with pytest.warns(UserWarning, match=r'largest difference 5\.0e-01'):
        load_pretrained(model, save(state))
    moved = model.stages[0].blocks[0].attn.deform_weight.flatten(0, 1)[5, 1, 1]
    assert moved == state['layers.0.blocks.0.attn.dep_conv1.weight'][5, 0, 1, 1] + 0.5


@pytest.mark.parametrize('count', [63, 70, 3])
def test_a_position_embedding_of_unknown_size_is_refused(count, save):
    model = small(SlidePVT)
    state = to_authors_pvt(model)
    state['pos_embed1'] = torch.randn(1, count, 16)
    message = rf'{count} positions fits neither the 56×56 map of this model.*pretrain_img_size'
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, save(state))


def to_authors_swin(state):
    """mmdet's Swin weights in the authors' layout, by mmdet's own converter run backwards key by key."""
    from mmdet.models.backbones.swin import swin_converter

    theirs = {}
    for key, value in state.items():
        name = key.replace('stages.', 'layers.').replace('.attn.w_msa.', '.attn.')
        name = name.replace('.ffn.layers.0.0.', '.mlp.fc1.').replace('.ffn.layers.1.', '.mlp.fc2.')
        name = name.replace('patch_embed.projection.', 'patch_embed.proj.')
        if '.downsample.' in name:  # find the order that the converter undoes
            index = torch.arange(value.shape[-1])
            forward = swin_converter({name: index.expand_as(value)})[f'backbone.{key}']
            order = torch.empty_like(index)
            order[forward.flatten()[: len(index)]] = index
            value = value[..., order]
        if not key.startswith('norm'):
            theirs[name] = value
    return theirs


def test_authors_swin_layout_equals_mmdets(save):
    swin = pytest.importorskip('mmdet.models.backbones').SwinTransformer
    state = randomize(swin(embed_dims=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8))).state_dict()
    state = {key: value for key, value in state.items() if 'index' not in key}
    row = dict(embed_dims=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), mlp_ratios=4)
    models = []
    for layout in (state, to_authors_swin(state)):
        model = SlideSwin(row, slide_stages=(), stage_norm=None)
        load_pretrained(model, save(layout))
        models.append(model)
    assert_same(*models)
    assert len(models[0].state_dict()) == len(to_authors_swin(state))


def to_authors_pvt(model):
    """A host of ours in the authors' layout."""
    theirs = {'cls_token': torch.zeros(1, 1, 8), 'norm.weight': torch.ones(8), 'head.weight': torch.ones(10, 8)}
    for key, value in model.state_dict().items():
        _, stage, rest = key.split('.', 2)
        number = int(stage) + 1
        rest = rest.replace('ffn.layers.0.0.', 'mlp.fc1.').replace('ffn.layers.1.', 'mlp.fc2.')
        if rest == 'embed.position_embedding':
            value = value.flatten(1, 2)
            if number == 4:
                value = torch.cat([torch.full_like(value[:, :1], 9.0), value], dim=1)  # the class token
            theirs[f'pos_embed{number}'] = value
        elif rest.startswith('embed.'):
            theirs[f'patch_embed{number}.{rest[6:].replace("projection", "proj")}'] = value
        else:
            theirs[f'block{number}.{rest.removeprefix("blocks.")}'] = value
    return theirs


def test_authors_pvt_layout(save, log):
    source = randomize(small(SlidePVT, slide_stages=()))
    model = small(SlidePVT, slide_stages=())
    load_pretrained(model, save(to_authors_pvt(source)))
    assert_same(model, source)
    assert "authors' PVT layout" in log.text
    assert 'cls_token' in log.text


def local_attention(attention, x):
    """Attention of each pixel to its 3×3 neighbours, zeros outside."""
    batch, height, width, channels = x.shape
    heads = attention.num_heads
    q, k, v = attention.qkv(x).view(batch, height, width, 3, heads, -1).permute(3, 0, 4, 5, 1, 2).flatten(1, 2)
    unfolded = [torch.nn.functional.unfold(y, 3, padding=1).view(*y.shape[:2], 9, height, width) for y in (k, v)]
    logits = (q.unsqueeze(2) * unfolded[0]).sum(1, keepdim=True) * q.shape[1] ** -0.5
    out = (logits.softmax(2) * unfolded[1]).sum(2).view(batch, channels, height, width).permute(0, 2, 3, 1)
    return attention.proj(out)


def mmdet_host(name, **kwargs):
    return randomize(getattr(pytest.importorskip('mmdet.models.backbones'), name)(**kwargs))


WHOLE = {
    'ours': (lambda: small(SlidePVT).state_dict(), lambda **kw: small(SlidePVT, **kw)),
    'authors PVT': (
        lambda: to_authors_pvt(small(SlidePVT, slide_stages=())),
        lambda **kw: small(SlidePVT, slide_stages=(), **kw),
    ),
    'mmdet PVT': (
        lambda: mmdet_host('PyramidVisionTransformer', num_layers=[2, 2, 2, 2]).state_dict(),
        lambda **kw: SlidePVT('tiny', **kw),
    ),
    'mmdet Swin': (
        lambda: mmdet_host('SwinTransformer').state_dict(),
        lambda **kw: SlideSwin('tiny', **kw),
    ),
    'authors Slide-Swin': (
        lambda: golden_state('slide_swin_tiny_224'),
        lambda **kw: SlideSwin(window_size=(7, 7, 14, 7), **kw),
    ),
    'authors SVT': (lambda: golden_state('alt_gvt_small_cls_224'), lambda **kw: TwinsSVT('small', **kw)),
    'mmseg PCPVT': (
        lambda: mmseg_host(TwinsPCPVT, norm_after_stage=True).state_dict(),
        lambda **kw: small_twins(TwinsPCPVT, **kw),
    ),
    'mmpretrain SVT': (lambda: golden_state('mmpretrain_svt'), lambda **kw: small_twins(TwinsSVT, **kw)),
    'authors CSWin': (lambda: golden_state('cswin_tiny_segmentation_192x256'), lambda **kw: SlideCSWin('tiny', **kw)),
    'timm PVTv2': (lambda: golden_state('timm_pvt_v2_li'), lambda **kw: small_pvtv2(LINEAR, **kw)),
}


@pytest.mark.parametrize('layout', WHOLE)
@pytest.mark.parametrize('out_indices', [pytest.param((0,), marks=pytest.mark.slow), (0, 2)])
def test_a_whole_backbone_loads_into_one_without_the_last_stages(layout, out_indices, save, log):
    state, build = WHOLE[layout]
    checkpoint = save(state())
    whole, model = build(), build(out_indices=out_indices)
    for backbone in (whole, model):
        load_pretrained(backbone, checkpoint)
    assert len(model.stages) == out_indices[-1] + 1
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in model.state_dict().items())
    assert 'unexpected, not used' in log.text
    assert not any(record.levelno >= logging.WARNING for record in log.records)


def test_another_host_is_refused_without_the_last_stages_too(save):
    checkpoint = save(small_twins(TwinsPCPVT).state_dict())
    with pytest.raises(ValueError, match=r'does not fit this SlidePVT'):
        load_pretrained(small(SlidePVT, out_indices=(0,), slide_stages=()), checkpoint)


def test_pvtv2_is_refused_by_cswin_whose_layers_have_the_same_shapes(save):
    row = dict(embed_dims=16, depths=(1, 1), num_heads=2, mlp_ratios=2)
    source = SlidePVTv2(dict(row, sr_ratios=(2, 1)), slide_stages=(), out_indices=(0, 1))
    model = SlideCSWin(dict(row, split_sizes=(1, 7)), slide_stages=(0, 1), out_indices=(0, 1))
    with pytest.raises(ValueError, match=r'does not fit this SlideCSWin: it has .*ffn\.layers\.0\.2\.bias'):
        load_pretrained(model, save(source.state_dict()))


@pytest.mark.parametrize('cls', [SlidePVT, SlideSwin])
def test_warm_start_from_a_host_is_plain_local_attention_with_its_weights(cls, save, log):
    host = randomize(small(cls, slide_stages=()))
    model = small(cls)
    load_pretrained(model, save(host.state_dict()))
    ours, theirs = model.stages[1].blocks[1].attn, host.stages[1].blocks[1].attn
    if cls is SlidePVT:
        assert torch.equal(ours.qkv.weight, torch.cat([theirs.q.weight, theirs.kv.weight]))
        assert torch.equal(ours.qkv.bias, torch.cat([theirs.q.bias, theirs.kv.bias]))
    else:
        assert torch.equal(ours.qkv.weight, theirs.qkv.weight)
    x = torch.randn(1, 6, 5, 32)
    assert relative_error(ours(x), local_attention(ours, x)) < 1e-5
    assert 'deform_weight' in log.text


def test_position_embeddings_and_bias_tables_are_resized(save, log):
    source = randomize(small(SlidePVT, slide_stages=(), pretrain_img_size=224))
    model = small(SlidePVT, slide_stages=(), pretrain_img_size=320)
    load_pretrained(model, save(source.state_dict()))
    for out, wanted in zip(outputs(model, (320, 320)), outputs(source, (320, 320)), strict=True):
        assert relative_error(out, wanted) < 1e-5  # what the host computes at every forward
    assert 'resized' in log.text

    host = randomize(small(SlideSwin, slide_stages=(), window_size=7))
    wider = small(SlideSwin, slide_stages=(), window_size=12)
    load_pretrained(wider, save(host.state_dict()))
    old = host.stages[0].blocks[0].attn.relative_position_bias_table
    new = wider.stages[0].blocks[0].attn.relative_position_bias_table
    assert new.shape == (23 * 23, 1)
    assert relative_error(new.view(23, 23)[11, 11], old.view(13, 13)[6, 6]) < 1e-5  # the centre stays the centre


def test_missing_keys_are_named_as_a_warning(save, log):
    source = randomize(small(SlideSwin))
    state = source.state_dict()
    del state['stages.2.blocks.1.norm1.weight']
    load_pretrained(small(SlideSwin), save(state))
    assert 'stages.*.blocks.*.norm1.weight' in log.text
    assert any(record.levelno == logging.WARNING for record in log.records)


def test_blocks_that_the_model_lacks_are_named_as_a_warning(save, log):
    source = small(SlideSwin)
    state = source.state_dict()
    last = 'stages.2.blocks.1.'
    state |= {key.replace(last, 'stages.2.blocks.2.'): value for key, value in state.items() if key.startswith(last)}
    load_pretrained(small(SlideSwin), save(state))
    assert 'unexpected, not used' in log.text
    assert any(record.levelno == logging.WARNING for record in log.records)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (
            {'conv1.weight': torch.zeros(3), 'layer1.0.conv1.weight': torch.zeros(3)},
            r'none of the layouts.*conv1\.weight',
        ),
        ({'epoch': 3}, r'holds no state dict'),
        ([1, 2], r'holds no state dict, but list'),
    ],
)
def test_foreign_files_are_refused(content, message, save):
    with pytest.raises(ValueError, match=message):
        load_pretrained(small(SlidePVT), save(content))


@pytest.mark.parametrize(
    ('source', 'target'),
    [
        (lambda: small(SlideSwin), lambda: SlideSwin('tiny')),
        (lambda: SlideSwin(SMALL), lambda: SlidePVT(SMALL_PVT)),
        (lambda: SlideSwin(dict(SMALL, depths=(1, 1, 1, 1))), lambda: SlideSwin(dict(SMALL, depths=(2, 2, 9, 2)))),
        (lambda: small_twins(TwinsPCPVT), lambda: TwinsPCPVT('small')),
        (lambda: TwinsSVT('small'), lambda: TwinsPCPVT('small')),
        (lambda: SlidePVT(SMALL_PVT, slide_stages=()), lambda: TwinsPCPVT(SMALL_PVT)),
        (lambda: SlideSwin(SMALL, slide_stages=()), lambda: TwinsSVT(SMALL_PVT)),
        (lambda: TwinsPCPVT(SMALL_PVT), lambda: SlidePVT(SMALL_PVT, slide_stages=())),
        (lambda: TwinsSVT(SMALL_PVT), lambda: SlideSwin(SMALL, slide_stages=())),
        (lambda: SlidePVT(SMALL_PVT, slide_stages=()), lambda: SlidePVTv2(SMALL_PVT, slide_stages=())),
        (lambda: SlidePVTv2(SMALL_PVT, slide_stages=()), lambda: SlidePVT(SMALL_PVT, slide_stages=())),
    ],
    ids=[
        'width',
        'host',
        'depth',
        'Twins',
        'other Twins',
        'PVT',
        'Swin',
        'PVT from Twins',
        'Swin from Twins',
        'PVTv2 from PVT',
        'PVT from PVTv2',
    ],
)
def test_another_model_is_refused(source, target, save):
    with pytest.raises(
        ValueError, match=r'does not fit this (Slide|Twins)(PVT|PVTv2|Swin|PCPVT|SVT): .*Check the arch'
    ):
        load_pretrained(target(), save(source().state_dict()))


def test_truncated_file_is_refused(save, tmp_path):
    whole = save(small(SlidePVT).state_dict())
    content = (tmp_path / 'checkpoint.pth').read_bytes()
    for count in (0, 10, *range(1000, len(content), len(content) // 50)):
        (tmp_path / 'checkpoint.pth').write_bytes(content[:count])
        with pytest.raises(ValueError, match='not a readable checkpoint'):
            load_pretrained(small(SlidePVT), whole)


GOLDEN_TWINS = {
    'pcpvt_small_v0_cls_224': TwinsPCPVT,  # the classification files are timm's too: it has the same keys
    'alt_gvt_small_cls_224': TwinsSVT,
    'pcpvt_small_detection_192x256': TwinsPCPVT,
    'alt_gvt_small_detection_192x256': TwinsSVT,
    'alt_gvt_small_segmentation_192x256': TwinsSVT,
}
GOLDEN_CSWIN = ['cswin_tiny_cls_224', 'cswin_tiny_segmentation_192x256']
TWINS = pytest.mark.parametrize('cls', [TwinsPCPVT, TwinsSVT])
WRAPPINGS = pytest.mark.parametrize(
    ('wrapper', 'prefix'),
    [
        (None, ''),
        pytest.param('model', '', marks=pytest.mark.slow),
        pytest.param('state_dict', 'backbone.', marks=pytest.mark.slow),
        pytest.param('model', 'module.', marks=pytest.mark.slow),
        ('state_dict', 'module.backbone.'),
    ],
)


def wrap(state, wrapper, prefix):
    state = {f'{prefix}{key}': value for key, value in state.items()}
    if 'backbone.' in prefix:
        state[f'{prefix.removesuffix("backbone.")}neck.weight'] = torch.zeros(3)
    return state if wrapper is None else {wrapper: state, 'epoch': 1}


@pytest.mark.parametrize('name', GOLDEN_TWINS)
@WRAPPINGS
def test_authors_twins_layout(name, wrapper, prefix, save, log):
    state = golden_state(name)
    model = GOLDEN_TWINS[name]('small')
    load_pretrained(model, save(wrap(state, wrapper, prefix)))
    assert torch.equal(model.stages[2].peg.proj.weight, state['pos_block.2.proj.0.weight'])
    assert torch.equal(model.stages[3].blocks[1].ffn.layers[1].bias, state['blocks.3.1.mlp.fc2.bias'])
    assert "authors' Twins layout" in log.text
    assert 'head.weight' in log.text
    assert ('stages.*.norm.weight' in log.text) == (name == 'alt_gvt_small_cls_224')
    assert not any(record.levelno >= logging.WARNING for record in log.records)


@TWINS
@WRAPPINGS
def test_mmseg_twins_layout(cls, wrapper, prefix, save, log):
    """The numbers are compared in test_twins; here the way from the file."""
    host = randomize(mmseg_host(cls, norm_after_stage=True))
    model = small_twins(cls, stage_norm='next')
    load_pretrained(model, save(wrap(host.state_dict(), wrapper, prefix)))
    assert torch.equal(model.stages[2].blocks[1].attn.kv.weight, host.layers[2][1].attn.attn.in_proj_weight[48:])
    assert 'mmseg Twins layout' in log.text
    assert 'all keys match' in log.text


@TWINS
@WRAPPINGS
def test_mmpretrain_twins_layout(cls, wrapper, prefix, save, log):
    state = golden_state(f'mmpretrain_{cls.__name__.removeprefix("Twins").lower()}')
    model = small_twins(cls, stage_norm='next')
    load_pretrained(model, save(wrap(state, wrapper, prefix)))
    assert torch.equal(model.stages[3].norm.bias, state['norm_after_stage3.bias'])
    assert 'mmpretrain Twins layout' in log.text
    assert 'all keys match' in log.text


@TWINS
def test_the_norm_of_mmpretrains_classifier_is_no_norm_of_a_stage(cls, save, log):
    state = golden_state(f'mmpretrain_{cls.__name__.removeprefix("Twins").lower()}')
    state = {
        key: value for key, value in state.items() if not key.startswith(tuple(f'norm_after_stage{i}' for i in '012'))
    }
    model = small_twins(cls, stage_norm='next')
    load_pretrained(model, save(state))
    assert torch.equal(model.stages[3].norm.weight, torch.ones(64))
    assert '\u2502 norm.weight' in log.text


def test_slide_attention_starts_from_the_windows_of_svt(save, log):
    host = randomize(small_twins(TwinsSVT))
    model = small_twins(TwinsSVT, slide_stages=(0, 1))
    load_pretrained(model, save(host.state_dict()))
    ours, theirs = model.stages[1].blocks[0].attn, host.stages[1].blocks[0].attn
    assert torch.equal(ours.qkv.weight, theirs.qkv.weight)
    assert torch.equal(model.stages[1].blocks[1].attn.kv.weight, host.stages[1].blocks[1].attn.kv.weight)
    x = torch.randn(1, 6, 5, 32)
    assert relative_error(ours(x), local_attention(ours, x)) < 1e-5
    assert 'deform_weight' in log.text


@pytest.mark.parametrize('name', GOLDEN_CSWIN)
@WRAPPINGS
def test_authors_cswin_layout(name, wrapper, prefix, save, log):
    """The numbers are compared in test_cswin; here the way from the file."""
    state = golden_state(name)
    model = SlideCSWin('tiny', slide_stages=())
    load_pretrained(model, save(wrap(state, wrapper, prefix)))
    assert torch.equal(model.stages[2].embed.projection.weight, state['merge2.conv.weight'])
    assert torch.equal(model.stages[2].blocks[20].attn.lepe[1].weight, state['stage3.20.attns.1.get_v.weight'])
    assert "authors' CSWin layout" in log.text
    assert ('stages.*.norm.weight' in log.text) == ('head.weight' in log.text) == (name == 'cswin_tiny_cls_224')
    assert not any(record.levelno >= logging.WARNING for record in log.records)


def test_slide_attention_starts_from_the_strips_of_cswin(save, log):
    """Where all pixels of the map are in one strip and are neighbours too, without LePE both are the same."""
    row = dict(embed_dims=8, depths=(1, 1), num_heads=(4, 4), mlp_ratios=2, split_sizes=(3, 3))
    host = randomize(SlideCSWin(row, slide_stages=(), out_indices=(0, 1)))
    model = SlideCSWin(row, slide_stages=(0,), out_indices=(0, 1))
    load_pretrained(model, save(host.state_dict()))
    assert '.attn.lepe.*.weight' in log.text  # unexpected
    assert not any(record.levelno >= logging.WARNING for record in log.records)
    ours, theirs = (x.stages[0].blocks[0].attn for x in (model, host))
    for lepe in theirs.lepe:
        torch.nn.init.zeros_(lepe.weight), torch.nn.init.zeros_(lepe.bias)
    x = torch.randn(2, 3, 3, 8)
    assert relative_error(ours(x)[:, 1, 1], theirs(x)[:, 1, 1]) < 1e-5


def test_the_moving_average_is_read_where_there_is_one(save, log):
    """Saved by timm's training scripts beside the weights; mmengine's ema_state_dict is another thing."""
    weights, average = ({'stages.0.norm.weight': torch.full((3,), value)} for value in (1.0, 2.0))
    checkpoint = save({'state_dict': weights, 'state_dict_ema': average})
    for state in (read_state_dict(checkpoint), CheckpointLoader.load_checkpoint(checkpoint)['state_dict']):
        assert torch.equal(state['stages.0.norm.weight'], average['stages.0.norm.weight'])
    assert log.text.count('the averaged weights, state_dict_ema, are loaded') == 2
    log.clear()
    for content, wanted in (
        ({'state_dict_ema': average}, average),
        ({'state_dict': weights, 'model': average}, weights),
        ({'state_dict': weights, 'ema_state_dict': average}, weights),
    ):
        assert torch.equal(*(x['stages.0.norm.weight'] for x in (read_state_dict(save(content)), wanted)))
    assert 'averaged' not in log.text


def assert_equal_states(state, wanted):
    assert list(state) == list(wanted)
    assert all(torch.equal(state[key], value) for key, value in wanted.items())


@pytest.mark.parametrize('name', [*GOLDEN_TWINS, *GOLDEN_CSWIN])
def test_round_trip_from_the_authors(name):
    state = golden_state(name)
    assert_equal_states(from_mmslide(to_mmslide(state)[1], 'authors'), state)


@TWINS
@pytest.mark.parametrize('qkv_bias', [True, False])
def test_round_trip_from_mmseg(cls, qkv_bias):
    host = mmseg_host(cls, norm_after_stage=True, qkv_bias=qkv_bias)
    state = randomize(host).state_dict()
    layout, ours = to_mmslide(state)
    assert layout == 'mmseg Twins'
    assert_equal_states(from_mmslide(ours, 'mmseg'), state)
    theirs = from_mmslide(ours, 'authors')
    assert_equal_states(from_mmslide(to_mmslide(theirs)[1], 'mmseg'), state)


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        (lambda: small(SlidePVT, slide_stages=()), r"the layout '{}' exists for .*Twins.*, but these weights"),
        (lambda: small(SlideSwin, slide_stages=()), r"the layout '{}' exists for .*Twins.*, but these weights"),
        (
            lambda: small_twins(TwinsSVT, slide_stages=(1,)),
            r"layout '{}' does not support Slide Attention.*stages\.1\.blocks\.0\.attn\.deform_weight",
        ),
    ],
)
@pytest.mark.parametrize('layout', ['authors', 'mmseg'])
def test_what_a_layout_cannot_hold_is_refused(source, message, layout):
    with pytest.raises(ValueError, match=message.format(layout)):
        from_mmslide(source().state_dict(), layout)


@pytest.mark.parametrize('slide_stages', [(0,), (0, 1)])
def test_slide_attention_has_no_place_in_the_layout_of_cswin(slide_stages):
    row = dict(embed_dims=8, depths=(1, 1), num_heads=2, mlp_ratios=2, split_sizes=3)
    state = SlideCSWin(row, slide_stages=slide_stages, out_indices=(0, 1)).state_dict()
    with pytest.raises(ValueError, match=r"'authors' does not support Slide Attention.*stages\.0\..*deform_weight"):
        from_mmslide(state, 'authors')


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match=r"layouts \['mmslide', .*'authors', .*\], got 'keras'"):
        from_mmslide(small_twins(TwinsSVT).state_dict(), 'keras')


@pytest.fixture(params=['authors', 'mmdet', 'timm', 'transformers'])
def pvtv2_layout(request):
    return request.param


@WRAPPINGS
def test_pvtv2_layouts(pvtv2_layout, wrapper, prefix, save, log):
    """Whose keys and numbers these are is compared below and in test_pvtv2; here the way from the file."""
    source = randomize(small_pvtv2())
    state = from_mmslide(source.state_dict(), pvtv2_layout) | {'head.weight': torch.zeros(10, 64)}
    model = small_pvtv2()
    load_pretrained(model, save(wrap(state, wrapper, prefix)))
    assert_same(model, source)
    assert 'PVTv2 layout' in log.text
    assert 'head.weight' in log.text
    assert not any(record.levelno >= logging.WARNING for record in log.records)


@pytest.mark.parametrize(
    ('layout', 'state'),
    [
        ('authors', lambda: golden_state('pvt_v2_b1_cls_224')),
        ('authors', lambda: golden_state('pvt_v2_b1_detection_192x256')),
        ('mmdet', lambda: mmdet_pvtv2(SlidePVTv2.variants['b0']).state_dict()),
        ('mmdet', lambda: mmdet_pvtv2(SlidePVTv2.variants['b0'], qkv_bias=False).state_dict()),
        ('timm', lambda: golden_state('timm_pvt_v2_li')),
        ('transformers', lambda: golden_state('transformers_pvt_v2')),
    ],
)
def test_round_trips_of_pvtv2(layout, state):
    state = state()
    name, ours = to_mmslide(state)
    assert name.startswith(layout)
    back = from_mmslide(ours, layout)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_transformers_without_a_classifier():
    state = golden_state('transformers_pvt_v2')
    alone = {key.removeprefix('pvt_v2.'): value for key, value in state.items() if not key.startswith('classifier')}
    assert to_mmslide(alone)[1].keys() == small_pvtv2().state_dict().keys()


@pytest.mark.parametrize('linear', [False, True])
def test_timms_class(linear):
    timm = pytest.importorskip('timm.models.pvt_v2')
    row = {key: (value,) * 4 if value == 2 else value for key, value in SMALL_PVTV2.items()}
    theirs = randomize(timm.PyramidVisionTransformerV2(num_classes=0, linear=linear, **row)).eval()
    model = small_pvtv2(LINEAR if linear else SMALL_PVTV2)
    model.load_state_dict(to_mmslide(theirs.state_dict())[1])
    image = torch.randn(1, 3, 75, 97)
    assert relative_error(model.eval()(image)[-1], theirs.forward_features(image)) < 1e-5
    theirs.load_state_dict(from_mmslide(model.state_dict(), 'timm'))


@pytest.mark.parametrize('linear', [False, True])
def test_transformers_class(linear):
    transformers = pytest.importorskip('transformers')
    row = dict(SMALL_PVTV2, mlp_ratios=[2] * 4)
    config = transformers.PvtV2Config(
        hidden_sizes=row.pop('embed_dims'),
        num_attention_heads=row.pop('num_heads'),
        linear_attention=linear,
        layer_norm_eps=1e-5,
        **row,
    )
    theirs = randomize(transformers.PvtV2ForImageClassification(config)).eval()
    model = small_pvtv2(LINEAR if linear else SMALL_PVTV2, norm_cfg=dict(type='LN', eps=1e-5))
    state = theirs.state_dict()
    head = {key: state[key] for key in ('classifier.weight', 'classifier.bias')}
    model.load_state_dict({key: value for key, value in to_mmslide(state)[1].items() if key not in head})
    image = torch.randn(1, 3, 75, 97)
    logits = torch.nn.functional.linear(model.eval()(image)[-1].mean((2, 3)), *head.values())
    assert relative_error(logits, theirs(image).logits) < 1e-5
    theirs.load_state_dict(from_mmslide(model.state_dict(), 'transformers') | head)


@pytest.mark.parametrize('row', [SMALL_PVTV2, LINEAR])
def test_warm_start_of_pvtv2(pvtv2_layout, row, save, log):
    host = randomize(small_pvtv2(row))
    if pvtv2_layout == 'mmdet' and row is LINEAR:
        with pytest.raises(ValueError, match='mmdet has no linear PVTv2'):
            from_mmslide(host.state_dict(), 'mmdet')
        return
    model = small_pvtv2(row, slide_stages=(0, 1))
    load_pretrained(model, save(from_mmslide(host.state_dict(), pvtv2_layout)))
    ours, theirs = model.stages[1].blocks[1].attn, host.stages[1].blocks[1].attn
    assert torch.equal(ours.qkv.weight, torch.cat([theirs.q.weight, theirs.kv.weight]))
    assert torch.equal(ours.qkv.bias, torch.cat([theirs.q.bias, theirs.kv.bias]))
    x = torch.randn(1, 6, 5, 32)
    assert relative_error(ours(x), local_attention(ours, x)) < 1e-5
    assert 'deform_weight' in log.text
    assert 'stages.*.blocks.*.attn.sr.weight' in log.text
    assert not any(record.levelno >= logging.WARNING for record in log.records)


def test_slide_pvtv2_has_no_place_in_a_hosts_layout(pvtv2_layout):
    with pytest.raises(ValueError, match=rf"layout '{pvtv2_layout}' does not support Slide Attention.*deform_weight"):
        from_mmslide(small_pvtv2(slide_stages=(1,)).state_dict(), pvtv2_layout)


@pytest.fixture
def convert(monkeypatch, capsys):
    """tools/convert_checkpoint.py, and what it prints."""

    def convert(*arguments):
        monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', *map(str, arguments)])
        monkeypatch.setenv('COLUMNS', '160')
        runpy.run_path(str(Path(__file__).parents[1] / 'tools/convert_checkpoint.py'), run_name='__main__')
        return capsys.readouterr().out

    return convert


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_convert_checkpoint_there_and_back(suffix, convert, save, tmp_path):
    if suffix == 'safetensors':
        pytest.importorskip('safetensors')
    state = golden_state('alt_gvt_small_cls_224')
    state['patch_embeds.0.proj.weight'] = state['patch_embeds.0.proj.weight'].to(memory_format=torch.channels_last)
    paths = [save({'model': state}), *(str(tmp_path / f'{name}.{suffix}') for name in ('ours', 'mmseg', 'authors'))]
    out = convert(paths[0], paths[1], '--to', 'mmslide')
    assert f'{paths[0]} to {paths[1]}' in out.splitlines()
    for row in (
        ("read, authors' Twins", 'blocks.*.*.mlp.fc1.weight', '18'),
        ('written, mmslide', 'stages.*.blocks.*.ffn.layers.*.*.weight', '18'),
        ('kept', 'head.weight', '1'),
    ):
        assert any(all(cell in line for cell in row) for line in out.splitlines()), row
    convert(paths[1], paths[2], '--to', 'mmseg')
    convert(paths[2], paths[3], '--to', 'authors')
    assert read_state_dict(paths[3]).keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in read_state_dict(paths[3]).items())
    model = TwinsSVT('small', stage_norm=None)
    for path in paths:
        load_pretrained(model, path)
        assert torch.equal(model.stages[0].peg.proj.bias, state['pos_block.0.proj.0.bias'])
    assert sorted(tmp_path.iterdir()) == sorted(map(Path, paths))


def test_convert_keeps_what_is_around_the_backbone(convert, save, tmp_path):
    host = randomize(mmseg_host(TwinsSVT)).state_dict()
    state = wrap(host, None, 'backbone.')
    convert(save({'state_dict': state}), tmp_path / 'ours.pth')
    ours = read_state_dict(str(tmp_path / 'ours.pth'))
    assert 'neck.weight' in ours
    assert ours.keys() - {'neck.weight'} == {f'backbone.{key}' for key in small_twins(TwinsSVT).state_dict()}
    convert(tmp_path / 'ours.pth', tmp_path / 'back.pth', '--to', 'mmseg')
    back = read_state_dict(tmp_path / 'back.pth')
    assert back.keys() == state.keys()
    assert all(torch.equal(value, back[key]) for key, value in state.items())


def test_convert_writes_tied_weights_as_safetensors(convert, save, tmp_path):
    pytest.importorskip('safetensors')
    tied = torch.randn(4, 4)
    head = {'bbox_head.0.weight': tied, 'bbox_head.1.weight': tied, 'bbox_head.2.weight': tied[:2]}
    backbone = {f'backbone.{key}': value for key, value in small_twins(TwinsSVT).state_dict().items()}
    convert(save({**backbone, **head}), tmp_path / 'ours.safetensors')
    state = read_state_dict(tmp_path / 'ours.safetensors')
    assert all(torch.equal(state[key], value) for key, value in head.items())


@pytest.mark.parametrize('failure', ['foreign', 'truncated', 'missing', 'layout', 'folder', 'disk', 'itself'])
def test_convert_fails_with_one_error_and_leaves_nothing(failure, convert, save, tmp_path, monkeypatch, capsys):
    checkpoint, out, layout = save(small_twins(TwinsSVT).state_dict()), tmp_path / 'out.pth', 'mmseg'
    out.write_text('as it was')
    if failure == 'foreign':
        save({'layer1.0.conv1.weight': torch.zeros(3)})
        message = 'none of the layouts'
    elif failure == 'truncated':
        Path(checkpoint).write_bytes(Path(checkpoint).read_bytes()[:-500])
        message = 'not a readable checkpoint'
    elif failure == 'missing':
        Path(checkpoint).unlink()
        message = r'checkpoint\.pth does not exist'
    elif failure == 'layout':
        save(small(SlidePVT, slide_stages=()).state_dict())
        message = 'exists for .*Twins.*, but these weights'
    elif failure == 'folder':
        out, message = tmp_path / 'none' / 'out.pth', 'the folder of .*none/out.pth does not exist'
    elif failure == 'itself':
        checkpoint, message = str(out), 'would overwrite the input'
    else:

        def fail(state, path):
            Path(path).write_text('half')
            raise OSError('No space left on device')

        monkeypatch.setattr(torch, 'save', fail)
        message = 'No space left on device'
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=r'^2$'):
        convert(checkpoint, out, '--to', layout)
    assert re.fullmatch(f'error: .*{message}.*\n', capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / 'out.pth').read_text() == 'as it was'


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    source = randomize(small_twins(TwinsPCPVT))
    path = tmp_path / 'model.safetensors'
    safetensors.save_file({f'backbone.{key}': value for key, value in source.state_dict().items()}, path)
    model = small_twins(TwinsPCPVT, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    assert_same(model, source)
    content = path.read_bytes()
    for count in (0, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:count])
        with pytest.raises(ValueError, match='not a readable checkpoint'):
            load_pretrained(model, str(path))


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    (tmp_path / 'x.safetensors').touch()
    with pytest.raises(ImportError, match=r'need the package safetensors\. Run: pip install safetensors'):
        read_state_dict(tmp_path / 'x.safetensors')


class CfgNode(dict):
    """Pickled under yacs's name, as the authors' training scripts leave it in their checkpoints."""


def test_authors_files_with_their_settings_inside(save, monkeypatch):
    CfgNode.__module__, CfgNode.__qualname__ = 'yacs.config', 'CfgNode'
    monkeypatch.setitem(sys.modules, 'yacs', type(sys)('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', type(sys)('yacs.config'))
    sys.modules['yacs.config'].CfgNode = CfgNode
    node = CfgNode(LR=1e-4)
    node.frozen = True
    state = small(SlidePVT).state_dict()
    for settings in (node, argparse.Namespace(lr=1e-4)):
        checkpoint = save({'model': state, 'config': settings})
        assert list(read_state_dict(checkpoint)) == list(state)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(checkpoint, weights_only=True)  # harmless in our loader only
