import contextlib
from functools import partial
from unittest import mock

import pytest
import torch
from helpers import NEEDS_EXPORT, NEEDS_MODERN, relative_error
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import Side, measure
from mmslide.ops import native, neighborhood, neighborhood_attention, tiles
from mmslide.ops.reference import neighborhood_reference

NAMES = ('out', 'q', 'k', 'v', 'rpb')
SHAPES = [  # batch, height, width, heads, head size, kernel size
    (2, 7, 7, 2, 4, 7),  # one window
    (1, 7, 31, 1, 8, 7),
    (1, 9, 8, 2, 5, 7),
    (2, 13, 17, 3, 16, 7),
    (1, 40, 22, 2, 8, 7),
    (1, 1, 6, 1, 4, 1),
    (3, 15, 3, 2, 4, 3),
    (1, 29, 14, 1, 4, 11),  # a window larger than a tile
]


def arguments(batch, height, width, heads, head_dims, kernel_size, dtype=torch.float64):
    """q, k and v as a module cuts them out of one projection."""
    maps = torch.randn(batch, height, width, 3, heads, head_dims, dtype=torch.float64).to(dtype).unbind(3)
    rpb = torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1, dtype=torch.float64).to(dtype)
    return [x.requires_grad_() for x in (*maps, rpb)]


def gradients(out, args, grad):
    return out, *torch.autograd.grad(out, args, grad.to(out.dtype))


def wanted(args, grad, scale=None, mask=None):
    doubles = [x.detach().double().requires_grad_() for x in args]
    scale = args[0].shape[-1] ** -0.5 if scale is None else scale
    out = neighborhood_reference(*doubles, scale, mask if mask is None else mask.double())
    return gradients(out, doubles, grad)


def assert_agrees(found, reference, tolerance):
    for name, value, other in zip(NAMES, found, reference, strict=True):
        assert relative_error(value, other) < tolerance, name


def test_reference_equals_the_sum_over_single_pixels():
    """The equation once more with plain loops, so that the reference itself is held against something."""
    q, k, v, rpb = (x.detach() for x in arguments(1, 6, 9, 2, 3, 5))
    out = neighborhood_reference(q, k, v, rpb, scale=0.7)
    for y, x, head in [(0, 0, 0), (1, 2, 1), (3, 5, 0), (5, 8, 1), (2, 7, 1)]:
        # From the window's first pixel on: around the pixel, but inside the map.
        top, left = min(max(y - 2, 0), 6 - 5), min(max(x - 2, 0), 9 - 5)
        pixels = [(i, j) for i in range(top, top + 5) for j in range(left, left + 5)]
        logits = [0.7 * q[0, y, x, head] @ k[0, i, j, head] + rpb[head, i - y + 4, j - x + 4] for i, j in pixels]
        weights = torch.stack(logits).softmax(0)
        result = sum(weight * v[0, i, j, head] for weight, (i, j) in zip(weights, pixels, strict=True))
        assert relative_error(out[0, y, x, head], result) < 1e-12


def without_kernels():
    return mock.patch.multiple(native, library=None, why_none='is missing')


@pytest.mark.filterwarnings('ignore:the library of CPU kernels')
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_output_and_gradients_agree_with_the_reference(shape):
    args = arguments(*shape)
    grad = torch.randn(shape[:5], dtype=torch.float64)
    reference = wanted(args, grad)
    assert_agrees(gradients(neighborhood_attention(*args), args, grad), reference, 1e-12)
    single = [x.detach().float().requires_grad_() for x in args]
    with without_kernels():
        assert_agrees(gradients(neighborhood_attention(*single), single, grad), reference, 1e-5)


def test_missing_kernels_are_reported():
    args = arguments(1, 8, 9, 1, 8, 7, dtype=torch.float32)
    with without_kernels(), pytest.warns(UserWarning, match='CPU kernels is missing; falling back to plain PyTorch'):
        neighborhood_attention(*args)


