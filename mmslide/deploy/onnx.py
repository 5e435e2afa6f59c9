import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmslide.files import replacing
from mmslide.models.attention import SlideAttention

from .checkpoint import load_model
from .fuse import fuse

PARTS = ('backbone', 'model')
MIN_SIDE = 32
symbolic_shapes_config: Any = torch.fx.experimental._config
# Of an output, as max|Δ| / max|PyTorch's|; of label maps the share of pixels that differ.
TOLERANCE = 1e-4
# Traced for every size: large and odd, so that no map is by chance square, whole windows or inside one.
DYNAMIC_TRACE = (2003, 2503)


class ExportableBackbone(nn.Module):
    """A backbone as it is exported: the image (1, 3, H, W) to one map (1, C, H', W') a stage."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.output_names = [f'stage{index + 1}' for index in backbone.out_indices]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.backbone(image)


class ExportableSegmentor(nn.Module):
    """A segmentor as it is exported: the image (1, 3, H, W) to logits (1, classes, H, W) and labels (1, H, W) in int64.

    Both are of the image's size, which the logits are resized to as `EncoderDecoder.predict` does for whole images.

    Raises:
        ValueError: the segmentor tests in slices, or has one channel for two classes.
    """

    output_names = ('logits', 'labels')

    def __init__(self, segmentor: Any) -> None:
        super().__init__()
        mode = segmentor.test_cfg.get('mode', 'whole')
        if mode != 'whole':
            raise ValueError(f"only segmentors that test whole images can be exported, got test_cfg.mode='{mode}'")
        if segmentor.out_channels < 2:
            raise ValueError('only segmentors with a channel for each class can be exported, got out_channels=1')
        self.segmentor: Any = segmentor
        make_sizes_symbolic(segmentor.decode_head)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.segmentor.decode_head(self.segmentor.extract_feat(image))
        size = image.shape[2:]
        logits = F.interpolate(logits, size=size, mode='bilinear', align_corners=self.segmentor.align_corners)
        return logits, logits.argmax(1)


class AdaptiveAverage(nn.Module):
    """nn.AdaptiveAvgPool2d by two averaging matrices made from the map's shape, so that it is right at every size."""

    def __init__(self, output_size: Any) -> None:
        super().__init__()
        self.output_size = (output_size,) * 2 if isinstance(output_size, int) else output_size

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self._average(side, out, x) for side, out in zip(x.shape[2:], self.output_size, strict=True))
        return rows @ x @ columns.t()

    @staticmethod
    def _average(side: int, out: int, x: Tensor) -> Tensor:
        """(out, side): row i is the mean of the pixels from ⌊i · side / out⌋ to ⌈(i + 1) · side / out⌉ - 1."""
        index = torch.arange(out, device=x.device)[:, None]
        first, last = index * side // out, ((index + 1) * side + out - 1) // out
        pixel = torch.arange(side, device=x.device)
        return ((pixel >= first) & (pixel < last)).to(x.dtype) / (last - first).to(x.dtype)


class Enlarge(nn.Module):
    """mmseg's Upsample by a whole factor, which there makes a constant of the size."""

    def __init__(self, factor: int, mode: str, align_corners: bool | None) -> None:
        super().__init__()
        self.factor, self.mode, self.align_corners = factor, mode, align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = [self.factor * side for side in x.shape[2:]]
        return F.interpolate(x, size=size, mode=self.mode, align_corners=self.align_corners)


def make_sizes_symbolic(model: nn.Module) -> None:
    """Replaces, in place, what would be exported for the traced size alone."""
    from mmseg.models.utils import Upsample

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(module, name, AdaptiveAverage(child.output_size))
            elif isinstance(child, Upsample) and not child.size and float(child.scale_factor).is_integer():
                setattr(module, name, Enlarge(int(child.scale_factor), child.mode, child.align_corners))


def part(model: Any, name: str, shape: tuple[int, int]) -> nn.Module:
    """What is exported of a fused model: its 'backbone', or the whole 'model' for images of `shape` (height, width)."""
    if name == 'backbone':
        return ExportableBackbone(model.backbone)
    if hasattr(model, 'decode_head'):
        return ExportableSegmentor(model)
    from .detection import ExportableDetector  # type: ignore[import-untyped,import-not-found,unused-ignore]

    return ExportableDetector(model, shape)


