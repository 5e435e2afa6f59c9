import argparse
import logging
import os
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from helpers import golden_state, randomize, relative_error
from mmengine.logging import MMLogger
from test_backbones import SMALL, SMALL_PVT, small

from mmslide.models import SlidePVT, SlideSwin
from mmslide.weights import load_pretrained, read_state_dict


@pytest.fixture
def log(caplog):
    """What mmslide tells the user through mmengine's logger."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


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


def test_init_weights_without_a_checkpoint():
    model = small(SlideSwin)
    model.init_weights()
    assert model.stages[0].blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.stages[0].blocks[0].attn.qkv.bias.any()


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


def test_authors_shift_kernels_must_be_the_shift(save):
    state = golden_state('slide_swin_tiny_224')
    state['layers.0.blocks.0.attn.dep_conv.weight'][5, 0, 1, 1] += 0.5
    with pytest.raises(ValueError, match=r'dep_conv\.weight must be the fixed shift'):
        load_pretrained(SlideSwin(window_size=(7, 7, 14, 7)), save(state))


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
        model = SlideSwin(row, slide_stages=(), output_norm=False)
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
    source = randomize(small(SlidePVT, slide_stages=(), norm_after_stage=False))
    model = small(SlidePVT, slide_stages=(), norm_after_stage=False)
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
    ],
    ids=['width', 'host', 'depth'],
)
def test_another_model_is_refused(source, target, save):
    with pytest.raises(ValueError, match=r'does not fit this Slide(PVT|Swin).*Check the arch'):
        load_pretrained(target(), save(source().state_dict()))


def test_truncated_file_is_refused(save, tmp_path):
    whole = save(small(SlidePVT).state_dict())
    content = (tmp_path / 'checkpoint.pth').read_bytes()
    for count in (0, 10, len(content) // 2, len(content) - 100):
        (tmp_path / 'checkpoint.pth').write_bytes(content[:count])
        with pytest.raises(ValueError, match='not a readable checkpoint'):
            load_pretrained(small(SlidePVT), whole)


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


class Call:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def test_a_file_with_a_call_in_it_runs_nothing(save, tmp_path):
    target = tmp_path / 'written'
    checkpoint = save({'state_dict': OrderedDict(x=torch.zeros(1)), 'evil': Call(os.system, f'touch {target}')})
    with pytest.raises(ValueError, match='not a readable checkpoint'):
        load_pretrained(small(SlidePVT), checkpoint)
    assert not target.exists()


def test_history_buffers_load_and_getattr_stays_shut(tmp_path):
    """In a process of its own, since a successful attack would change this one."""
    script = f"""
import builtins, pickle, sys, torch
import mmslide
from mmengine.logging import HistoryBuffer

class Get:
    def __init__(self, *arguments): self.arguments = arguments
    def __reduce__(self): return getattr, self.arguments

path = {str(tmp_path / 'hub.pth')!r}
buffer = HistoryBuffer([1.0, 2.0, 6.0], [1, 1, 1])
torch.save(dict(buffer=buffer), path)
assert torch.load(path, weights_only=True)['buffer'].mean() == 3.0
for arguments in [(HistoryBuffer, '__init__'), (torch, 'load'), (builtins, 'exec'), (HistoryBuffer.mean, '__globals__'),
                  (HistoryBuffer, '_statistics_methods')]:
    try:
        torch.save(dict(x=Get(*arguments)), path)
    except Exception:
        continue  # modules cannot be pickled at all
    try:
        torch.load(path, weights_only=True)
    except pickle.UnpicklingError:
        continue
    sys.exit(f'{{arguments}} was handed out')
"""
    subprocess.run([sys.executable, '-c', script], check=True)
