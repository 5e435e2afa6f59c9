"""int8: exported from a folder of images, and by PyTorch's own tools."""

import copy
from functools import partial

import cv2
import numpy as np
import onnx
import openvino
import pytest
import torch
from helpers import BACKBONES, randomize, relative_error
from mmengine.registry import MODELS
from test_export import save  # noqa: F401
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from mmslide.deploy import export as driver
from mmslide.deploy import fuse
from mmslide.deploy.export import calibration_files, export
from mmslide.deploy.graphs import Exportable
from mmslide.deploy.targets import TARGETS, Runner, Traced

SHAPE = (64, 96)
INT8 = [suffix for suffix, target in TARGETS.items() if 'int8' in target.precisions]


@pytest.fixture
def images(tmp_path):
    """A folder with a smooth random image, and another in a folder of its own."""
    folder = tmp_path / 'images'
    (folder / 'more').mkdir(parents=True)
    for seed, name in enumerate(['a.png', 'more/b.JPG']):
        small = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
        cv2.imwrite(str(folder / name), cv2.resize(small, SHAPE[::-1]))
    (folder / 'notes.txt').write_text('not an image')
    return folder


def int8_weights(path):
    """How many numbers the weights in int8 have; scales and zero points are vectors."""
    if path.suffix == '.onnx':
        found = [x.dims for x in onnx.load(path).graph.initializer if x.data_type == onnx.TensorProto.INT8]
    else:
        constants = [x for x in openvino.Core().read_model(path).get_ops() if x.get_type_name() == 'Constant']
        found = [x.shape for x in constants if x.get_element_type() == openvino.Type.i8]
    return sum(np.prod(shape) for shape in found if len(shape) > 1)


@pytest.mark.slow
@pytest.mark.parametrize('suffix', ['.onnx', pytest.param('.xml', marks=pytest.mark.exhaustive)])
def test_layers_are_quantized_and_all_else_is_not(suffix, save, images, tmp_path):  # noqa: F811
    config, checkpoint, model = save('SlideSwin', 'FPNHead')
    out = tmp_path / f'x{suffix}'
    lines = export(config, checkpoint, out, 'model', SHAPE, precision='int8', calibration=images)
    assert {line.split(':')[0] for line in lines} == {str(images / 'a.png'), str(images / 'more/b.JPG')}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert int8_weights(out) == sum(layer.weight.numel() for layer in layers)
    runner = TARGETS[suffix].load(out)
    assert runner.metadata['classes'] == ['a', 'b', 'c', 'd', 'e']
    assert runner.run(np.zeros((1, 3, *SHAPE), np.float32))['labels'].shape == (1, *SHAPE)


@pytest.mark.exhaustive
@pytest.mark.parametrize('suffix', INT8)
def test_wrong_ranges_leave_no_file(suffix, save, images, tmp_path, monkeypatch):  # noqa: F811
    config, checkpoint, _ = save()
    before = sorted(tmp_path.rglob('*'))

    def narrow(program, about, precision, calibration):
        return Traced(program, about, precision, [x / 10 for x in calibration])

    monkeypatch.setattr(driver, 'Traced', narrow)
    with pytest.raises(RuntimeError, match=r"results differ from the model's: .*a\.png: .* differs from PyTorch by"):
        export(config, checkpoint, tmp_path / f'x{suffix}', 'backbone', SHAPE, precision='int8', calibration=images)
    assert sorted(tmp_path.rglob('*')) == before


