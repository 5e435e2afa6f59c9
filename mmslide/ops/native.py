"""Calls the kernels in native.cpp, which are compiled at installation if possible."""

import ctypes
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VERSION = 4  # as in native.cpp, of the functions' interface; increased with every change
LANES = 8  # as in native.cpp
KERNEL_SIZES = (3, 5, 7)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the maps, in the order of native.cpp


class _Map(ctypes.Structure):
    _fields_ = (('data', ctypes.c_void_p), ('strides', ctypes.c_int64 * 4))


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ('batch', 'height', 'width', 'heads', 'head_dims')),
        *((name, ctypes.c_int64) for name in ('kernel_size', 'threads', 'dtype')),
        ('scale', ctypes.c_float),
        *((name, _Map) for name in ('q', 'k', 'v', 'out')),
        *((name, ctypes.c_void_p) for name in ('kernels', 'rpb', 'mask')),
        *((name, _Map) for name in ('grad_q', 'grad_k', 'grad_v')),
        *((name, ctypes.c_void_p) for name in ('grad_kernels', 'grad_rpb')),
    )


def _load() -> tuple[Any, str]:
    """The compiled library, or None and the reason."""
    if platform.machine() in ('x86_64', 'AMD64') and torch.backends.cpu.get_cpu_capability() == 'DEFAULT':
        return None, 'needs a processor with AVX2'
    file = Path(__file__).with_name('_native.so')
    if not file.is_file():
        return None, 'was not compiled: install a C++ compiler with OpenMP and reinstall mmslide'
    try:
        found = ctypes.CDLL(str(file))
    except OSError as error:
        return None, f'cannot be loaded ({error}): reinstall mmslide on this machine'
    # An outdated build in a checkout.
    if found.slide_attention_version() != VERSION:
        return None, 'was compiled from another version of mmslide: reinstall it'
    return found, ''


library, why_none = _load()


def refusal(q: Tensor, weight: Tensor) -> str | None:
    """Why the Slide Attention kernels do not support these arguments, or None."""
    return _refusal(q, weight.dtype, weight.shape[-1])


def neighborhood_refusal(q: Tensor, rpb: Tensor) -> str | None:
    """Why the neighborhood attention kernels do not support these arguments, or None."""
    return _refusal(q, rpb.dtype, (rpb.shape[-1] + 1) // 2)


def _refusal(q: Tensor, dtype: torch.dtype, kernel_size: int) -> str | None:
    if q.device.type != 'cpu':
        return f'needs CPU tensors, got {q.device.type}'
    if q.dtype not in DTYPES or dtype != torch.float32:
        return f'supports float32, bfloat16 or float16 maps and float32 parameters, got {q.dtype} and {dtype}'
    if q.shape[-1] % LANES:
        return f'supports head sizes divisible by {LANES}, got {q.shape[-1]}'
    if kernel_size not in KERNEL_SIZES:
        return f'supports kernel sizes {KERNEL_SIZES}, got {kernel_size}'
    return why_none if library is None else None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: Tensor,
    scale: float,
    dropout_mask: Tensor | None,
) -> Tensor:
    out = _empty(q)
    _run('slide_attention', weight.shape[-1], (q, k, v, out), (_pack(weight, bias), rpb, dropout_mask), scale)
    return out


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: Tensor,
    scale: float,
    dropout_mask: Tensor | None,
    parameters: bool,
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, and with `parameters` those of weight, bias and rpb."""
    kernels = _pack(weight, bias)
    grads = _new_gradients(q)
    call = 'slide_attention', weight.shape[-1], (q, k, v, grad_out), (kernels, rpb, dropout_mask), scale
    if not parameters:
        _run(*call, grads)
        return _narrowed(grads, q)
    grad_kernels, grad_rpb = _per_thread(kernels), _per_thread(rpb)
    _run(*call, (*grads, grad_kernels, grad_rpb))
    # (tap, channel block, slot, channel) to (channel block, channel, slot, tap)
    sums = grad_kernels.sum(0).permute(1, 3, 2, 0).flatten(0, 1)
    grad_weight = sums[..., :-1].contiguous().view(weight.shape)
    return *_narrowed(grads, q), grad_weight, sums[..., -1].contiguous(), grad_rpb.sum(0)


def neighborhood_forward(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, scale: float, dropout_mask: Tensor | None
) -> Tensor:
    """See `mmslide.ops.neighborhood_attention` for shapes; dropout_mask is (B, H, W, heads, k²)."""
    out = _empty(q)
    _run('neighborhood_attention', (rpb.shape[-1] + 1) // 2, (q, k, v, out), (None, rpb, dropout_mask), scale)
    return out


def neighborhood_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor,
    scale: float,
    dropout_mask: Tensor | None,
    parameters: bool,
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, and with `parameters` that of rpb."""
    grads = _new_gradients(q)
    kernel_size = (rpb.shape[-1] + 1) // 2
    call = 'neighborhood_attention', kernel_size, (q, k, v, grad_out), (None, rpb, dropout_mask), scale
    if not parameters:
        _run(*call, grads)
        return _narrowed(grads, q)
    grad_rpb = _per_thread(rpb)
    _run(*call, (*grads, None, grad_rpb))
    return *_narrowed(grads, q), grad_rpb.sum(0)


def _empty(q: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    x = torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    library.slide_attention_large_pages(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.nbytes))
    return x


def _new_gradients(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients of q, k and v. The kernels accumulate into the latter two, in float32."""
    return _empty(q), _empty(q, torch.float32).zero_(), _empty(q, torch.float32).zero_()


def _narrowed(grads: tuple[Tensor, ...], q: Tensor) -> tuple[Tensor, ...]:
    return tuple(grad.to(q.dtype) for grad in grads)


def _per_thread(x: Tensor) -> Tensor:
    return x.new_zeros(torch.get_num_threads(), *x.shape)


def _pack(weight: Tensor, bias: Tensor) -> Tensor:
    """(k² + 1, d / 8, k², 8): the kernels tap by tap, and the bias as an additional tap; a vector's channels last."""
    taps = torch.cat([weight.flatten(2), bias[..., None]], dim=-1)
    return taps.unflatten(0, (-1, LANES)).permute(3, 0, 2, 1).contiguous()


def _run(
    name: str,
    kernel_size: int,
    maps: tuple[Tensor, ...],
    parameters: tuple[Tensor | None, ...],
    scale: float,
    grads: tuple[Any, ...] = (),
) -> None:
    """Calls a kernel. The maps may have any strides, but the channels of a head have to be contiguous.

    Args:
        maps: q, k, v and the output or its gradient.
        parameters: kernels, rpb and the dropout mask.
        grads: of q, k and v, and if needed of kernels and rpb for each thread.
    """
    maps = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in maps)
    numbers = [None if x is None else x.contiguous() for x in (*parameters, *grads[3:])]
    threads = len(grads[4]) if len(grads) > 3 else torch.get_num_threads()
    call = _Call(*maps[0].shape, kernel_size, threads, DTYPES.index(maps[0].dtype), scale)
    for field, x in zip(('q', 'k', 'v', 'out', 'grad_q', 'grad_k', 'grad_v'), (*maps, *grads[:3]), strict=False):
        setattr(call, field, _Map(x.data_ptr(), x.stride()[:4]))
    for field, values in zip(('kernels', 'rpb', 'mask', 'grad_kernels', 'grad_rpb'), numbers, strict=False):
        setattr(call, field, None if values is None else values.data_ptr())
    getattr(library, name)(ctypes.byref(call))
