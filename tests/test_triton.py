import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from mmslide.ops import check, slide_attention
from mmslide.ops.backends import choose_backend, triton_refusal
from mmslide.ops.custom_op import custom_op
from mmslide.ops.reference import reference

pytest.importorskip('triton')
from mmslide.ops import triton_kernels

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'  # where Triton's interpreter takes seconds for what follows
NAMES = ('out', 'q', 'k', 'v', 'weight', 'bias', 'rpb')
SLOW = pytest.mark.slow
GPU = pytest.mark.skipif(DEVICE == 'cpu', reason='too large for the interpreter')
BFLOAT16 = pytest.mark.skipif(DEVICE == 'cpu', reason='products of bfloat16 are wrong in the interpreter')


def arguments(batch, height, width, heads, head_dims, kernel_size, dtype):
    """q, k and v as a module cuts them out of one projection, and float32 parameters."""
    slots = kernel_size**2
    maps = torch.randn(batch, height, width, 3, heads, head_dims).to(dtype).to(DEVICE).unbind(3)
    shapes = (head_dims, slots, kernel_size, kernel_size), (head_dims, slots), (heads, slots)
    return [x.requires_grad_() for x in (*maps, *(torch.randn(shape).to(DEVICE) for shape in shapes))]


def small(dtype=torch.float32):
    return arguments(1, 2, 5, 2, 16, 3, dtype)


def run(args, grad, **kwargs):
    out = slide_attention(*args, backend='triton', **kwargs)
    return out, *torch.autograd.grad(out, args, grad)


def assert_agrees(results, args, grad, scale=None, mask=None):
    """With the reference in float64 on the CPU, by the dtype of each result."""
    doubles = [x.detach().cpu().double().requires_grad_() for x in args]
    out = reference(*doubles, scale or args[0].shape[-1] ** -0.5, mask if mask is None else mask.cpu().double())
    wanted = (out, *torch.autograd.grad(out, doubles, grad.cpu().double()))
    dtype = args[0].dtype
    rounded = [x.detach().cpu().to(dtype).requires_grad_() for x in args]
    with torch.enable_grad():
        out = reference(*rounded, scale or args[0].shape[-1] ** -0.5, mask if mask is None else mask.cpu().to(dtype))
    usual = (out, *torch.autograd.grad(out, rounded, grad.cpu()))
    for name, value, wanted_value, usual_value in zip(NAMES, results, wanted, usual, strict=True):
        assert value.dtype == (torch.float32 if name in NAMES[4:] else dtype), name
        # In half precision twice what the reference makes of it in that dtype, or one rounding.
        tolerance = max(2 * relative_error(usual_value, wanted_value), torch.finfo(dtype).eps)
        assert relative_error(value, wanted_value) < (1e-5 if dtype == torch.float32 else tolerance), name


@pytest.mark.parametrize(
    ('shape', 'dtype'),
    [
        # batch, height, width, heads, head size, kernel size
        ((2, 1, 1, 2, 16, 3), torch.float16),
        ((1, 1, 7, 1, 20, 5), torch.float32),
        ((1, 5, 4, 2, 5, 1), torch.float16),
        pytest.param((1, 5, 4, 2, 5, 1), torch.bfloat16, marks=BFLOAT16),
        pytest.param((2, 13, 17, 2, 20, 3), torch.float16, marks=pytest.mark.exhaustive),
        pytest.param((1, 13, 17, 1, 32, 3), torch.float32, marks=SLOW),
        pytest.param((1, 13, 17, 1, 17, 5), torch.float16, marks=pytest.mark.exhaustive),
        pytest.param((1, 13, 17, 1, 17, 5), torch.bfloat16, marks=[SLOW, BFLOAT16]),
        pytest.param((1, 13, 17, 1, 32, 7), torch.float16, marks=pytest.mark.exhaustive),
        pytest.param((1, 3, 11, 1, 128, 7), torch.float32, marks=pytest.mark.exhaustive),
        pytest.param((1, 5, 9, 2, 72, 3), torch.float16, marks=SLOW),
        *(
            pytest.param(shape, dtype, marks=[GPU, SLOW])
            for shape in [
                (2, 63, 40, 3, 32, 3),
                (1, 63, 40, 2, 48, 5),
                (1, 63, 40, 2, 32, 7),
                (1, 63, 40, 1, 128, 7),
                (1, 200, 320, 1, 64, 3),
            ]
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        ),
    ],
    ids=str,
)
def test_output_and_gradients_agree_with_the_reference(shape, dtype):
    args = arguments(*shape, dtype)
    grad = torch.randn(shape[:5]).to(dtype).to(DEVICE)
    results = run(args, grad)
    assert_agrees(results, args, grad)
    if DEVICE == 'cuda':
        assert all(torch.equal(x, y) for x, y in zip(results, run(args, grad), strict=True))


