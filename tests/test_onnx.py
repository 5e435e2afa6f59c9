import copy
import importlib.util
import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import TOOLS, randomize, relative_error, tool
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmseg.structures import SegDataSample
from torch import nn

from mmslide.deploy import fuse, load_model, onnx
from mmslide.models import SlideSwin
from mmslide.models.attention import SlideAttention

onnxruntime = pytest.importorskip('onnxruntime')

# Few blocks, since exporting takes time for each: a second one only where blocks alternate.
ARCH = dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), mlp_ratios=2)
ARCH_SR = dict(ARCH, sr_ratios=(8, 4, 2, 1))
BACKBONES = {
    'SlidePVT': dict(type='mmslide.SlidePVT', arch=dict(ARCH_SR, depths=(1, 1, 1, 1))),
    'SlidePVTv2': dict(
        type='mmslide.SlidePVTv2', arch=dict(ARCH_SR, depths=(1, 1, 1, 1), pool_sizes=(7, 0, 0, 7)), slide_stages=(1,)
    ),
    'SlideSwin': dict(type='mmslide.SlideSwin', arch=ARCH),
    'SlideCSWin': dict(
        type='mmslide.SlideCSWin',
        arch=dict(ARCH, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 4), split_sizes=(1, 2, 7, 7)),
        slide_stages=(0,),
    ),
    'TwinsPCPVT': dict(type='mmslide.TwinsPCPVT', arch=dict(ARCH_SR, depths=(1, 1, 1, 1))),
    'TwinsSVT': dict(type='mmslide.TwinsSVT', arch=ARCH_SR, slide_stages=(0, 1)),
    'SlideNAT': dict(type='mmslide.SlideNAT', arch=dict(ARCH, depths=(1, 1, 1, 1)), slide_stages=(0,)),
}
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


def in_onnxruntime(path):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda image: [torch.from_numpy(x) for x in session.run(None, {'image': image.numpy()})]


def in_openvino(path):
    openvino = pytest.importorskip('openvino')
    compiled = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda image: [torch.from_numpy(x) for x in compiled(image.numpy()).values()]


ENGINES = [in_onnxruntime, in_openvino]  # where there is no openvino, tests are skipped behind onnxruntime


def unfused(model):
    """In float64, with the reference form of Slide Attention."""
    for module in model.modules():
        if isinstance(module, SlideAttention):
            module.backend = 'reference'
    return model.double()


@pytest.mark.slow
@pytest.mark.parametrize('backbone', BACKBONES)
@pytest.mark.parametrize('dynamic', [False, True], ids=['fixed', 'dynamic'])
def test_backbones(backbone, dynamic, save, tmp_path):
    config, checkpoint, model = save(backbone)
    out = str(tmp_path / 'backbone.onnx')
    lines = onnx.export_onnx(config, checkpoint, out, 'backbone', (70, 99), dynamic)
    assert len(lines) == (4 if dynamic else 1)
    reference = unfused(model.backbone)
    for engine in ENGINES:
        run = engine(out)
        for size in SIZES if dynamic else [(70, 99)]:
            image = torch.randn(1, 3, *size)
            with torch.no_grad():
                wanted = reference(image.double())
            for value, stage in zip(run(image), wanted, strict=True):
                assert relative_error(value, stage) < 1e-5, size


@pytest.mark.slow
@pytest.mark.parametrize('head', SEGMENTORS)
@pytest.mark.parametrize('dynamic', [False, True], ids=['fixed', 'dynamic'])
def test_segmentors(head, dynamic, save, tmp_path):
    """Against what mmseg predicts."""
    config, checkpoint, model = save('TwinsPCPVT', head)
    out = str(tmp_path / 'model.onnx')
    onnx.export_onnx(config, checkpoint, out, 'model', (70, 99), dynamic)
    reference = unfused(model)
    for engine in ENGINES:
        run = engine(out)
        for size in [(70, 99), *(SIZES if dynamic else [])]:
            image = torch.randn(1, 3, *size)
            with torch.no_grad():
                (wanted,) = reference.predict(image.double())
            logits, labels = run(image)
            assert relative_error(logits[0], wanted.seg_logits.data) < 1e-5, size
            assert labels.dtype == torch.int64
            assert torch.equal(labels, logits.argmax(1))
            assert (labels == wanted.pred_sem_seg.data).double().mean() > 1 - 1e-3
    assert_draws(out, tmp_path)


