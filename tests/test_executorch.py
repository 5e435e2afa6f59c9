"""The target .pte, by ExecuTorch's own runtime."""

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize, relative_error
from mmdet.registry import MODELS as DETECTORS
from mmengine.registry import MODELS, DefaultScope
from test_export import BACKBONES, CHANNELS, PREPROCESSOR, SEGMENTORS
from test_export_detector import config as detector_config
from test_export_detector import saved

from mmslide.deploy import fuse
from mmslide.deploy.export import export
from mmslide.deploy.graphs import ExportableBackbone, part
from mmslide.deploy.targets import TARGETS, Traced
from mmslide.deploy.targets.executorch import decompositions, lower
from mmslide.deploy.trace import trace

SHAPE = (70, 99)  # no whole windows, so that maps are padded and cropped
# What XNNPACK does not take, and what calls it.
LEFT = {'aten.native_layer_norm.default', 'aten.sum.dim_IntList', 'executorch_call_delegate', 'getitem'}
LEFT_IN = {
    'SlidePVTv2': {'aten._adaptive_avg_pool2d.default'},  # of PVTv2 Li
    # The windows, of which seven dimensions are more than XNNPACK's tensors have.
    'SlideNAT': {
        'aten.index.Tensor',
        'aten.permute_copy.default',
        'aten.view_copy.default',
        'dim_order_ops._clone_dim_order.default',
    },
    'UPerHead': {'aten.argmax.default'},
    'FPNHead': {'aten.argmax.default', 'aten.upsample_nearest2d.vec'},
}

target = TARGETS['.pte']
without_executorch = pytest.mark.skipif(target.why_not_run() is not None, reason='executorch is not installed')


@pytest.mark.parametrize('size', [(3, 4), (5, 3, 4), (1, 5, 3, 4), (2, 5, 3, 4)])
def test_products(size):
    matmul = decompositions()[torch.ops.aten.matmul.default]
    for x in (torch.randn(size), torch.randn(2, 5, 4, 3).mT):
        for y in (torch.randn(4, 6), torch.randn(6, 4).t(), torch.randn(1, 1, 4, 6), torch.randn(2, 5, 4, 6)):
            assert relative_error(matmul(x, y), x @ y) < 1e-6
        vector = torch.randn(4)
        assert relative_error(matmul(x, vector), x @ vector) < 1e-6
        matrix = torch.randn(2, x.shape[-2])
        assert relative_error(matmul(matrix, x), matrix @ x) < 1e-6


@pytest.mark.parametrize('mask', [None, torch.randn(2, 1, 5, 7), torch.eye(5, 7) < 1])
@pytest.mark.parametrize('scale', [None, 0.3])
def test_attention(mask, scale):
    attention = decompositions()[torch.ops.aten.scaled_dot_product_attention.default]
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    wanted = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    assert relative_error(attention(q, k, v, mask, scale=scale), wanted) < 1e-6


def test_moves():
    table, aten = decompositions(), torch.ops.aten
    x = torch.randn(2, 5, 7, 3)
    for pads in ([0, 0, 1, -2], [0, 0, -1, 0, 2, -3], [1, 2, 3, 4], [0, 0, 0, 0]):
        assert torch.equal(table[aten.pad.default](x, pads, 'constant', 0.5), F.pad(x, pads, value=0.5))
    assert torch.equal(table[aten.pad.default](x[0], [1, 2], 'replicate'), F.pad(x[0], [1, 2], 'replicate'))
    for shifts, dims in (([-3, 2], [1, 2]), ([0], [1]), ([8], [-2])):
        assert torch.equal(table[aten.roll.default](x, shifts, dims), x.roll(shifts, dims))
    for dim in (0, 1, -1):
        for split, wanted in (
            (table[aten.unbind.int](x, dim), x.unbind(dim)),
            (table[aten.split.Tensor](x, 2, dim), x.split(2, dim)),
        ):
            assert len(split) == len(wanted)
            assert all(torch.equal(*pair) for pair in zip(split, wanted, strict=True))


