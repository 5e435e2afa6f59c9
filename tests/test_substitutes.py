"""What stands in for names that older versions of PyTorch lack, on every version."""

import runpy
import sys

import pytest
import torch
from helpers import tool_error
from mmengine.utils import digit_version
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmslide import compat, substitutes


@substitutes.register_custom_op('mmslide_test::scaled', mutates_args=())
def scaled(x: Tensor, y: Tensor | None, factor: float, twice: bool, name: str) -> Tensor:
    assert name == 'name'
    return x * factor * (2 if twice else 1) + (0 if y is None else y)


@substitutes.register_custom_op('mmslide_test::both', mutates_args=())
def both(x: Tensor) -> tuple[Tensor, Tensor]:
    return x + 1, x * 2


@scaled.register_fake
def _(x, *_):
    return torch.empty_like(x)


def _setup(ctx, inputs, output):
    ctx.factor = inputs[2] * (2 if inputs[3] else 1)
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad):
    assert not torch.is_grad_enabled()
    return grad * ctx.factor, None, None, None, None


scaled.register_autograd(_backward, setup_context=_setup)


def test_an_operator_has_values_gradients_and_shapes():
    x = torch.randn(3, requires_grad=True)
    out = scaled(x, torch.ones(3), 1.5, True, 'name')
    assert torch.equal(out, 3 * x + 1)
    out.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 3.0))
    with torch.no_grad():
        assert not scaled(x, None, 2.0, False, 'name').requires_grad
    with FakeTensorMode():
        assert scaled(torch.empty(4, 5), None, 2.0, False, 'name').shape == (4, 5)
    first, second = both(torch.ones(2))
    assert first.tolist() == second.tolist() == [2, 2]


def test_the_rest():
    assert not substitutes.is_compiling()
    assert substitutes.statically_known_true(1 < 2)
    assert not substitutes.is_autocast_enabled('cpu')
    with torch.autocast('cpu'):
        assert substitutes.is_autocast_enabled('cpu')


def test_operations_are_counted():
    substitutes.register_flop_formula(torch.ops.mmslide_test.both)(lambda x_shape, **_: x_shape[0])
    with FlopCounterMode(display=False) as counter:
        both(torch.ones(7))
    assert counter.get_total_flops() == 7


def test_operations_are_counted_by_the_registry_of_2_1(monkeypatch):
    monkeypatch.setattr('torch.utils.flop_counter.flop_mapping', mapping := {}, raising=False)
    substitutes.register_flop_formula(torch.ops.mmslide_test.both)(max)
    assert mapping == {torch.ops.mmslide_test.both: max}


# The names in compat.py that came with a version, and what they are called there.
CAME_WITH = {
    '2.2': ['utils.flop_counter.register_flop_formula'],
    '2.4': ['library.custom_op', 'serialization.add_safe_globals', 'get_autocast_dtype'],
    '2.5': ['serialization.safe_globals'],
    '2.7': ['compiler.is_exporting'],
    '2.8': ['nn.modules.module._has_any_global_hook'],
}


@pytest.mark.parametrize('version', ['2.1.2', '2.2.2+cu121', '2.5.1', '2.6.0', '2.7.1', '2.8.0', '2.9.1'])
def test_each_version_gets_what_it_has(version, monkeypatch):
    if digit_version(version) > compat.torch_version:
        pytest.skip(f'needs PyTorch {version}')
    monkeypatch.setattr(torch, '__version__', version)
    for first, names in CAME_WITH.items():
        for name in names if digit_version(version) < digit_version(first) else ():
            monkeypatch.delattr(f'torch.{name}', raising=False)
    names = runpy.run_path(compat.__file__, run_name='mmslide.compat')
    assert set(compat.__all__) <= set(names)
    assert names['CAN_EXPORT'] == (version == '2.9.1')
    assert names['MODERN'] == (version not in ('2.1.2', '2.2.2+cu121', '2.5.1'))
    assert not names['is_exporting']()


@pytest.mark.parametrize('name', ['forward', 'forward_pre', 'full_backward', 'full_backward_pre'])
def test_hooks_of_all_modules_are_seen(name):
    assert not compat.has_any_global_hook()
    handle = getattr(torch.nn.modules.module, f'register_module_{name}_hook')(lambda *_: None)
    try:
        assert compat.has_any_global_hook()
    finally:
        handle.remove()
    assert not compat.has_any_global_hook()


def test_export_says_which_version_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(compat, 'CAN_EXPORT', False)
    monkeypatch.delitem(sys.modules, 'mmslide.deploy.trace', raising=False)
    message = tool_error('export', 'config.py', 'checkpoint.pth', tmp_path / 'x.onnx', '--shape', 64, 64)
    assert message == f'export needs PyTorch 2.9 or later, got {torch.__version__}'
