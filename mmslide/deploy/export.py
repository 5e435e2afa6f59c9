import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor

from mmslide.checkpoints import class_names
from mmslide.data import find_test_pipeline, transform_name
from mmslide.files import atomic_write, find_config

from .checkpoint import load_model
from .fuse import fuse
from .graphs import EXACT, PARTS, Exportable, part
from .targets import Metadata, Target, Traced, find_target, require
from .targets.images import MIN_SIDE, normalize, prepare, read_image, to_pixels

IMAGE_SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.webp'}
# Number of images from a calibration folder; more are slow and hardly change the ranges.
MAX_CALIBRATION = 128
# Number of these to compare on.
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
    """Fuses and exports a trained model in the format of out's suffix, and compares it with PyTorch in its runtime.

    The graph takes `image` (1, 3, H, W), float32, normalized, with channels in the model's order. The preprocessing is
    stored in the file, see `metadata`.

    Args:
        config: path or bare name of the model's config.
        checkpoint: file or URL of the trained weights.
        out: the file, see `mmslide.deploy.targets`; it is written completely or not at all.
        name: 'backbone' (outputs stage1, ...), 'features' (backbone and neck, outputs level1, ...) or 'model' (of a
            classifier: scores; of a segmentor: logits, labels; of a detector: see `ExportableDetector`).
        shape: (height, width) of the image, at least 32 pixels per side.
        dynamic: whether the file accepts any size of at least 32 pixels per side; shape is the first one compared.
        images: image files to compare on, in addition to random inputs.
        precision: one supported by the target; None is its default.
        calibration: folder of images that determine the ranges for int8.

    Returns:
        One line for each image on which the file was compared with the model before fusing: random images of `shape`
            and, if dynamic, of three other sizes, or for int8 eight of the calibration images; then `images`.

    Raises:
        ValueError: an argument is invalid, or see `load_model`.
        FileNotFoundError: one of the files does not exist.
        ImportError: PyTorch is older than 2.9, or the target's packages are not installed.
        RuntimeError: the results differ, or the graph does not run.
        OSError: out cannot be written.
    """
    from .trace import trace  # needs PyTorch 2.9

    target = find_target(out)
    precision = precision or next(iter(target.precisions))
    check_arguments(target, name, shape, dynamic, precision, calibration)
    require(target, target.write_packages)
    if precision == 'int8':
        require(target, target.int8_packages, target.int8_install)
    outs = [Path(out), *target.companions(Path(os.path.realpath(out)))]
    if strangers := [path for path in outs[1:] if path.exists() and not outs[0].exists()]:
        raise ValueError(f'{strangers[0]} exists without {out}, and would be overwritten: choose another name')
    inputs = [find_config(config), checkpoint, *images]
    with atomic_write(*outs, inputs=inputs, folders=target.is_folder) as (path, *companions):
        cfg, model, meta = load_model(config, checkpoint)
        module = part(fuse(model), name, shape)
        unfused = part(model, name, shape)
        if module.has_operators and not target.takes_detectors:
            raise ValueError(f"{target.suffix} has no NMS and RoIAlign: export the part 'features' of a detector")
        if dynamic and not module.any_size:
            raise ValueError('a whole detector is exported for one size; only its backbone and features can be dynamic')
        about = metadata(cfg, meta, module, name, shape, dynamic)

        def load_image(file: str | Path) -> np.ndarray:
            return prepare(read_image(file), about, shape)[0]

        for file in images:
            read_image(file)  # reports invalid images before doing any work
        files = calibration_files(calibration)
        ranges = [load_image(file) for file in files]
        target.write(Traced(trace(module, shape, dynamic), about, precision, ranges), path)
        # Random inputs are outside the ranges of int8.
        chosen = [*spread(files, MAX_COMPARED), *images]
        compared: dict[str, Callable[[], np.ndarray]] = {str(file): partial(load_image, file) for file in chosen}
        if not ranges:
            compared = random_images([shape, *(other_shapes(shape) if dynamic else [])]) | compared
        if target.takes_pixels:
            compared = {name: partial(_as_pixels, image, about) for name, image in compared.items()}
        lines = compare(unfused, target, path, compared, precision)
        for temporary, made in zip(companions, target.companions(path), strict=True):
            os.replace(made, temporary)
        return lines


def check_arguments(
    target: Target, name: str, shape: tuple[int, int], dynamic: bool, precision: str, calibration: str | Path | None
) -> None:
    """Raises ValueError with the name of the argument if one is invalid."""
    if name not in PARTS:
        raise ValueError(f'part must be one of {PARTS}, got {name!r}')
    if min(shape) < MIN_SIDE:
        raise ValueError(f'shape must be at least {MIN_SIDE} pixels per side, got {tuple(shape)}')
    if precision not in target.precisions:
        raise ValueError(f'precision of {target.suffix} must be one of {tuple(target.precisions)}, got {precision!r}')
    if dynamic and not target.any_size:
        raise ValueError(f'{target.suffix} supports only one size: remove dynamic')
    if (precision == 'int8') != (calibration is not None):
        raise ValueError("precision='int8' needs calibration, a folder of images, and no other precision uses one")
    if dynamic and precision == 'int8':
        raise ValueError("precision='int8' supports only one size: remove dynamic")