@pytest.mark.skipif(native.library is None, reason='not compiled')
@pytest.mark.parametrize('threads', [1, 2, 5])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize(
    'shape', [(1, 7, 7, 2, 8, 7), (2, 13, 17, 3, 32, 7), (1, 41, 9, 1, 24, 5), (2, 3, 30, 2, 16, 3)]
)
def test_native_agrees_with_the_reference_and_repeats(shape, masked, threads):
    """For any number of threads, each of which has strips of rows of its own."""
    args = arguments(*shape, dtype=torch.float32)
    grad = torch.randn(shape[:5])
    mask = (torch.rand(*shape[:4], shape[5] ** 2) > 0.4) / 0.6 if masked else None
    assert native.neighborhood_refusal(args[0], args[3]) is None

    def run():
        return gradients(neighborhood.custom_op(*args, 0.3, mask), args, grad)

    with (
        mock.patch('torch.get_num_threads', return_value=threads),
        mock.patch.object(tiles, 'forward', side_effect=AssertionError),
        mock.patch.object(tiles, 'backward', side_effect=AssertionError),
    ):
        found = run()
        assert_agrees(found, wanted(args, grad, 0.3, mask), 1e-5)
        assert all(torch.equal(x, y) for x, y in zip(found, run(), strict=True))


@pytest.mark.parametrize(
    ('shape', 'dtype'),
    [
        ((1, 9, 9, 1, 8, 7), torch.float64),
        ((1, 9, 9, 1, 12, 7), torch.float32),
        ((1, 9, 9, 1, 8, 9), torch.float32),
    ],
)
def test_what_native_cannot_do_is_left_to_tiles(shape, dtype):
    q, *_, rpb = arguments(*shape, dtype=dtype)
    assert native.neighborhood_refusal(q, rpb)


def test_native_passes_nan_and_infinity_on():
    args = [x.detach() for x in arguments(1, 9, 9, 1, 8, 3, dtype=torch.float32)]
    for value in (float('nan'), float('inf')):
        args[0][0, 2, 2, 0, 3] = value
        out = neighborhood_attention(*args)
        assert out[0, 2, 2].isnan().all()
        assert not out[0, 2, 3].isnan().any()


@pytest.mark.parametrize('count', [1, 2, 5, 100])
def test_blocks_of_any_size(count):
    """Parts of rows, rows, images."""
    args = arguments(3, 24, 30, 2, 4, 7)
    grad = torch.randn(3, 24, 30, 2, 4, dtype=torch.float64)
    with mock.patch.object(tiles, 'CPU_BLOCK_BYTES', count * 2 * 7**2 * 13**2 * 8):
        assert_agrees(gradients(neighborhood_attention(*args), args, grad), wanted(args, grad), 1e-12)


@pytest.mark.filterwarnings('ignore:the library of CPU kernels')
@pytest.mark.parametrize('compiled', [True, False])
@pytest.mark.parametrize('dtype', [torch.bfloat16, pytest.param(torch.float16, marks=NEEDS_MODERN)])
def test_half_precision(dtype, compiled):
    """Compiled kernels round the results alone, tiles the products too."""
    args = arguments(2, 13, 17, 2, 16, 7, dtype=dtype)
    grad = torch.randn(2, 13, 17, 2, 16).to(dtype)
    with contextlib.nullcontext() if compiled else without_kernels():
        found = gradients(neighborhood_attention(*args), args, grad)
    assert {x.dtype for x in found} == {dtype}
    assert_agrees(found, wanted(args, grad), (1 if compiled else 4) * torch.finfo(dtype).eps)


def test_autocast_does_not_round_inside():
    args = arguments(1, 9, 11, 2, 8, 7, dtype=torch.float32)
    grad = torch.randn(1, 9, 11, 2, 8)
    plain = gradients(neighborhood_attention(*args), args, grad)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = neighborhood_attention(*args)
        found = gradients(out, args, grad)
    assert all(torch.equal(value, other) for value, other in zip(found, plain, strict=True))


def test_half_precision_maps_with_a_float32_bias():
    """As under autocast."""
    args = arguments(1, 9, 11, 2, 8, 7, dtype=torch.float32)
    args[:3] = [x.detach().bfloat16().requires_grad_() for x in args[:3]]
    grad = torch.randn(1, 9, 11, 2, 8).bfloat16()
    found = gradients(neighborhood_attention(*args), args, grad)
    assert [x.dtype for x in found] == [torch.bfloat16] * 4 + [torch.float32]
    assert_agrees(found, wanted(args, grad), 4 * torch.finfo(torch.bfloat16).eps)


