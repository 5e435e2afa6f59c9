"""Every model against the tables of the papers (Slide-Transformer, Twins), single blocks against arithmetic."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS

from mmslide.flops import complexity_table, count_complexity, count_macs
from mmslide.models.attention import (
    CrossShapedWindowAttention,
    LocallyGroupedAttention,
    NeighborhoodAttention,
    PooledAttention,
    SlideAttention,
    SubsampledAttention,
    WindowAttention,
)
from mmslide.models.layers import Block
from mmslide.models.mlp import MLP, ConvMLP

ROOT = Path(__file__).parents[1]
# Config: the paper's G multiply-adds (1280×800 for detection, 512×2048 and for Twins 512×512 for segmentation) and
# M parameters, where it gives them.
PAPER = {
    'slide_pvt/mask-rcnn_pvt-t_fpn_1x_coco': (240, 33),
    'slide_pvt/mask-rcnn_pvt-s_fpn_1x_coco': (305, 44),
    'slide_pvt/mask-rcnn_pvt-m_fpn_1x_coco': (392, 64),
    'slide_pvt/mask-rcnn_slide-pvt-t_fpn_1x_coco': (219, 32),
    'slide_pvt/mask-rcnn_slide-pvt-s_fpn_1x_coco': (269, 42),
    'slide_pvt/mask-rcnn_slide-pvt-m_fpn_1x_coco': (357, 62),
    'slide_pvt/retinanet_slide-pvt-t_fpn_1x_coco': (None, None),
    'slide_pvt/retinanet_slide-pvt-s_fpn_1x_coco': (None, None),
    'slide_pvt/retinanet_slide-pvt-m_fpn_1x_coco': (None, None),
    'slide_pvt/retinanet_pvt-t_fpn_1x_coco': (None, None),
    'slide_pvt/retinanet_pvt-s_fpn_1x_coco': (None, None),
    'slide_pvt/retinanet_pvt-m_fpn_1x_coco': (None, None),
    'slide_pvt/pvt-t_fpn_8xb4-80k_ade20k-512x512': (158, 17),
    'slide_pvt/pvt-s_fpn_8xb4-80k_ade20k-512x512': (225, 28),
    'slide_pvt/slide-pvt-t_fpn_8xb4-80k_ade20k-512x512': (136, 16),
    'slide_pvt/slide-pvt-s_fpn_8xb4-80k_ade20k-512x512': (188, 26),
    'slide_swin/mask-rcnn_swin-t_fpn_ms-crop-3x_coco': (267, 48),
    'slide_swin/mask-rcnn_slide-swin-t_fpn_ms-crop-3x_coco': (268, 48),
    'slide_swin/cascade-mask-rcnn_slide-swin-t_fpn_ms-crop-3x_coco': (747, 86),
    'slide_swin/cascade-mask-rcnn_slide-swin-s_fpn_ms-crop-3x_coco': (838, 107),
    'slide_swin/cascade-mask-rcnn_slide-swin-b_fpn_ms-crop-3x_coco': (983, 145),
    'slide_swin/cascade-mask-rcnn_swin-t_fpn_ms-crop-3x_coco': (None, None),
    'slide_swin/cascade-mask-rcnn_swin-s_fpn_ms-crop-3x_coco': (None, None),
    'slide_swin/cascade-mask-rcnn_swin-b_fpn_ms-crop-3x_coco': (None, None),
    'slide_swin/swin-t_upernet_8xb2-160k_ade20k-512x512': (945, 60),
    'slide_swin/swin-s_upernet_8xb2-160k_ade20k-512x512': (1038, 81),
    'slide_swin/slide-swin-t_upernet_8xb2-160k_ade20k-512x512': (946, 60),
    'slide_swin/slide-swin-s_upernet_8xb2-160k_ade20k-512x512': (1038, 81),
    'slide_swin/slide-swin-t_upernet_8xb2-layer-decay-160k_ade20k-512x512': (None, None),
    'slide_swin/swin-t_upernet_8xb2-layer-decay-160k_ade20k-512x512': (None, None),
    'twins/mask-rcnn_twins-pcpvt-s_fpn_1x_coco': (None, 44.3),
    'twins/mask-rcnn_twins-pcpvt-s_fpn_ms-crop-3x_coco': (None, 44.3),
    'twins/retinanet_twins-pcpvt-s_fpn_1x_coco': (None, None),
    'twins/retinanet_twins-pcpvt-s_fpn_ms-crop-3x_coco': (None, None),
    'twins/twins-pcpvt-s_fpn_8xb4-80k_ade20k-512x512': (None, None),
    'twins/twins-pcpvt-s_upernet_8xb2-160k_ade20k-512x512': (234, 54.6),
    'twins/mask-rcnn_twins-pcpvt-b_fpn_1x_coco': (None, 64.0),
    'twins/mask-rcnn_twins-pcpvt-b_fpn_ms-crop-3x_coco': (None, 64.0),
    'twins/retinanet_twins-pcpvt-b_fpn_1x_coco': (None, None),
    'twins/retinanet_twins-pcpvt-b_fpn_ms-crop-3x_coco': (None, None),
    'twins/twins-pcpvt-b_fpn_8xb4-80k_ade20k-512x512': (None, None),
    'twins/twins-pcpvt-b_upernet_8xb2-160k_ade20k-512x512': (250, 74.3),
    'twins/mask-rcnn_twins-pcpvt-l_fpn_1x_coco': (None, 81.2),
    'twins/mask-rcnn_twins-pcpvt-l_fpn_ms-crop-3x_coco': (None, 81.2),
    'twins/retinanet_twins-pcpvt-l_fpn_1x_coco': (None, None),
    'twins/retinanet_twins-pcpvt-l_fpn_ms-crop-3x_coco': (None, None),
    'twins/twins-pcpvt-l_fpn_8xb4-80k_ade20k-512x512': (None, None),
    'twins/twins-pcpvt-l_upernet_8xb2-160k_ade20k-512x512': (269, 91.5),
    'twins/mask-rcnn_twins-svt-s_fpn_1x_coco': (None, 44.0),
    'twins/mask-rcnn_twins-svt-s_fpn_ms-crop-3x_coco': (None, 44.0),
    'twins/retinanet_twins-svt-s_fpn_1x_coco': (None, None),
    'twins/retinanet_twins-svt-s_fpn_ms-crop-3x_coco': (None, None),
    'twins/twins-svt-s_fpn_8xb4-80k_ade20k-512x512': (None, None),
    'twins/twins-svt-s_upernet_8xb2-160k_ade20k-512x512': (228, 54.4),
    'twins/mask-rcnn_twins-svt-b_fpn_1x_coco': (None, 76.3),
    'twins/mask-rcnn_twins-svt-b_fpn_ms-crop-3x_coco': (None, 76.3),
    'twins/retinanet_twins-svt-b_fpn_1x_coco': (None, None),
    'twins/retinanet_twins-svt-b_fpn_ms-crop-3x_coco': (None, None),
    'twins/twins-svt-b_fpn_8xb4-80k_ade20k-512x512': (None, None),
    'twins/twins-svt-b_upernet_8xb2-160k_ade20k-512x512': (261, 88.5),
    'twins/mask-rcnn_twins-svt-l_fpn_1x_coco': (None, 119.7),
    'twins/mask-rcnn_twins-svt-l_fpn_ms-crop-3x_coco': (None, 119.7),
    'twins/retinanet_twins-svt-l_fpn_1x_coco': (None, None),
    'twins/retinanet_twins-svt-l_fpn_ms-crop-3x_coco': (None, None),
    'twins/twins-svt-l_fpn_8xb4-80k_ade20k-512x512': (None, None),
    'twins/twins-svt-l_upernet_8xb2-160k_ade20k-512x512': (297, 133),
}


def load(name: str) -> Config:
    return Config.fromfile(ROOT / 'configs' / f'{name}.py')


def test_every_config_stands_in_the_table():
    configs = (path for path in (ROOT / 'configs').glob('*/*.py') if path.parent.name not in ('_base_', 'mini'))
    assert {f'{path.parent.name}/{path.stem}' for path in configs} == set(PAPER)


@pytest.mark.parametrize('name', PAPER)
def test_paper(name):
    family, config = name.split('/')
    twins = family == 'twins'
    cfg = load(name)
    complexity = count_complexity(cfg, (512, 512) if twins and cfg.default_scope == 'mmseg' else None)
    macs, params = complexity.macs / 1e9, complexity.params / 1e6
    paper_macs, paper_params = PAPER[name]
    if paper_macs is not None:
        assert macs == pytest.approx(paper_macs, rel=0.01)
    if twins and paper_params is not None:
        # The authors' detectors and segmentors carry the ImageNet classifier along: norm and linear.
        neck_or_head = cfg.model.get('neck') or cfg.model.decode_head
        classifier = (2 + 1000) * neck_or_head.in_channels[-1] + 1000
        assert params + classifier / 1e6 == pytest.approx(paper_params, rel=0.007)
    elif paper_params is not None:
        assert params == pytest.approx(paper_params, abs=0.6)

    # What we say about ourselves was measured with this code.
    models = yaml.safe_load((ROOT / 'configs' / family / 'metafile.yml').read_text())['Models']
    (model,) = (x for x in models if x['Name'] == config)
    assert model['Metadata']['FLOPs (G)'] == round(macs, 1)
    assert model['Metadata']['Parameters (M)'] == round(params, 1)
    assert model['Paper Results'].get('FLOPs (G)') == paper_macs
    assert model['Paper Results'].get('Parameters (M)') == paper_params
    (row,) = (x for x in (ROOT / 'configs' / family / 'README.md').read_text().splitlines() if f'({config}.py)' in x)
    assert f'| {params:.1f} | {macs:.1f} | {paper_params or "–"} | {paper_macs or "–"} |' in row


def macs_of(block: Block, channels: int, height: int, width: int) -> int:
    x = torch.empty(1, height, width, channels, device='meta')
    out, macs = count_macs(block.to('meta').eval(), x)
    assert out.shape == x.shape
    return macs


def block(mixer: torch.nn.Module, channels: int) -> Block:
    return Block(mixer, MLP(channels, 4 * channels), channels)


def test_slide_block():
    channels, kernel, height, width = 32, 3, 10, 15
    pixels, slots = height * width, kernel**2
    expected = (
        3 * channels**2 * pixels  # qkv
        + 2 * channels * slots * slots * pixels  # the merged kernels on K and on V: k² slots from k² taps each
        + channels * slots * pixels  # q · K
        + channels * slots * pixels  # a · V
        + channels**2 * pixels  # projection
        + 2 * 4 * channels**2 * pixels  # MLP
    )
    assert macs_of(block(SlideAttention(channels, 2, kernel), channels), channels, height, width) == expected


@pytest.mark.parametrize(
    'mixer',
    [
        WindowAttention(32, 2, 7),
        WindowAttention(32, 2, 7, shift_size=3),
        LocallyGroupedAttention(32, 2, 7),
        LocallyGroupedAttention(32, 2, 7, mask_padding=False),
    ],
    ids=['W-MSA', 'SW-MSA', 'LSA', 'LSA without mask'],
)
def test_window_block(mixer):
    channels, window, height, width = 32, 7, 10, 15
    pixels, padded = height * width, 14 * 21
    expected = (
        3 * channels**2 * padded  # qkv, on the padding too
        + 2 * channels * window**2 * padded  # q · k and a · v
        + channels**2 * pixels  # projection
        + 2 * 4 * channels**2 * pixels  # MLP
    )
    assert macs_of(block(mixer, channels), channels, height, width) == expected


def test_cross_shaped_window_block():
    channels, split, height, width = 32, 7, 10, 15
    pixels = height * width
    vertical, horizontal = height * 21, 14 * width  # pixels of the padded maps
    expected = (
        3 * channels**2 * pixels  # qkv
        + 2 * channels // 2 * (vertical * height * split + horizontal * width * split)  # q · k and a · v
        + 9 * channels // 2 * (vertical + horizontal)  # LePE
        + channels**2 * pixels  # projection
        + 2 * 4 * channels**2 * pixels  # MLP
    )
    mixer = CrossShapedWindowAttention(channels, 2, split)
    assert macs_of(block(mixer, channels), channels, height, width) == expected
    whole = CrossShapedWindowAttention(channels, 2, None)
    expected = 12 * channels**2 * pixels + 2 * channels * pixels**2 + 9 * channels * pixels
    assert macs_of(block(whole, channels), channels, height, width) == expected


def test_spatial_reduction_block():
    channels, ratio, height, width = 32, 4, 12, 16
    pixels = height * width
    reduced = pixels // ratio**2
    expected = (
        channels**2 * pixels  # q
        + channels**2 * ratio**2 * reduced  # the reduction, a convolution
        + 2 * channels**2 * reduced  # k and v
        + 2 * channels * pixels * reduced  # q · k and a · v
        + channels**2 * pixels  # projection
        + 2 * 4 * channels**2 * pixels  # MLP
    )
    assert macs_of(block(SubsampledAttention(channels, 2, ratio), channels), channels, height, width) == expected


@pytest.mark.parametrize('size', [(10, 15), (5, 9)])
def test_neighborhood_block(size):
    channels, window = 32, 7
    pixels, padded = size[0] * size[1], max(size[0], window) * max(size[1], window)
    expected = (
        3 * channels**2 * padded  # qkv, on the padding of a map smaller than the window too
        + 2 * channels * window**2 * padded  # q · k and a · v
        + channels**2 * pixels  # projection
        + 2 * 4 * channels**2 * pixels  # MLP
    )
    assert macs_of(block(NeighborhoodAttention(channels, 2, window), channels), channels, *size) == expected


def test_pooled_block():
    channels, height, width = 32, 12, 16
    pixels, pooled = height * width, 49
    expected = (
        channels**2 * pixels  # q
        + channels**2 * pooled  # the convolution after the pool
        + 2 * channels**2 * pooled  # k and v
        + 2 * channels * pixels * pooled  # q · k and a · v
        + channels**2 * pixels  # projection
        + (2 * 4 * channels**2 + 9 * 4 * channels) * pixels  # MLP with a depthwise convolution
    )
    mlp = ConvMLP(channels, 4 * channels, relu=True)
    block = Block(PooledAttention(channels, 2), mlp, channels)
    assert macs_of(block, channels, height, width) == expected


def test_does_not_depend_on_the_backend():
    name = 'slide_pvt/mask-rcnn_slide-pvt-t_fpn_1x_coco'
    cfg = load(name)
    cfg.model.backbone.attn_backend = 'tapwise'
    assert count_complexity(cfg, (64, 96)) == count_complexity(load(name), (64, 96))


def test_builds_on_meta_and_if_need_be_on_the_cpu(monkeypatch):
    """mmdet's Swin reads its drop path rates from a tensor while it is built, which the meta device refuses."""
    devices = []

    def build(cfg):
        model = MODELS.build(cfg)
        devices.append({parameter.device.type for parameter in model.parameters()})
        return model

    monkeypatch.setattr('mmslide.build.MODELS', SimpleNamespace(build=build))
    cfg = load('slide_swin/swin-t_upernet_8xb2-160k_ade20k-512x512')
    host = count_complexity(cfg, (64, 96))
    assert devices == [{'meta'}]
    cfg.model.backbone = dict(type='mmdet.SwinTransformer')
    foreign = count_complexity(cfg, (64, 96))
    assert devices == [{'meta'}, {'cpu'}]
    assert foreign.params == host.params
    assert foreign.parts[1:] == host.parts[1:]


