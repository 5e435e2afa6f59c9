"""Core ML packages: their structure everywhere, their numbers in Core ML on macOS, elsewhere in PyTorch by `mil`.

No mmcv.ops and no mmseg but for the segmentor, since .github/workflows/macos.yml has mmcv-lite.
"""

import sys

import cv2
import numpy as np
import pytest
import torch
from helpers import BACKBONES, randomize, relative_error, tool_error
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmslide.deploy import load_model
from mmslide.deploy.export import compare, export
from mmslide.deploy.graphs import Exportable
from mmslide.deploy.targets import TARGETS, Traced
from mmslide.deploy.targets.images import normalize, to_pixels

coremltools = pytest.importorskip('coremltools', reason="needs pip install 'mmslide[coreml]'")
import mil  # noqa: E402

coreml = TARGETS['.mlpackage']
PREPROCESSOR = dict(mean=[123.0, 116.0, 103.0], std=[58.0, 57.0, 56.0])
CLASSIFIER = dict(
    type='ImageClassifier',
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=5, in_channels=128),
)
SHAPE = (70, 99)
# Of MIL's operators, those that the neural engine was seen to take, as measured by others (the op catalog of ANEForge,
# hollance/neural-engine), since Apple has no list. upsample_bilinear is emulated before the A14.
NEURAL_ENGINE = """
    add sub mul real_div matmul linear conv layer_norm batch_norm softmax gelu relu reduce_sum reduce_mean reduce_argmax
    reshape transpose squeeze expand_dims slice_by_index pad split concat gather upsample_bilinear cast
"""


@pytest.fixture
def runtime(monkeypatch):
    """Core ML itself on macOS, elsewhere PyTorch in its place."""
    if sys.platform != 'darwin':
        monkeypatch.setattr(type(coreml), 'why_not_run', lambda self: None)
        monkeypatch.setattr(coremltools.models.MLModel, 'predict', mil.predict)


def save(folder, scope='mmpretrain', **model):
    """A config and a checkpoint of a model with random weights."""
    config = Config(dict(default_scope=scope, model=model))
    with DefaultScope.overwrite_default_scope(scope):
        built = randomize(MODELS.build(config.model))
    (folder / 'config.py').write_text(config.pretty_text)
    torch.save(dict(state_dict=built.state_dict(), meta={}), folder / 'model.pth')
    return folder / 'config.py', folder / 'model.pth'


def classifier(folder, backbone):
    preprocessor = dict(PREPROCESSOR, type='ClsDataPreprocessor', to_rgb=True)
    return save(folder, data_preprocessor=preprocessor, backbone=BACKBONES[backbone], **CLASSIFIER)


def assert_taken_by_the_neural_engine(path, outputs, precision='fp16'):
    """Names and shapes of what goes in and out; operators without control flow, of fixed shapes, five axes at most."""
    model = coremltools.models.MLModel(str(path), skip_model_load=True)
    description = model.get_spec().description
    (image,) = description.input
    assert image.name == 'image'
    assert (image.type.imageType.height, image.type.imageType.width) == SHAPE
    assert not image.type.imageType.WhichOneof('SizeFlexibility')
    arrays = {output.name: output.type.multiArrayType for output in description.output}
    assert {name: tuple(array.shape) for name, array in arrays.items()} == outputs
    assert not [name for name, array in arrays.items() if array.WhichOneof('ShapeFlexibility')]

    operations = mil.operations(model)
    assert {op.op_type for op in operations} <= set(NEURAL_ENGINE.split())
    assert all(np.isfinite(constant).all() for constant in mil.constants(model))
    for op in operations:
        assert not op.blocks
        for output in op.outputs:
            assert all(isinstance(side, int) for side in output.shape)
            assert len(output.shape) <= 5
            assert mil.type_of(output) == ('int32' if op.op_type == 'reduce_argmax' else precision), op
    assert [op.inputs['x'].name for op in operations if op.op_type == 'cast'] == ['image'] * (precision == 'fp16')


class Tiny(nn.Module):
    """Channels that differ, a mask, a slice of everything (an alias in the graph) and integers."""

    def __init__(self):
        super().__init__()
        self.register_buffer('mask', torch.zeros(40).index_fill(0, torch.tensor([0, 7]), -torch.inf))
        self.register_buffer('scale', torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1))

    def forward(self, image):
        weights = (image[..., :40] * self.scale + self.mask).softmax(-1)
        return weights, weights.argmax(1)


