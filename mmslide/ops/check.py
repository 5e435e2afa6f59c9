"""Checks the GPU kernels on the device that they run on, before their first use."""

import threading
import warnings
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .reference import reference

# Largest relative error of the output and of each gradient: a few roundings.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
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
    except BaseException as raised:  # of any kind, from a compiler or driver, including SystemExit
        return f'{type(raised).__name__}: {str(raised).strip().splitlines()[0] if str(raised).strip() else "no text"}'
    return '' if error <= TOLERANCES[dtype] else f'largest error: {error:.1e}, in the {name}'


def _errors(device: torch.device, dtype: torch.dtype, head_dims: int, kernel_size: int) -> list[tuple[float, str]]:
    """The relative error of each result compared with the reference in float64 on the CPU, for random parameters.

    Raises:
        RuntimeError: a result has the wrong shape or dtype.
    """
    kernels: Any = import_module(f'{__package__}.triton_kernels')

    # Whatever the defaults are.
    on_cpu: Any = dict(dtype=torch.float32, device='cpu')
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), **on_cpu)
    slots = kernel_size**2
    shape = 1, *MAP, 2, head_dims
    maps = [draw(shape).to(dtype) for _ in range(4)]
    weight = 0.1 * draw(head_dims, slots, kernel_size, kernel_size)
    weight += torch.eye(slots, **on_cpu).view(slots, kernel_size, kernel_size)
    parameters = [weight, *(draw(size, slots) for size in (head_dims, 2))]
    mask = 2 * (draw(*shape[:-1], slots) > 0).float()
    scale = head_dims**-0.5
    doubles = [x.double().requires_grad_() for x in (*maps[:3], *parameters)]
    inputs: Any
    *inputs, grad_out = (x.to(device) for x in (*maps[:3], *parameters, maps[3]))

    errors = []
    # Dropout and frozen parameters take different paths through the kernels.
    for dropout_mask, parameters_too in ((None, True), (mask, False)):
        count = len(inputs) if parameters_too else 3
        with torch.enable_grad():
            out = reference(*doubles, scale, dropout_mask)  # type: ignore[arg-type, call-arg]
            wanted = [out.detach(), *torch.autograd.grad(out, doubles[:count], maps[3].double())]
        call = *inputs, scale, None if dropout_mask is None else dropout_mask.to(device)
        found = [kernels.forward(*call), *kernels.backward(grad_out, *call, parameters_too)]
        shaped_as = grad_out, *inputs[:count]
        for name, x, like, y in zip(NAMES[: 1 + count], found, shaped_as, wanted, strict=True):
            if x.shape != like.shape or x.dtype != like.dtype:
                raise RuntimeError(f'the {name} is {x.dtype} {tuple(x.shape)}, not {like.dtype} {tuple(like.shape)}')
            # With k = 1 some gradients are zero.
            error = (x.cpu().double() - y).abs().max() / y.abs().max().clamp(min=torch.finfo(y.dtype).tiny)
            where = name if parameters_too else f'{name} with dropout and frozen parameters'
            # NaN is worse than any error.
            errors.append((float(error.nan_to_num(nan=torch.inf)), where))
    return errors
