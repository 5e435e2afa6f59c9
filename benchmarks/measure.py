"""Time, memory and floor of two implementations that are run alternately in one process."""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Side:
    """One implementation.

    Args:
        forward: returns the outputs.
        inputs: by name; in training, their gradients are computed and compared with those of the other side.
        parameters: in training, their gradients are computed too. Both sides may have different names.
    """

    name: str
    forward: Callable[[], Sequence[Tensor]]
    inputs: Mapping[str, Tensor]
    parameters: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Measurement:
    """For one step: the median time; the peak memory in addition to what was allocated before; and the memory that
    forward keeps for backward, including inputs and parameters."""

    seconds: float
    peak_bytes: int
    saved_bytes: int


@dataclass(frozen=True)
class Machine:
    """The measured peak rates of the hardware: bytes read and written per second in a copy, operations per second in a
    matrix product."""

    copy_rate: float
    matrix_rate: float

    def floor(self, moved_bytes: float, operations: float) -> float:
        """The minimum time in seconds of a step that moves this many bytes and computes this many operations."""
        return max(moved_bytes / self.copy_rate, operations / self.matrix_rate)


def compare(
    ours: Side, baseline: Side, training: bool, tolerance: float | None, seconds: float = 4.0
) -> tuple[Measurement, Measurement]:
    """Checks that both sides agree, then runs them alternately for `seconds`, at least three times.

    Before each run on a CPU, free memory is returned to the system (on Linux): otherwise one side might reuse memory of
    the other, depending on the allocator, which would affect the ratio.

    Args:
        training: measure forward and backward together, instead of forward without gradients.
        tolerance: largest relative error, max|Δ| / max|baseline|, of every output and, in training, of every input's
            gradient; None for different functions.

    Raises:
        RuntimeError: the results disagree; the message names the output or gradient.
    """
    sides = ours, baseline
    steps = [_step(side, training) for side in sides]
    device = next(iter(ours.inputs.values())).device
    result, reference = (step() for step in steps)  # warms up too
    if tolerance is not None:
        check(ours.name, result, baseline.name, reference, tolerance)
    del result, reference
    peaks = [_peak_bytes(step, device) for step in steps]
    saved = [_saved_bytes(side) if training else 0 for side in sides]
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for step, measured in zip(steps, times, strict=True):
            measured.append(_seconds(step, device))
    first, second = map(Measurement, map(statistics.median, times), peaks, saved)
    return first, second


def measure_machine(dtype: torch.dtype, device: torch.device) -> Machine:
    """The best of ten copies of 256 MiB and of ten products of 2048 × 2048 matrices."""
    source = torch.ones(2**28 // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    matrix = torch.ones(2048, 2048, dtype=dtype, device=device)
    product = torch.empty_like(matrix)
    copy = min(_seconds(lambda: target.copy_(source), device) for _ in range(10))
    multiply = min(_seconds(lambda: torch.mm(matrix, matrix, out=product), device) for _ in range(10))
    return Machine(2 * source.nbytes / copy, 2 * 2048**3 / multiply)


def _step(side: Side, training: bool) -> Callable[[], dict[str, Tensor]]:
    """Runs once and returns outputs and, in training, the inputs' gradients, by name."""
    grads: list[Tensor] = []  # of the outputs: drawn once and used for both sides

    def infer() -> dict[str, Tensor]:
        with torch.no_grad():
            return {f'output {index}': out for index, out in enumerate(side.forward())}

    def train() -> dict[str, Tensor]:
        outs = side.forward()
        if not grads:
            generator = torch.Generator(outs[0].device).manual_seed(0)
            for out in outs:
                grads.append(torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator))
        found = torch.autograd.grad(outs, [*side.inputs.values(), *side.parameters], grads, allow_unused=True)
        results = {f'output {index}': out.detach() for index, out in enumerate(outs)}
        return results | {f'gradient of {name}': grad for name, grad in zip(side.inputs, found, strict=False)}

    return train if training else infer


def check(
    name: str, result: Mapping[str, Tensor], against: str, reference: Mapping[str, Tensor], tolerance: float
) -> None:
    """Compares tensors by name: the relative error is max|Δ| / max|reference|.

    Raises:
        RuntimeError: one is above the tolerance.
    """
    for what, value in result.items():
        wanted = reference[what].double()
        error = float((value.double() - wanted).abs().max() / wanted.abs().max())
        if not error <= tolerance:
            raise RuntimeError(f'{name} and {against} disagree: {what} by {error:.1e}, more than {tolerance:.0e}')


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif sys.platform == 'linux' and (trim := getattr(ctypes.CDLL(None), 'malloc_trim', None)):
        trim(0)
    start = time.perf_counter()
    step()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    if device.type == 'cuda':
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _saved_bytes(side: Side) -> int:
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # x itself may be the output of the node that keeps it, a reference cycle that is never freed

    with saved_tensors_hooks(pack, lambda x: x):
        outs = side.forward()  # kept until the end, so that no address is reused
    del outs
    return sum(storages.values())
