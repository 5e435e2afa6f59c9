import json
import runpy
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from helpers import BACKBONES, TOOLS, assert_gpu_operators, randomize, relative_error, tool, tool_error
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmseg.structures import SegDataSample
from torch import nn

from mmslide.deploy import export as driver
from mmslide.deploy import fuse, load_model
from mmslide.deploy.export import export, metadata, resizing
from mmslide.deploy.graphs import Exportable, ExportableBackbone, part
from mmslide.deploy.graphs.segmentor import AdaptiveAverage, ExportableSegmentor
from mmslide.deploy.targets import TARGETS, Traced, require
from mmslide.deploy.targets.images import prepare, read_image
from mmslide.deploy.targets.onnx import to_onnx
from mmslide.deploy.trace import trace
from mmslide.models import SlideSwin
from mmslide.models.attention import SlideAttention
from mmslide.ops.unrolled import unrolled

CHANNELS = [16, 32, 64, 128]
HEAD = dict(in_index=[0, 1, 2, 3], channels=16, num_classes=5, dropout_ratio=0.1, norm_cfg=dict(type='SyncBN'))
SEGMENTORS = {
    'UPerHead': dict(decode_head=dict(HEAD, type='UPerHead', in_channels=CHANNELS, pool_scales=(1, 2, 3, 6))),
    'FPNHead': dict(
        neck=dict(type='FPN', in_channels=CHANNELS, out_channels=32, num_outs=4),
        decode_head=dict(HEAD, type='FPNHead', in_channels=[32] * 4, feature_strides=[4, 8, 16, 32]),
    ),
}
PREPROCESSOR = dict(
    type='SegDataPreProcessor', mean=[123.0, 116.0, 103.0], std=[58.0, 57.0, 56.0], bgr_to_rgb=True, size=(64, 64)
)
# Odd, with a window that just covers the last map or two, with one that exactly does, and the least.
SIZES = [(65, 97), (225, 224), (224, 448), (32, 33)]


