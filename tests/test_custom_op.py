"""What every backend behind the custom operator has to do."""

from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import NEEDS_MODERN, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmslide.compat import MODERN
from mmslide.ops import backends, custom_op, native, slide_attention
from mmslide.ops.backends import choose_backend
from mmslide.ops.reference import reference

NAMES = ('out', 'q', 'k', 'v', 'weight', 'bias', 'rpb')
NEEDS_TRITON = pytest.mark.skipif(not MODERN or find_spec('triton') is None, reason='needs Triton 3')
SHAPES = [  # batch, height, width, heads, head size, kernel size
    (2, 1, 1, 2, 8, 3),
    (1, 1, 7, 1, 16, 5),
    (2, 13, 17, 3, 32, 3),
    (1, 13, 17, 2, 8, 7),
    (1, 63, 40, 1, 64, 3),
    (3, 40, 9, 2, 24, 5),
    (1, 29, 5, 1, 8, 7),
]


@pytest.fixture(params=['native', 'tapwise', pytest.param('triton', marks=NEEDS_TRITON)])
def backend(request):
    return request.param


@pytest.fixture
def device(backend):
    return 'cuda' if backend == 'triton' and torch.cuda.is_available() else 'cpu'


def arguments(batch, height, width, heads, head_dims, kernel_size, device='cpu'):
    """q, k and v as a module cuts them out of one projection."""
    slots = kernel_size**2
    maps = torch.randn(batch, height, width, 3, heads, head_dims, device=device).unbind(3)
    shapes = (head_dims, slots, kernel_size, kernel_size), (head_dims, slots), (heads, slots)
    return [x.requires_grad_() for x in (*maps, *(torch.randn(shape, device=device) for shape in shapes))]


@pytest.fixture
def args(device):
    return arguments(1, 2, 5, 2, 16, 3, device)


@pytest.fixture
def attention(backend):
    return partial(slide_attention, backend=backend)


def results(attention, args, grad, **kwargs):
    out = attention(*args, **kwargs)
    return out, *torch.autograd.grad(out, args, grad)


def assert_agrees(found, args, grad, scale=None, mask=None, tolerance=1e-5):
    doubles = [x.detach().cpu().double().requires_grad_() for x in args]
    out = reference(*doubles, scale or args[0].shape[-1] ** -0.5, mask if mask is None else mask.cpu().double())
    wanted = (out, *torch.autograd.grad(out, doubles, grad.cpu().double()))
    for name, value, reference_value in zip(NAMES, found, wanted, strict=True):
        assert relative_error(value, reference_value) < tolerance, name


@pytest.mark.parametrize('threads', [1, 2, 5])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_native_agrees_with_the_reference_and_repeats(shape, threads):
    """For any number of threads, each of which has strips of rows of its own."""
    args, grad = arguments(*shape), torch.randn(shape[:5])
    run = partial(results, partial(slide_attention, backend='native'), args, grad)
    with mock.patch('torch.get_num_threads', return_value=threads):
        found = run()
        assert_agrees(found, args, grad)
        assert all(torch.equal(x, y) for x, y in zip(found, run(), strict=True))


@pytest.mark.parametrize('size', [0.0, 1e-4, 30.0])
def test_native_softmax_from_equal_to_lone_slots(size):
    args, grad = arguments(1, 9, 8, 2, 16, 3), torch.randn(1, 9, 8, 2, 16)
    args[0] = (size * args[0]).detach().requires_grad_()
    # Logits of some hundreds, whose rounding the softmax passes on.
    tolerance = 3e-5 if size > 1 else 1e-5
    assert_agrees(results(partial(slide_attention, backend='native'), args, grad), args, grad, tolerance=tolerance)


def test_native_passes_nan_and_infinity_on():
    args = [x.detach() for x in arguments(1, 5, 5, 1, 8, 3)]
    for value in (float('nan'), float('inf')):
        args[0][0, 2, 2, 0, 3] = value
        out = slide_attention(*args, backend='native')
        assert out[0, 2, 2].isnan().all()
        assert not out[0, 2, 3].isnan().any()


@pytest.mark.parametrize('layout', ['views with heads outside', 'unlike each other', 'channels apart'])
def test_maps_of_any_layout_and_an_explicit_scale(attention, args, device, layout):
    """And a gradient that is one number everywhere."""
    if layout == 'views with heads outside':
        args[:3] = (x.requires_grad_() for x in torch.randn(1, 2, 5, 2, 3, 16, device=device).unbind(4))
    elif layout == 'channels apart':
        args[:3] = (x.requires_grad_() for x in torch.randn(3, 1, 2, 16, 5, 2, device=device).movedim(3, -1))
    else:
        args[1] = args[1].detach().contiguous().requires_grad_()
        args[2] = args[2].detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
    grad = torch.randn(1, device=device).expand(args[0].shape)
    assert_agrees(results(attention, args, grad, scale=0.3), args, grad, scale=0.3)