def assert_draws(exported, folder):
    """tools/run_onnx.py, with a picture as wide as none before."""
    picture = np.random.default_rng(0).integers(0, 256, (50, 77, 3), np.uint8)
    cv2.imwrite(str(folder / 'in.png'), picture)
    text = tool('run_onnx', exported, folder / 'in.png', folder / 'out.png')
    drawn = cv2.imread(str(folder / 'out.png'))
    assert drawn.shape == picture.shape
    counts = [line.split() for line in text.splitlines()]
    assert {name for name, *_ in counts} <= set('abcde')
    assert sum(int(count) for _, count, _ in counts) == 50 * 77
    # Every pixel is the mean of itself and a colour of its class.
    colours = 2 * drawn.astype(int) - picture
    assert len(np.unique(colours.reshape(-1, 3) // 4, axis=0)) < 8 * len(counts)


def test_every_output_has_to_agree():
    agreement, ones = onnx.Exportable().agreement, torch.ones(2)
    assert agreement([ones, ones], [ones, ones + 1e-6])[0]
    for wrong in (ones + 1e-3, torch.tensor([1.0, torch.nan]), torch.ones(3)):
        assert not agreement([ones, wrong], [ones, ones])[0]
        assert not agreement([wrong, ones], [ones, ones])[0]
        assert not agreement([ones], [ones, wrong])[0]
    assert agreement([ones], [torch.ones(1, 2)])[1] == 'onnxruntime gives shapes [(2,)], PyTorch [(1, 2)]'


def test_another_label_is_right_in_a_tie_only(save):
    agreement = onnx.ExportableSegmentor(save()[2]).agreement
    logits = torch.tensor([[-3.0, -2.0, 5.0, 5.0, -1.0]]).view(1, 5, 1, 1) + torch.zeros(1, 5, 2, 2)
    labels = logits.argmax(1)
    assert agreement([logits, labels], [logits, labels])[0]
    assert agreement([logits, 5 - labels], [logits, labels])[0]
    for wrong in ([logits, labels - 1], [logits + 1e-3, labels], [logits, labels[:, :1]], [logits[:, :4], labels]):
        assert not agreement(wrong, [logits, labels])[0]


@pytest.mark.slow
def test_what_cannot_be_drawn_is_named(save, tmp_path):
    config, checkpoint, _ = save()
    whole, backbone, foreign = (str(tmp_path / f'{name}.onnx') for name in ('whole', 'backbone', 'foreign'))
    for name, out in (('model', whole), ('backbone', backbone)):
        onnx.export_onnx(config, checkpoint, out, name, (64, 64))
    torch.onnx.export(nn.Identity().eval(), (torch.zeros(1),), dynamo=True, verbose=False).save(foreign)
    good, out, link = tmp_path / 'in.png', tmp_path / 'out.png', tmp_path / 'link.png'
    cv2.imwrite(str(good), np.zeros((64, 64, 3), np.uint8))
    link.symlink_to(good)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments, message in [
        ((tmp_path / 'none.onnx', good, out), f'there is no file {tmp_path / "none.onnx"}'),
        ((tmp_path, good, out), f'there is no file {tmp_path}'),
        ((config, good, out), 'config.py is not an ONNX model that onnxruntime can load'),
        ((good, good, out), 'in.png is not an ONNX model that onnxruntime can load'),
        ((foreign, good, out), 'was not written by tools/export_onnx.py'),
        ((backbone, good, out), 'holds the backbone alone'),
        ((whole, config, out), 'config.py is not a readable picture'),
        ((whole, tmp_path, out), f'there is no file {tmp_path}'),
        ((whole, good, tmp_path / 'no' / 'folder.png'), 'cannot write a picture to '),
        ((whole, good, tmp_path / 'out.what'), 'cannot write a picture to '),
        ((whole, good, whole), 'whole.onnx is the input '),
        ((whole, good, link), 'link.png is the input '),
    ]:
        status, text = tool('run_onnx', *arguments, check=False)
        assert status == 2
        *drawn, last = text.splitlines()
        assert last.startswith('error: ')
        assert message in last
        assert all(line.endswith('pixels') for line in drawn)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_graph_is_fused_and_small():
    """No second path, nothing k² times as large, and as many nodes for a large map as for a small one."""
    arch = dict(embed_dims=(16, 32), depths=(1, 2), num_heads=(1, 2), mlp_ratios=2)
    wrapped = onnx.ExportableBackbone(fuse(randomize(SlideSwin(arch, out_indices=(0, 1)))))
    counts, constants = [], []
    for shape in [(64, 64), (256, 320)]:
        graph = onnx.to_onnx(wrapped, shape, dynamic=False).model.graph
        counts.append(Counter(node.op_type for node in graph))
        constants.append({name: value.const_value.size for name, value in graph.initializers.items()})
    assert counts[0] == counts[1]
    assert counts[0]['Conv'] == 1  # the patch embedding: Slide Attention is products, tap by tap
    # A block has qkv, proj, two in the MLP; queries and outputs 9 taps and the bias. And one patch merging.
    assert counts[0]['MatMul'] == 3 * (4 + 2 * (9 + 1)) + 1
    assert not [name for name in constants[0] if 'deform' in name or 'shift' in name]
    # Beside the parameters themselves the fused ones transposed, and a few shapes and indices.
    parameters = sum(parameter.numel() for parameter in wrapped.parameters())
    fused = sum(x.numel() for name, x in wrapped.named_parameters() if 'fused' in name)
    assert fused == 3 * 16 * 9 * (9 + 1)
    for sizes in constants:
        assert parameters <= sum(sizes.values()) <= parameters + fused + 100


def test_outputs_are_named_in_the_order_they_come():
    arch = dict(embed_dims=16, depths=(1, 1, 1), num_heads=1, mlp_ratios=2)
    assert onnx.ExportableBackbone(SlideSwin(arch, out_indices=(2, 0))).output_names == ['stage1', 'stage3']


@pytest.mark.parametrize('output_size', [1, 2, 3, 6, (3, 5)])
@pytest.mark.parametrize('size', [(1, 1), (2, 7), (16, 20), (13, 31)])
def test_averaging_matrices_equal_adaptive_pooling(output_size, size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    wanted = nn.AdaptiveAvgPool2d(output_size)(x)
    assert relative_error(onnx.AdaptiveAverage(output_size)(x), wanted) < 1e-12


@pytest.mark.slow
def test_tools_from_fusing_to_a_picture(save, tmp_path):
    config, checkpoint, _ = save()
    fused, out, picture = tmp_path / 'fused.pth', tmp_path / 'model.onnx', tmp_path / 'high.png'
    tool('fuse_checkpoint', config, checkpoint, fused)
    saved = torch.load(fused, weights_only=True)
    assert saved['meta']['fused'] is True
    cv2.imwrite(str(picture), np.random.default_rng(0).integers(0, 256, (90, 30, 3), np.uint8))
    text = tool('export_onnx', fused.with_suffix('.py'), fused, out, '--shape', 64, 96, '--images', picture)
    assert '64×96: onnxruntime and PyTorch differ by' in text
    assert 'high.png: onnxruntime and PyTorch differ by' in text
    meta = onnxruntime.InferenceSession(out, providers=['CPUExecutionProvider']).get_modelmeta().custom_metadata_map
    assert json.loads(meta['mean']) == PREPROCESSOR['mean']
    assert json.loads(meta['std']) == PREPROCESSOR['std']
    assert json.loads(meta['bgr_to_rgb']) is True
    assert json.loads(meta['classes']) == ['a', 'b', 'c', 'd', 'e']
    assert_draws(out, tmp_path)


def test_a_picture_is_prepared_as_its_runner_does_it(tmp_path):
    """Resized into the shape's corner, normalised in the model's order of channels, pad_value around it."""
    values = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=True, pad_value=0.5, pad_divisor=1)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 31, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'x.png'), pixels)
    image = onnx.prepare(str(tmp_path / 'x.png'), values, (45, 80))
    assert image.shape == (1, 3, 45, 80)
    assert image.dtype == torch.float32
    resized = cv2.resize(pixels, (16, 45))[..., ::-1]
    wanted = (resized - np.array(values['mean'])) / values['std']
    assert relative_error(image[0, :, :, :16], torch.from_numpy(wanted).permute(2, 0, 1)) < 1e-6
    assert (image[..., 16:] == 0.5).all()
    spec = importlib.util.spec_from_file_location('run_onnx', TOOLS / 'run_onnx.py')
    run_onnx = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_onnx)
    theirs, size = run_onnx.prepare(pixels, [45, 80], values)
    assert size == (45, 16)
    assert relative_error(torch.from_numpy(theirs), image) < 1e-6


