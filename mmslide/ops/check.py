"""Checks the GPU kernels on the device that they run on, before their first use."""

import threading
import warnings
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .reference import reference

# Largest relative error of the output and of each gradient; a wrong kernel has much larger errors.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Size of the small problem: larger than a tile, and not a multiple of it.
MAP = 5, 9
NAMES = ('output', *(f'gradient of {name}' for name in ('q', 'k', 'v', 'weight', 'bias', 'rpb')))

_verdicts: dict[tuple, bool] = {}
_lock = threading.Lock()


def trusted(q: Tensor, weight: Tensor) -> bool:
    """Whether the kernels in `triton_kernels` are correct for this device, dtype, head size and kernel size.

    The first call computes a small problem with them; the result is cached for the process. If the check fails, a
    warning with the reason is issued. While a CUDA graph is captured, nothing is computed, and unchecked kernels are
    not used.
    """
    key = q.device, q.dtype, q.shape[-1], weight.shape[-1]
    if key in _verdicts:
        return _verdicts[key]
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    with _lock:
        if key not in _verdicts:
            problem: list[str] = []
            # In a separate thread, without the autograd state, modes and streams of this one.
            thread = threading.Thread(target=lambda: problem.append(_problem(*key)))
            thread.start()
            thread.join()
            _verdicts[key] = not problem[0]
            if problem[0]:
                device, dtype, head_dims, kernel_size = key
                name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
                warnings.warn(
                    f"the kernels of backend 'triton' fail on {name} for {dtype}, head size {head_dims} and k = "
                    f"{kernel_size} ({problem[0]}); falling back to 'tapwise', which is slower",
                    stacklevel=2,
                )
    return _verdicts[key]


def _problem(device: torch.device, dtype: torch.dtype, head_dims: int, kernel_size: int) -> str:
    """The problem with the kernels; '' if none."""
    try:
        error, name = max(_errors(device, dtype, head_dims, kernel_size))
    except Exception as raised:  # of any kind, from a compiler or driver
        return f'{type(raised).__name__}: {str(raised).strip().splitlines()[0] if str(raised).strip() else "no text"}'
    return '' if error <= TOLERANCES[dtype] else f'largest error: {error:.1e}, in the {name}'


def _errors(device: torch.device, dtype: torch.dtype, head_dims: int, kernel_size: int) -> list[tuple[float, str]]:
    """The relative error of each result compared with the reference in float64 on the CPU, for random parameters."""
    kernels: Any = import_module(f'{__package__}.triton_kernels')

    generator = torch.Generator().manual_seed(0)
    slots = kernel_size**2
    shape = 1, *MAP, 2, head_dims
    maps = [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]
    weight = 0.1 * torch.randn(head_dims, slots, kernel_size, kernel_size, generator=generator)
    weight += torch.eye(slots).view(slots, kernel_size, kernel_size)
    parameters = [weight, *(torch.randn(size, slots, generator=generator) for size in (head_dims, 2))]
    inputs: Any
    *inputs, grad_out = (x.to(device) for x in (*maps[:3], *parameters, maps[3]))
    scale = head_dims**-0.5
    found = [kernels.forward(*inputs, scale, None)]
    found += kernels.backward(grad_out, *inputs, scale, None, True)

    doubles = [x.double().requires_grad_() for x in (*maps[:3], *parameters)]
    with torch.enable_grad():
        out = reference(*doubles, scale)  # type: ignore[arg-type, call-arg]
        wanted = [out, *torch.autograd.grad(out, doubles, maps[3].double())]
    errors = [(x.cpu().double() - y).abs().max() / y.abs().max() for x, y in zip(found, wanted, strict=True)]
    # NaN is worse than any error.
    return [(float(x.nan_to_num(nan=torch.inf)), name) for x, name in zip(errors, NAMES, strict=True)]