def metadata(
    cfg: Config,
    meta: Mapping[str, Any],
    module: Exportable,
    name: str,
    shape: tuple[int, int],
    dynamic: bool = False,
) -> Metadata:
    """The metadata that a runner needs to prepare an image, read as BGR, and to name the results.

    Args:
        cfg: of the model, with its data_preprocessor in `cfg.model`.
        meta: of the checkpoint.

    Returns:
        part, outputs (names), shape, dynamic; mean and std (3 numbers each), bgr_to_rgb (whether the channels are
        reversed), pad_value (of the normalized image), pad_divisor, resize and resize_ratio (see
        `targets.images.prepare`), classes.

    Raises:
        ValueError: the model does not have 3 input channels.
    """
    values = cfg.model.get('data_preprocessor') or {}
    channels = {np.size(values.get(key) or 0.0) for key in ('mean', 'std')}
    if not channels <= {1, 3}:
        raise ValueError(f'only models with 3 channels can be exported, got a mean or std with {max(channels)}')
    return {
        'part': name,
        'outputs': list(module.output_names),
        'shape': list(shape),
        'dynamic': dynamic,
        'mean': np.broadcast_to(values.get('mean') or 0.0, 3).tolist(),
        'std': np.broadcast_to(values.get('std') or 1.0, 3).tolist(),
        # The preprocessors of mmengine, mmdet and mmseg treat both the same.
        'bgr_to_rgb': bool(values.get('bgr_to_rgb') or values.get('rgb_to_bgr') or values.get('to_rgb')),
        'pad_value': values.get('pad_value') or values.get('pad_val') or 0,
        # mmseg's own size_divisor is only for training.
        'pad_divisor': values.get('pad_size_divisor') or (values.get('test_cfg') or {}).get('size_divisor') or 1,
        **resizing(cfg),
        'classes': class_names(meta),
    }


def resizing(cfg: Config) -> dict[str, Any]:
    """How the test pipeline resizes an image to the model's size, see `targets.images.prepare`.

    'crop' or 'stretch' before a CenterCrop, 'stretch' for a Resize that does not keep the aspect ratio, else 'fit'.
    """
    steps = {transform_name(step): step for step in find_test_pipeline(cfg)}
    resize = steps.get('Resize')
    stretched = resize is not None and not resize.get('keep_ratio', False)
    if 'CenterCrop' not in steps:
        return {'resize': 'stretch' if stretched else 'fit', 'resize_ratio': 1.0}
    before = [steps[name]['scale'] for name in ('Resize', 'ResizeEdge') if 'scale' in steps.get(name, ())]
    ratio = np.min(before[-1]) / np.min(steps['CenterCrop']['crop_size']) if before else 1.0
    return {'resize': 'stretch' if stretched else 'crop', 'resize_ratio': float(ratio)}


def calibration_files(folder: str | Path | None) -> Sequence[Path]:
    """Up to 128 images of a folder, evenly spaced in their sorted names.

    Raises:
        ValueError: there is none.
    """
    if folder is None:
        return []
    files = sorted(
        path
        for path in Path(folder).rglob('*')
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.') and path.is_file()
    )
    if not files:
        raise ValueError(f'{folder} is not a folder with images ({", ".join(sorted(IMAGE_SUFFIXES))})')
    return spread(files, MAX_CALIBRATION)


def spread(items: Sequence[Any], limit: int) -> Sequence[Any]:
    """At most `limit` of them, evenly spaced."""
    return items[:: -(-len(items) // limit) or 1]


def other_shapes(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Three more shapes to compare a dynamic graph at: odd, the smallest, larger."""
    height, width = shape
    yield max(MIN_SIDE, height // 2) | 1, width + 13
    yield MIN_SIDE, MIN_SIDE + 13
    yield height + 27, max(MIN_SIDE, width // 2)


def random_images(shapes: Sequence[tuple[int, int]]) -> dict[str, Callable[[], np.ndarray]]:
    """Standard normal images, one of each shape."""
    return {f'{height}×{width}': partial(_random_image, height, width) for height, width in shapes}


def _random_image(height: int, width: int) -> np.ndarray:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).numpy()


def _as_pixels(image: Callable[[], np.ndarray], about: Metadata) -> np.ndarray:
    return normalize(to_pixels(image(), about), about)


def compare(
    module: Exportable, target: Target, path: Path, images: Mapping[str, Callable[[], np.ndarray]], precision: str
) -> list[str]:
    """Compares the runtime's results with the module's; returns a line for each of the named images.

    Args:
        images: functions, so that one image at a time is in memory.

    Raises:
        RuntimeError: they differ, or the graph does not run.
    """
    if reason := target.why_not_run():
        return [f'not compared, since {reason}: export it on a machine that can run it']
    written = target.precisions[precision]
    tolerances: dict[str | None, float] = {None: written}
    tolerances |= {name: max(bound, written) for name, bound in target.available_precisions().items()}
    runners = {chosen: target.load(path, precision=chosen) for chosen in tolerances}
    lines = []
    wrong: dict[str | None, list[str]] = {chosen: [] for chosen in runners}
    for name, load_image in images.items():
        image = load_image()
        wanted = reference(module, image)
        for chosen, runner in runners.items():
            found = [torch.from_numpy(x) for x in runner.run(image).values()]
            agrees, how = module.agreement(found, wanted, tolerances[chosen])
            lines.append(f'{name}: {target.runtime}{f" in {chosen}" if chosen else ""} {how}')
            if not agrees:
                wrong[chosen].append(lines[-1])
    for chosen, tolerance in tolerances.items():
        if len(wrong[chosen]) > (0 if tolerance <= EXACT else module.may_differ * len(images)):
            raise RuntimeError("the exported graph's results differ from the model's: " + '\n'.join(wrong[chosen]))
    return lines


def reference(module: Exportable, image: np.ndarray) -> Sequence[Tensor]:
    with torch.no_grad():
        return module(torch.from_numpy(image))