def test_offsets_are_64_bit():
    """Pixels 2²⁶ elements apart, in memory that is never touched in between."""
    args = arguments(1, 5, 8, 1, 16, 3, torch.float16)
    storage = torch.from_numpy(np.empty(40 << 26, np.float16)).to(DEVICE)
    with torch.no_grad():
        for index in range(3):
            strides = (40 << 26, 8 << 26, 1 << 26, 16, 1)
            args[index] = storage.as_strided((1, 5, 8, 1, 16), strides, 16 * index).copy_(args[index]).requires_grad_()
    grad = torch.randn(1, 5, 8, 1, 16).half().to(DEVICE)
    assert_agrees(run(args, grad), args, grad)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_dropout_mask(dtype):
    args = small(dtype)
    mask = (torch.rand(1, 2, 5, 2, 9, device=DEVICE) > 0.4) / 0.6
    grad = torch.randn(args[0].shape).to(dtype).to(DEVICE)
    out = custom_op(*args, 16**-0.5, mask, 'triton')
    assert_agrees((out, *torch.autograd.grad(out, args, grad)), args, grad, mask=mask)


@pytest.mark.parametrize('size', [1.0, 1e-3])
def test_small_learned_parts_are_kept_next_to_the_shift(size):
    """Merged kernels in half precision would take 1 + 2⁻¹² for 1: what the learned part adds would be lost."""
    args = small(torch.float16)
    shift = torch.eye(9, device=DEVICE).view(9, 3, 3)
    with torch.no_grad():
        args[3].copy_(shift + size * args[3])
    grad = torch.randn(args[0].shape).half().to(DEVICE)
    results = run(args, grad)
    assert_agrees(results, args, grad)
    if size < 1:  # as exact as if all was computed in float32 and rounded once
        wanted = reference(*(x.detach().cpu().double() for x in args), 16**-0.5)
        assert relative_error(results[0], wanted) < torch.finfo(torch.float16).eps


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(check, '_verdicts', {})
    monkeypatch.setattr(check, 'MAP', (1, 2))  # for the interpreter


def test_kernels_are_checked_once_before_they_are_trusted(unchecked, monkeypatch, recwarn):
    args = small()
    runs = mock.Mock(side_effect=check._errors)
    monkeypatch.setattr(check, '_errors', runs)
    with torch.inference_mode():
        slide_attention(*args, backend='gpu')
    grad = torch.randn(args[0].shape).to(DEVICE)
    out = slide_attention(*args, backend='gpu')
    assert_agrees((out, *torch.autograd.grad(out, args, grad)), args, grad)
    assert runs.call_count == 1
    assert not [warning for warning in recwarn.list if 'triton' in str(warning.message)]
    assert check._verdicts == {(args[0].device, torch.float32, 16, 3): True}


def wrong_output(*args, **kwargs):
    return 1.01 * honest_forward(*args, **kwargs)


def wrong_gradient(*args, **kwargs):
    *grads, grad_rpb = honest_backward(*args, **kwargs)
    return *grads, torch.zeros_like(grad_rpb)


def nan(*args, **kwargs):
    return torch.full_like(honest_forward(*args, **kwargs), torch.nan)


def failing(*args, **kwargs):
    raise RuntimeError('ptxas fatal\nmore')


honest_forward, honest_backward = triton_kernels.forward, triton_kernels.backward


@pytest.mark.parametrize(
    ('name', 'kernel', 'message'),
    [
        ('forward', wrong_output, r'largest error: 1\.0e-02, in the output'),
        ('forward', nan, 'largest error: inf, in the output'),
        ('backward', wrong_gradient, r'largest error: 1\.0e\+00, in the gradient of rpb'),
        ('forward', failing, r'\(RuntimeError: ptxas fatal\)'),
    ],
)
def test_tapwise_stands_in_for_kernels_that_fail(name, kernel, message, unchecked, monkeypatch):
    monkeypatch.setattr(triton_kernels, name, kernel)
    args = small()
    grad = torch.randn(args[0].shape).to(DEVICE)
    with pytest.warns(UserWarning, match=rf"the kernels of backend 'triton' fail on .*{message}.*'tapwise' stands in"):
        out = slide_attention(*args, backend='gpu')
    assert_agrees((out, *torch.autograd.grad(out, args, grad)), args, grad)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # it is said once
        slide_attention(*args, backend='gpu')


def test_nothing_is_checked_while_a_graph_is_captured(unchecked):
    q = SimpleNamespace(device=torch.device('cuda:0'), dtype=torch.float16, shape=(1, 1, 1, 1, 32), is_cuda=True)
    with mock.patch('torch.cuda.is_current_stream_capturing', return_value=True):
        assert not check.trusted(q, torch.empty(32, 9, 3, 3))
    assert not check._verdicts


@pytest.mark.parametrize(
    ('shape', 'dtype', 'weight_dtype', 'message'),
    [
        ((8, 3), torch.float64, torch.float64, r'float32, float16 or bfloat16, got torch.float64'),
        ((8, 3), torch.float32, torch.float64, r'weight, bias and rpb in float32, got torch.float64'),
        ((129, 3), torch.float32, torch.float32, r'head sizes up to 128, got 129'),
        ((8, 9), torch.float32, torch.float32, r'kernels up to 7×7, got 9×9'),
    ],
)
def test_what_it_cannot_do_is_refused(shape, dtype, weight_dtype, message):
    args = arguments(1, 1, 1, 1, *shape, torch.float32)
    args = [x.to(dtype) for x in args[:3]] + [x.to(weight_dtype) for x in args[3:]]
    with pytest.raises(ValueError, match=rf"'triton' takes .*{message}; take 'tapwise'"):
        slide_attention(*args, backend='triton')


