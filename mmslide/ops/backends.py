"""All implementations of Slide Attention, what each can do, and which one is taken by default."""

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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# Read once, since torch.compile follows neither the environment nor a search for packages.
WANTED = os.environ.get('MMSLIDE_BACKEND')
TRITON = _version('triton')


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Args:
        run: takes q, k, v, weight, bias, rpb, scale and dropout_mask.
        refusal: why it cannot take q and weight, or None.
        widens: takes q, k and v in their own dtype, and widens them bit by bit.
    """

    run: Callable[..., Tensor]
    refusal: Callable[[Tensor, Tensor], str | None] = lambda q, weight: None
    widens: bool = False


def triton_refusal(q: Tensor, weight: Tensor) -> str | None:
    """Why the backend 'triton' cannot take these arguments, or None."""
    head_dims, kernel_size = q.shape[-1], weight.shape[-1]
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'takes q, k and v in float32, float16 or bfloat16, got {q.dtype}'
    if weight.dtype != torch.float32:
        return f'takes weight, bias and rpb in float32, got {weight.dtype}'
    if head_dims > 128:
        return f'takes head sizes up to 128, got {head_dims}'
    if kernel_size > 7:
        return f'takes kernels up to 7×7, got {kernel_size}×{kernel_size}'
    return _device_refusal(q.device)


def _device_refusal(device: torch.device) -> str | None:
    interpreted = device.type == 'cpu' and os.environ.get('TRITON_INTERPRET') == '1'
    if device.type != 'cuda' and not interpreted:
        return f'needs CUDA tensors (or TRITON_INTERPRET=1 for slow trials on a CPU), got {device.type}'
    if TRITON is None:
        return 'needs the package triton, which is not installed'
    if int(TRITON.split('.')[0]) < 3:
        return f'needs Triton 3 or later, got {TRITON}'
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip or properties.major < 8:
            return f'needs an NVIDIA GPU of compute capability 8.0 or later, got {properties.name}'
    return None


BACKENDS = {
    'conv': Backend(conv),
    'reference': Backend(reference),
    'unrolled': Backend(unrolled),
    'tapwise': Backend(partial(custom_op, backend='tapwise'), widens=True),
    'native': Backend(partial(custom_op, backend='native'), native.refusal, widens=True),
    'triton': Backend(partial(custom_op, backend='triton'), triton_refusal, widens=True),
    'gpu': Backend(partial(custom_op, backend='gpu'), triton_refusal, widens=True),
}


def check_backend(name: str, value: str | None) -> None:
    """Raises ValueError, which names the argument, if there is no such backend."""
    if value is not None and value not in BACKENDS:
        raise ValueError(f'{name} must be one of {sorted(BACKENDS)} or None, got {name}={value!r}')


def choose_backend(q: Tensor, weight: Tensor) -> str:
    """What `backend=None` takes, the first that applies:

    - 'conv' on the meta device and for forward-mode derivatives,
    - the environment variable MMSLIDE_BACKEND, as it was at import,
    - on a CPU 'native' where it can, else 'tapwise',
    - on CUDA 'gpu' where it can, else 'tapwise',
    - on other devices 'unrolled', plain operations.

    Raises:
        ValueError: there is no backend of the name in MMSLIDE_BACKEND.
    """
    if q.is_meta or forward_ad._current_level >= 0:
        return 'conv'
    if WANTED:
        check_backend('MMSLIDE_BACKEND', WANTED)
        return WANTED
    if q.device.type not in ('cpu', 'cuda'):
        return 'unrolled'
    if q.is_cuda:
        return 'tapwise' if triton_refusal(q, weight) else 'gpu'
    reason = native.refusal(q, weight)
    if reason and reason == native.why_none and not is_compiling():
        warnings.warn(f"backend 'native' {reason}; 'tapwise' stands in and is slower", stacklevel=3)
    return 'tapwise' if reason else 'native'
