import json
import runpy
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import NEEDS_EXPORT, relative_error, tool_error
from mmengine.logging import MMLogger

from benchmarks import (
    BACKBONES,
    Machine,
    Side,
    backbone_pair,
    compare,
    compare_exported,
    measure_machine,
    model_pair,
    neighborhood_pair,
    op_pair,
)
from benchmarks.baselines import im2col
from benchmarks.pairs import SMALL_SHAPE
from mmslide.ops import neighborhood_attention, slide_attention
from mmslide.ops.backends import BACKENDS, Backend

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def log_level():
    """The tool is silent about what it loads; other tests are not."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    yield
    logger.setLevel(level)


def side(name, function, *inputs):
    return Side(name, lambda: [function(*inputs)], {f'x{index}': x for index, x in enumerate(inputs)})


@pytest.mark.parametrize('kernel_size', [3, 5])
def test_im2col_is_slide_attention(kernel_size):
    heads, dims, slots = 2, 6, kernel_size**2
    q, k, v = torch.randn(3, 2, 5, 8, heads, dims, dtype=torch.float64)
    weight = torch.randn(dims, slots, kernel_size, kernel_size, dtype=torch.float64)
    bias, rpb = torch.randn(dims, slots, dtype=torch.float64), torch.randn(heads, slots, dtype=torch.float64)
    wanted = slide_attention(q, k, v, weight, bias, rpb, backend='reference')
    assert relative_error(im2col(q, k, v, weight, bias, rpb), wanted) < 1e-12


@pytest.mark.parametrize('baseline', ['two-path', 'im2col', 'conv', 'reference'])
@pytest.mark.parametrize('training', [False, True])
def test_op(baseline, training):
    pair = op_pair(9, 12, 8, 2, batch=2, baseline=baseline, training=training)
    ours, theirs = compare(pair.ours, pair.baseline, training, pair.tolerance, seconds=0.0)
    assert min(ours.seconds, theirs.seconds) > 0
    # Ours keeps q, k, v and the parameters: the merged kernels are the op's own.
    kept = sum(x.nbytes for x in pair.ours.inputs.values())
    assert ours.saved_bytes == (kept - pair.ours.inputs['deform_bias'].nbytes if training else 0)
    if training and baseline != 'im2col':
        assert theirs.saved_bytes > 3 * ours.saved_bytes


@pytest.mark.parametrize('training', [False, True])
def test_neighborhood(training):
    pair = neighborhood_pair(9, 12, 8, 2, batch=2, training=training)
    ours, theirs = compare(pair.ours, pair.baseline, training, pair.tolerance, seconds=0.0)
    assert ours.saved_bytes == (sum(x.nbytes for x in pair.ours.inputs.values()) if training else 0)
    assert theirs.peak_bytes > 2 * 49 * pair.ours.inputs['qkv'].nbytes // 3


def test_disagreement_is_an_error_before_anything_is_timed():
    x = torch.randn(5, requires_grad=True)
    sides = side('ours', lambda x: x.sin(), x), side('theirs', lambda x: x.sin() * 1.1, x)
    with pytest.raises(RuntimeError, match=r'ours and theirs disagree: output 0 by 9\.1e-02'):
        compare(*sides, training=False, tolerance=1e-2)
    sides = side('ours', lambda x: x.sin(), x), side('theirs', lambda x: x.sin() + (x - x.detach()), x)
    with pytest.raises(RuntimeError, match='disagree: gradient of x0'):
        compare(*sides, training=True, tolerance=1e-2)
    compare(*sides, training=False, tolerance=1e-2, seconds=0.0)


def test_memory():
    x = torch.zeros(1000, 1000, requires_grad=True)
    # Two maps at once: a product and what is made of it. Some bytes for the factors.
    measured, _ = compare(
        *[side('a', lambda x: ((x * 2) * 3).sin(), x)] * 2, training=False, tolerance=None, seconds=0.0
    )
    assert measured.peak_bytes == pytest.approx(2 * x.nbytes, rel=1e-4)
    measured, _ = compare(*[side('a', lambda x: x.exp().sin(), x)] * 2, training=True, tolerance=None, seconds=0.0)
    assert measured.saved_bytes == x.nbytes  # the exponential, once


def test_nothing_measured_stays_alive():
    x, outs = torch.zeros(10, requires_grad=True), []

    def forward(x):
        outs.append(weakref.ref(out := x.exp()))
        return out

    compare(*[side('a', forward, x)] * 2, training=True, tolerance=None, seconds=0.0)
    assert outs
    assert not [out for out in outs if out() is not None]


def test_floor():
    assert Machine(copy_rate=10.0, matrix_rate=100.0).floor(20.0, 50.0) == 2.0
    assert Machine(copy_rate=10.0, matrix_rate=100.0).floor(2.0, 500.0) == 5.0
    machine = measure_machine(torch.float32, torch.device('cpu'))
    assert machine.copy_rate > 1e8
    assert machine.matrix_rate > 1e8


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ('name', 'training'), [(name, training) for name in BACKBONES for training in (False, True)[: 2 - ('/' in name)]]
)
def test_backbones(name, training):
    pair = backbone_pair(name, *SMALL_SHAPE, training=training)
    assert (pair.tolerance is None) == name.startswith('slide')
    ours, _ = compare(pair.ours, pair.baseline, training, pair.tolerance, seconds=0.0)
    assert ours.peak_bytes > 0


@pytest.mark.slow
def test_swin_where_one_window_covers_the_last_map():
    """mmdet shifts that window all the same, which the pair undoes."""
    pair = backbone_pair('swin-t', 224, 224)
    compare(pair.ours, pair.baseline, False, pair.tolerance, seconds=0.0)


@pytest.mark.exhaustive
def test_hosts_are_compared_at_the_size_that_is_measured():
    backbone_pair('slide-swin-t', 224, 224)
    # mmdet fills a map that is smaller than the window with zeros.
    with pytest.raises(RuntimeError, match='the host of slide-swin-t and SwinTransformer disagree: output 3'):
        backbone_pair('slide-swin-t', 160, 224)


@pytest.mark.slow
def test_a_wrong_backend_is_noticed(monkeypatch):
    wrong = lambda *args: 1.01 * slide_attention(*args[:6], backend='conv')  # noqa: E731
    monkeypatch.setitem(BACKENDS, 'native', Backend(wrong))
    with pytest.raises(RuntimeError, match='slide-swin-t and the reference disagree'):
        backbone_pair('slide-swin-t', *SMALL_SHAPE)


@pytest.mark.exhaustive
def test_models():
    from mmengine.config import Config

    config = Config.fromfile(ROOT / 'configs/mini/cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py')
    baseline = Config.fromfile(ROOT / 'configs/mini/cascade-mask-rcnn_twins-svt-mini_fpn_mini-coco.py')
    pair = model_pair(config, baseline, 64, 96)
    assert (pair.ours.name, pair.baseline.name) == (Path(config.filename).stem, Path(baseline.filename).stem)
    assert len(pair.ours.forward()) == 2 * 4  # classes and boxes of the RPN, four maps
    compare(pair.ours, pair.baseline, False, pair.tolerance, seconds=0.0)


def tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *map(str, arguments)])
    runpy.run_path(str(ROOT / 'tools/benchmark.py'), run_name='__main__')


def test_tool(monkeypatch, capsys, tmp_path):
    options = ['--maps', '8x12x8x2', '6x6x8x1', '--threads', torch.get_num_threads(), '--seconds', 0, '--device', 'cpu']
    tool(monkeypatch, 'op', *options, '--training', '--baseline', 'conv', '--json', tmp_path / 'out.json')
    records = json.loads((tmp_path / 'out.json').read_text())
    assert [x['name'] for x in records] == ['8×12×8, 2 heads, k=3', '6×6×8, 1 heads, k=3']
    assert set(records[0]['ours']) == {'seconds', 'peak_bytes', 'saved_bytes'}
    out = capsys.readouterr().out
    assert 'forward and backward, batch 1, float32' in out
    assert 'geometric mean' in out
    tool(monkeypatch, 'neighborhood', '--maps', '8x12x8x2', '--seconds', 0, '--device', 'cpu')
    assert '8×12×8, 2 heads, k=7' in capsys.readouterr().out


def test_a_pair_that_fails_does_not_take_the_others_along(monkeypatch, capsys, tmp_path):
    def pair(height, *sizes, **settings):
        if height == 9:
            raise RuntimeError('ours and two-path disagree: output 0')
        return op_pair(height, *sizes, **settings)

    monkeypatch.setattr('benchmarks.op_pair', pair)
    monkeypatch.setattr('benchmarks.measure_machine', lambda *_: Machine(1.0, 1.0))
    options = ['--threads', torch.get_num_threads(), '--seconds', 0, '--device', 'cpu', '--json', tmp_path / 'out.json']
    error = tool_error('benchmark', 'op', '--maps', '8x12x8x2', '9x9x8x2', '6x6x8x1', *options)
    assert error == 'not measured: 9x9x8x2: ours and two-path disagree: output 0'
    rows = [line.split('  ')[0] for line in capsys.readouterr().out.splitlines() if '×8, ' in line]
    assert rows == ['8×12×8, 2 heads, k=3', '6×6×8, 1 heads, k=3']
    assert [x['name'] for x in json.loads((tmp_path / 'out.json').read_text())] == rows


@pytest.mark.slow
@pytest.mark.parametrize('command', [['op', '--maps', '1x1x8x2'], ['backbone', 'twins-pcpvt-s']])
def test_plot(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys.modules['benchmarks.cost'], '_global_seconds', lambda pair: 0.0)
    runner = runpy.run_path(str(ROOT / 'tools/benchmark.py'))
    monkeypatch.setitem(runner['run_cost'].__globals__, 'SIDES', (32, 64))
    options = ['--threads', str(torch.get_num_threads()), '--seconds', '0', '--device', 'cpu']
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *command, *options, '--plot', str(tmp_path / 'cost.png')])
    runner['main']()
    assert (tmp_path / 'cost.png').stat().st_size > 10_000
    assert '0.001 to 0.004 Mpixels: time ×' in capsys.readouterr().out


@pytest.mark.exhaustive
def test_flex_attention_is_the_op_with_nothing_learned():
    pair = op_pair(9, 11, 32, 2, kernel_size=3, baseline='flex')
    with torch.no_grad():  # on a CPU it has no backward
        ours, theirs = pair.ours.forward(), pair.baseline.forward()
    assert relative_error(theirs[0], ours[0]) < 1e-5
    assert len(pair.ours.parameters) == 4  # whose gradients training computes all the same


@pytest.mark.parametrize('training', [False, True])
def test_natten_is_the_op_with_nothing_learned_inside_the_map(training, monkeypatch):
    def na2d(q, k, v, kernel_size):
        return neighborhood_attention(q, k, v, torch.zeros(q.shape[3], 2 * kernel_size - 1, 2 * kernel_size - 1))

    monkeypatch.setitem(sys.modules, 'natten', SimpleNamespace(na2d=na2d))
    pair = op_pair(9, 11, 16, 2, baseline='natten', training=training)
    assert pair.ours.forward()[0].shape == (1, 7, 9, 2, 8)
    compare(pair.ours, pair.baseline, training, pair.tolerance, seconds=0.0)


@NEEDS_EXPORT
@pytest.mark.slow
@pytest.mark.parametrize('mlp_ratio', [0, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_exported_layers_agree_and_are_measured(mlp_ratio, monkeypatch):
    fused, two_path = compare_exported(9, 13, 16, 2, 3, mlp_ratio, seconds=0.0)
    assert fused.seconds > 0
    assert two_path.seconds > 0
    monkeypatch.setattr('benchmarks.baselines.two_path', lambda q, *_: q)
    with pytest.raises(RuntimeError, match='fused and two-path disagree'):
        compare_exported(9, 13, 16, 2, 3, mlp_ratio, seconds=0.0)


@NEEDS_EXPORT
@pytest.mark.exhaustive
def test_exported_layers_through_the_tool(tmp_path, monkeypatch, capsys):
    tool(monkeypatch, 'onnx', '--maps', '8x8x16x2', '--seconds', 0, '--json', tmp_path / 'figures.json')
    assert 'in onnxruntime, float32, 2 CPU threads' in capsys.readouterr().out
    (record,) = json.loads((tmp_path / 'figures.json').read_text())
    assert record['name'] == '8x8x16x2'
    assert record['fused_ms'] > 0


@NEEDS_EXPORT
@pytest.mark.exhaustive
def test_exported_models_through_the_tool(tmp_path, monkeypatch, capsys):
    config = 'slide-swin-mini_upernet_mini-ade20k-64x64.py'
    host = tmp_path / 'host.py'
    backbone = dict(_delete_=True, type='MixVisionTransformer', embed_dims=8, num_layers=[1] * 4, num_heads=[1] * 4)
    host.write_text(f"_base_ = '{ROOT / 'configs/mini' / config}'\nmodel = dict(backbone={backbone})")
    arguments = ['--shape', 64, 64, '--seconds', 0, '--runtimes', 'onnxruntime', '--json', tmp_path / 'figures.json']
    tool(monkeypatch, 'exported', config, host, *arguments)
    assert '64×64' in capsys.readouterr().out
    (record,) = json.loads((tmp_path / 'figures.json').read_text())
    assert record['runtime'] == 'onnxruntime'
    ours, baseline = record['measurements']
    assert ours['seconds'] > 0
    assert baseline['seconds'] > 0
    assert ours['file_bytes'] > 1e6 > baseline['file_bytes'] > 1e4
    assert ours['peak_bytes'] > ours['file_bytes']