def test_dropout_mask(backend, args, device):
    mask = (torch.rand(1, 2, 5, 2, 9, device=device) > 0.4) / 0.6
    grad = torch.randn(args[0].shape, device=device)
    operator = lambda *args: custom_op.custom_op(*args, 16**-0.5, mask, backend)  # noqa: E731
    assert_agrees(results(operator, args, grad), args, grad, mask=mask)


def test_dropout_of_the_public_function(attention, args):
    found = []
    for function in (partial(slide_attention, backend='reference'), attention):
        torch.manual_seed(1)
        found.append(function(*args, dropout_p=0.4))
    assert relative_error(found[1], found[0]) < 1e-5
    assert relative_error(found[1], attention(*args)) > 1e-2


def test_backward_keeps_the_inputs_only(attention, args):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        attention(*args)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in args}


@pytest.mark.parametrize('trained', [(), (3, 4, 5), (5,)], ids=['none', 'all', 'one'])
def test_frozen_parameters_cost_nothing(backend, attention, args, device, trained):
    grad = torch.randn(args[0].shape, device=device)
    wanted = torch.autograd.grad(attention(*args), args, grad)
    for index in range(3, 6):
        args[index].requires_grad_(index in trained)
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            out = function(*arguments, **(kwargs or {}))
            if function is torch.ops.mmslide.slide_attention_backward.default:
                calls.append((arguments[-2:], [x.numel() for x in out[3:]]))
            return out

    out = attention(*args)
    with Calls():
        out.backward(grad)
    sizes = [x.numel() for x in args[3:]] if trained else [0, 0, 0]
    assert calls == [((bool(trained), backend), sizes)]
    for index, (x, gradient) in enumerate(zip(args, wanted, strict=True)):
        if index < 3 or index in trained:
            assert torch.equal(x.grad, gradient)
        else:
            assert x.grad is None


