"""Predictions of a trained detector, segmentor or classifier on images and videos, for tools/predict.py."""

import copy
import glob
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from rich.progress import track

from mmslide.build import load_weights
from mmslide.checkpoints import check_finite, dataset_meta, find_state_dict, meta_of, read_checkpoint
from mmslide.data import dicts
from mmslide.files import atomic_write
from mmslide.messages import listed

IMAGES = {'.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp'}
VIDEOS = {'.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm'}
TOP = 5  # classes per image


def predict(
    config: Config,
    checkpoint: str | Path,
    inputs: Sequence[str | Path],
    out: str | Path,
    score_thr: float = 0.3,
    device: str | None = None,
    draw: bool = True,
) -> None:
    """Runs a trained model on images and videos, and writes the results to a folder, completely or not at all.

    - `predictions.json`: for each detection `image_id`, `category_id`, `bbox` (x, y, width, height in pixels), `score`
      and, with masks, `segmentation` (RLE), in COCO's results format; for a classifier, the top five classes of each
      image.
    - `images.json`: the images (`id`, `file_name`, `height`, `width`, in a video `frame`) and the categories (`id`, the
      label, and `name`) in COCO's format, so that `COCO('images.json').loadRes('predictions.json')` works.
    - `labels/`: for a segmentor, a PNG file for each image, whose pixels are labels.
    - `drawn/`: the images and videos with the predictions.

    Args:
        config: a complete config of mmdet, mmseg or mmpretrain.
        checkpoint: a file or URL, which must match the model completely.
        inputs: images, folders of images, glob patterns and videos.
        out: the folder, which must be new or empty. Names in it are the input paths relative to their common folder.
        score_thr: detections with scores above this are written and drawn.
        device: a torch device; None uses a GPU if there is one.
        draw: whether to write `drawn`.

    Raises:
        OSError: an input does not exist, or some cannot be read (results for the others are written); the checkpoint
            cannot be read, or out cannot be written.
        ValueError: the checkpoint is damaged, does not match or is not finite; the folder is not empty or is an input;
            or the config has no test pipeline, or a scope other than these three.
    """
    files = find_inputs(inputs)
    if Path(out).is_dir() and any(Path(out).iterdir()):
        raise ValueError(f'the folder {out} is not empty: choose another one, or delete it')
    given = [checkpoint, *files] if config.filename is None else [config.filename, checkpoint, *files]
    # Inferencers build pipelines in the current scope, which may be that of an earlier model.
    scope = DefaultScope.overwrite_default_scope(config.get('default_scope'))
    with scope, atomic_write(out, inputs=given, folders=True) as (folder,):
        unreadable = _write(_load(config, checkpoint, device), files, folder, score_thr, draw)
        if len(unreadable) == len(files):
            raise OSError(f'cannot read {listed(unreadable, 10)}')
    if unreadable:
        raise OSError(f'cannot read {listed(unreadable, 10)}; the predictions of the others are in {out}')


def find_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """The image and video files given by the inputs: each once, those of a folder or pattern in order.

    Raises:
        OSError: an input matches no file.
        ValueError: a file is neither an image nor a video by its suffix.
    """
    files: dict[str, Path] = {}
    for given in map(str, inputs):
        if os.path.isdir(given):
            found = sorted(path for path in Path(given).iterdir() if path.suffix.lower() in IMAGES)
        elif os.path.exists(given):
            found = [Path(given)]
        else:
            found = [Path(path) for path in sorted(glob.glob(given, recursive=True))]
        found = [path for path in found if path.is_file()]
        if not found:
            what = 'has no images' if os.path.isdir(given) else 'does not exist'
            raise FileNotFoundError(f'{given} {what}')
        for path in found:
            if path.suffix.lower() not in IMAGES | VIDEOS:
                raise ValueError(f'{path} is not an image or video: supported are {", ".join(sorted(IMAGES | VIDEOS))}')
            files.setdefault(os.path.abspath(path), path)
    return list(files.values())


def output_names(files: Sequence[Path]) -> list[str]:
    """A name without suffix for the outputs of each file: its path relative to the common folder.

    If two differ only in their suffixes, these are kept.
    """
    paths = [Path(os.path.abspath(path)) for path in files]
    common = os.path.commonpath([path.parent for path in paths])
    relative = [path.relative_to(common) for path in paths]
    stems = Counter(path.with_suffix('').as_posix().lower() for path in relative)
    return [
        (path.with_suffix('') if stems[path.with_suffix('').as_posix().lower()] == 1 else path).as_posix()
        for path in relative
    ]