def export_onnx(
    config: str, checkpoint: str, out: str, name: str, shape: tuple[int, int], dynamic: bool = False
) -> dict[tuple[int, int], float]:
    """Writes a trained model, fused, as an ONNX file, after onnxruntime has given PyTorch's numbers with it.

    The graph takes `image` (1, 3, H, W), float32, normalised and in the model's order of channels. What is needed for
    that stands in the file's metadata as JSON: mean, std, bgr_to_rgb, pad_divisor, classes.

    Args:
        out: the file; it appears whole or not at all.
        name: 'backbone' (outputs stage1, ...) or 'model' (of a segmentor: logits, labels).
        shape: (height, width) of the image, from 32 pixels a side.
        dynamic: the file takes every size from 32 pixels a side; shape is the first that is compared.

    Returns:
        The largest error of an output for each size that was compared: shape, and if dynamic three others. See
        `TOLERANCE`.

    Raises:
        ValueError: an argument does not fit, or see `load_model`.
        RuntimeError: the numbers differ, or the graph does not run.
        OSError: out cannot be written.
    """
    if name not in PARTS:
        raise ValueError(f'part must be one of {PARTS}, got {name!r}')
    if min(shape) < MIN_SIDE:
        raise ValueError(f'shape must be at least {MIN_SIDE} pixels a side, got {tuple(shape)}')
    with replacing(out) as path:
        cfg, model, meta = load_model(config, checkpoint)
        module = part(fuse(model), name, shape)
        whole_detector = not isinstance(module, ExportableBackbone | ExportableSegmentor)
        if whole_detector and dynamic:
            raise ValueError('a whole detector is exported for one size; its backbone can be dynamic')
        program = to_onnx(module, shape, dynamic)
        program.model.metadata_props.update(
            {key: json.dumps(value) for key, value in preprocessing(cfg, meta).items()} | {'part': json.dumps(name)}
        )
        program.save(path, external_data=False)
        return compare(module, path, [shape, *(other_shapes(shape) if dynamic else [])])


def to_onnx(module: nn.Module, shape: tuple[int, int], dynamic: bool) -> torch.onnx.ONNXProgram:
    """The graph of what `part` returns, its Slide Attention in plain operations."""
    for child in module.modules():
        if isinstance(child, SlideAttention):
            child.backend = 'unrolled'
    if isinstance(module, ExportableBackbone | ExportableSegmentor):
        output_names, translations = list(module.output_names), None
    else:
        from .detection import ONNX_TRANSLATIONS

        output_names, translations = ['boxes', 'labels', 'scores', 'masks'], ONNX_TRANSLATIONS
    # From twice the least side on, since PyTorch sets apart maps with a side of 1, which is the same in the graph.
    sides = {axis: torch.export.Dim(side, min=2 * MIN_SIDE) for axis, side in ((2, 'height'), (3, 'width'))}
    traced = DYNAMIC_TRACE if dynamic else shape
    # torch.onnx.export alone would make a size constant, without a word, where export asks for it. The mathematical
    # form of attention has the memory layout that is left after its decomposition.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), symbolic_shapes_config.patch(backed_size_oblivious=True):
        exported = torch.export.export(
            module,
            (torch.zeros(1, 3, *traced),),
            dynamic_shapes=(sides,) if dynamic else None,
            prefer_deferred_runtime_asserts_over_guards=dynamic,
        )
        program = torch.onnx.export(
            exported,
            dynamo=True,
            input_names=['image'],
            output_names=output_names,
            custom_translation_table=translations,
            verbose=False,
        )
    assert program is not None
    return program


def preprocessing(cfg: Config, meta: dict[str, Any]) -> dict[str, Any]:
    """What a runner must know to prepare an image and to name what was found."""
    values = cfg.model.get('data_preprocessor') or {}
    divisor = values.get('pad_size_divisor') or values.get('size_divisor') or 1
    classes = meta.get('dataset_meta', {}).get('classes') or meta.get('dataset_meta', {}).get('CLASSES') or ()
    return {
        'mean': list(values.get('mean') or (0.0, 0.0, 0.0)),
        'std': list(values.get('std') or (1.0, 1.0, 1.0)),
        'bgr_to_rgb': bool(values.get('bgr_to_rgb', False)),
        'pad_divisor': divisor,
        'classes': list(classes),
    }


def other_shapes(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Three that a dynamic graph is compared at beside the one asked for: odd, the least, larger."""
    height, width = shape
    yield max(MIN_SIDE, height // 2) | 1, width + 13
    yield MIN_SIDE, MIN_SIDE + 13
    yield height + 27, max(MIN_SIDE, width // 2)


def compare(module: nn.Module, path: Path, shapes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """The largest error of onnxruntime's outputs for each shape.

    Raises:
        RuntimeError: it exceeds `TOLERANCE`, or the graph does not run.
    """
    import onnxruntime

    generator = torch.Generator().manual_seed(0)
    errors = {}
    try:
        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        for shape in shapes:
            image = torch.randn(1, 3, *shape, generator=generator)
            with torch.no_grad():
                wanted = module(image)
            outputs = session.run(None, {'image': image.numpy()})
            errors[shape] = max(
                output_error(torch.from_numpy(x), reference) for x, reference in zip(outputs, wanted, strict=True)
            )
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise RuntimeError(f'onnxruntime does not run the exported graph: {error}') from error
    wrong = {shape: error for shape, error in errors.items() if not error <= TOLERANCE}
    if wrong:
        raise RuntimeError(f"onnxruntime's results differ from PyTorch's by more than {TOLERANCE}: {wrong}")
    return errors


def output_error(value: Tensor, reference: Tensor) -> float:
    """max|Δ| / max|reference|; of integers the share that differ; infinite where the shapes do."""
    if value.shape != reference.shape:
        return float('inf')
    if not reference.numel():
        return 0.0
    if not reference.is_floating_point():
        return float((value != reference).double().mean())
    return float((value - reference).abs().max() / reference.abs().max().clamp(min=1e-12))
