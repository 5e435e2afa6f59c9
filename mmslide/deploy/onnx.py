import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmslide.files import atomic_write, find_config
from mmslide.models.attention import SlideAttention

from .checkpoint import load_model
from .fuse import fuse

PARTS = ('backbone', 'model')
MIN_SIDE = 32
symbolic_shapes_config: Any = torch.fx.experimental._config
# Of an output, as max|Δ| / max|PyTorch's|.
TOLERANCE = 1e-4
# Traced for every size: large and odd, so that no map is by chance square, whole windows or inside one.
DYNAMIC_TRACE = (2003, 2503)


class Exportable(nn.Module):
    """A model as it is exported: the image (1, 3, H, W) to the outputs that are named."""

    output_names: Sequence[str]
    any_size = True
    translations: dict[Callable, Callable] | None = None  # of operators that PyTorch lacks

    def agreement(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[bool, str]:
        """Whether onnxruntime's outputs are PyTorch's within `TOLERANCE`, and how far they are, in words."""
        shapes, expected = ([tuple(x.shape) for x in each] for each in (outputs, wanted))
        if shapes != expected:
            return False, f'onnxruntime gives shapes {shapes}, PyTorch {expected}'
        errors = [
            (value - reference).abs().max() / reference.abs().max().clamp(min=1e-12)
            for value, reference in self.compared(outputs, wanted)
        ]
        error = float(torch.stack(errors).max())  # Python's max() passes over a NaN that is not the first
        return error <= TOLERANCE, f'onnxruntime and PyTorch differ by {error:.1e}'

    def compared(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        """Pairs that must be the same within `TOLERANCE`, for outputs of the right shapes."""
        return zip(outputs, wanted, strict=True)


class ExportableBackbone(Exportable):
    """A backbone as it is exported: the image (1, 3, H, W) to one map (1, C, H', W') a stage."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.output_names = [f'stage{index + 1}' for index in sorted(backbone.out_indices)]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.backbone(image)


class ExportableSegmentor(Exportable):
    """A segmentor as it is exported: the image (1, 3, H, W) to logits (1, classes, H, W) and labels (1, H, W) in int64.

    Both are of the image's size, which the logits are resized to as `EncoderDecoder.predict` does for whole images.

    Raises:
        ValueError: the segmentor or its head predicts in a way of its own, such as CascadeEncoderDecoder or
            Mask2FormerHead; it tests in slices, or has one channel for two classes.
    """

    output_names = ('logits', 'labels')

    def __init__(self, segmentor: Any) -> None:
        from mmseg.models import EncoderDecoder
        from mmseg.models.decode_heads.decode_head import BaseDecodeHead

        super().__init__()
        if type(segmentor) is not EncoderDecoder:
            raise ValueError(f'of segmentors only EncoderDecoder can be exported, got {type(segmentor).__name__}')
        head = type(segmentor.decode_head)
        if (head.predict, head.predict_by_feat) != (BaseDecodeHead.predict, BaseDecodeHead.predict_by_feat):
            raise ValueError(f"only decode heads with BaseDecodeHead's predict can be exported, got {head.__name__}")
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

    def compared(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        """The logits, and for each pixel PyTorch's logits of both labels: of two classes that tie, either is right."""
        (logits, labels), (reference, expected) = outputs, wanted
        yield logits, reference
        yield reference.gather(1, labels[:, None]), reference.gather(1, expected[:, None])


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


def part(model: Any, name: str, shape: tuple[int, int]) -> Exportable:
    """What is exported of a fused model: its 'backbone', or the whole 'model' for images of `shape` (height, width)."""
    if name == 'backbone':
        return ExportableBackbone(model.backbone)
    if hasattr(model, 'decode_head'):
        return ExportableSegmentor(model)
    from .detection import ExportableDetector

    return ExportableDetector(model, shape)


def export_onnx(
    config: str,
    checkpoint: str,
    out: str,
    name: str,
    shape: tuple[int, int],
    dynamic: bool = False,
    images: Sequence[str] = (),
) -> list[str]:
    """Writes a trained model, fused, as an ONNX file, after onnxruntime has given PyTorch's results with it.

    The graph takes `image` (1, 3, H, W), float32, normalised and in the model's order of channels. What is needed for
    that stands in the file's metadata as JSON, see `preprocessing`.

    Args:
        out: the file; it appears whole or not at all.
        name: 'backbone' (outputs stage1, ...) or 'model' (of a segmentor: logits, labels; of a detector: see
            `ExportableDetector`).
        shape: (height, width) of the image, from 32 pixels a side.
        dynamic: the file takes every size from 32 pixels a side; shape is the first that is compared.
        images: files of pictures that are compared too, see `prepare`, beside random numbers as an image.

    Returns:
        A line for each image that was compared: random ones of `shape`, and if dynamic of three other sizes; images.

    Raises:
        ValueError: an argument does not fit, or see `load_model`.
        FileNotFoundError: one of the files does not exist.
        RuntimeError: the results differ, see `compare`, or the graph does not run.
        OSError: out cannot be written.
    """
    if name not in PARTS:
        raise ValueError(f'part must be one of {PARTS}, got {name!r}')
    if min(shape) < MIN_SIDE:
        raise ValueError(f'shape must be at least {MIN_SIDE} pixels a side, got {tuple(shape)}')
    with atomic_write(out, inputs=[find_config(config), checkpoint, *images]) as (path,):
        cfg, model, meta = load_model(config, checkpoint)
        values = preprocessing(cfg, meta)
        pictures = {file: prepare(file, values, shape) for file in images}
        module = part(fuse(model), name, shape)
        if dynamic and not module.any_size:
            raise ValueError('a whole detector is exported for one size; its backbone can be dynamic')
        program = to_onnx(module, shape, dynamic)
        program.model.metadata_props.update({key: json.dumps(value) for key, value in {**values, 'part': name}.items()})
        program.save(path, external_data=False)
        shapes = [shape, *(other_shapes(shape) if dynamic else [])]
        return compare(module, path, {**random_images(shapes), **pictures})


def to_onnx(module: Exportable, shape: tuple[int, int], dynamic: bool) -> torch.onnx.ONNXProgram:
    """The graph of what `part` returns, its Slide Attention in plain operations."""
    for child in module.modules():
        if isinstance(child, SlideAttention):
            child.backend = 'unrolled'
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
            output_names=list(module.output_names),
            custom_translation_table=module.translations,
            verbose=False,
        )
    assert program is not None
    return program


def preprocessing(cfg: Config, meta: dict[str, Any]) -> dict[str, Any]:
    """What a runner must know to prepare an image, read as BGR, and to name what was found.

    Args:
        cfg: of the model, with its data_preprocessor in `cfg.model`.
        meta: of the checkpoint.

    Returns:
        mean and std (3 numbers each), bgr_to_rgb (whether the channels are reversed), pad_value (of the normalised
        image), pad_divisor, classes.
    """
    values = cfg.model.get('data_preprocessor') or {}
    dataset_meta = meta.get('dataset_meta') or {}
    return {
        'mean': np.broadcast_to(values.get('mean') or 0.0, 3).tolist(),
        'std': np.broadcast_to(values.get('std') or 1.0, 3).tolist(),
        # The preprocessors of mmengine, mmdet and mmseg do the same for either.
        'bgr_to_rgb': bool(values.get('bgr_to_rgb') or values.get('rgb_to_bgr')),
        'pad_value': values.get('pad_value') or values.get('pad_val') or 0,
        'pad_divisor': values.get('pad_size_divisor') or values.get('size_divisor') or 1,
        'classes': list(dataset_meta.get('classes') or dataset_meta.get('CLASSES') or ()),
    }


def other_shapes(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Three that a dynamic graph is compared at beside the one asked for: odd, the least, larger."""
    height, width = shape
    yield max(MIN_SIDE, height // 2) | 1, width + 13
    yield MIN_SIDE, MIN_SIDE + 13
    yield height + 27, max(MIN_SIDE, width // 2)


def random_images(shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Standard normal, one of each shape."""
    generator = torch.Generator().manual_seed(0)
    return {f'{height}×{width}': torch.randn(1, 3, height, width, generator=generator) for height, width in shapes}


def prepare(file: str, values: dict[str, Any], shape: tuple[int, int]) -> Tensor:
    """A picture as the model sees it, (1, 3, H, W): as large as fits into `shape`, normalised, padded below and right.

    Args:
        values: see `preprocessing`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture.
    """
    picture = mmcv.imread(file)
    if picture is None:
        raise ValueError(f'{file} is not a readable picture')
    scale = min(side / length for side, length in zip(shape, picture.shape, strict=False))
    resized = mmcv.imrescale(picture, scale)
    normalised = mmcv.imnormalize(resized, *(np.array(values[key]) for key in ('mean', 'std')), values['bgr_to_rgb'])
    image = torch.from_numpy(normalised).permute(2, 0, 1)[None].contiguous()
    bottom, right = (side - length for side, length in zip(shape, image.shape[2:], strict=True))
    return F.pad(image, (0, right, 0, bottom), value=values['pad_value'])


def run(path: Path, images: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """onnxruntime's outputs, image by image.

    Raises:
        RuntimeError: the graph does not run.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        for image in images:
            yield [torch.from_numpy(x) for x in session.run(None, {'image': image.numpy()})]
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise RuntimeError(f'onnxruntime does not run the exported graph: {error}') from error


def compare(module: Exportable, path: Path, images: dict[str, Tensor]) -> list[str]:
    """How the graph's results agree with the module's, a line for each of the images, which have names.

    Raises:
        RuntimeError: they do not, or the graph does not run.
    """
    lines = []
    for (name, image), outputs in zip(images.items(), run(path, images.values()), strict=True):
        with torch.no_grad():
            agrees, how = module.agreement(outputs, module(image))
        lines.append(f'{name}: {how}')
        if not agrees:
            raise RuntimeError(f"the exported graph's results are not the model's: {lines[-1]}")
    return lines
