"""Computes what a backbone has learned and what it attends to; `mmslide.figures` plots the results.

Class activation is implemented here instead of using the package grad-cam, which needs torchvision, which an OpenMMLab
stack may lack, and a model from a tensor to a tensor with a layer that returns maps (B, C, H, W), whereas a detector
returns detections and a stage a pair of channels-last maps. Only a single product would be left to the package.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmslide.build import build_model, load_what_fits
from mmslide.data import find_test_pipeline, transform_name
from mmslide.deploy import load_model
from mmslide.deploy.targets.images import read_image
from mmslide.engine import run_checkpoints
from mmslide.models.attention import SlideAttention
from mmslide.models.pyramid import Pyramid
from mmslide.ops import fixed_shift
from mmslide.weights import load_pretrained

Key = TypeVar('Key')


@dataclass(frozen=True)
class Sample:
    """An image as seen by a model.

    Args:
        pixels: (H, W, 3), RGB, uint8, after the test pipeline.
        inputs: (1, 3, H', W'), normalized and padded at the right and bottom.
        data_sample: of mmdet, mmseg or mmpretrain.
    """

    pixels: np.ndarray
    inputs: Tensor
    data_sample: Any


def load_sample(cfg: Config, model: Any, file: str | Path) -> Sample:
    """Loads an image file with the test pipeline of a config, without annotations, and the model's data_preprocessor.

    Args:
        cfg: of mmdet, mmseg or mmpretrain.
        model: its model.
        file: the image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image, or does not have 3 channels; or the config has no test pipeline.
    """
    read_image(file)
    steps = [step for step in find_test_pipeline(cfg) if not _loads_annotations(transform_name(step))]
    if not steps:
        raise ValueError('the config has no test pipeline, neither in test_dataloader.dataset nor as test_pipeline')
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        packed = Compose(steps)(dict(img_path=str(file), img_id=0))
    if len(packed['inputs']) != 3:
        raise ValueError(f'only images with 3 channels can be drawn, got {len(packed["inputs"])}')
    pixels = packed['inputs'].permute(1, 2, 0).numpy()[..., ::-1]  # pipelines load BGR
    batch = model.data_preprocessor(dict(inputs=[packed['inputs']], data_samples=[packed['data_samples']]), False)
    return Sample(pixels.round().clip(0, 255).astype(np.uint8), batch['inputs'], batch['data_samples'][0])


def _loads_annotations(name: str) -> bool:
    return name.startswith('Load') and 'Image' not in name


def find_backbone(model: nn.Module) -> Pyramid:
    """Raises:
    ValueError: the model's backbone is not from mmslide.
    """
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, Pyramid):
        raise ValueError(f'the backbone must be from mmslide, got {type(backbone).__name__}')
    return backbone


def slide_attentions(model: nn.Module) -> dict[str, SlideAttention]:
    """Every Slide Attention of a model by its name in the state dict."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SlideAttention)}