@pytest.mark.parametrize(
    ('scope', 'preprocessor'),
    [
        ('mmdet', dict(type='DetDataPreprocessor', pad_value=0.5, rgb_to_bgr=True, pad_size_divisor=32)),
        ('mmdet', dict(type='DetDataPreprocessor', bgr_to_rgb=True)),
        ('mmengine', dict(type='ImgDataPreprocessor', mean=[9.0], std=[7.0], pad_value=-1.0, pad_size_divisor=32)),
        ('mmengine', dict(type='ImgDataPreprocessor', mean=None, std=None, pad_size_divisor=32)),
        ('mmseg', dict(type='SegDataPreProcessor', pad_val=0.5, rgb_to_bgr=True, test_cfg=dict(size_divisor=32))),
    ],
)
def test_preparing_equals_the_preprocessor(scope, preprocessor, tmp_path):
    preprocessor = {**dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0]), **preprocessor}
    pixels = np.random.default_rng(0).integers(0, 256, (64, 31, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'x.png'), pixels)
    values = onnx.preprocessing(Config(dict(model=dict(data_preprocessor=preprocessor))), {})
    data = dict(inputs=[torch.from_numpy(pixels).permute(2, 0, 1)], data_samples=[SegDataSample()])
    with DefaultScope.overwrite_default_scope(scope):
        wanted = MODELS.build(preprocessor)(data)['inputs']
    assert relative_error(onnx.prepare(str(tmp_path / 'x.png'), values, wanted.shape[2:]), wanted) < 1e-6