def test_dropout_mask():
    args = arguments(2, 9, 16, 2, 4, 7)
    grad = torch.randn(2, 9, 16, 2, 4, dtype=torch.float64)
    mask = (torch.rand(2, 9, 16, 2, 49, dtype=torch.float64) > 0.4) / 0.6
    found = gradients(neighborhood.custom_op(*args, 0.3, mask), args, grad)
    assert_agrees(found, wanted(args, grad, 0.3, mask), 1e-12)


def test_dropout_of_the_public_function():
    q, k, _, rpb = arguments(1, 16, 16, 4, 8, 7, dtype=torch.float32)
    ones = torch.ones_like(q)
    sums = neighborhood_attention(q, k, ones, rpb, dropout_p=0.4)  # of the weights that were kept
    assert sums.std() > 0.1
    assert sums.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize('layout', ['heads outside', 'channels apart', 'one gradient everywhere'])
def test_maps_of_any_layout_and_an_explicit_scale(layout):
    args = arguments(2, 9, 16, 2, 4, 7)
    grad = torch.randn(2, 9, 16, 2, 4, dtype=torch.float64)
    if layout == 'heads outside':
        args[:3] = (
            x.requires_grad_() for x in torch.randn(2, 2, 9, 16, 12, dtype=torch.float64).movedim(1, 3).split(4, -1)
        )
    elif layout == 'channels apart':
        args[:3] = (x.requires_grad_() for x in torch.randn(3, 2, 4, 9, 16, 2, dtype=torch.float64).movedim(2, -1))
    else:
        grad = torch.ones(1, dtype=torch.float64).expand(grad.shape)
    assert_agrees(gradients(neighborhood_attention(*args, scale=0.3), args, grad), wanted(args, grad, 0.3), 1e-12)


def test_an_empty_batch():
    args = arguments(0, 9, 8, 2, 4, 7)
    out, *grads = gradients(neighborhood_attention(*args), args, torch.zeros(0, 9, 8, 2, 4))
    assert out.shape == (0, 9, 8, 2, 4)
    assert [x.shape for x in grads] == [x.shape for x in args]
    assert not grads[-1].any()


def test_backward_keeps_the_inputs_only():
    args = arguments(1, 30, 40, 2, 4, 7)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        neighborhood_attention(*args)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in args}


def test_a_frozen_bias_costs_nothing():
    args = arguments(1, 9, 8, 2, 4, 7)
    grad = torch.randn(1, 9, 8, 2, 4, dtype=torch.float64)
    reference = wanted(args, grad)
    args[3].requires_grad_(False)
    with mock.patch.object(tiles._Region, 'add_to_rpb', side_effect=AssertionError):
        found = gradients(neighborhood_attention(*args), args[:3], grad)
    for value, other in zip(found, reference, strict=False):
        assert relative_error(value, other) < 1e-12


@NEEDS_MODERN
@pytest.mark.filterwarnings('ignore:the library of CPU kernels')
@pytest.mark.parametrize('library', ['native', 'tiles'])
@pytest.mark.parametrize('training', [False, True])
def test_memory(training, library):
    """At most an eighth of the windows of k alone, outputs and gradients included."""
    height, width, heads, head_dims = 200, 320, 2, 32
    args = [torch.randn(1, height, width, heads, head_dims).requires_grad_() for _ in 'qkv']
    args.append(torch.randn(heads, 13, 13).requires_grad_())
    side = Side('ours', lambda: [neighborhood_attention(*args)], dict(zip(NAMES[1:], args, strict=True)))
    with without_kernels() if library == 'tiles' else contextlib.nullcontext():
        step = measure._step(side, training)
        step()  # draws the output's gradient
        peak = measure._peak_bytes(step, args[0].device)
    assert peak < 49 * args[1].nbytes / 8