@contextmanager
def _recorded(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, tuple[Any, Any]]]:
    """The input and the output of each module's last call inside the block."""
    calls: dict[Key, tuple[Any, Any]] = {}

    def record(key: Key, module: nn.Module, args: tuple, output: Any) -> None:
        calls[key] = args[0], output

    handles = [module.register_forward_hook(partial(record, key)) for key, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def stage_maps(backbone: Pyramid, inputs: Tensor, normed: bool = False) -> list[Tensor]:
    """The map of each stage, (B, C, H, W), for images (B, C, H, W).

    Args:
        normed: after the stage's norm, as in the backbone's output. Gradients are taken before the norm: after a
            LayerNorm, the sum over the channels is nearly constant, and with stage_norm='output' the next stage gets
            the map before it.
    """
    with _recorded(dict(enumerate(backbone.stages))) as calls:
        backbone(inputs)
    return [calls[stage][1][int(normed)].permute(0, 3, 1, 2) for stage in range(len(backbone.stages))]


@torch.no_grad()
def feature_maps(backbone: Pyramid, inputs: Tensor) -> list[Tensor]:
    """The map of each stage, (C, H, W), as in the backbone's output.

    Args:
        backbone: a backbone of mmslide.
        inputs: one image, (1, C, H, W).
    """
    return [x[0] for x in stage_maps(backbone, inputs, normed=True)]


def principal_component(feature: Tensor) -> tuple[Tensor, float]:
    """The linear combination of the channels of a map (C, H, W) with the largest variance over the pixels: (H, W), with
    the sign chosen so that the value of largest magnitude is positive, and its share of the variance of all channels.
    """
    pixels = feature.flatten(1).double()
    pixels = pixels - pixels.mean(1, keepdim=True)
    variances, vectors = torch.linalg.eigh(pixels @ pixels.T)
    component = (vectors[:, -1] @ pixels).view(feature.shape[1:])
    component = component * component.flatten()[component.abs().argmax()].sign()
    return component, float(variances[-1] / variances.sum().clamp(min=1e-30))


def strongest_channels(feature: Tensor, number: int) -> list[int]:
    """The channels of a map (C, H, W) with the largest variance over the pixels."""
    return feature.flatten(1).var(1, correction=0).topk(min(number, len(feature))).indices.tolist()


@dataclass(frozen=True)
class AttendedSlots:
    """The positions that one pixel of a map attends to in one Slide Attention.

    Args:
        name: of the module in the backbone.
        stride: side of the map's pixels, in pixels of the image.
        shifted: (k², 2), x and y in the image of the pixels that the fixed kernels select.
        places: (k², 2), likewise of the pixels that the merged kernels read, see `slot_offsets`.
        weights: (heads, k²), with sum 1 over the slots.
    """

    name: str
    stride: int
    shifted: Tensor
    places: Tensor
    weights: Tensor


@torch.no_grad()
def attended_slots(
    backbone: Pyramid, inputs: Tensor, point: tuple[float, float], stages: Sequence[int]
) -> list[AttendedSlots]:
    """The slots that the pixel at a point attends to, in each Slide Attention of some stages.

    Args:
        backbone: a backbone of mmslide.
        inputs: one image, (1, C, H, W).
        point: x and y in pixels of the inputs.
        stages: their numbers, from 0.
    """
    named = {stage: slide_attentions(backbone.stages[stage]) for stage in stages}
    modules = {(stage, name): module for stage in stages for name, module in named[stage].items()}
    with _recorded(modules) as calls:
        backbone(inputs)
    slots = []
    for (stage, name), attention in modules.items():
        x = calls[stage, name][0]
        stride = backbone.strides[stage]
        column, row = (min(int(value / stride), side - 1) for value, side in zip(point, x.shape[2:0:-1], strict=True))
        # The taps of this pixel, without those outside the map.
        margin = attention.kernel_size // 2
        top, left = max(0, row - margin), max(0, column - margin)
        around = x[:, top : row + margin + 1, left : column + margin + 1]
        weights = attention.attention_weights(around)[0, row - top, column - left]
        weight, _ = attention.kernels()
        here = torch.tensor([column + 0.5, row + 0.5])
        shifted, places = (
            stride * (here + slot_offsets(kernels.cpu()))
            for kernels in (fixed_shift(attention.kernel_size)[None], weight)
        )
        slots.append(AttendedSlots(f'stages.{stage}.{name}', stride, shifted, places, weights.cpu()))
    return slots


def slot_offsets(weight: Tensor) -> Tensor:
    """The position that each slot of the kernels reads: (k², 2), x and y from the pixel, in map pixels.

    It is the mean position of the taps, weighted by the absolute values of the kernels, over all channels; for kernels
    that interpolate between pixels, it is exactly the interpolated position. NaN for a slot that reads nothing.

    Args:
        weight: (d, k², k, k).
    """
    kernel_size = weight.shape[-1]
    offset = torch.arange(kernel_size, dtype=weight.dtype, device=weight.device) - kernel_size // 2
    share = weight.abs().sum(0)  # (k², k, k)
    share = share / share.sum((1, 2), keepdim=True)
    return torch.stack([(share * offset).sum((1, 2)), (share * offset[:, None]).sum((1, 2))], dim=1)


def deformed_part(weight: Tensor) -> Tensor:
    """The learned part of merged kernels: their difference from the fixed shift.

    Args:
        weight: (d, k², k, k).
    """
    return weight - fixed_shift(weight.shape[-1]).to(weight)


def shift_distance(weight: Tensor) -> float:
    """The distance of merged kernels from the fixed shift: ‖deformed part‖ / ‖shift‖, Frobenius norms.

    Args:
        weight: (d, k², k, k).
    """
    return float(deformed_part(weight).norm() / weight[:, :, 0, 0].numel() ** 0.5)


def merged_kernels(model: nn.Module) -> dict[str, Tensor]:
    """The merged kernels (d, k², k, k) of every Slide Attention, trained or fused, by its name.

    Args:
        model: any module.

    Raises:
        ValueError: the model has no Slide Attention.
    """
    kernels = {name: module.kernels()[0].detach().cpu() for name, module in slide_attentions(model).items()}
    if not kernels:
        raise ValueError(f'this {type(model).__name__} has no Slide Attention: slide_stages of its backbone is empty')
    return kernels


def shift_distances(model: nn.Module) -> dict[str, float]:
    """`shift_distance` of every Slide Attention by its name.

    Args:
        model: any module.

    Raises:
        ValueError: see `merged_kernels`.
    """
    return {name: shift_distance(weight) for name, weight in merged_kernels(model).items()}


def kernel_history(
    config: str | Path, checkpoints: Sequence[str | Path]
) -> tuple[list[str], list[int] | None, dict[str, list[float]]]:
    """`shift_distance` of every Slide Attention in several checkpoints of one config.

    Args:
        config: file of the config.
        checkpoints: files or URLs, in order; a folder means all checkpoints saved in it during training.

    Returns:
        Their names, their iterations (None if missing), and the distances by block name.

    Raises:
        ValueError: a folder has no checkpoint, see `run_checkpoints`; or see `load_model` and `merged_kernels`.
        OSError: see `load_model`.
    """
    files: list[str | Path] = []
    for path in checkpoints:
        found = run_checkpoints(path) if Path(path).is_dir() else [path]
        if not found:
            raise ValueError(f'{path} has no checkpoint epoch_N.pth or iter_N.pth')
        files += found
    iterations: list[Any] = []
    distances: dict[str, list[float]] = {}
    for file in files:
        _, model, meta = load_model(config, file)
        iterations.append(meta.get('iter'))
        for name, distance in shift_distances(find_backbone(model)).items():
            distances.setdefault(name, []).append(distance)
    known = [x for x in iterations if isinstance(x, int)]
    return [Path(file).stem for file in files], known if len(known) == len(files) else None, distances


def tiled(kernels: Tensor) -> Tensor:
    """Kernels (k², k, k) as one image (k², k²): the tile at row i and column j is the kernel of slot i·k + j."""
    size = kernels.shape[-1]
    return kernels.unflatten(0, (size, size)).transpose(1, 2).flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class Target:
    """The target of a class activation.

    Args:
        name: the class, and its score or the share of the image that it covers.
        score: with its autograd graph.
        box: (4,), x1, y1, x2, y2 in the image; None if the score is for the whole image.
    """

    name: str
    score: Tensor
    box: Tensor | None = None


def find_targets(
    model: Any, sample: Sample, inputs: Tensor, classes: Sequence[str], limit: int = 3, score_thr: float = 0.3
) -> list[Target]:
    """The highest-scoring detections, the most likely classes of an image, or the classes that cover most of it.

    Args:
        inputs: those of the sample, for which gradients are needed.
        classes: their names; missing names are replaced by numbers.
        score_thr: of detections.

    Raises:
        ValueError: the head returns no differentiable scores.
    """

    def name(label: int) -> str:
        return classes[label] if label < len(classes) else f'class {label}'

    if not (hasattr(model, 'decode_head') or hasattr(model, 'with_head')):
        found = model.predict(inputs, [sample.data_sample], rescale=False)[0].pred_instances
        if len(found) and not found.scores.requires_grad:
            raise ValueError(f'the scores of this {type(model).__name__} have no gradients')
        order = found.scores.argsort(descending=True)[:limit]
        return [
            Target(f'{name(int(label))} {score:.2f}', score, box.detach().cpu())
            for label, score, box in zip(found.labels[order], found.scores[order], found.bboxes[order], strict=True)
            if score >= score_thr
        ]
    try:
        logits = model(inputs, [sample.data_sample], mode='tensor')
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f'the head of this {type(model).__name__} does not run on feature maps only: {error}'
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 4):
        raise ValueError(f'the head of this {type(model).__name__} returns {type(logits).__name__}, not logits')
    if logits.ndim == 2:
        shares, labels = logits[0].softmax(0).topk(min(limit, logits.shape[1]))
        return [
            Target(f'{name(label)} {share:.2f}', logits[0, label])
            for label, share in zip(labels.tolist(), shares.tolist(), strict=True)
        ]
    if logits.shape[1] == 1:
        logits = torch.cat([-logits, logits], dim=1)
    labels = logits[0].argmax(0)
    counts, order = labels.flatten().bincount().sort(descending=True)
    return [
        Target(f'{name(label)} {count / labels.numel():.0%}', logits[0, label][labels == label].sum())
        for label, count in zip(order[:limit].tolist(), counts.tolist(), strict=False)
        if count
    ]