@pytest.mark.parametrize('precision', coreml.precisions)
@pytest.mark.parametrize('bgr_to_rgb', [False, True])
def test_an_image_goes_in(bgr_to_rgb, precision, runtime, tmp_path):
    """As a camera has it: channels are put in order and normalized inside."""
    about = dict(outputs=['weights', 'labels'], shape=[32, 40], bgr_to_rgb=bgr_to_rgb, **PREPROCESSOR)
    program = torch.export.export(Tiny(), (torch.zeros(1, 3, 32, 40),))
    coreml.write(Traced(program, about, precision), tmp_path / 'x.mlpackage')
    runner = coreml.load(tmp_path / 'x.mlpackage')
    assert runner.metadata == about
    image = normalize(np.random.default_rng(0).integers(0, 256, (32, 40, 3)), about)
    weights, labels = (torch.from_numpy(x) for x in runner.run(image).values())
    wanted, _ = Tiny()(torch.from_numpy(image))
    assert relative_error(weights, wanted) < dict(fp16=5e-3, fp32=1e-5)[precision]
    assert labels.dtype == torch.int64
    assert torch.equal(labels, weights.argmax(1))
    model = coremltools.models.MLModel(str(tmp_path / 'x.mlpackage'), skip_model_load=True)
    assert all(np.isfinite(constant).all() for constant in mil.constants(model))


def test_pixels_and_back():
    pixels = np.repeat(np.arange(256), 3).reshape(16, 16, 3)
    about = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
    assert np.array_equal(to_pixels(normalize(pixels, about), about), pixels)
    image = np.full((1, 3, 32, 40), 9.0, np.float32)
    image[..., :10] = 0.0
    image[..., 10:20] = -9.0
    assert np.array_equal(np.unique(to_pixels(image, about)), [0, 104, 116, 124, 255])


@pytest.mark.skipif(sys.platform == 'darwin', reason='Core ML is here')
def test_what_is_said_without_core_ml(tmp_path):
    (tmp_path / 'x.mlpackage').mkdir()
    cv2.imwrite(str(tmp_path / 'x.png'), np.zeros((32, 32, 3), np.uint8))
    (line,) = compare(Exportable(), coreml, tmp_path / 'x.mlpackage', {}, 'fp16')
    assert line.startswith('not compared, since Core ML runs on macOS only')
    with pytest.raises(RuntimeError, match=r'x\.mlpackage cannot be run here, since Core ML runs on macOS only'):
        coreml.load(tmp_path / 'x.mlpackage')
    text = tool_error('run_exported', tmp_path / 'x.mlpackage', tmp_path / 'x.png', tmp_path / 'out.png')
    assert text.endswith('x.mlpackage cannot be run here, since Core ML runs on macOS only')


def test_a_damaged_package(runtime, tmp_path):
    (tmp_path / 'x.mlpackage').mkdir()
    with pytest.raises(RuntimeError, match=r'Core ML cannot load .*x\.mlpackage'):
        coreml.load(tmp_path / 'x.mlpackage')


@pytest.mark.exhaustive
@pytest.mark.parametrize('backbone', BACKBONES)
def test_backbones(backbone, runtime, tmp_path):
    config, checkpoint = classifier(tmp_path, backbone)
    out = tmp_path / 'x.mlpackage'
    (line,) = export(config, checkpoint, out, 'backbone', SHAPE)
    assert line.startswith('70×99: Core ML differs from PyTorch by ')
    with torch.no_grad():
        stages = load_model(config, checkpoint)[1].backbone(torch.zeros(1, 3, *SHAPE))
    assert_taken_by_the_neural_engine(out, {f'stage{i}': tuple(x.shape) for i, x in enumerate(stages, 1)})


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['fp16', pytest.param('fp32', marks=pytest.mark.exhaustive)])
def test_a_classifier(precision, runtime, tmp_path):
    """Beside random numbers an image, and in the place of an older package."""
    config, checkpoint = classifier(tmp_path, 'SlidePVT')
    out, image = tmp_path / 'x.mlpackage', tmp_path / 'image.png'
    (out / 'Data').mkdir(parents=True)
    (out / 'Data' / 'old').touch()
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 256, (50, 120, 3), np.uint8))
    lines = export(config, checkpoint, out, 'model', SHAPE, images=[image], precision=precision)
    assert [line.split(': ')[0] for line in lines] == ['70×99', str(image)]
    assert sorted(path.name for path in out.iterdir()) == ['Data', 'Manifest.json']
    assert not (out / 'Data' / 'old').exists()
    assert_taken_by_the_neural_engine(out, {'scores': (1, 5)}, precision)
    about = coreml.load(out).metadata
    assert {name: about[name] for name in PREPROCESSOR} == PREPROCESSOR
    assert about['shape'] == list(SHAPE)


@pytest.mark.exhaustive
def test_a_segmentor(runtime, tmp_path):
    test_export = pytest.importorskip('test_export', reason='needs mmseg, and mmcv with its ops')
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=test_export.PREPROCESSOR,
        backbone=BACKBONES['TwinsPCPVT'],
        test_cfg=dict(mode='whole'),
        **test_export.SEGMENTORS['UPerHead'],
    )
    config, checkpoint = save(tmp_path, 'mmseg', **model)
    out = tmp_path / 'x.mlpackage'
    (line,) = export(config, checkpoint, out, 'model', SHAPE)
    assert line.startswith('70×99: Core ML differs from PyTorch by ')
    assert_taken_by_the_neural_engine(out, {'logits': (1, 5, *SHAPE), 'labels': (1, *SHAPE)})
