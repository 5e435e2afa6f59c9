from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor

from mmslide.files import atomic_write, find_config

from .checkpoint import load_model
from .fuse import fuse
from .graphs import EXACT, PARTS, Exportable, part
from .targets import Metadata, Target, Traced, find_target, require
from .targets.images import MIN_SIDE, normalize, prepare, read_image, to_pixels
from .trace import trace

IMAGE_SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.webp'}
# Of a calibration folder; more change the ranges little and take long.
MAX_CALIBRATION = 128
# Of these.
MAX_COMPARED = 8


def export(
    config: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    name: str,
    shape: tuple[int, int],
    dynamic: bool = False,
    images: Sequence[str | Path] = (),
    precision: str | None = None,
    calibration: str | Path | None = None,
) -> list[str]:
    """Writes a trained model, fused, in the format of out's suffix, after its runtime has given PyTorch's results.

    The graph takes `image` (1, 3, H, W), float32, normalised and in the model's order of channels. What is needed for
    that is in the file, see `metadata`.

    Args:
        out: the file, see `mmslide.deploy.targets`; it appears whole or not at all.
        name: 'backbone' (outputs stage1, ...), 'features' (backbone and neck, outputs level1, ...) or 'model' (of a
            classifier: scores; of a segmentor: logits, labels; of a detector: see `ExportableDetector`).
        shape: (height, width) of the image, from 32 pixels a side.
        dynamic: the file takes every size from 32 pixels a side; shape is the first that is compared.
        images: files that are compared too, prepared as `metadata` says, beside random numbers as an image.
        precision: one of the target's; None is its default.
        calibration: a folder of images, that int8 takes its ranges from.

    Returns:
        A line for each image that was compared: random ones of `shape`, and if dynamic of three other sizes, or for
        int8 eight of the calibration; images.

    Raises:
        ValueError: an argument does not fit, or see `load_model`.
        FileNotFoundError: one of the files does not exist.
        ImportError: the target's packages are not installed.
        RuntimeError: the results differ, or the graph does not run.
        OSError: out cannot be written.
    """
    target = find_target(out)
    precision = precision or next(iter(target.precisions))
    check_arguments(target, name, shape, dynamic, precision, calibration)
    require(target, [*target.write_packages, *(target.int8_packages if precision == 'int8' else ())])
    outs = [Path(out), *target.companions(Path(out))]
    inputs = [find_config(config), checkpoint, *images]
    with atomic_write(*outs, inputs=inputs, folders=target.is_folder) as (path, *companions):
        cfg, model, meta = load_model(config, checkpoint)
        module = part(fuse(model), name, shape)
        if module.has_operators and not target.takes_detectors:
            raise ValueError(f"{target.suffix} has no NMS and RoIAlign: of a detector export the part 'features'")
        if dynamic and not module.any_size:
            raise ValueError('a whole detector is exported for one size; its backbone and its features can be dynamic')
        about = metadata(cfg, meta, module, name, None if dynamic else shape)
        prepared = {str(file): prepare(read_image(file), about, shape)[0] for file in images}
        ranges = {str(file): prepare(read_image(file), about, shape)[0] for file in calibration_files(calibration)}
        target.write(Traced(trace(module, shape, dynamic), about, precision, list(ranges.values())), path)
        for temporary, made in zip(companions, target.companions(path), strict=True):
            temporary.hardlink_to(made)
        shapes = [shape, *(other_shapes(shape) if dynamic else [])]
        # Random numbers are outside the ranges of int8.
        compared = {name: ranges[name] for name in spread(list(ranges), MAX_COMPARED)} or random_images(shapes)
        compared |= prepared
        if target.takes_pixels:
            compared = {name: normalize(to_pixels(image, about), about) for name, image in compared.items()}
        return compare(module, target, path, compared, precision)


def check_arguments(
    target: Target, name: str, shape: tuple[int, int], dynamic: bool, precision: str, calibration: str | Path | None
) -> None:
    """Raises ValueError, which names the argument, if one does not fit."""
    if name not in PARTS:
        raise ValueError(f'part must be one of {PARTS}, got {name!r}')
    if min(shape) < MIN_SIDE:
        raise ValueError(f'shape must be at least {MIN_SIDE} pixels a side, got {tuple(shape)}')
    if precision not in target.precisions:
        raise ValueError(f'precision of {target.suffix} must be one of {tuple(target.precisions)}, got {precision!r}')
    if dynamic and not target.any_size:
        raise ValueError(f'{target.suffix} takes one size only: leave out dynamic')
    if (precision == 'int8') != (calibration is not None):
        raise ValueError("precision='int8' needs calibration, a folder of images, and no other precision takes one")
    if dynamic and precision == 'int8':
        raise ValueError("precision='int8' takes one size only: leave out dynamic")


