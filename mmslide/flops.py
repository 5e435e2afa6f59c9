"""Multiply-adds and parameters of a model, including the matrix products of attention."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmslide.build import build_model
from mmslide.models.attention import SlideAttention

# (height, width) as in the papers' tables.
DETECTION_SHAPE = (800, 1280)
SEGMENTATION_SHAPE = (512, 2048)
CLASSIFICATION_SHAPE = (224, 224)
BOX_PROPOSALS = 1000
MASK_PROPOSALS = 100
HEADS = {
    'decode_head': 'decode head',
    'rpn_head': 'RPN head',
    'bbox_head': 'dense head',
    'head': 'classification head',
}
SHAPES = {'decode_head': SEGMENTATION_SHAPE, 'head': CLASSIFICATION_SHAPE}
ROI_HEADS = {'bbox': ('box head', BOX_PROPOSALS), 'mask': ('mask head', MASK_PROPOSALS)}


@dataclass(frozen=True)
class Part:
    """`macs` multiply-adds for one image, `params` parameters including frozen ones."""

    name: str
    macs: int
    params: int


@dataclass(frozen=True)
class Complexity:
    """The cost of each part of a model for one image of `shape` (height, width)."""

    shape: tuple[int, int]
    parts: tuple[Part, ...]

    @property
    def macs(self) -> int:
        return sum(part.macs for part in self.parts)

    @property
    def params(self) -> int:
        return sum(part.params for part in self.parts)


def count_complexity(cfg: Config, shape: Sequence[int] | None = None) -> Complexity:
    """Counts the multiply-adds of inference on one image, and all parameters; needs no data and no weights.

    Convolutions, linear layers and the matrix products of attention count; norms, activations, softmax, resampling and
    RoIAlign do not. Slide Attention is counted as in inference, with its merged kernels once for keys and once for
    values. A two-stage detector has 1000 proposals in each box head and 100 in each mask head. Heads used only in
    training count parameters but no multiply-adds.

    Args:
        cfg: a whole config of mmdet, mmseg or mmpretrain.
        shape: (height, width) of the image including padding; None is 800×1280 for a detector, 512×2048 for a segmentor
            and 224×224 for a classifier.

    Raises:
        ValueError: the model has no backbone, or one of its parts does not run on the previous part's maps alone, for
            instance because `in_channels` is wrong.
    """
    if 'backbone' not in cfg.get('model', {}):
        raise ValueError(f'only models with a backbone can be counted, got {cfg.get("model", {}).get("type")}')
    model: Any = build_model(cfg, 'meta').eval()
    heads = [name for name in HEADS if hasattr(model, name)]
    if not heads:
        raise ValueError(
            f'only models with a decode, RPN, box or classification head can be counted, got {type(model).__name__}'
        )
    for module in model.modules():
        if isinstance(module, SlideAttention):
            module.backend = None  # on the meta device, the op then uses the backend whose products can be counted
    height, width = shape or SHAPES.get(heads[0], DETECTION_SHAPE)
    parts = []

    def run(name: str, module: nn.Module, x: Tensor | Sequence[Tensor]) -> Any:
        try:
            out, macs = count_macs(module, x)
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f'{type(model).__name__} cannot be counted: its {name} does not run on {_shapes(x)} alone ({error})'
            ) from error
        parts.append(Part(name, macs, _params(module)))
        return out

    maps = run('backbone', model.backbone, torch.empty(1, 3, height, width, device='meta'))
    if model.with_neck:
        maps = run('neck', model.neck, maps)
    for name in heads:
        run(HEADS[name], getattr(model, name), maps)
    for name, head, rois in _roi_heads(model):
        run(name, head, rois)
    unused = _params(model) - sum(part.params for part in parts)
    if unused:
        parts.append(Part('only in training', 0, unused))
    return Complexity((height, width), tuple(parts))


def count_macs(module: nn.Module, x: Any) -> tuple[Any, int]:
    """The output of `module(x)` and its multiply-adds.

    Module and tensors must be on the meta device: on a CPU, torch does not count scaled_dot_product_attention.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = module(x)
    return out, counter.get_total_flops() // 2


def complexity_table(complexity: Complexity) -> Table:
    """A table of the parts and their sum, in 10⁹ multiply-adds and 10⁶ parameters."""
    height, width = complexity.shape
    table = Table(
        title=f'One image of {height}×{width} pixels (height × width)',
        caption=(
            'Multiply-adds of convolutions, linear layers and the matrix products of attention. '
            f'{BOX_PROPOSALS} proposals in each box head, {MASK_PROPOSALS} in each mask head.'
        ),
    )
    table.add_column('part')
    table.add_column('multiply-adds (G)', justify='right')
    table.add_column('parameters (M)', justify='right')
    for part in (*complexity.parts, Part('total', complexity.macs, complexity.params)):
        if part.name == 'total':
            table.add_section()
        table.add_row(part.name, f'{part.macs / 1e9:.2f}', f'{part.params / 1e6:.2f}')
    return table


def _roi_heads(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, module and input of each box and mask head: one of each in a standard RoI head, several in a cascade."""
    roi_head = getattr(model, 'roi_head', None)
    for kind, (name, count) in ROI_HEADS.items():
        heads = getattr(roi_head, f'{kind}_head', None)
        if heads is None:
            continue
        extractors = getattr(roi_head, f'{kind}_roi_extractor')
        if not isinstance(heads, nn.ModuleList):
            heads, extractors = [heads], [extractors]
        for index, (head, extractor) in enumerate(zip(heads, extractors, strict=True)):
            number = f' {index + 1}' if len(heads) > 1 else ''
            rois = torch.empty(count, extractor.out_channels, *extractor.roi_layers[0].output_size, device='meta')
            yield name + number, head, rois


def _shapes(x: Tensor | Sequence[Tensor]) -> str:
    maps = [x] if isinstance(x, Tensor) else x
    shapes = [str(tuple(each.shape)) if isinstance(each, Tensor) else type(each).__name__ for each in maps]
    return f'maps of shape {", ".join(shapes)}'


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