@pytest.fixture
def save(tmp_path):
    """Writes a config and a checkpoint of a model with random weights: their paths, and the model."""

    def save(backbone='SlidePVT', head='UPerHead', **changes):
        model = dict(
            type='EncoderDecoder',
            data_preprocessor=PREPROCESSOR,
            backbone=BACKBONES[backbone],
            train_cfg=dict(),
            test_cfg=dict(mode='whole'),
            **SEGMENTORS[head],
        )
        config = Config(dict(default_scope='mmseg', model={**model, **changes}))
        with DefaultScope.overwrite_default_scope('mmseg'):
            built = randomize(MODELS.build(config.model)).eval()
        for module in built.modules():
            if isinstance(module, nn.SyncBatchNorm | nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        paths = tmp_path / 'config.py', tmp_path / 'model.pth'
        paths[0].write_text(config.pretty_text)
        meta = dict(dataset_meta=dict(classes=('a', 'b', 'c', 'd', 'e')))
        torch.save(dict(state_dict=built.state_dict(), meta=meta), paths[1])
        return *(str(path) for path in paths), built

    return save


FIT = dict(resize='fit', resize_ratio=1.0, dynamic=False)


def traced_part(config, checkpoint, name, shape, dynamic=False):
    cfg, model, meta = load_model(config, checkpoint)
    module = part(fuse(model), name, shape)
    return Traced(trace(module, shape, dynamic), metadata(cfg, meta, module, name, shape, dynamic))


# In float32, on any image; ExecuTorch and Core ML are tested in files of their own.
SUFFIXES = ['.onnx', *(pytest.param(suffix, marks=pytest.mark.exhaustive) for suffix in ('.xml', '.pt2'))]


def written(traced, suffix, folder):
    """A file, as a function from tensor to tensors."""
    path, target = folder / f'x{suffix}', TARGETS[suffix]
    target.write(traced, path)
    if suffix == '.onnx':
        assert_gpu_operators(onnx.load(path))
    runner = target.load(path)
    return lambda image: [torch.from_numpy(x) for x in runner.run(image.numpy()).values()]


def about(cfg, meta):
    return metadata(cfg, meta, Exportable(), 'backbone', (64, 96))


def unfused(model):
    """In float64, with the reference form of Slide Attention."""
    for module in model.modules():
        if isinstance(module, SlideAttention):
            module.backend = 'reference'
    return model.double()


def only(*names):
    """All backbones; the others only in the exhaustive tests."""
    return [x if x in names else pytest.param(x, marks=pytest.mark.exhaustive) for x in BACKBONES]


@pytest.mark.slow
@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('backbone', only('SlideSwin', 'TwinsSVT'))
def test_backbones(backbone, suffix, save, tmp_path):
    assert_backbone(backbone, False, suffix, save, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('backbone', only())
def test_dynamic_backbones(backbone, suffix, save, tmp_path):
    assert_backbone(backbone, True, suffix, save, tmp_path)


def assert_backbone(backbone, dynamic, suffix, save, folder):
    config, checkpoint, model = save(backbone)
    run = written(traced_part(config, checkpoint, 'backbone', (70, 99), dynamic), suffix, folder)
    reference = unfused(model.backbone)
    for size in SIZES if dynamic else [(70, 99)]:
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            wanted = reference(image.double())
        for value, stage in zip(run(image), wanted, strict=True):
            assert relative_error(value, stage) < 1e-5, size


@pytest.mark.slow
@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('head', ['UPerHead', pytest.param('FPNHead', marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize('dynamic', [pytest.param(False, marks=pytest.mark.exhaustive), True], ids=['fixed', 'dynamic'])
def test_segmentors(head, dynamic, suffix, save, tmp_path):
    """Against what mmseg predicts."""
    config, checkpoint, model = save('TwinsPCPVT', head)
    run = written(traced_part(config, checkpoint, 'model', (70, 99), dynamic), suffix, tmp_path)
    reference = unfused(model)
    for size in [(70, 99), *(SIZES if dynamic else [])]:
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            (wanted,) = reference.predict(image.double())
        logits, labels = run(image)
        assert relative_error(logits[0], wanted.seg_logits.data) < 1e-5, size
        assert labels.dtype == torch.int64
        assert torch.equal(labels, logits.argmax(1))
        assert (labels == wanted.pred_sem_seg.data).double().mean() > 1 - 1e-3
    assert_draws(tmp_path / f'x{suffix}', tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize('suffix', SUFFIXES)
def test_features(suffix, save, tmp_path):
    """Backbone and neck, at every size."""
    config, checkpoint, model = save('TwinsPCPVT', 'FPNHead')
    traced = traced_part(config, checkpoint, 'features', (70, 99), dynamic=True)
    assert traced.metadata['outputs'] == ['level1', 'level2', 'level3', 'level4']
    run, reference = written(traced, suffix, tmp_path), unfused(model)
    for size in [(70, 99), *SIZES]:
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            wanted = reference.extract_feat(image.double())
        for value, level in zip(run(image), wanted, strict=True):
            assert relative_error(value, level) < 1e-5, size


def assert_draws(exported, folder):
    """tools/run_exported.py, with a picture as wide as none before."""
    picture = np.random.default_rng(0).integers(0, 256, (50, 77, 3), np.uint8)
    cv2.imwrite(str(folder / 'in.png'), picture)
    text = tool('run_exported', exported, folder / 'in.png', folder / 'out.png')
    drawn = cv2.imread(str(folder / 'out.png'))
    assert drawn.shape == picture.shape
    counts = [line.split() for line in text.splitlines()]
    assert {name for name, *_ in counts} <= set('abcde')
    assert sum(int(count) for _, count, _ in counts) == 50 * 77
    # Every pixel is the mean of itself and a colour of its class.
    colours = 2 * drawn.astype(int) - picture
    assert len(np.unique(colours.reshape(-1, 3) // 4, axis=0)) < 8 * len(counts)


def test_more_classes_than_colours(capsys):
    draw = runpy.run_path(str(TOOLS / 'run_exported.py'))
    image = np.zeros((8, 8, 3), np.uint8)
    draw['draw_scores'](image, np.arange(1000.0)[None], range(10**9))
    draw['draw_labels'](image, np.full((1, 8, 8), 846), (8, 8), [f'c{index}' for index in range(847)])
    found = dict(boxes=np.array([[1.0, 1, 9, 9]] * 2), labels=np.array([900, 0]), scores=np.array([0.9, 0.0]))
    draw['draw_detections'](image, found, (8, 8), [f'c{index}' for index in range(1203)], 0.0)
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ['999', '998', '997', '996', '995', 'c846', 'c900']


def test_every_output_has_to_agree():
    ones = torch.ones(2)

    def agreement(outputs, wanted):
        return Exportable().agreement(outputs, wanted, 1e-4)

    assert agreement([ones, ones], [ones, ones + 1e-6])[0]
    for wrong in (ones + 1e-3, torch.tensor([1.0, torch.nan]), torch.ones(3)):
        assert not agreement([ones, wrong], [ones, ones])[0]
        assert not agreement([wrong, ones], [ones, ones])[0]
        assert not agreement([ones], [ones, wrong])[0]
    assert agreement([ones], [torch.ones(1, 2)])[1] == 'shapes are [(2,)], of PyTorch [(1, 2)]'


def test_another_label_is_right_in_a_tie_only(save):
    segmentor = ExportableSegmentor(save()[2])

    def agrees(outputs, wanted):
        return segmentor.agreement(outputs, wanted, 1e-4)[0]

    logits = torch.tensor([[-3.0, -2.0, 5.0, 5.0, -1.0]]).view(1, 5, 1, 1) + torch.zeros(1, 5, 2, 2)
    labels = logits.argmax(1)
    assert agrees([logits, labels], [logits, labels])
    assert agrees([logits, 5 - labels], [logits, labels])
    for wrong in ([logits, labels - 1], [logits + 1e-3, labels], [logits, labels[:, :1]], [logits[:, :4], labels]):
        assert not agrees(wrong, [logits, labels])


@pytest.mark.exhaustive
def test_what_cannot_be_drawn_is_named(save, tmp_path):
    config, checkpoint, _ = save()
    whole, backbone, foreign = (str(tmp_path / f'{name}.onnx') for name in ('whole', 'backbone', 'foreign'))
    export(config, checkpoint, whole, 'model', (64, 64))
    torch.onnx.export(nn.Identity().eval(), (torch.zeros(1),), dynamo=True, verbose=False).save(foreign)
    model = onnx.load(whole)
    values = json.loads(model.metadata_props[0].value)
    huge = json.dumps({**values, 'shape': [10**9, 10**9]})
    part_only = json.dumps({**values, 'part': 'backbone'})
    contents = dict(backbone=part_only, little='{"part": "model"}', huge=huge, text='x', list='[]')
    for name, content in contents.items():
        model.metadata_props[0].value = content
        onnx.save(model, tmp_path / f'{name}.onnx')
    broken = {suffix: tmp_path / f'broken{suffix}' for suffix in TARGETS}
    for path in broken.values():
        path.write_bytes(b'nothing')
    good, out, link = tmp_path / 'in.png', tmp_path / 'out.png', tmp_path / 'link.png'
    cv2.imwrite(str(good), np.zeros((64, 64, 3), np.uint8))
    link.symlink_to(good)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments, message in [
        ((tmp_path / 'none.onnx', good, out), f'{tmp_path / "none.onnx"} does not exist'),
        ((tmp_path, good, out), f'{tmp_path} must end in one of .onnx, .xml'),
        ((config, good, out), 'config.py must end in one of .onnx, .xml'),
        ((broken['.onnx'], good, out), 'onnxruntime cannot load '),
        ((broken['.xml'], good, out), 'openvino cannot load '),
        ((broken['.pt2'], good, out), 'torch.export cannot load '),
        ((foreign, good, out), 'was not written by tools/export.py'),
        ((backbone, good, out), 'contains only the backbone'),
        ((tmp_path / 'little.onnx', good, out), 'little.onnx cannot be run on'),
        ((tmp_path / 'huge.onnx', good, out), 'huge.onnx cannot be run on'),
        ((tmp_path / 'text.onnx', good, out), 'text.onnx is not JSON'),
        ((tmp_path / 'list.onnx', good, out), 'list.onnx is not a dict, but list'),
        ((whole, config, out), 'config.py is not a readable image'),
        ((whole, tmp_path, out), f'{tmp_path} is a folder'),
        ((whole, good, tmp_path / 'no' / 'folder.png'), 'cannot write image '),
        ((whole, good, tmp_path / 'out.what'), 'cannot write image '),
        ((whole, good, whole), 'whole.onnx is the input '),
        ((whole, good, link), 'link.png is the input '),
    ]:
        text = tool_error('run_exported', *arguments)
        assert message in text
        assert len(text.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


class Mixed(Exportable):
    """A residual connection of a map in each order of channels."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(3), nn.Conv2d(3, 3, 1)

    def forward(self, image):
        x = image.permute(0, 2, 3, 1)
        x = x + self.norm(x)
        x = 2 * x + x  # feeds no norm
        image = x.permute(0, 3, 1, 2)
        return image + self.conv(image)


def test_sums_and_norms_of_maps_become_those_of_tokens():
    module = randomize(Mixed())
    program = trace(module, (32, 40))
    axes = {
        str(op): [node.meta['val'].ndim for node in program.graph.find_nodes(op='call_function', target=op)]
        for op in (torch.ops.aten.layer_norm.default, torch.ops.aten.add.Tensor)
    }
    # The map with channels first stays one, whose sum runtimes fuse with the convolution.
    assert axes == {'aten.layer_norm.default': [3], 'aten.add.Tensor': [3, 3, 4]}
    image = torch.randn(1, 3, 32, 40)
    torch.testing.assert_close(program.module()(image), module(image))


def test_the_graph_is_fused_and_small():
    """No second path, nothing k² times as large, and as many nodes for a large map as for a small one."""
    arch = dict(embed_dims=(16, 32), depths=(1, 2), num_heads=(1, 2), mlp_ratios=2)
    wrapped = ExportableBackbone(fuse(randomize(SlideSwin(arch, out_indices=(0, 1)))))
    counts, constants = [], []
    for shape in [(64, 64), (256, 320)]:
        program = trace(wrapped, shape)
        assert all(node.users for node in program.graph.find_nodes(op='placeholder'))
        norms = program.graph.find_nodes(op='call_function', target=torch.ops.aten.layer_norm.default)
        assert {node.meta['val'].ndim for node in norms} == {3}  # tokens
        # No constant is a slice of another, whose memory XNNPACK would read.
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in program.state_dict.values())
        graph = to_onnx(Traced(program, dict(outputs=wrapped.output_names))).model.graph
        counts.append(Counter(node.op_type for node in graph))
        constants.append({name: value.const_value.size for name, value in graph.initializers.items()})
    assert counts[0] == counts[1]
    assert counts[0]['Conv'] == 1  # the patch embedding: Slide Attention is products, tap by tap
    # A block has q, k, v, proj, two in the MLP; queries and outputs 9 taps and the bias. And one patch merging.
    assert counts[0]['MatMul'] == 3 * (6 + 2 * (9 + 1)) + 1
    assert not [name for name in constants[0] if 'deform' in name or 'shift' in name]
    # Beside the parameters themselves the fused ones transposed, and a few shapes and indices.
    parameters = sum(parameter.numel() for parameter in wrapped.parameters())
    fused = sum(x.numel() for name, x in wrapped.named_parameters() if 'fused' in name)
    assert fused == 3 * 16 * 9 * (9 + 1)
    for sizes in constants:
        assert parameters <= sum(sizes.values()) <= parameters + fused + 100


def test_a_large_map_is_worked_off_in_strips(monkeypatch):
    q, k, v = (torch.randn(2, 23, 9, 2, 4, dtype=torch.float64) for _ in range(3))
    weight, bias, rpb = (torch.randn(*shape, dtype=torch.float64) for shape in [(4, 9, 3, 3), (4, 9), (2, 9)])
    whole = unrolled(q, k, v, weight, bias, rpb, 0.5)
    for rows in (1, 5, 22):
        monkeypatch.setattr('mmslide.ops.unrolled.STRIP_BYTES', rows * q[:, :1].nbytes)
        assert relative_error(unrolled(q, k, v, weight, bias, rpb, 0.5), whole) < 1e-12


def test_outputs_are_named_in_the_order_they_come():
    arch = dict(embed_dims=16, depths=(1, 1, 1), num_heads=1, mlp_ratios=2)
    assert ExportableBackbone(SlideSwin(arch, out_indices=(2, 0))).output_names == ['stage1', 'stage3']


@pytest.mark.parametrize('output_size', [1, 2, 3, 6, (3, 5)])
@pytest.mark.parametrize('size', [(1, 1), (2, 7), (16, 20), (13, 31)])
def test_averaging_matrices_equal_adaptive_pooling(output_size, size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    wanted = nn.AdaptiveAvgPool2d(output_size)(x)
    assert relative_error(AdaptiveAverage(output_size)(x), wanted) < 1e-12


@pytest.mark.exhaustive
def test_tools_from_fusing_to_a_picture(save, tmp_path):
    config, checkpoint, _ = save()
    fused, out, picture = tmp_path / 'fused.pth', tmp_path / 'model.onnx', tmp_path / 'high.png'
    tool('fuse_checkpoint', config, checkpoint, fused)
    saved = torch.load(fused, weights_only=True)
    assert saved['meta']['fused'] is True
    cv2.imwrite(str(picture), np.random.default_rng(0).integers(0, 256, (90, 30, 3), np.uint8))
    text = tool('export', fused.with_suffix('.py'), fused, out, '--shape', 64, 96, '--images', picture)
    assert '64×96: onnxruntime differs from PyTorch by' in text
    assert 'high.png: onnxruntime differs from PyTorch by' in text
    meta = TARGETS['.onnx'].load(out).metadata
    assert meta['mean'] == PREPROCESSOR['mean']
    assert meta['std'] == PREPROCESSOR['std']
    assert meta['bgr_to_rgb'] is True
    assert meta['classes'] == ['a', 'b', 'c', 'd', 'e']
    assert meta['shape'] == [64, 96]
    assert_draws(out, tmp_path)


def test_a_picture_is_prepared_as_its_runner_does_it(tmp_path):
    """Resized into the shape's corner, normalised in the model's order of channels, pad_value around it."""
    values = dict(FIT, mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=True, pad_value=0.5, pad_divisor=1)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 31, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'x.png'), pixels)
    image, size = prepare(read_image(tmp_path / 'x.png'), values, (45, 80))
    assert size == (45, 16)
    assert image.shape == (1, 3, 45, 80)
    assert image.dtype == np.float32
    resized = cv2.resize(pixels, (16, 45))[..., ::-1]
    wanted = (resized - np.array(values['mean'])) / values['std']
    assert relative_error(torch.from_numpy(image)[0, :, :, :16], torch.from_numpy(wanted).permute(2, 0, 1)) < 1e-6
    assert (image[..., 16:] == 0.5).all()


@pytest.mark.parametrize(
    ('scope', 'preprocessor'),
    [
        ('mmdet', dict(type='DetDataPreprocessor', pad_value=0.5, rgb_to_bgr=True, pad_size_divisor=32)),
        ('mmdet', dict(type='DetDataPreprocessor', bgr_to_rgb=True)),
        ('mmengine', dict(type='ImgDataPreprocessor', mean=[9.0], std=[7.0], pad_value=-1.0, pad_size_divisor=32)),
        ('mmengine', dict(type='ImgDataPreprocessor', mean=None, std=None, pad_size_divisor=32)),
        ('mmseg', dict(type='SegDataPreProcessor', pad_val=0.5, rgb_to_bgr=True, test_cfg=dict(size_divisor=32))),
        ('mmseg', dict(type='SegDataPreProcessor', size_divisor=48)),
    ],
)
def test_preparing_equals_the_preprocessor(scope, preprocessor, tmp_path):
    preprocessor = {**dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0]), **preprocessor}
    pixels = np.random.default_rng(0).integers(0, 256, (64, 33, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'x.png'), pixels)
    values = about(Config(dict(model=dict(data_preprocessor=preprocessor))), {})
    data = dict(inputs=[torch.from_numpy(pixels).permute(2, 0, 1)], data_samples=[SegDataSample()])
    with DefaultScope.overwrite_default_scope(scope):
        wanted = MODELS.build(preprocessor)(data)['inputs']
    image, _ = prepare(pixels, {**values, 'dynamic': True})
    assert relative_error(torch.from_numpy(image), wanted) < 1e-6


RESIZE_EDGE = dict(type='mmpretrain.ResizeEdge', scale=256, edge='short')


@pytest.mark.parametrize(
    ('steps', 'how', 'ratio'),
    [
        ([], 'fit', 1.0),
        ([dict(type='Resize', scale=(1333, 800), keep_ratio=True)], 'fit', 1.0),
        ([dict(type='mmdet.Resize', scale=(640, 640), keep_ratio=False)], 'stretch', 1.0),
        ([dict(type='Resize', scale=(512, 512))], 'stretch', 1.0),
        ([RESIZE_EDGE, dict(type='CenterCrop', crop_size=224)], 'crop', 256 / 224),
        ([RESIZE_EDGE, dict(type='CenterCrop', crop_size=(224, 224))], 'crop', 256 / 224),
        ([dict(type='Resize', scale=(256, 256)), dict(type='CenterCrop', crop_size=224)], 'stretch', 256 / 224),
        ([dict(type='CenterCrop', crop_size=224)], 'crop', 1.0),
    ],
)
@pytest.mark.parametrize('place', ['test_pipeline', 'dataset', 'wrapped'])
def test_resizing_of_a_test_pipeline(steps, how, ratio, place):
    pipeline = [dict(type='LoadImageFromFile'), *steps, dict(type='PackInputs')]
    dataset = dict(type='X', pipeline=pipeline)
    if place == 'wrapped':
        dataset = dict(type='RepeatDataset', dataset=dataset)
    found = resizing(
        Config(
            dict(test_pipeline=pipeline)
            if place == 'test_pipeline'
            else dict(test_pipeline=[dict(type='Resize')], test_dataloader=dict(dataset=dataset))
        )
    )
    assert found == dict(resize=how, resize_ratio=ratio)


@pytest.mark.parametrize(
    ('how', 'ratio', 'wanted'),
    [
        ('crop', 2.0, lambda image: cv2.resize(image, (64, 128))[48:80, 16:48]),
        ('crop', 1.0, lambda image: cv2.resize(image, (32, 64))[16:48]),
        ('stretch', 1.0, lambda image: cv2.resize(image, (32, 32))),
        ('stretch', 1.5, lambda image: cv2.resize(image, (48, 48))[8:40, 8:40]),
    ],
)
@pytest.mark.parametrize('dynamic', [False, True])
def test_images_of_a_classifier_are_cropped_or_stretched(how, ratio, wanted, dynamic):
    values = dict(resize=how, resize_ratio=ratio, dynamic=dynamic, shape=[32, 32], mean=[0.0] * 3, std=[1.0] * 3)
    values |= dict(bgr_to_rgb=False, pad_value=0, pad_divisor=1)
    pixels = np.random.default_rng(0).integers(0, 256, (80, 40, 3), np.uint8)
    image, size = prepare(pixels, values)
    assert size == (32, 32)
    assert np.array_equal(image[0].transpose(1, 2, 0), wanted(pixels))


@pytest.mark.parametrize('name', ['bild-ä-像.png', 'a b.png'])
def test_image_names(name, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    cv2.imencode('.png', pixels)[1].tofile(tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name), pixels)


@pytest.mark.parametrize('content', [b'', b'no image'])
def test_what_is_no_image(content, tmp_path):
    (tmp_path / 'x.png').write_bytes(content)
    with pytest.raises(ValueError, match=r'x\.png is not a readable image'):
        read_image(tmp_path / 'x.png')


def test_missing_packages_are_named_with_their_extra():
    target = TARGETS['.xml']
    with pytest.raises(
        ImportError, match=r"\.xml needs none, which is not installed: pip install 'mmslide\[openvino\]'"
    ):
        require(target, ['none'])
    with pytest.raises(ImportError, match=r"pip install 'mmslide\[int8\]'"):
        require(target, ['none'], target.int8_install)
    with pytest.raises(ImportError, match=r'\.pt2 needs none, which is not installed: pip install torch'):
        require(TARGETS['.pt2'], ['none'])


def test_a_strangers_companion_is_kept(save, tmp_path):
    config, checkpoint, _ = save()
    (tmp_path / 'model.bin').write_text('keep')
    with pytest.raises(ValueError, match=r'model\.bin exists without .*model\.xml'):
        export(config, checkpoint, tmp_path / 'model.xml', 'backbone', (64, 64))
    assert (tmp_path / 'model.bin').read_text() == 'keep'


def test_the_two_files_of_a_linked_output_stay_together(save, tmp_path, monkeypatch):
    # Random weights are too coarse for bfloat16, which OpenVINO uses where the processor has it.
    monkeypatch.setattr(type(TARGETS['.xml']), 'runtime_precisions', {})
    config, checkpoint, _ = save()
    store = tmp_path / 'store'
    store.mkdir()
    for name in ('v1.xml', 'v1.bin'):
        (store / name).write_text('of an earlier export')
    (tmp_path / 'model.xml').symlink_to('store/v1.xml')
    export(config, checkpoint, tmp_path / 'model.xml', 'backbone', (64, 64))
    assert sorted(path.name for path in store.iterdir()) == ['v1.bin', 'v1.xml']
    assert not (tmp_path / 'model.bin').exists()
    TARGETS['.xml'].load(store / 'v1.xml')


def test_other_than_three_channels_are_refused(save, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, 'SlidePVT', {**BACKBONES['SlidePVT'], 'in_channels': 4})
    config, checkpoint, _ = save(data_preprocessor=None)
    with pytest.raises(ValueError, match='only models with 3 channels can be exported, got in_channels=4'):
        export(config, checkpoint, tmp_path / 'x.onnx', 'backbone', (64, 64))


def test_a_preprocessor_at_the_top_level_and_a_checkpoint_without_meta(save):
    """mmengine's Runner puts a data_preprocessor of the config into the model."""
    config, checkpoint, model = save(data_preprocessor=None)
    text = Path(config).read_text().replace('data_preprocessor=None,', '')
    Path(config).write_text(f'{text}\ndata_preprocessor = {PREPROCESSOR!r}\n')
    torch.save(dict(state_dict=model.state_dict(), meta=None), checkpoint)
    cfg, loaded, meta = load_model(config, checkpoint)
    assert type(loaded.data_preprocessor).__name__ == PREPROCESSOR['type']
    values = about(cfg, meta)
    assert values['mean'] == PREPROCESSOR['mean']
    assert values['bgr_to_rgb'] is True
    assert values['classes'] == []


@pytest.mark.parametrize(
    ('name', 'shape', 'images', 'error', 'message'),
    [
        ('model', (31, 64), [], ValueError, r'shape must be at least 32 pixels per side, got \(31, 64\)'),
        ('neck', (64, 64), [], ValueError, r"part must be one of \('backbone', 'features', 'model'\), got 'neck'"),
        ('model', (64, 64), ['none.jpg'], FileNotFoundError, 'none.jpg'),
        ('model', (64, 64), [__file__], ValueError, 'test_export.py is not a readable image'),
    ],
)
def test_wrong_arguments_are_named(name, shape, images, error, message, save, tmp_path):
    config, checkpoint, _ = save()
    with pytest.raises(error, match=message):
        export(config, checkpoint, str(tmp_path / 'x.onnx'), name, shape, images=images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.py', 'model.pth']


def test_a_segmentor_that_tests_in_slices_is_refused(save, tmp_path):
    config, checkpoint, _ = save(test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(32, 32)))
    with pytest.raises(ValueError, match=r"only segmentors that test whole images.*mode='slide'"):
        export(config, checkpoint, str(tmp_path / 'x.onnx'), 'model', (64, 64))


def test_models_that_predict_in_a_way_of_their_own_are_refused(save, tmp_path):
    head = SEGMENTORS['UPerHead']['decode_head']
    cascade = dict(type='CascadeEncoderDecoder', num_stages=1, decode_head=[head])
    config, checkpoint, _ = save(**cascade)
    with pytest.raises(
        ValueError, match='only segmentors of type EncoderDecoder can be exported, got CascadeEncoderDecoder'
    ):
        export(config, checkpoint, str(tmp_path / 'x.onnx'), 'model', (64, 64))
    config, checkpoint, _ = save(decode_head=dict(HEAD, type='EncHead', in_channels=CHANNELS))
    with pytest.raises(ValueError, match=r"with BaseDecodeHead's predict can be exported, got EncHead"):
        export(config, checkpoint, str(tmp_path / 'x.onnx'), 'model', (64, 64))


def test_a_checkpoint_that_does_not_fit_and_a_target_that_cannot_be_written(save, tmp_path):
    config, checkpoint, model = save()
    (tmp_path / 'folder.onnx').mkdir()
    before = sorted(tmp_path.iterdir())
    for out, message in ((tmp_path / 'none/x.onnx', 'does not exist'), (tmp_path / 'folder.onnx', 'is a folder')):
        with pytest.raises(ValueError, match=message):
            export(config, checkpoint, str(out), 'model', (64, 64))
    state = model.state_dict()
    key = next(key for key in state if key.endswith('deform_weight'))
    wrong = [
        ({name: value for name, value in state.items() if name != key}, rf'1 keys missing \({key}'),
        ({**state, 'head.x': torch.zeros(1)}, r'1 keys unexpected \(head\.x'),
        ({**state, key: torch.zeros(3, 9, 3, 3)}, r'1 keys of another shape \(.*deform_weight'),
    ]
    for content, message in wrong:
        torch.save(content, checkpoint)
        with pytest.raises(ValueError, match=rf'(?s)model\.pth does not fit .*config\.py.*{message}'):
            export(config, checkpoint, str(tmp_path / 'x.onnx'), 'model', (64, 64))
    Path(checkpoint).write_bytes(b'no checkpoint')
    with pytest.raises(ValueError, match='is not a readable checkpoint'):
        export(config, checkpoint, str(tmp_path / 'x.onnx'), 'model', (64, 64))
    assert sorted(tmp_path.iterdir()) == before


def test_a_difference_leaves_no_file(save, tmp_path, monkeypatch):
    """Also one that fusing makes: the comparison is with the model before."""
    config, checkpoint, _ = save()
    before = sorted(tmp_path.iterdir())
    honest = driver.fuse

    def wrong(model):
        fused = honest(model)
        nn.init.zeros_(fused.backbone.stages[1].blocks[0].attn.fused_bias)
        return fused

    monkeypatch.setattr(driver, 'fuse', wrong)
    with pytest.raises(
        RuntimeError, match="graph's results differ from the model's: 64×64: onnxruntime differs from PyTorch by"
    ):
        export(config, checkpoint, str(tmp_path / 'x.onnx'), 'backbone', (64, 64))
    assert sorted(tmp_path.iterdir()) == before
