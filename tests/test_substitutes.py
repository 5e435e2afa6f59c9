"""The substitutes for what PyTorch before 2.6 lacks, on every version."""

import pytest
import torch
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
    assert set(compat.__all__) - {'MODERN'} <= set(dir(substitutes))
    assert not substitutes.is_compiling()
    assert not substitutes.is_exporting()
    assert substitutes.statically_known_true(1 < 2)
    assert not substitutes.is_autocast_enabled('cpu')
    with torch.autocast('cpu'):
        assert substitutes.is_autocast_enabled('cpu')


@pytest.mark.skipif(compat.MODERN, reason='later ones have a registry of their own')
def test_operations_are_counted():
    substitutes.register_flop_formula(torch.ops.mmslide_test.both)(lambda x_shape, **_: x_shape[0])
    with FlopCounterMode(display=False) as counter:
        both(torch.ones(7))
    assert counter.get_total_flops() == 7
