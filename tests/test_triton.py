import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from mmslide.ops import slide_attention
from mmslide.ops.backends import triton_refusal
from mmslide.ops.custom_op import custom_op
from mmslide.ops.reference import reference

pytest.importorskip('triton')
from mmslide.ops import triton_kernels

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'  # where Triton's interpreter takes seconds for what follows
NAMES = ('out', 'q', 'k', 'v', 'weight', 'bias', 'rpb')
SLOW = pytest.mark.slow
GPU = pytest.mark.skipif(DEVICE == 'cpu', reason='too large for the interpreter')


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
    for name, value, reference_value in zip(NAMES, results, wanted, strict=True):
        assert value.dtype == (torch.float32 if name in NAMES[4:] else dtype), name
        if value.dtype != torch.float32:
            tolerance = torch.finfo(dtype).eps  # of one rounding, at the end
        else:  # the second is for the parameters of half-precision maps, since tensor cores do not round sums
            tolerance = 1e-5 if dtype == torch.float32 else 1e-4
        assert relative_error(value, reference_value) < tolerance, name


@pytest.mark.parametrize(
    ('shape', 'dtype'),
    [
        # batch, height, width, heads, head size, kernel size
        ((2, 1, 1, 2, 16, 3), torch.float16),
        ((1, 1, 7, 1, 20, 5), torch.float32),
        ((1, 5, 4, 2, 5, 1), torch.bfloat16),
        pytest.param((2, 13, 17, 2, 20, 3), torch.float16, marks=SLOW),
        pytest.param((1, 13, 17, 1, 32, 3), torch.float32, marks=SLOW),
        pytest.param((1, 13, 17, 1, 17, 5), torch.bfloat16, marks=SLOW),
        pytest.param((1, 13, 17, 1, 32, 7), torch.float16, marks=SLOW),
        pytest.param((1, 3, 11, 1, 128, 7), torch.float32, marks=SLOW),
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


def test_small_learned_parts_are_kept_next_to_the_shift():
    """Half-precision kernels would take 1 + 2⁻¹⁰ for 1, and their gradients, in float32, would show it."""
    args = small(torch.bfloat16)
    shift = torch.eye(9, device=DEVICE).view(9, 3, 3)
    with torch.no_grad():
        args[3].copy_(shift + 2**-10 * args[3])
    grad = torch.randn(args[0].shape).bfloat16().to(DEVICE)
    assert_agrees(run(args, grad), args, grad)


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
        mock.patch('mmslide.ops.backends.find_spec', return_value=object() if installed else None),
    ):
        q = torch.empty(1, 4, 4, 2, head_dims, device='cuda')
        weight = torch.empty(head_dims, kernel_size**2, kernel_size, kernel_size, device='cuda')
        found = triton_refusal(q, weight)
        assert (found is None) if refusal is None else (refusal in found)


@SLOW
def test_kernels_compile_for_gpus():
    """Without a GPU: down to machine code, with the shared memory that every GPU from compute capability 8.0 on has."""
    env = {**os.environ, 'TRITON_INTERPRET': '0'}
    subprocess.run([sys.executable, __file__], env=env, check=True)


def compile_kernels():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = [value for name, value in vars(triton_kernels).items() if name.endswith('_kernel')]
    assert len(kernels) == 4
    for head_dims, kernel_size, dtype, capability in [
        (32, 3, torch.float16, 90),
        (72, 5, torch.bfloat16, 80),
        (32, 7, torch.float32, 90),
    ]:
        q = torch.empty(1, 1, 1, 1, head_dims, dtype=dtype)
        weight = torch.empty(head_dims, kernel_size**2, kernel_size, kernel_size)
        constants = triton_kernels._Launch(q, q, q, weight, weight[..., 0, 0]).constants
        options = {name: constants.pop(name) for name in ('num_warps', 'num_stages')}
        pointer = {torch.float16: '*fp16', torch.bfloat16: '*bf16', torch.float32: '*fp32'}[dtype]
        types = dict.fromkeys(('out', 'q', 'k', 'v', 'grad_out', 'grad_q', 'grad_k', 'grad_v'), pointer)
        types |= dict.fromkeys(('tiles', 'heads', 'height', 'width', 'stride', 'head_stride'), 'i32')
        types |= dict.fromkeys(constants, 'constexpr') | dict(scale='fp32')
        for kernel in kernels:
            signature = {name: types.get(name, '*fp32') for name in kernel.arg_names}
            source = ASTSource(kernel, signature, constants)
            compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
            assert compiled.metadata.shared <= 99 * 1024, (kernel, head_dims, kernel_size, dtype)


if __name__ == '__main__':
    compile_kernels()