def test_a_preprocessor_at_the_top_level_and_a_checkpoint_without_meta(save):
    """mmengine's Runner puts a data_preprocessor of the config into the model."""
    config, checkpoint, model = save(data_preprocessor=None)
    text = Path(config).read_text().replace('data_preprocessor=None,', '')
    Path(config).write_text(f'{text}\ndata_preprocessor = {PREPROCESSOR!r}\n')
    torch.save(dict(state_dict=model.state_dict(), meta=None), checkpoint)
    cfg, loaded, meta = load_model(config, checkpoint)
    assert type(loaded.data_preprocessor).__name__ == PREPROCESSOR['type']
    values = onnx.preprocessing(cfg, meta)
    assert values['mean'] == PREPROCESSOR['mean']
    assert values['bgr_to_rgb'] is True
    assert values['classes'] == []


@pytest.mark.parametrize(
    ('name', 'shape', 'images', 'error', 'message'),
    [
        ('model', (31, 64), [], ValueError, r'shape must be at least 32 pixels a side, got \(31, 64\)'),
        ('neck', (64, 64), [], ValueError, r"part must be one of \('backbone', 'model'\), got 'neck'"),
        ('model', (64, 64), ['none.jpg'], FileNotFoundError, 'none.jpg'),
        ('model', (64, 64), [__file__], ValueError, 'test_onnx.py is not a readable picture'),
    ],
)
def test_wrong_arguments_are_named(name, shape, images, error, message, save, tmp_path):
    config, checkpoint, _ = save()
    with pytest.raises(error, match=message):
        onnx.export_onnx(config, checkpoint, str(tmp_path / 'x.onnx'), name, shape, images=images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.py', 'model.pth']


def test_a_segmentor_that_tests_in_slices_is_refused(save, tmp_path):
    config, checkpoint, _ = save(test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(32, 32)))
    with pytest.raises(ValueError, match=r"only segmentors that test whole images.*mode='slide'"):
        onnx.export_onnx(config, checkpoint, str(tmp_path / 'x.onnx'), 'model', (64, 64))


