"""Draws the figures of docs/how-it-works.md from the functions they explain."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor

from mmslide.ops import fixed_shift, merge_paths

IMAGES = Path(__file__).parents[1] / 'images'
KERNEL_SIZE = 3
DPI = 120
WEIGHTS = dict(cmap='RdBu_r', norm=TwoSlopeNorm(0, -1, 1))


def example_kernels() -> tuple[Tensor, Tensor, Tensor]:
    """Of one channel, (k², k, k) each: fixed, learned (drawn at random here), and their sum."""
    shift = fixed_shift(KERNEL_SIZE)
    slots = KERNEL_SIZE**2
    learned = 0.3 * torch.randn(1, slots, KERNEL_SIZE, KERNEL_SIZE, generator=torch.Generator().manual_seed(3))
    fused, _ = merge_paths(shift, torch.zeros(1, slots), learned, torch.zeros(1, slots))
    return shift, learned[0], fused[0]


def draw_kernels() -> None:
    """The kernels of all slots, on the three paths."""
    titles = ('fixed shift: slot j picks neighbor j', '+  deformed shift: learned', '=  fused: what runs at inference')
    figure = plt.figure(figsize=(10, 3.6), layout='constrained')
    parts = figure.subfigures(1, 3, width_ratios=(1, 1, 1.2))
    for part, kernels, title in zip(parts, example_kernels(), titles, strict=True):
        part.suptitle(title, fontsize=11)
        axes = part.subplots(KERNEL_SIZE, KERNEL_SIZE)
        for slot, (ax, kernel) in enumerate(zip(axes.flat, kernels, strict=True)):
            image = ax.imshow(kernel, **WEIGHTS)
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(f'j = {slot}', fontsize=8, labelpad=2)
    part.colorbar(image, ax=axes, shrink=0.8, label='weight')
    figure.savefig(IMAGES / 'shift.png', dpi=DPI)


def draw_slots() -> None:
    """What one slot reads on each path, then the attention over all slots."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout='constrained')
    shift, _, fused = example_kernels()
    slot = 5  # the neighbor on the right
    draw_neighborhood(axes[0], shift[slot], 'slot 5, fixed shift:\nthe neighbor on the right')
    draw_neighborhood(axes[1], fused[slot], 'slot 5, fused:\na mixture of the neighborhood')
    draw_attention(axes[2])
    figure.savefig(IMAGES / 'slots.png', dpi=DPI)


def draw_neighborhood(ax: Axes, kernel: Tensor, title: str) -> None:
    """The taps of a kernel around a pixel in the middle of a map."""
    side, middle = 7, 3
    taps = torch.zeros(side, side)
    begin = middle - KERNEL_SIZE // 2
    taps[begin : begin + KERNEL_SIZE, begin : begin + KERNEL_SIZE] = kernel
    ax.imshow(taps, **WEIGHTS)
    for edge in range(side + 1):
        ax.axhline(edge - 0.5, color='0.85', linewidth=0.8)
        ax.axvline(edge - 0.5, color='0.85', linewidth=0.8)
    ax.add_patch(Rectangle((begin - 0.5,) * 2, KERNEL_SIZE, KERNEL_SIZE, fill=False, linewidth=1.5))
    ax.text(middle, middle, 'p', ha='center', va='center', fontweight='bold')
    ax.set(xticks=[], yticks=[], title=title)


def draw_attention(ax: Axes) -> None:
    """From q, k and v to the output."""
    boxes = {
        'q': (0.1, 0.85, 'q'),
        'k': (0.43, 0.85, 'k'),
        'v': (0.77, 0.85, 'v'),
        'K': (0.43, 0.58, '9 kernels\n→ K₀ … K₈'),
        'V': (0.77, 0.58, 'same kernels\n→ V₀ … V₈'),
        'a': (0.25, 0.3, 'softmax over j of\nq · (Kⱼ + rⱼ) / √d'),
        'out': (0.52, 0.06, 'out = Σⱼ aⱼ · Vⱼ'),
    }
    artists = {
        name: ax.text(
            x, y, text, ha='center', va='center', fontsize=9, bbox=dict(boxstyle='round', fc='white', ec='0.4')
        )
        for name, (x, y, text) in boxes.items()
    }
    for start, end in (('k', 'K'), ('v', 'V'), ('q', 'a'), ('K', 'a'), ('a', 'out'), ('V', 'out')):
        ax.add_patch(
            FancyArrowPatch(
                boxes[start][:2],
                boxes[end][:2],
                patchA=artists[start].get_bbox_patch(),
                patchB=artists[end].get_bbox_patch(),
                arrowstyle='->',
                mutation_scale=12,
                color='0.4',
            )
        )
    ax.set(xlim=(-0.02, 1), ylim=(-0.02, 1), title='attention of pixel p')
    ax.axis('off')


if __name__ == '__main__':
    draw_kernels()
    draw_slots()