def class_activation(feature: Tensor, gradient: Tensor) -> Tensor:
    """HiResCAM (arXiv 2011.08891, section 3): max(0, Σ_c gradient · map), (H, W), of a map (H, W, C) and its gradient.

    Grad-CAM averages the gradient over the map first. Before global pooling, the two are the same; for a detection,
    Grad-CAM highlights everything similar, HiResCAM only what led to this detection.
    """
    return (feature * gradient).sum(-1).clamp(min=0)


def class_activations(
    model: Any, sample: Sample, classes: Sequence[str], limit: int = 3, score_thr: float = 0.3
) -> list[tuple[Target, list[Tensor]]]:
    """The targets of an image, see `find_targets`, and for each target the class activation (H, W) of every stage.

    Args:
        model: a detector, segmentor or classifier with a backbone of mmslide.
        sample: an image, see `load_sample`.
        classes: their names; missing names are replaced by numbers.
        limit: largest number of targets.
        score_thr: of detections.

    Raises:
        ValueError: see `find_targets`.
    """
    backbone = find_backbone(model)
    inputs = sample.inputs.clone().requires_grad_()
    with torch.enable_grad(), _recorded(dict(enumerate(backbone.stages))) as calls:
        targets = find_targets(model, sample, inputs, classes, limit, score_thr)
    maps = [calls[stage][1][0] for stage in range(len(backbone.stages))]
    found = []
    for target in targets:
        # Zeros for a stage that the score does not depend on.
        gradients = torch.autograd.grad(target.score, maps, retain_graph=True, materialize_grads=True)
        activations = [class_activation(x[0], gradient[0]) for x, gradient in zip(maps, gradients, strict=True)]
        found.append((target, [x.detach().cpu() for x in activations]))
    return found


