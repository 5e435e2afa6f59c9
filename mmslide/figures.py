"""Figures of the results of `mmslide.visualize`. Does not use pyplot, so the user's own figures are unaffected."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from mmslide import visualize
from mmslide.checkpoints import class_names
from mmslide.deploy import load_model
from mmslide.deploy.targets.images import read_image
from mmslide.models.arguments import check_integer, check_stages
from mmslide.ops import fixed_shift
from mmslide.visualize import (
    AttendedSlots,
    Sample,
    Target,
    contribution_side,
    deformed_part,
    principal_component,
    shift_distance,
    slot_offsets,
    strongest_channels,
    tiled,
)

KINDS = ('features', 'attention', 'kernels', 'erf', 'cam')
IMAGE_KINDS = {'features', 'attention', 'erf', 'cam'}
SLIDE_KINDS = {'attention', 'kernels'}
NO_SLIDE_ATTENTION = 'the model has no Slide Attention in these stages'

PANEL = 2.4  # inches
SIGNED, POSITIVE = 'RdBu_r', 'viridis'
SHARES = {0.5: 'solid', 0.95: 'dashed'}  # of a receptive field, outlined
FAINTEST = 1e-4  # of a receptive field, relative to its maximum
TINY = 1e-12


def draw(
    config: str | Path,
    checkpoint: str | Path,
    images: Sequence[str | Path] = (),
    kinds: Sequence[str] | None = None,
    stages: Sequence[int] | None = None,
    points: Sequence[tuple[float, float]] = ((0.5, 0.5),),
    history: Sequence[str | Path] = (),
    host_checkpoint: str | Path | None = None,
    channels: int = 3,
    targets: int = 3,
    score_thr: float = 0.3,
) -> Iterator[tuple[str, Figure]]:
    """Yields the name and the figure of everything that can be drawn for a trained model, as in tools/visualize.py.

    Args:
        config: file of the config.
        checkpoint: file or URL of the weights.
        images: image files; not needed for kernels.
        kinds: some of 'features', 'attention', 'kernels', 'erf' and 'cam'; None draws all possible ones.
        stages: numbers of the stages, from 0; None draws all.
        points: where to draw attention, x and y as fractions of the image's width and height.
        history: checkpoints of a training run, or its folder, see `kernel_history`.
        host_checkpoint: weights of the host, to compare its receptive field.
        channels: number of channels per feature map.
        targets: number of class activations per image.
        score_thr: minimum score of detections.

    Raises:
        ValueError: an argument needs something that the model or the other arguments lack, there is nothing to draw,
            or a file is not an image; see also `load_model`.
        OSError: a file does not exist or cannot be read.
    """
    cfg, model, meta = load_model(config, checkpoint)
    backbone = visualize.find_backbone(model)
    stages = range(len(backbone.stages)) if stages is None else stages
    check_stages('stages', stages, len(backbone.stages))
    check_integer('channels', channels)
    check_integer('targets', targets)
    prefixes = tuple(f'stages.{stage}.' for stage in stages)
    blocks = [name for name in visualize.slide_attentions(backbone) if name.startswith(prefixes)]
    chosen = _chosen_kinds(kinds, bool(images), bool(blocks), bool(history))
    if host_checkpoint and not ('erf' in chosen and blocks):
        raise ValueError('host_checkpoint needs the kind erf and a model with Slide Attention')
    for image in images:
        read_image(image)  # reports invalid images before doing any work
    if 'kernels' in chosen:
        kernels = visualize.merged_kernels(backbone)
        yield 'kernels', kernel_figure({name: kernels[name] for name in blocks})
    if history:
        labels, iterations, distances = visualize.kernel_history(config, history)
        yield 'history', history_figure(labels, {name: distances[name] for name in blocks}, iterations)
    stems = [Path(image).stem for image in images]
    if len(set(stems)) < len(stems):
        stems = [f'{index}_{stem}' for index, stem in enumerate(stems)]
    inputs = []
    for stem, image in zip(stems, images, strict=True):
        sample = visualize.load_sample(cfg, model, image)
        inputs.append(sample.inputs)
        if 'features' in chosen:
            maps = visualize.feature_maps(backbone, sample.inputs)
            drawn = {stage: maps[stage] for stage in stages}
            yield f'features_{stem}', feature_figure(sample, drawn, backbone.strides, channels)
        if 'attention' in chosen:
            height, width = sample.pixels.shape[:2]
            for x, y in points:
                point = x * width, y * height
                slots = visualize.attended_slots(backbone, sample.inputs, point, stages)
                yield f'attention_{stem}_{x:g}-{y:g}', attention_figure(sample, point, slots)
        if 'cam' in chosen:
            found, reason = [], f'no detection has a score of {score_thr} or more'
            try:
                found = visualize.class_activations(model, sample, class_names(meta), targets, score_thr)
            except ValueError as error:
                if kinds:
                    raise
                reason = str(error)
            if found:
                yield f'cam_{stem}', activation_figure(sample, found, stages, backbone.strides)
            else:
                print(f'{image}: no class activation, since {reason}')
    if 'erf' in chosen:
        crops = visualize.centre_crops(inputs, backbone.strides[-1])
        name = type(backbone).__name__
        backbones = {name: backbone}
        if blocks:
            weights = 'its own weights' if host_checkpoint else 'attention untrained'
            host = visualize.build_host(cfg, backbone, host_checkpoint)
            backbones[f'{name.removeprefix("Slide")} (host)\n{weights}'] = host
        fields = {
            name: visualize.receptive_fields(partial(visualize.stage_maps, x), crops) for name, x in backbones.items()
        }
        yield 'erf', receptive_field_figure(fields, stages, backbone.strides, len(images))


def _chosen_kinds(kinds: Sequence[str] | None, images: bool, slide_attention: bool, history: bool) -> list[str]:
    """The kinds to draw: the given ones, or everything possible with the given images and model."""
    if unknown := set(kinds or ()) - set(KINDS):
        raise ValueError(f'kinds must be some of {KINDS}, got {sorted(unknown)}')
    problems = {} if images else dict.fromkeys(IMAGE_KINDS, 'no image is given')
    if not slide_attention:
        problems.update(dict.fromkeys(SLIDE_KINDS, NO_SLIDE_ATTENTION))
    for kind in [*(kinds or ()), *(['kernels'] if history else ())]:
        if kind in problems:
            raise ValueError(f'cannot draw {kind}: {problems[kind]}')
    chosen = [kind for kind in kinds or KINDS if kind not in problems]
    if not chosen:
        raise ValueError(f'nothing to draw: no image is given, and {NO_SLIDE_ATTENTION}')
    return chosen


def feature_figure(sample: Sample, maps: Mapping[int, Tensor], strides: Sequence[int], channels: int = 3) -> Figure:
    """One row per stage: the image, the first principal component of the map, the channels with the largest variance.

    Args:
        maps: (C, H, W) by stage.
        strides: of all stages.
    """
    figure, axes = _panels(
        'Feature maps: first principal component, channels with the largest variance', len(maps), channels + 2
    )
    for row, (stage, feature) in zip(axes, maps.items(), strict=True):
        stride = strides[stage]
        _show_image(row[0], sample, f'stage {stage}, stride {stride}')
        component, share = principal_component(feature)
        panels = {f'first component\n{share:.0%} of the variance': component}
        panels |= {
            f'channel {index} of {len(feature)}': feature[index] for index in strongest_channels(feature, channels)
        }
        for ax, (title, values) in zip(row[1:], panels.items(), strict=False):
            _show(ax, values, title, SIGNED, _symmetric(values), extent=_extent(values, stride))
            _crop(ax, sample)
    return figure


def attention_figure(sample: Sample, point: tuple[float, float], slots: Sequence[AttendedSlots]) -> Figure:
    """The slots that the pixel at a point attends to, drawn on the image: one row per block, one column per head.

    Dots mark where the merged kernels read, with the attention weight as color and area; crosses mark where the fixed
    shift would read.
    """
    x, y = point
    title = f'Slide Attention of the pixel at x = {x:.0f}, y = {y:.0f} (× fixed shift, ● merged kernels)'
    figure, axes = _panels(title, len(slots), max(len(block.weights) for block in slots) + 1)
    scale = Normalize(0, max(float(block.weights.max()) for block in slots))
    dots: Any = None
    for row, block in zip(axes, slots, strict=True):
        centre = block.shifted.mean(0)
        half = float((block.shifted - centre).abs().max()) + block.stride
        (left, top), (right, bottom) = (centre - half).tolist(), (centre + half).tolist()
        _show_image(row[0], sample, f'{block.name}\nstride {block.stride}')
        row[0].add_patch(Rectangle((left, top), 2 * half, 2 * half, fill=False, color='red'))
        for head, (ax, weights) in enumerate(zip(row[1:], block.weights, strict=False)):
            _show_image(ax, sample, f'head {head}')
            ax.set(xlim=(left, right), ylim=(bottom, top))
            ax.plot(
                *block.shifted.T.numpy(), 'X', color='white', markeredgecolor='black', markersize=5, markeredgewidth=0.5
            )
            places, weights = block.places.T.numpy(), weights.numpy()
            dots = ax.scatter(*places, s=600 * weights, c=weights, norm=scale, cmap='plasma', alpha=0.8)
    figure.colorbar(dots, ax=axes, label='attention weight', shrink=0.6)
    return figure


def kernel_figure(kernels: Mapping[str, Tensor]) -> Figure:
    """One row per block: the fixed and deformed parts of its merged kernels, their sum, and where each slot reads.

    Kernels are drawn as k×k tiles, one per slot, each with k×k taps.

    Args:
        kernels: (d, k², k, k) by the block's name, see `merged_kernels`.
    """
    figure, axes = _panels('Slide Attention: one tile per slot, with k×k taps', len(kernels), 5)
    for row, (name, weight) in zip(axes, kernels.items(), strict=True):
        deformed, size = deformed_part(weight), weight.shape[-1]
        mean, spread, merged = deformed.mean(0), deformed.square().mean(0).sqrt(), weight.mean(0)
        panels = [
            (f'{name}\nfixed shift', fixed_shift(size), POSITIVE, (0.0, 1.0)),
            ('deformed, mean of channels', mean, SIGNED, _symmetric(mean)),
            ('deformed, RMS of channels', spread, POSITIVE, (0.0, max(float(spread.max()), TINY))),
            (f'sum, mean of channels\ndistance {shift_distance(weight):.3f}', merged, SIGNED, _symmetric(merged)),
        ]
        for ax, (title, part, colours, limits) in zip(row, panels, strict=False):
            _show(ax, tiled(part), title, colours, limits)
            edges = np.arange(size - 0.5, size**2 - 1, size)
            ax.vlines(edges, -0.5, size**2 - 0.5, 'grey', linewidth=0.8)
            ax.hlines(edges, -0.5, size**2 - 0.5, 'grey', linewidth=0.8)
        _show_offsets(row[4], weight)
    return figure


def _show_offsets(ax: Any, weight: Tensor) -> None:
    """Lines from where the fixed shift reads to where merged kernels (d, k², k, k) read, in pixels of the map."""
    reach = weight.shape[-1] / 2 + 0.2
    shifted, places = slot_offsets(fixed_shift(weight.shape[-1])[None]), slot_offsets(weight)
    for (x, y), (to_x, to_y) in zip(shifted.tolist(), places.tolist(), strict=True):
        ax.plot([x, to_x], [y, to_y], color='grey')
    ax.plot(*shifted.T.numpy(), 'x', color='black', markersize=5)
    ax.plot(*places.T.numpy(), 'o', color='red', markersize=4)
    ax.set_axis_on()
    ax.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect='equal')
    ax.set_title('where slots read', fontsize='small')


def history_figure(
    labels: Sequence[str], distances: Mapping[str, Sequence[float]], iterations: Sequence[int] | None = None
) -> Figure:
    """`shift_distance` of every block's kernels, checkpoint by checkpoint.

    Args:
        labels: of the checkpoints.
        distances: one per checkpoint, by block name.
        iterations: of the checkpoints; None spaces them evenly, with their labels.
    """
    figure = Figure(figsize=(4 * PANEL, 2 * PANEL), layout='constrained')
    ax = figure.subplots()
    for name, values in distances.items():
        ax.plot(range(len(labels)) if iterations is None else iterations, values, marker='o', label=name)
    if iterations is None:
        ax.set_xticks(range(len(labels)), labels, rotation=30, ha='right')
    ax.set(
        title='Distance of the kernels from the fixed shift',
        xlabel='checkpoint' if iterations is None else 'iteration',
        ylabel='‖deformed part‖ / ‖shift‖',
    )
    ax.set_ylim(0, 1.05 * max(TINY, *(value for values in distances.values() for value in values)))
    figure.legend(loc='outside right upper', fontsize='small')
    return figure


def activation_figure(
    sample: Sample,
    found: Sequence[tuple[Target, Sequence[Tensor]]],
    stages: Sequence[int],
    strides: Sequence[int],
) -> Figure:
    """Class activation over the image: one row per target, one column per stage, each relative to its own maximum.

    Args:
        found: see `class_activations`; all stages.
        stages: to draw.
        strides: of all stages.
    """
    figure, axes = _panels('Class activation (HiResCAM)', len(found), len(stages) + 1)
    overlay: Any = None
    for row, (target, activations) in zip(axes, found, strict=True):
        _show_image(row[0], sample, target.name)
        for ax, stage in zip(row[1:], stages, strict=True):
            _show_image(ax, sample, f'stage {stage}')
            values = activations[stage]
            relative = (values / values.max().clamp(min=TINY)).numpy()
            overlay = ax.imshow(
                relative,
                cmap='inferno',
                vmin=0,
                vmax=1,
                alpha=0.3 + 0.5 * relative,
                extent=_extent(values, strides[stage]),
                interpolation='bilinear',
            )
            _crop(ax, sample)
        if target.box is not None:
            left, top, right, bottom = target.box.tolist()
            for ax in row:
                ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color='lime'))
    figure.colorbar(overlay, ax=axes, label='relative to the maximum', shrink=0.6)
    return figure


def receptive_field_figure(
    fields: Mapping[str, Sequence[Tensor]], stages: Sequence[int], strides: Sequence[int], images: int
) -> Figure:
    """Effective receptive fields: one row per backbone, one column per stage, with the squares containing 50 % and 95
    %.

    Args:
        fields: see `receptive_fields`, all stages, by the backbone's name; their sides divide by all strides.
        stages: to draw.
        strides: of all stages.
        images: number of images averaged over.
    """
    title = f'Effective receptive field, mean of {images} image{"s" * (images > 1)} (squares: 50 % and 95 %)'
    figure, axes = _panels(title, len(fields), len(stages))
    shown: Any = None
    for row, (name, each) in zip(axes, fields.items(), strict=True):
        for ax, stage in zip(row, stages, strict=True):
            field, stride = each[stage], strides[stage]
            relative = (field / field.max().clamp(min=TINY)).clamp(min=FAINTEST).numpy()
            ax.set_axis_on()
            shown = ax.imshow(relative, cmap='magma', norm=LogNorm(FAINTEST, 1), extent=_extent(field, 1))
            # The center of the map's middle pixel.
            height, width = field.shape
            x, y = ((side // stride // 2 + 0.5) * stride for side in (width, height))
            sides = {share: contribution_side(field, (x, y), share) for share in SHARES}
            for share, side in sides.items():
                corner = x - side / 2, y - side / 2
                ax.add_patch(Rectangle(corner, side, side, fill=False, color='cyan', linestyle=SHARES[share]))
            ax.set(xlim=(0, width), ylim=(height, 0))
            widths = ', '.join(f'{share:.0%}: {side:.0f} px' for share, side in sides.items())
            ax.set_title(f'stage {stage}\n{widths}', fontsize='small')
        row[0].set_ylabel(name)
    figure.colorbar(shown, ax=axes, label='gradient, relative to its maximum', shrink=0.6)
    return figure


def to_pixels(figure: Figure) -> np.ndarray:
    """A figure as (H, W, 3), RGB, uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _panels(title: str, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """Axes (rows, columns), invisible until something is drawn."""
    figure = Figure(figsize=(PANEL * columns, PANEL * rows + 0.6), layout='constrained')
    figure.suptitle(textwrap.fill(title, 30 * columns))
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def _show_image(ax: Any, sample: Sample, title: str) -> None:
    ax.imshow(sample.pixels, extent=_extent(sample.pixels, 1))
    ax.set_title(title, fontsize='small')


def _show(ax: Any, values: Tensor, title: str, colours: str, limits: tuple[float, float], **options: Any) -> None:
    """A map (H, W) with its color scale."""
    low, high = limits
    shown = ax.imshow(values.float().cpu().numpy(), cmap=colours, vmin=low, vmax=high, **options)
    ax.set_title(title, fontsize='small')
    ax.figure.colorbar(shown, ax=ax, shrink=0.7)


def _crop(ax: Any, sample: Sample) -> None:
    """Shows the part of a map that covers the image, without padding."""
    height, width = sample.pixels.shape[:2]
    ax.set(xlim=(0, width), ylim=(height, 0))


def _extent(values: Any, stride: int) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of a map (H, W, ...) in pixels of the image."""
    height, width = values.shape[:2]
    return 0, width * stride, height * stride, 0


def _symmetric(values: Tensor) -> tuple[float, float]:
    """Limits of a color scale centered at 0."""
    extreme = max(float(values.abs().max()), TINY)
    return -extreme, extreme
