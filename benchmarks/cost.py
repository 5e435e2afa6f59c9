"""Cost as a function of the number of pixels."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from mmslide.models.attention import SubsampledAttention

from .measure import Measurement, compare
from .pairs import Pair


@dataclass(frozen=True)
class Cost:
    """The cost at one image size.

    Args:
        pixels: of the image.
        global_seconds: the part of our time in global attention, which is quadratic by design; 0 in training and if
            there is none.
    """

    pixels: int
    ours: Measurement
    baseline: Measurement
    global_seconds: float


def measure_cost(
    build: Callable[[int], Pair], sides: Sequence[int], training: bool, seconds: float, report: Callable[[Cost], Any]
) -> list[Cost]:
    """Measures pairs at square images with these sides in pixels, and reports each as soon as it is measured."""
    costs = []
    for side in sides:
        pair = build(side)
        ours, baseline = compare(pair.ours, pair.baseline, training, pair.tolerance, seconds)
        cost = Cost(side * side, ours, baseline, 0.0 if training else _global_seconds(pair))
        report(cost)
        costs.append(cost)
    return costs


def plot_cost(costs: Sequence[Cost], title: str, names: tuple[str, str], file: Path) -> None:
    """Plots time and memory of both sides over the number of pixels, with lines of linear growth."""
    figure = Figure(figsize=(10, 4), layout='constrained')
    axes = figure.subplots(1, 2)
    pixels = [cost.pixels / 1e6 for cost in costs]
    panels = [
        ('time (ms)', lambda x: 1e3 * x.seconds, [1e3 * cost.global_seconds for cost in costs]),
        ('peak memory (MB)', lambda x: x.peak_bytes / 1e6, None),
    ]
    for ax, (label, value, part) in zip(axes, panels, strict=True):
        for name, side in zip(names, ('ours', 'baseline'), strict=True):
            ax.plot(pixels, [value(getattr(cost, side)) for cost in costs], marker='o', label=name)
        if part and any(part):
            ax.plot(pixels, part, marker='o', linestyle=':', label=f'{names[0]}: only global attention')
        first = value(costs[0].ours)
        ax.plot(pixels, [first * x / pixels[0] for x in pixels], color='gray', linestyle='--', label='in proportion')
        ax.set(xscale='log', yscale='log', xlabel='pixels of the image (10⁶)', ylabel=label)
        ax.legend()
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def _global_seconds(pair: Pair) -> float:
    """The time spent in modules with global attention, on a CPU."""
    modules = [x for x in pair.model.modules() if isinstance(x, SubsampledAttention)] if pair.model else []
    if not modules or next(iter(pair.ours.inputs.values())).device.type != 'cpu':
        return 0.0
    total, started = 0.0, 0.0

    def start(*_: Any) -> None:
        nonlocal started
        started = time.perf_counter()

    def stop(*_: Any) -> None:
        nonlocal total
        total += time.perf_counter() - started

    handles = [
        handle for x in modules for handle in (x.register_forward_pre_hook(start), x.register_forward_hook(stop))
    ]
    with torch.no_grad():
        pair.ours.forward()
    for handle in handles:
        handle.remove()
    return total