def test_errors_of_calibration_are_named(save, images, tmp_path):  # noqa: F811
    config, checkpoint, _ = save()
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken/a.jpg').write_text('not an image')
    file = images / 'a.png'
    pair = "precision='int8' needs calibration, a folder of images, and no other precision uses one"
    for settings, message in [
        (dict(precision='int8'), pair),
        (dict(calibration=images), pair),
        (dict(precision='int8', calibration=images, dynamic=True), "precision='int8' supports only one size"),
        (dict(precision='int8', calibration=tmp_path / 'none'), r'none is not a folder with images \(\.bmp'),
        (dict(precision='int8', calibration=tmp_path / 'empty'), r'empty is not a folder with images \(\.bmp'),
        (dict(precision='int8', calibration=file), r'a\.png is not a folder with images \(\.bmp'),
        (dict(precision='int8', calibration=tmp_path / 'broken'), r'a\.jpg is not a readable image'),
        (dict(precision='int4'), r"precision of \.onnx must be one of \('fp32', 'int8'\), got 'int4'"),
    ]:
        with pytest.raises(ValueError, match=message):
            export(config, checkpoint, tmp_path / 'x.onnx', 'backbone', SHAPE, **settings)
    assert not (tmp_path / 'x.onnx').exists()


def test_calibration_is_spread_over_the_folder(tmp_path):
    for index in range(300):
        (tmp_path / f'{index:03}.jpg').touch()
    chosen = [int(path.stem) for path in calibration_files(tmp_path)]
    assert chosen == list(range(0, 300, 3))


@pytest.mark.exhaustive
def test_fp16_halves_an_openvino_file(save, tmp_path):  # noqa: F811
    config, checkpoint, _ = save()
    for precision in ('fp32', 'fp16'):
        export(config, checkpoint, tmp_path / f'{precision}.xml', 'backbone', SHAPE, precision=precision)
    sizes = [(tmp_path / f'{precision}.bin').stat().st_size for precision in ('fp32', 'fp16')]
    assert 1.9 < sizes[0] / sizes[1] < 2.1
    image = np.random.default_rng(0).standard_normal((1, 3, *SHAPE), np.float32)
    runs = [TARGETS['.xml'].load(tmp_path / f'{precision}.xml').run for precision in ('fp32', 'fp16')]
    for wanted, found in zip(*(run(image).values() for run in runs), strict=True):
        assert 0 < relative_error(torch.from_numpy(found), torch.from_numpy(wanted)) < 5e-3


class Found(Exportable):
    """Agrees by the value of the image."""

    may_differ = 0.25

    def forward(self, image):
        return (image,)

    def agreement(self, outputs, wanted, tolerance):
        return bool(torch.equal(outputs[0], wanted[0])), 'is compared'


@pytest.mark.parametrize(('precision', 'allowed'), [('fp32', 0), ('int8', 2)])
def test_some_images_of_a_detector_may_differ_in_int8(precision, allowed, monkeypatch):
    target = TARGETS['.onnx']
    images = {str(index): partial(np.full, (1, 3, 1, 1), index, np.float32) for index in range(8)}
    for wrong in (allowed, allowed + 1):
        runner = Runner(lambda image, wrong=wrong: dict(y=image + (image < wrong)), {})
        monkeypatch.setattr(type(target), 'load', lambda *_, runner=runner, **__: runner)
        if wrong == allowed:
            assert len(driver.compare(Found(), target, 'x', images, precision)) == 8
        else:
            with pytest.raises(RuntimeError, match=r'(?s)0: onnxruntime is compared.*'):
                driver.compare(Found(), target, 'x', images, precision)


def by_torch_ao(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def by_torchao(model):
    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    return quantized


@pytest.mark.parametrize('quantize', [by_torch_ao, by_torchao])
@pytest.mark.parametrize('fused', [False, True], ids=['two paths', 'fused'])
@pytest.mark.parametrize('backbone', BACKBONES)
def test_pytorchs_dynamic_int8(backbone, fused, quantize):
    """Layers may not be read past what stands in for them or for their weights, with and without gradients."""
    model = randomize(MODELS.build(copy.deepcopy(BACKBONES[backbone]))).eval()
    model = fuse(model) if fused else model
    quantized = quantize(model)
    count = sum(isinstance(module, nn.Linear) for module in model.modules())
    packed = [
        module
        for module in quantized.modules()
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)
        or (isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter)
    ]
    assert len(packed) == count > 0
    image = torch.randn(1, 3, 64, 96)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for value, wanted in zip(quantized(image), model(image), strict=True):
                assert 1e-4 < relative_error(value, wanted) < 0.1
