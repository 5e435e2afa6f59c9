import os
import re
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from mmslide.ops import check, slide_attention
from mmslide.ops.backends import choose_backend, triton_refusal, triton_version
from mmslide.ops.custom_op import custom_op
from mmslide.ops.reference import reference

pytest.importorskip('triton')
import triton
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from mmslide.ops import triton_kernels

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'  # where Triton's interpreter takes seconds for what follows
NAMES = ('out', 'q', 'k', 'v', 'weight', 'bias', 'rpb')
SLOW = pytest.mark.slow
GPU = pytest.mark.skipif(DEVICE == 'cpu', reason='too large for the interpreter')


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """Triton's interpreter stores bfloat16 as integers of the same bits, and multiplies those."""
    dot = InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != triton.language.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), triton.language.float32)

    monkeypatch.setattr(
        InterpreterBuilder, 'create_dot', lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )


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
        tolerance = 1e-5 if dtype == torch.float32 else 2 * relative_error(usual_value, wanted_value)
        assert relative_error(value, wanted_value) <= tolerance, name


@pytest.mark.parametrize(
    ('shape', 'dtype'),
    [
        # batch, height, width, heads, head size, kernel size
        ((2, 1, 1, 2, 16, 3), torch.float16),
        ((1, 1, 7, 1, 20, 5), torch.float32),
        ((1, 5, 4, 2, 5, 1), torch.float16),
        ((1, 5, 4, 2, 5, 1), torch.bfloat16),
        pytest.param((2, 13, 17, 2, 20, 3), torch.float16, marks=pytest.mark.exhaustive),
        pytest.param((1, 13, 17, 1, 32, 3), torch.float32, marks=SLOW),
        pytest.param((1, 13, 17, 1, 17, 5), torch.float16, marks=pytest.mark.exhaustive),
        pytest.param((1, 13, 17, 1, 17, 5), torch.bfloat16, marks=SLOW),
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


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('size', [1.0, 1e-3])
def test_small_learned_parts_are_kept_next_to_the_shift(size, dtype):
    """Merged kernels in half precision would take 1 + 2⁻¹² for 1: what the learned part adds would be lost."""
    args = small(dtype)
    shift = torch.eye(9, device=DEVICE).view(9, 3, 3)
    with torch.no_grad():
        for learned in args[3:]:
            learned *= size
        args[3] += shift
    grad = torch.randn(args[0].shape).to(dtype).to(DEVICE)
    results = run(args, grad)
    assert_agrees(results, args, grad)
    if size < 1:  # as exact as if all was computed in float32 and rounded once
        wanted = reference(*(x.detach().cpu().double() for x in args), 16**-0.5)
        assert relative_error(results[0], wanted) < torch.finfo(dtype).eps


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(check, '_verdicts', {})
    monkeypatch.setattr(check, 'MAP', (1, 2))  # for the interpreter


@pytest.mark.filterwarnings('error')
def test_kernels_are_checked_once_before_they_are_trusted(unchecked, monkeypatch):
    args = small()
    runs = mock.Mock(side_effect=check._errors)
    monkeypatch.setattr(check, '_errors', runs)
    with torch.inference_mode():
        slide_attention(*args, backend='gpu')
    grad = torch.randn(args[0].shape).to(DEVICE)
    out = slide_attention(*args, backend='gpu')
    assert_agrees((out, *torch.autograd.grad(out, args, grad)), args, grad)
    assert runs.call_count == 1
    assert check._verdicts == {(args[0].device, torch.float32, 16, 3): True}


@pytest.mark.parametrize('kernel_size', [1, 3])
def test_right_kernels_pass_whatever_the_defaults_are(kernel_size, unchecked):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device('meta')
    try:
        assert check._problem(torch.device(DEVICE), torch.float32, 16, kernel_size) == ''
    finally:
        torch.set_default_dtype(default)
        torch.set_default_device(None)


honest_forward, honest_backward = triton_kernels.forward, triton_kernels.backward


def off_by(share):
    return lambda *args: (1 + share) * honest_forward(*args)


def wrong_gradient(*args):
    *grads, last = honest_backward(*args)
    return *grads, torch.zeros_like(last) if args[-1] else last


def wrong_with_dropout(*args):
    return (1 if args[-1] is None else 2) * honest_forward(*args)


def wrong_without_parameters(*args):
    return tuple((1 if args[-1] else 2) * grad for grad in honest_backward(*args))


def ending(error):
    def end(*args):
        raise error

    return end


@pytest.mark.parametrize(
    ('name', 'kernel', 'dtype', 'message'),
    [
        ('forward', off_by(1e-3), torch.float32, r'largest error: 1\.0e-03, in the output'),
        ('forward', off_by(1e-2), torch.float16, r'largest error: 1\..e-02, in the output'),
        ('forward', off_by(5e-2), torch.bfloat16, r'largest error: [45]\..e-02, in the output'),
        ('forward', off_by(torch.nan), torch.float32, 'largest error: inf, in the output'),
        ('backward', wrong_gradient, torch.float32, r'largest error: 1\.0e\+00, in the gradient of rpb'),
        ('forward', wrong_with_dropout, torch.float32, r'largest error: 1\.0e\+00, in the output with dropout'),
        ('backward', wrong_without_parameters, torch.float32, r'1\.0e\+00, in the gradient of . with .* frozen'),
        ('forward', lambda *args: honest_forward(*args).double(), torch.float32, 'output is torch.float64 .*not torch'),
        (
            'forward',
            lambda *args: honest_forward(*args)[:, :, :1],
            torch.float32,
            r'output is torch.float32 \(1, 1, 1,',
        ),
        ('forward', ending(RuntimeError('ptxas fatal\nmore')), torch.float32, r'\(RuntimeError: ptxas fatal\)'),
        ('forward', ending(SystemExit(3)), torch.float32, r'\(SystemExit: 3\)'),
    ],
)
def test_tapwise_is_used_instead_of_kernels_that_fail(name, kernel, dtype, message, unchecked, monkeypatch):
    monkeypatch.setattr(triton_kernels, name, kernel)
    args = small(dtype)
    grad = torch.randn(args[0].shape).to(dtype).to(DEVICE)
    with pytest.warns(UserWarning, match=rf"backend 'triton' fail on .*{message}.*falling back to 'tapwise'"):
        out = slide_attention(*args, backend='gpu')
    assert_agrees((out, *torch.autograd.grad(out, args, grad)), args, grad)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # it is said once
        slide_attention(*args, backend='gpu')


def test_compiled_code_uses_tapwise_instead_too(unchecked, monkeypatch):
    monkeypatch.setattr(triton_kernels, 'forward', off_by(1e-2))
    args = small()
    grad = torch.randn(args[0].shape).to(DEVICE)
    compiled = torch.compile(partial(slide_attention, backend='gpu'), backend='aot_eager', fullgraph=True)
    with pytest.warns(UserWarning, match="falling back to 'tapwise'"):
        out = compiled(*args)
    assert_agrees((out, *torch.autograd.grad(out, args, grad)), args, grad)


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
    with pytest.raises(ValueError, match=rf"'triton' supports .*{message}; use None"):
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
    ('shape', 'major', 'hip', 'installed', 'refusal'),
    [
        ((32, 3), 8, None, '3.0.0', None),
        ((32, 3), 7, None, '3.0.0', 'compute capability 8.0 or later, got some GPU'),
        ((32, 3), 9, '6.0', None, 'needs an NVIDIA GPU'),
        ((32, 3), 8, None, None, 'needs the package triton'),
        ((32, 3), 8, None, '2.1.0', 'needs Triton 3 or later, got 2.1.0'),
        ((160, 3), 8, None, '3.0.0', 'head sizes up to 128, got 160'),
        ((32, 9), 8, None, '3.0.0', 'kernels up to 7×7, got 9×9'),
    ],
)
def test_refusals_on_a_gpu(shape, major, hip, installed, refusal, monkeypatch):
    head_dims, kernel_size = shape
    monkeypatch.setattr('torch.version.hip', hip)
    with (
        FakeTensorMode(),
        mock.patch('torch.cuda.get_device_properties', return_value=SimpleNamespace(major=major, name='some GPU')),
        mock.patch('mmslide.ops.backends.TRITON', installed),
    ):
        q = torch.empty(1, 4, 4, 2, head_dims, device='cuda')
        weight = torch.empty(head_dims, kernel_size**2, kernel_size, kernel_size, device='cuda')
        found = triton_refusal(q, weight)
        assert (found is None) if refusal is None else re.search(refusal, found)
        assert choose_backend(q, weight) == ('gpu' if refusal is None else 'tapwise')


@pytest.mark.parametrize('distribution', ['triton', 'triton-windows', 'pytorch-triton-rocm', None])
def test_triton_under_every_name(distribution, monkeypatch):
    def version(name):
        if name == distribution:
            return '3.1.0'
        raise PackageNotFoundError(name)

    monkeypatch.setattr('mmslide.ops.backends.version', version)
    assert triton_version() == (distribution and '3.1.0')


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