def test_kernels_are_imported_only_when_they_are_used():
    code = 'import sys, mmslide.models, mmslide.ops; assert "mmslide.ops.triton_kernels" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)


def test_tensors_off_the_gpu_are_refused(monkeypatch):
    args = [x.cpu() for x in small()]
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with pytest.raises(ValueError, match=r'needs CUDA tensors .*got cpu'):
        slide_attention(*args, backend='triton')
    with pytest.raises(ValueError, match=r'needs CUDA tensors .*got meta'):
        slide_attention(*(x.to('meta') for x in args), backend='triton')


@pytest.mark.parametrize(
    ('shape', 'major', 'installed', 'refusal'),
    [
        ((32, 3), 8, True, None),
        ((32, 3), 7, True, 'compute capability 8.0 or later, got some GPU'),
        ((32, 3), 8, False, 'needs the package triton'),
        ((160, 3), 8, True, 'head sizes up to 128, got 160'),
        ((32, 9), 8, True, 'kernels up to 7×7, got 9×9'),
    ],
)
def test_refusals_on_a_gpu(shape, major, installed, refusal):
    head_dims, kernel_size = shape
    with (
        FakeTensorMode(),
        mock.patch('torch.cuda.get_device_properties', return_value=SimpleNamespace(major=major, name='some GPU')),
        mock.patch('mmslide.ops.backends.TRITON', '3.0.0' if installed else None),
    ):
        q = torch.empty(1, 4, 4, 2, head_dims, device='cuda')
        weight = torch.empty(head_dims, kernel_size**2, kernel_size, kernel_size, device='cuda')
        found = triton_refusal(q, weight)
        assert (found is None) if refusal is None else (refusal in found)
        assert choose_backend(q, weight) == ('gpu' if refusal is None else 'tapwise')


@SLOW
def test_kernels_compile_for_gpus():
    """Without a GPU: down to machine code, with the shared memory that every GPU from compute capability 8.0 on has."""
    env = {**os.environ, 'TRITON_INTERPRET': '0'}
    subprocess.run([sys.executable, __file__], env=env, check=True)


COMPILED = [(32, 3, torch.float16, 90), (72, 5, torch.bfloat16, 80), (32, 7, torch.float32, 90)]
TABLE = [
    (d, 3, dtype, arch) for d in (32, 64, 128) for dtype in (torch.bfloat16, torch.float32) for arch in (80, 90, 100)
]


def compile_kernels(cases):
    """Yields for each case and kernel: registers of a thread, bytes that it spills, bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    kernels = [value for name, value in vars(triton_kernels).items() if name.endswith('_kernel')]
    assert len(kernels) == 4
    cuobjdump = Path(get_ptxas(90).path).with_name('cuobjdump')
    for head_dims, kernel_size, dtype, capability in cases:
        q = torch.empty(1, 1, 1, 1, head_dims, dtype=dtype)
        weight = torch.empty(head_dims, kernel_size**2, kernel_size, kernel_size)
        constants = triton_kernels._Launch(q, q, q, weight, weight[..., 0, 0]).constants
        options = {name: constants.pop(name) for name in ('num_warps', 'num_stages')}
        pointer = {torch.float16: '*fp16', torch.bfloat16: '*bf16', torch.float32: '*fp32'}[dtype]
        names = ('out', 'q', 'k', 'v', 'kernels', 'grad_out', 'grad_q', 'grad_k', 'grad_v')
        types = dict.fromkeys(names, pointer)
        types |= dict.fromkeys(('tiles', 'heads', 'height', 'width', 'stride', 'head_stride'), 'i32')
        types |= dict.fromkeys(constants, 'constexpr') | dict(scale='fp32')
        for kernel in kernels:
            signature = {name: types.get(name, '*fp32') for name in kernel.arg_names}
            source = ASTSource(kernel, signature, constants)
            compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
            with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
                file.write(compiled.asm['cubin'])
                file.flush()
                usage = subprocess.check_output([cuobjdump, '-res-usage', file.name], text=True)
            registers, stack = (int(re.search(rf'{name}:(\d+)', usage)[1]) for name in ('REG', 'STACK'))
            case = f'd = {head_dims}, k = {kernel_size}, {str(dtype).removeprefix("torch.")}, sm_{capability}'
            yield case, kernel.__name__.strip('_'), registers, stack, compiled.metadata.shared


if __name__ == '__main__':  # --table: of docs/performance.md
    for *names, registers, stack, shared in compile_kernels(TABLE if '--table' in sys.argv else COMPILED):
        print(
            *names,
            f'{registers} registers, {stack} bytes spilled, {shared} bytes of shared memory',
            sep=', ',
            flush=True,
        )
        assert shared <= 99 * 1024, names
