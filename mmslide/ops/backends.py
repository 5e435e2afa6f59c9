"""All implementations of Slide Attention, what each supports, and the default."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmslide.compat import is_compiling

from . import native
from .conv import conv
from .custom_op import custom_op
from .reference import reference
from .unrolled import unrolled


def triton_version() -> str | None:
    """Of Triton under any of its distribution names, or None if it is not installed."""
    for name in ('triton', 'triton-windows', 'pytorch-triton', 'pytorch-triton-rocm'):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


# Read once, since torch.compile tracks neither environment variables nor installed packages.
WANTED = os.environ.get('MMSLIDE_BACKEND')
TRITON = triton_version()


@dataclass(frozen=True)
class Backend:
    """An implementation.

    Args:
        run: takes q, k, v, weight, bias, rpb, scale and dropout_mask.
        refusal: why it does not support q and weight, or None.
        widens: whether it takes q, k and v in their own dtype, and upcasts them part by part.
    """

    run: Callable[..., Tensor]
    refusal: Callable[[Tensor, Tensor], str | None] = lambda q, weight: None
    widens: bool = False


def triton_refusal(q: Tensor, weight: Tensor) -> str | None:
    """Why the backend 'triton' does not support these arguments, or None."""
    head_dims, kernel_size = q.shape[-1], weight.shape[-1]
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'supports q, k and v in float32, float16 or bfloat16, got {q.dtype}'
    if weight.dtype != torch.float32:
        return f'supports weight, bias and rpb in float32, got {weight.dtype}'
    if head_dims > 128:
        return f'supports head sizes up to 128, got {head_dims}'
    if kernel_size > 7:
        return f'supports kernels up to 7×7, got {kernel_size}×{kernel_size}'
    return _device_refusal(q.device)


def _device_refusal(device: torch.device) -> str | None:
    interpreted = device.type == 'cpu' and os.environ.get('TRITON_INTERPRET') == '1'
    if device.type != 'cuda' and not interpreted:
        return f'needs CUDA tensors (or TRITON_INTERPRET=1 for slow tests on a CPU), got {device.type}'
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip or properties.major < 8:
            return f'needs an NVIDIA GPU of compute capability 8.0 or later, got {properties.name}'
    if TRITON is None:
        return 'needs the package triton, which is not installed'
    if int(TRITON.split('.')[0]) < 3:
        return f'needs Triton 3 or later, got {TRITON}'
    return None


def tapwise_refusal(q: Tensor, weight: Tensor) -> str | None:
    """Why the backend 'tapwise' does not support these arguments, or None."""
    # Its windows overlap in memory, which the kernels of other devices may read incorrectly.
    return None if q.device.type in ('cpu', 'cuda', 'meta') else f'needs CPU or CUDA tensors, got {q.device.type}'


BACKENDS = {
    'conv': Backend(conv),
    'reference': Backend(reference),
    'unrolled': Backend(unrolled),
    'tapwise': Backend(partial(custom_op, backend='tapwise'), tapwise_refusal, widens=True),
    'native': Backend(partial(custom_op, backend='native'), native.refusal, widens=True),
    'triton': Backend(partial(custom_op, backend='triton'), triton_refusal, widens=True),
    'gpu': Backend(partial(custom_op, backend='gpu'), triton_refusal, widens=True),
}


def check_backend(name: str, value: str | None) -> None:
    """Raises ValueError with the name of the argument if there is no such backend."""
    if value is not None and value not in BACKENDS:
        raise ValueError(f'{name} must be one of {sorted(BACKENDS)} or None, got {name}={value!r}')


def choose_backend(q: Tensor, weight: Tensor) -> str:
    """The backend for `backend=None`; the first rule that applies:

    - 'conv' on the meta device and for forward-mode derivatives,
    - the environment variable MMSLIDE_BACKEND, as it was at import,
    - on a CPU, 'native' if it supports the arguments, else 'tapwise',
    - on CUDA, 'gpu' if it supports the arguments, else 'tapwise',
    - on other devices, 'unrolled', which uses plain operations.

    Raises:
        ValueError: MMSLIDE_BACKEND is not a backend, or it does not support these arguments.
    """
    if q.is_meta or forward_ad._current_level >= 0:
        return 'conv'
    if WANTED:
        check_backend('MMSLIDE_BACKEND', WANTED)
        if reason := BACKENDS[WANTED].refusal(q, weight):
            raise ValueError(f"MMSLIDE_BACKEND: backend '{WANTED}' {reason}; unset it to use the best supported one")
        return WANTED
    if q.device.type not in ('cpu', 'cuda'):
        return 'unrolled'
    if q.is_cuda:
        return 'tapwise' if triton_refusal(q, weight) else 'gpu'
    reason = native.refusal(q, weight)
    if reason and reason == native.why_none and not is_compiling():
        warnings.warn(f"backend 'native' {reason}; falling back to 'tapwise', which is slower", stacklevel=3)
    return 'tapwise' if reason else 'native'