def test_it_can_be_differentiated_once_only():
    args = arguments(1, 7, 8, 1, 4, 7)
    out = neighborhood_attention(*args)
    (grad,) = torch.autograd.grad(out.square().sum(), args[:1], create_graph=True)
    with pytest.raises(ValueError, match='can be differentiated only once'):
        grad.sum().backward()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_forward_mode_derivatives(dtype):
    args = [x.detach() for x in arguments(2, 9, 11, 2, 8, 7, dtype)]
    tangents = tuple(torch.randn_like(x) for x in args)
    found = torch.func.jvp(neighborhood_attention, tuple(args), tangents)
    doubles, directions = ([x.double() for x in xs] for xs in (args, tangents))
    reference = torch.func.jvp(partial(neighborhood_reference, scale=8**-0.5), tuple(doubles), tuple(directions))
    for value, other in zip(found, reference, strict=True):
        assert relative_error(value, other) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_checkpointed():
    args = arguments(1, 9, 11, 2, 4, 7)
    grad = torch.randn(1, 9, 11, 2, 4, dtype=torch.float64)
    out = checkpoint(neighborhood_attention, *args, use_reentrant=False)
    assert_agrees(gradients(out, args, grad), wanted(args, grad), 1e-12)


@NEEDS_MODERN
def test_the_operator_is_registered_as_it_should_be():
    args = arguments(1, 9, 11, 2, 4, 7)
    torch.library.opcheck(neighborhood.custom_op, (*args, 0.3, None))


def test_multiply_adds_of_training():
    """Backward has two products for each one of forward; nothing counts for what a tile masks or computes again."""
    args = arguments(2, 9, 11, 2, 4, 7)
    with FlopCounterMode(display=False) as counter:
        neighborhood_attention(*args).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 49 * args[0].numel()


class Attention(torch.nn.Module):
    def __init__(self, rpb):
        super().__init__()
        self.rpb = torch.nn.Parameter(rpb.detach())

    def forward(self, qkv):
        return neighborhood_attention(*qkv.unbind(3), self.rpb)


@NEEDS_EXPORT
@pytest.mark.parametrize('dynamic', [False, True])
def test_exported(dynamic):
    """In operations of PyTorch's alone."""
    from torch.fx.experimental import _config as symbolic_shapes_config

    *maps, rpb = arguments(1, 33, 59, 2, 4, 7)
    sides = {1: torch.export.Dim('height', min=7), 2: torch.export.Dim('width', min=7)}
    with symbolic_shapes_config.patch(backed_size_oblivious=True):
        program = torch.export.export(
            Attention(rpb),
            (torch.stack(maps, 3).detach(),),
            dynamic_shapes=(sides,) if dynamic else None,
            prefer_deferred_runtime_asserts_over_guards=dynamic,
        )
    assert not [node for node in program.graph.nodes if 'mmslide' in str(node.target)]
    for size in [(33, 59), *([(7, 7), (8, 30), (14, 15)] if dynamic else [])]:
        qkv = torch.randn(1, *size, 3, 2, 4, dtype=torch.float64)
        with torch.no_grad():
            assert relative_error(program.module()(qkv), neighborhood_attention(*qkv.unbind(3), rpb)) < 1e-12


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(q=torch.zeros(1, 8, 8, 32)), r'q, k and v must all be \(B, H, W, heads, d\), got q \(1, 8, 8, 32\)'),
        (dict(k=torch.zeros(1, 8, 9, 2, 4)), r'q, k and v must all be .* k \(1, 8, 9, 2, 4\)'),
        (dict(rpb=torch.zeros(3, 13, 13)), r'rpb must be .* heads = 2 .*got \(3, 13, 13\)'),
        (dict(rpb=torch.zeros(2, 13, 9)), r'rpb must be .*got \(2, 13, 9\)'),
        (dict(rpb=torch.zeros(2, 7, 7)), r'rpb must be .* k odd, got \(2, 7, 7\)'),
        (dict(rpb=torch.zeros(2, 17, 17)), r'maps must have at least k = 9 pixels per side, got \(8, 8\)'),
        (dict(v=torch.zeros(1, 8, 8, 2, 4).double()), r'must share one floating-point dtype.*torch\.float64'),
        (dict(rpb=torch.zeros(2, 13, 13).long()), r'rpb have one.*torch\.int64'),
        (dict(rpb=torch.zeros(2, 13, 13, device='meta')), r"on one device, got \['cpu', 'meta'\]"),
        (dict(dropout_p=1.0), r'dropout_p must be in \[0, 1\), got dropout_p=1\.0'),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = dict(zip(NAMES[1:], arguments(1, 8, 8, 2, 4, 7, dtype=torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**{**good, **change})