class _Model:
    """Wraps a model and the inferencer of its package."""

    inferencer: Any
    visualizer: str  # of a config that has none
    has_results = True

    def __init__(self, config: Config, device: str | None) -> None:
        raise NotImplementedError

    def set_classes(self, names: list[str], palette: list[tuple[int, int, int]]) -> None:
        self.classes = names
        self.inferencer.visualizer.dataset_meta = dict(classes=names, palette=palette)

    def find(self, image: str | np.ndarray) -> Any:
        """The data sample of an image file, or of a frame (H, W, 3) in BGR."""
        raise NotImplementedError

    def results(self, sample: Any, score_thr: float) -> Iterator[dict]:
        """Entries of predictions.json, without the image."""
        return iter(())

    def label_map(self, sample: Any) -> np.ndarray | None:
        """The label map (H, W) of a segmentor."""
        return None

    def draw(self, image: np.ndarray, sample: Any, score_thr: float) -> np.ndarray:
        """The image (H, W, 3) in RGB with the predictions."""
        self.inferencer.visualizer.add_datasample('', image, sample, draw_gt=False)
        return self.inferencer.visualizer.get_image()


class _Detector(_Model):
    visualizer = 'DetLocalVisualizer'

    def __init__(self, config: Config, device: str | None) -> None:
        from mmdet.apis import DetInferencer

        self.inferencer = DetInferencer(config, device=device, show_progress=False)

    def find(self, image: str | np.ndarray) -> Any:
        return self.inferencer([image], return_datasamples=True)['predictions'][0]

    def results(self, sample: Any, score_thr: float) -> Iterator[dict]:
        found = self.inferencer.pred2dict(sample)
        masks = found.get('masks') or [None] * len(found['labels'])
        for label, score, (x1, y1, x2, y2), mask in zip(
            found['labels'], found['scores'], found['bboxes'], masks, strict=True
        ):
            if score > score_thr:
                result = dict(category_id=label, bbox=[x1, y1, x2 - x1, y2 - y1], score=score)
                yield result if mask is None else dict(result, segmentation=mask)

    def draw(self, image: np.ndarray, sample: Any, score_thr: float) -> np.ndarray:
        self.inferencer.visualizer.add_datasample('', image, sample, draw_gt=False, pred_score_thr=score_thr)
        return self.inferencer.visualizer.get_image()


class _Segmentor(_Model):
    visualizer = 'SegLocalVisualizer'
    has_results = False

    def __init__(self, config: Config, device: str | None) -> None:
        from mmseg.apis import MMSegInferencer

        self.inferencer = MMSegInferencer(config, device=device)
        self.inferencer.show_progress = False

    def find(self, image: str | np.ndarray) -> Any:
        return self.inferencer([image], return_datasamples=True)

    def label_map(self, sample: Any) -> np.ndarray:
        labels = sample.pred_sem_seg.data[0].cpu().numpy()
        return labels.astype(np.uint8 if labels.max() < 256 else np.uint16)


class _Classifier(_Model):
    visualizer = 'UniversalVisualizer'

    def __init__(self, config: Config, device: str | None) -> None:
        from mmpretrain.apis import ImageClassificationInferencer
        from mmpretrain.visualization import UniversalVisualizer

        self.inferencer = ImageClassificationInferencer(config, pretrained=False, device=device)
        self.inferencer.visualizer = UniversalVisualizer()

    def find(self, image: str | np.ndarray) -> Any:
        # Calling the inferencer would draw its progress bar inside ours, after which rich can no longer draw any.
        (batch,) = self.inferencer.preprocess([image])
        return self.inferencer.forward(batch)[0]

    def results(self, sample: Any, score_thr: float) -> Iterator[dict]:
        scores, labels = sample.pred_score.topk(min(TOP, len(sample.pred_score)))
        for score, label in zip(scores.tolist(), labels.tolist(), strict=True):
            yield dict(category_id=label, score=score)

    def draw(self, image: np.ndarray, sample: Any, score_thr: float) -> np.ndarray:
        self.inferencer.visualizer.visualize_cls(image, sample, draw_gt=False)
        return self.inferencer.visualizer.get_image()


_MODELS: dict[str, type[_Model]] = {'mmdet': _Detector, 'mmseg': _Segmentor, 'mmpretrain': _Classifier}


def _load(config: Config, checkpoint: str | Path, device: str | None) -> _Model:
    """The model with the weights of a checkpoint, and the names and colors of its classes."""
    scope = config.get('default_scope')
    if scope not in _MODELS:
        raise ValueError(f'default_scope must be one of {", ".join(_MODELS)}, got {scope!r}')
    if not config.get('test_dataloader'):
        raise ValueError(f'config {config.filename} has no test_dataloader, whose pipeline prepares the images')
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f'device {device} cannot be used: {str(error).splitlines()[0]}') from error
    content = read_checkpoint(checkpoint)
    state = find_state_dict(content, checkpoint)
    check_finite(state, checkpoint)
    kind, config = _MODELS[scope], copy.deepcopy(config)
    config.visualizer = {'type': kind.visualizer, **(config.get('visualizer') or {}), 'vis_backends': None}
    with warnings.catch_warnings():
        # Weights and classes are set below.
        warnings.filterwarnings('ignore', 'Checkpoint is not loaded|weights is None|palette does not exist')
        model = kind(config, device)
    load_weights(model.inferencer.model, state, checkpoint, config.filename)
    model.set_classes(*_classes(config, meta_of(content)))
    return model