@pytest.mark.slow
@without_executorch
def test_features_of_a_detector_from_a_checkpoint(tmp_path):
    """NMS cannot go along, but backbone and neck can; what they are prepared and called stands in the file."""
    config, checkpoint = saved('retinanet', tmp_path)
    out = tmp_path / 'features.pte'
    with pytest.raises(ValueError, match=r"\.pte has no NMS and RoIAlign: export the part 'features' of a detector"):
        export(config, checkpoint, out, 'model', (64, 64))
    with pytest.raises(ValueError, match=r'\.pte supports only one size'):
        export(config, checkpoint, out, 'features', (64, 64), dynamic=True)
    (line,) = export(config, checkpoint, out, 'features', (64, 96))
    assert '64×96: executorch differs from PyTorch by' in line
    runner = target.load(out, threads=1)
    assert runner.metadata['part'] == 'features'
    assert runner.metadata['shape'] == [64, 96]
    assert runner.metadata['outputs'] == ['level1', 'level2', 'level3', 'level4', 'level5']
    assert len(runner.metadata['mean']) == len(runner.metadata['std']) == 3
    images = torch.randn(2, 1, 3, 64, 96)
    first, second = (runner.run(image.numpy()) for image in images)
    assert list(first) == runner.metadata['outputs']
    assert first['level1'].shape == (1, 64, 8, 12)
    assert (first['level1'] != second['level1']).any()  # not one piece of memory


def test_features_need_a_neck():
    model = detector_config('retinanet')
    with DefaultScope.overwrite_default_scope('mmdet'):
        detector = DETECTORS.build(model).eval()
    detector.neck = None
    with pytest.raises(ValueError, match="the model has no neck: export the part 'backbone'"):
        part(detector, 'features', (64, 64))


@pytest.mark.parametrize('content', [b'', b'nothing', bytes(4096)])
@without_executorch
def test_a_damaged_file_is_named(content, tmp_path):
    path = tmp_path / 'x.pte'
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r'executorch cannot load .*x\.pte: '):
        target.load(path)


def assert_agrees(module, left, folder):
    """In ExecuTorch and PyTorch; XNNPACK takes all but `left`."""
    edge = lower(Traced(trace(module, SHAPE), dict(outputs=list(module.output_names))))
    nodes = edge.exported_program().graph.nodes
    assert {getattr(node.target, '__name__', '') for node in nodes if node.op == 'call_function'} <= left
    path = folder / 'x.pte'
    edge.to_executorch().save(str(path))
    image = torch.randn(1, 3, *SHAPE)
    with torch.no_grad():
        wanted = module(image)
    found = target.load(path).run(image.numpy())
    agrees, how = module.agreement([torch.from_numpy(x) for x in found.values()], wanted, 1e-4)
    assert agrees, how


@pytest.mark.exhaustive
@pytest.mark.parametrize('backbone', BACKBONES)
def test_backbones(backbone, tmp_path):
    model = randomize(MODELS.build(BACKBONES[backbone]))
    assert_agrees(ExportableBackbone(fuse(model)), LEFT | LEFT_IN.get(backbone, set()), tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize('head', SEGMENTORS)
def test_segmentors(head, tmp_path):
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=PREPROCESSOR,
        backbone=BACKBONES['TwinsPCPVT'],
        test_cfg=dict(mode='whole'),
        **SEGMENTORS[head],
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        segmentor = fuse(randomize(MODELS.build(model)))
    assert_agrees(part(segmentor, 'model', SHAPE), LEFT | LEFT_IN[head], tmp_path)


@pytest.mark.exhaustive
def test_a_classifier(tmp_path):
    pytest.importorskip('mmpretrain')
    model = dict(
        type='ImageClassifier',
        backbone=dict(BACKBONES['SlidePVT'], out_indices=(3,)),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=5, in_channels=CHANNELS[-1]),
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        classifier = fuse(randomize(MODELS.build(model)))
    assert_agrees(part(classifier, 'model', SHAPE), LEFT, tmp_path)