def test_autocast_does_not_round_inside(attention, args, device):
    grad = torch.randn(args[0].shape, device=device)
    plain = results(attention, args, grad)
    with torch.autocast(device, dtype=torch.bfloat16):
        under_autocast = results(attention, args, grad)
    for value, wanted in zip(under_autocast, plain, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize('wrap', [pytest.param('compile', marks=NEEDS_MODERN), 'checkpoint'])
def test_compiled_and_checkpointed_it_stays_the_same(attention, args, device, wrap):
    if wrap == 'compile':
        wrapped = torch.compile(attention, backend='aot_eager', fullgraph=True)
    else:
        wrapped = lambda *args: checkpoint(attention, *args, use_reentrant=False)  # noqa: E731
    grad = torch.randn(args[0].shape, device=device)
    for value, wanted in zip(results(wrapped, args, grad), results(attention, args, grad), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.slow
@NEEDS_MODERN
@pytest.mark.parametrize('with_mask', [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_custom_op_is_registered_as_torch_asks(backend, args, device, with_mask):
    mask = torch.rand(1, 2, 5, 2, 9, device=device) if with_mask else None
    torch.library.opcheck(custom_op.custom_op, (*args, 0.25, mask, backend))
    detached = [x.detach() for x in args]
    for parameters in (True, False):
        torch.library.opcheck(custom_op._backward, (detached[0], *detached, 0.25, mask, parameters, backend))


def test_flops_are_those_of_the_merged_convolutions(attention, args):
    """And twice that in backward; torch itself ignores the groups of a convolution there."""
    counts = []
    for function in (attention, partial(slide_attention, backend='conv')):
        with FlopCounterMode(display=False) as counter:
            function(*args)
        counts.append(counter.get_total_flops())
    macs = 2 * 5 * 2 * 16 * 2 * (9 * 9 + 9)
    assert counts == [2 * macs, 2 * macs]
    with FlopCounterMode(display=False) as counter:
        attention(*args).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * macs


def test_second_backward_is_refused(backend, attention, args):
    (grad,) = torch.autograd.grad(attention(*args).sum(), args[:1], create_graph=True)
    with pytest.raises(ValueError, match=rf"'{backend}' can be differentiated only once; use 'conv'"):
        grad.sum().backward()


def test_forward_mode_derivatives_are_refused(backend, attention, args):
    q, *others = (x.detach() for x in args)
    with pytest.raises(ValueError, match=f"'{backend}' has no forward-mode derivatives; use 'conv'"):
        torch.func.jvp(lambda q: attention(q, *others), (q,), (q,))


def test_the_default_has_forward_mode_derivatives():
    args = tuple(x.detach() for x in arguments(2, 4, 5, 2, 8, 3))
    tangents = tuple(torch.randn_like(x) for x in args)
    found = torch.func.jvp(slide_attention, args, tangents)
    doubles, directions = (tuple(x.double() for x in xs) for xs in (args, tangents))
    wanted = torch.func.jvp(partial(reference, scale=8**-0.5), doubles, directions)
    for value, other in zip(found, wanted, strict=True):
        assert relative_error(value, other) < 1e-5


@pytest.mark.parametrize(
    ('shape', 'dtype', 'device', 'message'),
    [
        ((12, 3), torch.float32, 'cpu', 'supports head sizes divisible by 8, got 12'),
        ((8, 9), torch.float32, 'cpu', r'supports kernel sizes \(3, 5, 7\), got 9'),
        (
            (8, 3),
            torch.float64,
            'cpu',
            'supports float32, bfloat16 or float16 maps .*, got torch.float64 and torch.float64',
        ),
        ((8, 3), torch.float32, 'meta', 'needs CPU tensors, got meta'),
    ],
)
def test_what_native_cannot_do_is_refused_by_hand_and_left_to_others(shape, dtype, device, message):
    args = [x.detach().to(device) for x in arguments(1, 2, 3, 1, *shape)]
    args[:3] = (x.to(dtype) for x in args[:3])
    if dtype == torch.float64:
        args[3:] = (x.to(dtype) for x in args[3:])
    with pytest.raises(ValueError, match=rf"backend 'native' {message}; use None"):
        slide_attention(*args, backend='native')
    assert slide_attention(*args).shape == args[0].shape


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(target='pathlib.Path.is_file', return_value=False), 'was not compiled: install a C'),
        (dict(target='ctypes.CDLL', side_effect=OSError('no libgomp')), r'cannot be loaded \(no libgomp\)'),
        (dict(target='mmslide.ops.native.VERSION', new=0), 'was compiled from another version of mmslide'),
        (dict(target='torch.backends.cpu.get_cpu_capability', return_value='DEFAULT'), 'needs a processor with AVX2'),
    ],
)
def test_without_its_kernels_native_gives_way_to_tapwise(monkeypatch, change, message):
    with mock.patch(**change), mock.patch('platform.machine', return_value='x86_64'):
        library, why_none = native._load()
    monkeypatch.setattr(native, 'library', library)
    monkeypatch.setattr(native, 'why_none', why_none)
    args = arguments(1, 2, 3, 1, 8, 3)
    with pytest.raises(ValueError, match=message):
        slide_attention(*args, backend='native')
    with pytest.warns(UserWarning, match=f"{message}.*; falling back to 'tapwise', which is slower"):
        assert choose_backend(args[0], args[3]) == 'tapwise'
    if MODERN:
        torch.compile(choose_backend, backend='aot_eager', fullgraph=True)(args[0], args[3])


@pytest.mark.parametrize(('device', 'chosen'), [('meta', 'conv'), ('cpu', 'native')])
def test_the_choice_of_backend(device, chosen):  # on CUDA: see test_triton.py
    with FakeTensorMode():
        q, weight = (torch.empty(shape, device=device) for shape in [(1, 4, 4, 2, 32), (32, 9, 3, 3)])
        assert choose_backend(q, weight) == chosen
    assert native.library is not None


def test_other_devices_take_plain_operations():
    q = SimpleNamespace(device=torch.device('mps'), is_meta=False, is_cuda=False)
    assert choose_backend(q, torch.empty(32, 9, 3, 3)) == 'unrolled'
    assert backends.BACKENDS['tapwise'].refusal(q, torch.empty(32, 9, 3, 3)) == 'needs CPU or CUDA tensors, got mps'


def test_the_environment_chooses(monkeypatch):
    args = arguments(1, 2, 3, 1, 8, 3)
    monkeypatch.setattr(backends, 'WANTED', 'conv')
    assert choose_backend(args[0], args[3]) == 'conv'
    monkeypatch.setattr(backends, 'WANTED', 'fast')
    with pytest.raises(ValueError, match=r"MMSLIDE_BACKEND must be one of .*got MMSLIDE_BACKEND='fast'"):
        slide_attention(*args)