def metadata(
    cfg: Config, meta: Mapping[str, Any], module: Exportable, name: str, shape: tuple[int, int] | None
) -> Metadata:
    """What a runner must know to prepare an image, read as BGR, and to name what was found.

    Args:
        cfg: of the model, with its data_preprocessor in `cfg.model`.
        meta: of the checkpoint.
        shape: None for every size.

    Returns:
        part, outputs (names), shape; mean and std (3 numbers each), bgr_to_rgb (whether the channels are reversed),
        pad_value (of the normalised image), pad_divisor, resize and resize_ratio (see `targets.images.prepare`),
        classes.
    """
    values = cfg.model.get('data_preprocessor') or {}
    dataset_meta = meta.get('dataset_meta') or {}
    return {
        'part': name,
        'outputs': list(module.output_names),
        'shape': list(shape) if shape else None,
        'mean': np.broadcast_to(values.get('mean') or 0.0, 3).tolist(),
        'std': np.broadcast_to(values.get('std') or 1.0, 3).tolist(),
        # The preprocessors of mmengine, mmdet and mmseg do the same for either.
        'bgr_to_rgb': bool(values.get('bgr_to_rgb') or values.get('rgb_to_bgr') or values.get('to_rgb')),
        'pad_value': values.get('pad_value') or values.get('pad_val') or 0,
        'pad_divisor': values.get('pad_size_divisor') or values.get('size_divisor') or 1,
        **resizing(cfg),
        'classes': list(dataset_meta.get('classes') or dataset_meta.get('CLASSES') or ()),
    }


def resizing(cfg: Config) -> dict[str, Any]:
    """How the test pipeline of a classifier brings images to one size; all others are fitted and padded."""
    if cfg.get('default_scope') != 'mmpretrain':
        return {'resize': 'fit', 'resize_ratio': 1.0}
    steps = {step['type']: step for step in cfg.get('test_pipeline') or ()}
    if 'CenterCrop' not in steps:
        return {'resize': 'stretch', 'resize_ratio': 1.0}
    ratio = steps['ResizeEdge']['scale'] / steps['CenterCrop']['crop_size'] if 'ResizeEdge' in steps else 1.0
    return {'resize': 'crop', 'resize_ratio': ratio}


def calibration_files(folder: str | Path | None) -> Sequence[Path]:
    """Up to 128 images of a folder, evenly spread over their sorted names.

    Raises:
        ValueError: there is none.
    """
    if folder is None:
        return []
    files = sorted(path for path in Path(folder).rglob('*') if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f'{folder} is not a folder with images ({", ".join(sorted(IMAGE_SUFFIXES))})')
    return spread(files, MAX_CALIBRATION)


def spread(items: Sequence[Any], limit: int) -> Sequence[Any]:
    """At most `limit` of them, evenly spread."""
    return items[:: -(-len(items) // limit) or 1]


def other_shapes(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Three that a dynamic graph is compared at beside the one asked for: odd, the least, larger."""
    height, width = shape
    yield max(MIN_SIDE, height // 2) | 1, width + 13
    yield MIN_SIDE, MIN_SIDE + 13
    yield height + 27, max(MIN_SIDE, width // 2)


def random_images(shapes: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Standard normal, one of each shape."""
    generator = torch.Generator().manual_seed(0)
    return {
        f'{height}×{width}': torch.randn(1, 3, height, width, generator=generator).numpy() for height, width in shapes
    }


def compare(
    module: Exportable, target: Target, path: Path, images: Mapping[str, np.ndarray], precision: str
) -> list[str]:
    """How the runtime's results agree with the module's, a line for each of the images, which have names.

    Raises:
        RuntimeError: they do not, or the graph does not run.
    """
    if reason := target.why_not_run():
        return [f'not compared, since {reason}: export it on a machine that can run it to compare']
    wanted = {name: reference(module, image) for name, image in images.items()}
    lines = []
    written = target.precisions[precision]
    chosen_by_runtime = {name: max(bound, written) for name, bound in target.available_precisions().items()}
    for chosen, tolerance in [(None, written), *chosen_by_runtime.items()]:
        runner = target.load(path, precision=chosen)
        runtime = f'{target.runtime} in {chosen}' if chosen else target.runtime
        wrong = []
        for name, image in images.items():
            found = runner.run(image)
            agrees, how = module.agreement([torch.from_numpy(x) for x in found.values()], wanted[name], tolerance)
            lines.append(f'{name}: {runtime} {how}')
            if not agrees:
                wrong.append(lines[-1])
        if len(wrong) > (0 if tolerance <= EXACT else module.may_differ * len(images)):
            raise RuntimeError("the exported graph's results are not the model's: " + '\n'.join(wrong))
    return lines


def reference(module: Exportable, image: np.ndarray) -> Sequence[Tensor]:
    with torch.no_grad():
        return module(torch.from_numpy(image))