def test_single_stage_detector():
    cfg = load('slide_pvt/mask-rcnn_slide-pvt-t_fpn_1x_coco')
    channels, anchors, classes = 256, 9, 80
    cfg.model.type = 'RetinaNet'
    for key in ('rpn_head', 'roi_head', 'train_cfg', 'test_cfg'):
        del cfg.model[key]
    cfg.model.bbox_head = dict(type='RetinaHead', num_classes=classes, in_channels=channels, feat_channels=channels)
    complexity = count_complexity(cfg, (128, 128))
    assert [part.name for part in complexity.parts] == ['backbone', 'neck', 'dense head']
    pixels = 32**2 + 16**2 + 8**2 + 4**2 + 2**2
    assert complexity.parts[-1].macs == 9 * channels * (2 * 4 * channels + anchors * (classes + 4)) * pixels


def test_cascade():
    cfg = load('slide_pvt/mask-rcnn_slide-pvt-t_fpn_1x_coco')
    box, mask = count_complexity(cfg, (64, 64)).parts[-2:]
    assert (box.name, mask.name) == ('box head', 'mask head')
    cfg.model.type = 'CascadeRCNN'
    cfg.model.roi_head.update(type='CascadeRoIHead', num_stages=3, stage_loss_weights=[1, 0.5, 0.25])
    cfg.model.train_cfg = None
    cascade = count_complexity(cfg, (64, 64)).parts[-6:]
    assert [part.name for part in cascade] == [f'{kind} head {n}' for kind in ('box', 'mask') for n in (1, 2, 3)]
    assert [part.macs for part in cascade] == [box.macs] * 3 + [mask.macs] * 3


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (dict(type='TwoHeaded'), 'with a backbone can be counted, got TwoHeaded'),
        (dict(backbone=dict(type='mmslide.SlidePVT')), 'cannot be counted: its decode head does not run'),
    ],
)
def test_errors(model, message):
    cfg = load('slide_pvt/slide-pvt-t_fpn_8xb4-80k_ade20k-512x512')
    if 'backbone' in model:
        # A cascade of heads, each of which wants the output of the one before.
        model = dict(cfg.model, type='CascadeEncoderDecoder', num_stages=1, decode_head=[cfg.model.decode_head])
    cfg = Config(dict(default_scope='mmseg', model=model))
    with pytest.raises(ValueError, match=message):
        count_complexity(cfg, (64, 64))


def test_table_and_tool(capsys, monkeypatch):
    config = ROOT / 'configs/slide_pvt/slide-pvt-t_fpn_8xb4-80k_ade20k-512x512.py'
    monkeypatch.setenv('COLUMNS', '120')
    command = ['get_flops.py', str(config), '--shape', '64', '96', '--cfg-options', 'model.backbone.arch=small']
    monkeypatch.setattr(sys, 'argv', command)
    runpy.run_path(str(ROOT / 'tools/get_flops.py'), run_name='__main__')
    out = capsys.readouterr().out
    small = count_complexity(load('slide_pvt/slide-pvt-s_fpn_8xb4-80k_ade20k-512x512'), (64, 96))
    assert f'{small.macs / 1e9:.2f}' in out
    assert f'{small.params / 1e6:.2f}' in out
    assert '64×96' in out
    assert complexity_table(small).row_count == len(small.parts) + 1