def test_models_that_predict_in_a_way_of_their_own_are_refused(save, tmp_path):
    head = SEGMENTORS['UPerHead']['decode_head']
    cascade = dict(type='CascadeEncoderDecoder', num_stages=1, decode_head=[head])
    config, checkpoint, _ = save(**cascade)
    with pytest.raises(
        ValueError, match='of segmentors only EncoderDecoder can be exported, got CascadeEncoderDecoder'
    ):
        onnx.export_onnx(config, checkpoint, str(tmp_path / 'x.onnx'), 'model', (64, 64))
    config, checkpoint, _ = save(decode_head=dict(HEAD, type='EncHead', in_channels=CHANNELS))
    with pytest.raises(ValueError, match=r"with BaseDecodeHead's predict can be exported, got EncHead"):
        onnx.export_onnx(config, checkpoint, str(tmp_path / 'x.onnx'), 'model', (64, 64))


def test_a_checkpoint_that_does_not_fit_and_a_target_that_cannot_be_written(save, tmp_path):
    config, checkpoint, model = save()
    (tmp_path / 'folder').mkdir()
    before = sorted(tmp_path.iterdir())
    for out, message in ((tmp_path / 'none/x.onnx', 'does not exist'), (tmp_path / 'folder', 'is a folder')):
        with pytest.raises(ValueError, match=message):
            onnx.export_onnx(config, checkpoint, str(out), 'model', (64, 64))
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
            onnx.export_onnx(config, checkpoint, str(tmp_path / 'x.onnx'), 'model', (64, 64))
    Path(checkpoint).write_bytes(b'no checkpoint')
    with pytest.raises(ValueError, match='is not a readable checkpoint'):
        onnx.export_onnx(config, checkpoint, str(tmp_path / 'x.onnx'), 'model', (64, 64))
    assert sorted(tmp_path.iterdir()) == before


def test_a_difference_leaves_no_file(save, tmp_path, monkeypatch):
    config, checkpoint, _ = save()
    before = sorted(tmp_path.iterdir())
    honest = onnx.to_onnx

    def wrong(module, shape, dynamic):
        changed = copy.deepcopy(module)
        nn.init.zeros_(changed.backbone.stages[1].blocks[0].attn.fused_bias)
        return honest(changed, shape, dynamic)

    monkeypatch.setattr(onnx, 'to_onnx', wrong)
    with pytest.raises(
        RuntimeError, match="graph's results are not the model's: 64×64: onnxruntime and PyTorch differ"
    ):
        onnx.export_onnx(config, checkpoint, str(tmp_path / 'x.onnx'), 'backbone', (64, 64))
    assert sorted(tmp_path.iterdir()) == before