def receptive_fields(maps_of: Callable[[Tensor], Sequence[Tensor]], images: Sequence[Tensor]) -> list[Tensor]:
    """The effective receptive field (NeurIPS 2016, arXiv 1701.04128, section 2) of the center of each map.

    Args:
        maps_of: from an image (1, C, H, W) to maps (1, C', H', W'), such as `stage_maps`.
        images: of one shape, see `centre_crops`.

    Returns:
        For each map (H, W): |∂ Σ_c map[c, H' // 2, W' // 2] / ∂ image|, summed over the image's channels and averaged
        over the images.
    """
    totals: list[Tensor] = []
    for image in images:
        inputs = image.detach().clone().requires_grad_()
        with torch.enable_grad():
            centres = [x[0, :, x.shape[2] // 2, x.shape[3] // 2].sum() for x in maps_of(inputs)]
        gradients = [torch.autograd.grad(centre, inputs, retain_graph=True)[0] for centre in centres]
        fields = [gradient[0].abs().sum(0).cpu() / len(images) for gradient in gradients]
        totals = [total + field for total, field in zip(totals, fields, strict=True)] if totals else fields
    return totals


def contribution_side(field: Tensor, centre: tuple[float, float], share: float) -> float:
    """The side in pixels of the smallest square around a center that contains a share of a receptive field (H, W).

    Args:
        centre: x and y; pixel 0 reaches from 0 to 1.
    """
    (y, x), (centre_x, centre_y) = (torch.arange(side) + 0.5 for side in field.shape), centre
    distance = torch.maximum((y - centre_y).abs()[:, None], (x - centre_x).abs()).flatten()
    nearest = distance.argsort()
    held = field.flatten()[nearest].double().cumsum(0)
    return float(2 * distance[nearest[int((held < share * held[-1]).sum())]] + 1)


def centre_crops(images: Sequence[Tensor], divisor: int = 1) -> list[Tensor]:
    """Images (1, C, H, W) center-cropped to the smallest height and width, rounded down to multiples of `divisor`."""
    height, width = (min(x.shape[axis] for x in images) // divisor * divisor for axis in (2, 3))
    corners = [((x.shape[2] - height) // 2, (x.shape[3] - width) // 2) for x in images]
    return [x[:, :, top : top + height, left : left + width] for x, (top, left) in zip(images, corners, strict=True)]


def build_host(cfg: Config, backbone: Pyramid, checkpoint: str | Path | None = None) -> Pyramid:
    """The host of a config's backbone: the same backbone with slide_stages=().

    Args:
        backbone: its weights are copied to the host where they fit; the host's own attention is untrained then.
        checkpoint: weights of the host instead, see `mmslide.weights.load_pretrained`.

    Raises:
        OSError, ValueError: the checkpoint cannot be read or does not fit.
    """
    options = dict(cfg.model.backbone, slide_stages=(), deploy=False, init_cfg=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host: Any = build_model(Config(dict(model=options, default_scope=cfg.get('default_scope'))))
    if checkpoint is None:
        load_what_fits(host, backbone.state_dict())
    else:
        load_pretrained(host, checkpoint)
    return host.eval()