def _classes(config: Config, meta: dict[str, Any]) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names and colors of all classes: from the checkpoint, or else from the config's data set."""
    found = dataset_meta(meta)
    if not isinstance(found.get('classes'), list | tuple):
        with DefaultScope.overwrite_default_scope(config.default_scope):
            found = DATASETS.build({**config.test_dataloader.dataset, 'lazy_init': True}).metainfo
    classes = [str(name) for name in found.get('classes') or ()]
    number = max([len(classes), *(x['num_classes'] for x in dicts(config.model) if 'num_classes' in x)])
    classes += [f'class {label}' for label in range(len(classes), number)]
    palette = found.get('palette')
    colours = np.random.default_rng(0).integers(0, 256, (number, 3))
    if isinstance(palette, list | tuple) and np.shape(palette) == (len(palette), 3):
        colours[: len(palette)] = palette[:number]
    return classes, [tuple(colour) for colour in colours.tolist()]


@dataclass(frozen=True)
class _Picture:
    """An image file, or a frame of a video.

    Args:
        pixels: (H, W, 3) in BGR.
        frame: its number in a video, from 0.
        fps: of the video.
    """

    file: Path
    pixels: np.ndarray
    frame: int | None = None
    fps: float = 0.0


def _pictures(files: Sequence[Path], unreadable: list[Path]) -> Iterator[_Picture]:
    """All images and frames; files that cannot be read are added to `unreadable`."""
    for file in files:
        if file.suffix.lower() in VIDEOS:
            reader = mmcv.VideoReader(str(file))
            for frame, pixels in enumerate(reader):
                yield _Picture(file, pixels, frame, reader.fps)
            readable = reader.position > 0
        else:
            try:
                image = mmcv.imread(str(file))
            except (OSError, cv2.error):
                image = None
            readable = image is not None
            if readable:
                yield _Picture(file, image)
        if not readable:
            unreadable.append(file)


def _count(files: Sequence[Path]) -> int:
    """The number of images and frames according to the files."""
    videos = [file for file in files if file.suffix.lower() in VIDEOS]
    return len(files) - len(videos) + sum(max(mmcv.VideoReader(str(file)).frame_cnt, 0) for file in videos)


def _write(model: _Model, files: Sequence[Path], folder: Path, score_thr: float, draw: bool) -> list[Path]:
    """Writes the files described in `predict`, and returns the files that cannot be read."""
    names = dict(zip(files, output_names(files), strict=True))
    unreadable: list[Path] = []
    images: list[dict] = []
    results: list[dict] = []
    folder.mkdir()
    with _Videos() as videos:
        for picture in track(_pictures(files, unreadable), 'predicting', total=_count(files)):
            in_video = picture.frame is not None
            sample = model.find(picture.pixels if in_video else str(picture.file))
            height, width = picture.pixels.shape[:2]
            image = dict(id=len(images) + 1, file_name=str(picture.file), height=height, width=width)
            name = names[picture.file]
            if in_video:
                image['frame'] = picture.frame
            results += [dict(image_id=image['id'], **result) for result in model.results(sample, score_thr)]
            labels = model.label_map(sample)
            if labels is not None:
                image['label_map'] = f'labels/{name}/{picture.frame:06d}.png' if in_video else f'labels/{name}.png'
                _save_image(folder / image['label_map'], labels)
            images.append(image)
            if draw:
                drawn = model.draw(np.ascontiguousarray(picture.pixels[..., ::-1]), sample, score_thr)[..., ::-1]
                if in_video:
                    videos.add(folder / f'drawn/{name}.mp4', drawn, picture.fps)
                else:
                    _save_image(folder / f'drawn/{name}.jpg', drawn)
    categories = [dict(id=label, name=name) for label, name in enumerate(model.classes)]
    (folder / 'images.json').write_text(json.dumps(dict(images=images, categories=categories)))
    if model.has_results:
        (folder / 'predictions.json').write_text(json.dumps(results))
    return unreadable


def _save_image(file: Path, pixels: np.ndarray) -> None:
    if file.exists():
        raise ValueError(f'two inputs would be written to {file.relative_to(file.parents[1])}: rename one')
    file.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(file), pixels):
        raise OSError(f'cannot write {file}')


class _Videos:
    """Writes videos one after the other."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.writer: Any = None

    def __enter__(self) -> '_Videos':
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.release()

    def add(self, file: Path, pixels: np.ndarray, fps: float) -> None:
        """A frame (H, W, 3) in BGR."""
        if file != self.file:
            self.__exit__()
            file.parent.mkdir(parents=True, exist_ok=True)
            codec = cv2.VideoWriter.fourcc(*'mp4v')
            self.file, self.writer = file, cv2.VideoWriter(str(file), codec, fps or 25.0, pixels.shape[1::-1])
            if not self.writer.isOpened():
                raise OSError(f'cannot write {file}')
        self.writer.write(np.ascontiguousarray(pixels))
