"""Finds the data sets of a config and checks whether the config can use them."""

import io
import json
import math
import os
import posixpath
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from typing import Any

import mmcv
import numpy as np
from mmengine import list_from_file
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS
from PIL import Image
from rich.console import Console
from rich.progress import track

from mmslide.messages import listed

# Before training, only the last character of larger annotation files is checked: parsing them takes minutes.
MAX_JSON_BYTES = 64 * 2**20
# Number of label maps of a data set that are read before training; all of them have to exist.
NUM_LABEL_MAPS = 16
EXIF_ORIENTATION = 0x0112
# Heads whose num_classes is unrelated to the data set's classes: proposals, COCO's stuff classes, boundaries.
OTHER_HEADS = {'rpn_head', 'semantic_head', 'STDCHead'}


def move_data(config: Config, data_root: str) -> None:
    """Replaces the config's data_root in every path that begins with it.

    Setting data_root in a config would not change the paths of its data sets and evaluators. Paths are normalized
    before comparing: `data/coco`, `./data//coco/`, `s3://bucket/coco/`.

    Raises:
        ValueError: the config has no data_root.
    """
    if not config.get('data_root'):
        raise ValueError(
            f'data_root={data_root}: the config has no data_root to replace; '
            'set the paths in its dataloaders and evaluators instead'
        )
    old, new = normalize_path(config.data_root), normalize_path(str(data_root))

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return type(value)({key: moved(item) for key, item in value.items()})
        if isinstance(value, list | tuple):
            return type(value)(moved(item) for item in value)
        if not isinstance(value, str) or not value:
            return value
        path = normalize_path(value)
        if old == '.' and path != old and value.startswith('./'):
            path = f'./{path}'
        if path != old and not path.startswith(f'{old}/'):
            return value
        return new + path[len(old) :] + ('/' if value.endswith('/') else '')

    for key in list(config):
        config[key] = moved(config[key])


def normalize_path(path: str) -> str:
    """A path or URL without repeated slashes, '.' and trailing slashes."""
    scheme, separator, rest = path.rpartition('://')
    return scheme + separator + posixpath.normpath(rest)


def named_dicts(node: Any, name: str) -> Iterator[tuple[str, dict]]:
    """Every dict in a nested config with its key as written in --cfg-options."""
    if isinstance(node, dict):
        yield name, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, item in items:
        yield from named_dicts(item, f'{name}.{key}')


def dicts(node: Any) -> Iterator[dict]:
    """Every dict in a nested config."""
    return (found for _, found in named_dicts(node, ''))


def check_data(config: Config, *dataloaders: str) -> None:
    """Checks the data sets of some dataloaders before anything is written, as far as that is fast.

    All files have to exist. Annotation files below 64 MiB and a sample of the label maps are read; images are not.

    Raises:
        FileNotFoundError: a file or folder does not exist.
        ValueError: the config cannot use the data.
        OSError: a file cannot be read.
    """
    for check in check_datasets(config, *dataloaders):
        for problem in check.problems:
            raise problem


def check_datasets(config: Config, *dataloaders: str, everything: bool = False) -> list['DatasetCheck']:
    """The checks of `check_data`, without raising; with `everything`, also every image and label map.

    Returns:
        A check for each data set inside the dataloaders' wrappers. One that is evaluated twice is checked once.
    """
    checks: list[DatasetCheck] = []
    seen: list[tuple] = []
    for loader in dataloaders:
        for options in unwrapped((config.get(loader) or {}).get('dataset')):
            use = (options, evaluators(config, loader))
            if use not in seen:
                seen.append(use)
                checks.append(DatasetCheck(config, loader, options, everything))
    by_folder = [check for check in checks if check.folders]
    for check in by_folder[1:]:
        first = by_folder[0]
        if check.folders != first.folders:
            warnings.warn(
                f'{first.name} and {check.name} have different class folders '
                f'({listed(sorted({*first.folders} ^ {*check.folders}), 10)}): mmpretrain numbers the labels of '
                'each in the alphabetical order of its folders, so a label may mean different classes',
                stacklevel=3,
            )
    return checks


def unwrapped(dataset: Any) -> Iterator[dict]:
    """The configs of the data sets inside RepeatDataset, ConcatDataset and the like."""
    if isinstance(dataset, list | tuple):
        for item in dataset:
            yield from unwrapped(item)
    elif isinstance(dataset, dict):
        inner = dataset.get('dataset') or dataset.get('datasets')
        if inner:
            yield from unwrapped(inner)
        else:
            yield dataset


def find_test_pipeline(config: Config) -> Sequence[Mapping[str, Any]]:
    """The transforms of the test data set, inside any wrappers; () if there are none."""
    dataset = (config.get('test_dataloader') or {}).get('dataset') or {}
    while 'pipeline' not in dataset and isinstance(dataset.get('dataset'), Mapping):  # wrapped
        dataset = dataset['dataset']
    return dataset.get('pipeline') or config.get('test_pipeline') or ()


def transform_name(step: Mapping[str, Any]) -> str:
    """The type name of a pipeline's transform (a string or a class) without its scope."""
    given = step.get('type')
    return given.rpartition('.')[2] if isinstance(given, str) else getattr(given, '__name__', '')


def data_prefixes(dataset: dict) -> list[Any]:
    """A data set's folders: `data_prefix` in any form, or the `split` of mmpretrain's ImageNet."""
    prefixes = dataset.get('data_prefix') or dataset.get('split')
    return list(prefixes.values()) if isinstance(prefixes, dict) else [prefixes]


def evaluators(config: Config, loader: str) -> list[dict]:
    """The configs of a dataloader's metrics; none for training."""
    return list(dicts(config.get(loader.replace('dataloader', 'evaluator'))))


class DatasetCheck:
    """The contents of a data set, and the problems that prevent a config from using it.

    Data sets in the format of mmdet's CocoDataset, mmseg's BaseSegDataset and mmpretrain's CustomDataset (ImageNet) are
    read. For others, and for files that are not on a local disk, only paths are checked, where possible.

    Args:
        config: the whole config.
        loader: name of the dataloader, such as 'train_dataloader'.
        options: the data set's own config, inside any wrapper.
        everything: whether to read every image and label map.

    Attributes:
        name: the dataloader and the file or folder that lists the images.
        folders: the class folders, if classes are given by folder names.
        images: number of images; None if they were not counted, also for the next.
        annotations: number of instances that mmdet uses, of label maps read, or of labelled images.
        per_class: for each class, the number of its instances, of label maps that contain it, or of its images.
        problems: one exception for each kind of problem, naming its first file or value.
    """

    def __init__(self, config: Config, loader: str, options: dict, everything: bool) -> None:
        self.config, self.loader, self.options, self.everything = config, loader, options, everything
        self.evaluators = evaluators(config, loader)
        self.name = loader
        self.folders: list[str] = []
        self.images: int | None = None
        self.annotations: int | None = None
        self.per_class: Counter[str] = Counter()
        self.problems: list[Exception] = []
        try:
            self.problems.extend(self._find_problems())
        except OSError as error:
            self.problems.append(error)

    def _find_problems(self) -> Iterator[Exception]:
        missing = list(self._missing_paths())
        yield from missing
        # The format is known from the function that reads the data set; a class that overrides it may have any format.
        check = {
            ('mmdet', 'CocoDataset.load_data_list'): self._check_coco,
            ('mmseg', 'BaseSegDataset.load_data_list'): self._check_segmentation,
            ('mmpretrain', 'CustomDataset.load_data_list'): self._check_classification,
        }.get(self._reader())
        if missing or check is None:
            return
        root = self.options.get('data_root') or ''
        self.is_local = is_local(root, self.options)
        changes = dict(
            data_root=root if self.is_local else '',  # mmengine would use another backend to join paths
            pipeline=[],
            lazy_init=True,
            _scope_=self.config.get('default_scope'),
        )
        try:
            self.dataset = DATASETS.build({**self.options, **changes})
        except (ValueError, AssertionError) as error:  # of mmseg, about the classes
            hint = "; classes other than the data set's own need type='BaseSegDataset' and metainfo=dict(classes=(...))"
            yield ValueError(f'{self.loader}: {error}{hint if check == self._check_segmentation else ""}')
            return
        classes = self.dataset.metainfo.get('classes')
        if not classes and check == self._check_classification:
            classes = self._class_folders()
        if not classes or isinstance(classes, str):
            yield ValueError(
                f'{self.loader}: the data set has classes={classes!r}; '
                "set metainfo=dict(classes=('first', ...)), with a trailing comma if there is only one"
            )
            return
        self.classes = list(classes)
        yield from check()

    def _reader(self) -> tuple[str, str]:
        """The package and the name of the method that lists the data set's samples."""
        kind = self.options.get('type')
        if isinstance(kind, str):
            with DATASETS.switch_scope_and_registry(self.config.get('default_scope')) as registry:
                kind = registry.get(kind)
        method = getattr(kind, 'load_data_list', None)
        return getattr(method, '__module__', '').split('.')[0], getattr(method, '__qualname__', '')

    def _missing_paths(self) -> Iterator[Exception]:
        root = self.options.get('data_root') or ''
        paths = [(self.options.get('ann_file'), [self.options])]
        paths += [(prefix, self._file_readers()) for prefix in data_prefixes(self.options)]
        paths = [(os.path.join(root, part), readers) for part, readers in paths if isinstance(part, str)]
        paths += [(evaluator.get('ann_file'), [evaluator]) for evaluator in self.evaluators]
        for path, readers in paths:
            if path and is_local(path, *readers) and not os.path.exists(path):
                yield FileNotFoundError(
                    f'{path}, which {self.loader} reads, does not exist. docs/train.md shows the folders; '
                    '--cfg-options data_root=DIR sets their location'
                )

    def _file_readers(self) -> list[dict]:
        """The dicts that may set the backend for reading images and label maps."""
        return list(dicts(self.options))

    def _transforms(self, name: str) -> list[dict]:
        """The pipeline's transforms of a type, given as a string or as a class."""
        return [step for step in dicts(self.options.get('pipeline')) if transform_name(step) == name]

    def _wrong_num_classes(self) -> Iterator[Exception]:
        if getattr(self.dataset, 'return_classes', False):
            return  # open vocabulary: num_classes is the length of a text
        number = len(self.classes)
        allowed = (1, 2) if number == 2 else (number,)  # mmseg's single channel for two classes
        wrong = [f'{key}.num_classes={x["num_classes"]}' for key, x in self._heads() if x['num_classes'] not in allowed]
        if wrong:
            heads = ' and '.join(wrong)
            yield ValueError(
                f'{self.name} has {number} classes ({listed(self.classes, 10)}), but the model has {heads}: set '
                f'num_classes={number}, or the classes by metainfo=dict(classes=(...)) in every data set of the config'
            )

    def _heads(self) -> Iterator[tuple[str, dict]]:
        def walk(node: Any, path: str) -> Iterator[tuple[str, dict]]:
            if isinstance(node, dict):
                counts = isinstance(node.get('num_classes'), int) and not node.get('class_agnostic')
                labels = 'head' in path or path == 'model.data_preprocessor'  # mmpretrain's mixes labels
                if counts and labels and node.get('type') not in OTHER_HEADS:
                    yield path, node
                items: Iterable[tuple[Any, Any]] = node.items()
            else:
                items = enumerate(node if isinstance(node, list | tuple) else ())
            for key, item in items:
                if key not in OTHER_HEADS and key != 'backbone':
                    yield from walk(item, f'{path}.{key}')

        return walk(self.config.get('model'), 'model')

    def _check_coco(self) -> Iterator[Exception]:
        path = self.dataset.ann_file
        self.name = f'{self.loader}: {path}'
        if not path:
            yield ValueError(f'{self.loader}: the data set has no ann_file; set it to a JSON file in COCO format')
            return
        if not (self.is_local and is_local(path)):
            yield from self._wrong_num_classes()
            return
        if os.path.getsize(path) > MAX_JSON_BYTES and not self.everything:
            with open(path, 'rb') as file:
                file.seek(-64, os.SEEK_END)
                if not file.read().rstrip().endswith(b'}'):
                    yield ValueError(f'{path} is truncated: it does not end with }}; copy or export it again')
            yield from self._wrong_num_classes()
            return

        names = yield from self._check_coco_file(path)
        if names is None:
            return
        with redirect_stdout(io.StringIO()):  # pycocotools prints
            self.dataset.full_init()
        yield from self._check_instances(path, names)

    def _check_coco_file(self, path: str) -> Generator[Exception, None, list[str] | None]:
        """Checks the contents of an annotation file.

        Returns:
            The category names that the config uses, in the order of their labels; None if mmdet cannot use the file.
        """
        content = yield from self._read_coco_file(path)
        if content is None:
            return None
        faults: dict[str, list[str]] = defaultdict(list)
        categories = complete(content['categories'], 'category', ('id', 'name'), faults)
        images = complete(content['images'], 'image', ('id', 'file_name', 'height', 'width'), faults)
        names = [category['name'] for category in categories if category['name'] in self.classes]
        if categories and not names:
            found = [category['name'] for category in categories]
            yield ValueError(
                f"{path}: none of its categories ({listed(found, 10)}) is in the config's classes "
                f'({listed(self.classes, 10)}): set metainfo=dict(classes={tuple(found)}) in every data set of the '
                f'config and num_classes={len(found)} in every head'
            )
            return None
        yield from self._wrong_num_classes()
        if len(names) > len(set(names)):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            yield ValueError(
                f'{path} has several categories named {twice!r}, so its labels go up to {len(names) - 1}, at or above '
                f'num_classes={len(self.classes)}: merge them'
            )
            return None
        self._warn_of_labels(path, names)

        self._check_annotations(content.get('annotations', []), categories, images, faults)
        yield from grouped(faults, f'{path}: ')
        yield from self._check_images(path, images)
        return None if faults else names

    def _read_coco_file(self, path: str) -> Generator[Exception, None, dict | None]:
        """The content of an annotation file, if it has the lists of COCO's format."""
        with open(path, 'rb') as file:
            try:
                content = json.load(file)
            except ValueError as error:
                if os.path.getsize(path) == 0:
                    yield ValueError(f'{path} is empty; copy or export it again')
                else:
                    yield ValueError(f'{path} is truncated or not JSON ({error}); copy or export it again')
                return None
        for key in ('images', 'categories', *(['annotations'] if self._is_annotated() else [])):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                yield ValueError(
                    f'{path} has no list {key!r}: a file in COCO format is a dict of the lists '
                    "'images', 'annotations' and 'categories'"
                )
                return None
            if not content[key]:
                yield ValueError(f'{path} has no {key}: its list {key!r} is empty; export it again')
                return None
        return content

    def _is_annotated(self) -> bool:
        """Whether annotations are needed: not for predictions that are only written to a file."""
        return not any(evaluator.get('format_only') for evaluator in self.evaluators)

    def _check_annotations(
        self, annotations: list, categories: list[dict], images: list[dict], faults: dict[str, list[str]]
    ) -> None:
        # mmdet reads `area`, and pycocotools, in evaluation, `iscrowd`.
        keys = ('id', 'image_id', 'category_id', 'bbox', 'area', *(['iscrowd'] if self.evaluators else []))
        sizes = {image['id']: [image['height'], image['width']] for image in images}
        annotations = complete(annotations, 'annotation', keys, faults)
        known = {category['id'] for category in categories}
        with_mask = self._with_mask()
        for entries, noun in ((images, 'image'), (annotations, 'annotation')):
            for number, count in Counter(entry['id'] for entry in entries).items():
                if count > 1:
                    faults['number them from 1'].append(f'{count} {noun}s have the id {number!r}')
        for image in images:
            if not all(is_number(image[key]) and image[key] > 0 for key in ('height', 'width')):
                faults['set both in pixels'].append(
                    f'image {image["id"]!r} has height={image["height"]!r}, width={image["width"]!r}'
                )
        for annotation in annotations:
            name = f'annotation {annotation["id"]!r}'
            size = sizes.get(annotation['image_id'])
            if size is None:
                faults['add the image or remove the annotation'].append(
                    f"{name} has image_id={annotation['image_id']!r}, which is not among the file's images"
                )
            if annotation['category_id'] not in known:
                faults['add the category or remove the annotation'].append(
                    f"{name} has category_id={annotation['category_id']!r}, which is not among the file's categories"
                )
            box = annotation['bbox']
            if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box)) and min(box[2:]) >= 0):
                faults['a box is [x, y, width, height] in finite numbers of pixels; correct or remove it'].append(
                    f'{name} has bbox={box!r}'
                )
            if not is_number(annotation['area']):
                faults['set it to a finite number of pixels'].append(f'{name} has area={annotation["area"]!r}')
            mask = annotation.get('segmentation') if with_mask else None
            if isinstance(mask, dict) and size and mask.get('size') != size:
                faults['both are [height, width] and must be the same'].append(
                    f'{name} has a mask of size {mask.get("size")!r}, its image {size}'
                )
            if fault := mask_fault(mask):
                faults['correct or remove it'].append(f'{name} has {fault}')
            elif isinstance(mask, list) and not all(isinstance(polygon, list) for polygon in mask):
                faults['a segmentation is a list of polygons, [[x1, y1, x2, y2, ...], ...]'].append(
                    f'{name} has segmentation=[{listed(mask)}]'
                )

    def _with_mask(self) -> bool:
        return any(transform.get('with_mask') for transform in self._transforms('LoadAnnotations'))

    def _warn_of_labels(self, path: str, names: list[str]) -> None:
        """Warns about the order of classes: mmdet numbers the categories in the order of the file, ignoring theirs."""
        wrong = [label for label, name in enumerate(names) if name != self.classes[label]]
        missing = [name for name in self.classes if name not in names]
        if missing:
            text = f"{path} has no category {listed(missing, 10)}, which is among the config's classes"
        elif wrong:
            text = f"{path} has its categories in a different order than the config's classes"
        else:
            return
        if wrong:
            text += (
                f'; mmdet numbers labels in the order of the file, so {names[wrong[0]]!r} gets the label of '
                f'{self.classes[wrong[0]]!r}: set the order in metainfo=dict(classes=(...)) to {listed(names, 10)}'
            )
        warnings.warn(text, stacklevel=2)

    def _check_images(self, path: str, images: list[dict]) -> Iterator[Exception]:
        self.images = len(images)
        folder = self.dataset.data_prefix.get('img', '')
        if not self._opens_images() or not is_local(folder, *self._file_readers()):
            return
        files = {os.path.join(folder, image['file_name']): (image['width'], image['height']) for image in images}
        missing = [file for file in files if not os.path.exists(file)]
        if missing:
            number = f'{len(missing)} of the {len(files)} images' if len(missing) > 1 else 'an image'
            yield FileNotFoundError(
                f'{missing[0]} does not exist, {number} of {path}: add the files, or set data_prefix=dict(img=FOLDER)'
            )
        if not self.everything:
            return
        faults: dict[str, list[str]] = defaultdict(list)
        present = sorted(files.keys() - missing)
        for file, found in zip(present, in_threads(image_size, present, f'{self.loader}: images'), strict=True):
            if isinstance(found, Exception):
                faults['replace it or remove it from the annotations'].append(f'{file} cannot be read ({found})')
            elif found != files[file]:
                faults['correct one or the other (sizes are after EXIF rotation)'].append(
                    f'{file} has {found[0]}×{found[1]} pixels, in {path} {files[file][0]}×{files[file][1]}'
                )
        yield from grouped(faults)

    def _opens_images(self) -> bool:
        """Whether the pipeline loads images with a backend that Pillow can replace."""
        loaders = self._transforms('LoadImageFromFile')
        return bool(loaders) and all(x.get('imdecode_backend') != 'tifffile' for x in loaders)

    def _check_instances(self, path: str, names: list[str]) -> Iterator[Exception]:
        """Checks the annotations as parsed by mmdet."""
        self.annotations, without_mask = 0, 0
        example = ''
        for index in range(len(self.dataset)):
            info = self.dataset.get_data_info(index)
            for instance in info['instances']:
                self.annotations += 1
                self.per_class[names[instance['bbox_label']]] += 1
                if 'mask' not in instance:
                    without_mask += 1
                    example = example or info['img_path']
        if not self.annotations and self._is_annotated():
            yield ValueError(
                f"{path}: mmdet uses none of its annotations: all have categories other than the config's classes, "
                'marked as ignored, outside their image, less than a pixel wide or high, or have area 0'
            )
        if without_mask and self._with_mask():
            yield ValueError(
                f"{path}: {without_mask} of {self.annotations} annotations have no 'segmentation', the first one in "
                f'{example}, but the pipeline loads masks: add masks, or use a detector without them, such as '
                'RetinaNet'
            )

    def _class_folders(self) -> list[str]:
        """The folders that mmpretrain takes as classes if there is no ann_file."""
        folder = self.dataset.img_prefix
        if self.dataset.ann_file or not self.is_local or not os.path.isdir(folder):
            return []
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith('.'))

    def _check_classification(self) -> Iterator[Exception]:
        dataset = self.dataset
        folder = dataset.img_prefix
        self.name = f'{self.loader}: {dataset.ann_file or folder}'
        if not dataset.with_label:
            return
        wrong = [*self._wrong_num_classes(), *self._wrong_topk()]
        yield from wrong
        if wrong or not (self.is_local and is_local(folder, *self._file_readers())):
            return
        if dataset.ann_file:
            lines = list_from_file(dataset.ann_file)
            odd = [number for number, line in enumerate(lines) if not re.fullmatch(r'.+ -?[0-9]+', line.strip())]
            if odd or not lines:
                found = f'line {odd[0] + 1} is {lines[odd[0]]!r}' if odd else 'it is empty'
                yield ValueError(
                    f'{dataset.ann_file} must have an image and the index of its class in each line, such as '
                    f"'cat/1.jpg 0', but {found}"
                )
                return
        else:
            self.folders = self._class_folders()
            if len(self.folders) != len(self.classes):
                yield ValueError(
                    f'{folder} must have a folder for each of the {len(self.classes)} classes, but has '
                    f'{len(self.folders)} ({listed(self.folders)}): name them by metainfo=dict(classes=(...)) in every '
                    'data set of the config, and set num_classes'
                )
                return
            files = (
                file for name in self.folders for _, _, names in os.walk(os.path.join(folder, name)) for file in names
            )
            if not any(dataset.is_valid_file(file) for file in files):
                yield ValueError(
                    f'{folder} has no image: none of its files ends in {listed(sorted(dataset.extensions), 10)}'
                )
                return
            if self.folders == sorted(self.classes) != self.classes:
                warnings.warn(
                    f"{folder} has the config's classes in a different order: mmpretrain numbers labels in the "
                    'alphabetical order of the folders, so set the order in metainfo=dict(classes=(...)) to '
                    f'{listed(self.folders, 10)}',
                    stacklevel=2,
                )
        if dataset.ann_file or self.everything:
            yield from self._check_labelled_images()

    def _wrong_topk(self) -> Iterator[Exception]:
        for evaluator in self.evaluators:
            topk = evaluator.get('topk', 1)
            if np.max(topk) > len(self.classes):
                kind, number = evaluator.get('type'), len(self.classes)
                yield ValueError(
                    f'{self.name} has {number} classes, but {kind} has topk={topk}: it can be at most {number}'
                )

    def _check_labelled_images(self) -> Iterator[Exception]:
        samples = self.dataset.load_data_list()
        self.images = self.annotations = len(samples)
        faults: dict[str, list[str]] = defaultdict(list)
        paths = [sample['img_path'] for sample in samples]
        missing = missing_files(paths)
        if missing:
            yield FileNotFoundError(
                f'{missing[0]} does not exist, {len(missing)} of {len(paths)} images of {self.name}'
            )
        for path, label in ((sample['img_path'], sample['gt_label']) for sample in samples):
            if 0 <= label < len(self.classes):
                self.per_class[self.classes[label]] += 1
            else:
                faults[f'labels of {len(self.classes)} classes are 0 to {len(self.classes) - 1}'].append(
                    f'{path} has the label {label}'
                )
        if self.everything and self._opens_images():
            present = sorted({*paths} - {*missing})
            for path, size in zip(present, in_threads(image_size, present, f'{self.loader}: images'), strict=True):
                if isinstance(size, Exception):
                    faults['replace it or remove it'].append(f'{path} cannot be read ({size})')
        yield from grouped(faults)

    def _check_segmentation(self) -> Iterator[Exception]:
        dataset = self.dataset
        folder = dataset.data_prefix.get('img_path') or ''
        self.name = f'{self.loader}: {dataset.ann_file or folder}'
        wrong = list(self._wrong_num_classes())
        yield from wrong
        loaders = self._transforms('LoadAnnotations')
        if wrong or not (self.is_local and is_local(folder, *self._file_readers())):
            return
        files = dataset.load_data_list()
        self.images = len(files)
        if not files:
            yield ValueError(
                f'{folder} has no image *{dataset.img_suffix}, only {listed(sorted(os.listdir(folder)))}: '
                "set the data set's img_suffix"
            )
            return
        missing = [file['img_path'] for file in files if not os.path.exists(file['img_path'])]
        if missing:
            yield FileNotFoundError(
                f'{missing[0]} does not exist, {len(missing)} of {len(files)} images of {self.name}'
            )
            return
        if not loaders:
            return
        if 'seg_map_path' not in files[0]:
            yield ValueError(
                f'{self.loader}: the pipeline loads annotations, but the data set has no label maps: set '
                'data_prefix=dict(seg_map_path=FOLDER)'
            )
            return
        yield from self._check_label_maps(files, loaders[0])

    def _check_label_maps(self, files: list[dict], loader: dict) -> Iterator[Exception]:
        dataset = self.dataset
        folder = dataset.data_prefix['seg_map_path']
        missing = [file for file in files if not os.path.exists(file['seg_map_path'])]
        if len(missing) == len(files):
            yield ValueError(
                f'{dataset.data_prefix["img_path"]} and {folder} have no image in common: '
                f'{os.path.basename(files[0]["img_path"])} needs {os.path.basename(files[0]["seg_map_path"])}, found '
                f"{listed(sorted(os.listdir(folder)))}: set the data set's img_suffix and seg_map_suffix, or "
                'rename the label maps'
            )
            return
        if missing:
            yield FileNotFoundError(
                f'{missing[0]["seg_map_path"]} does not exist, the label map of {missing[0]["img_path"]} '
                f'({len(missing)} of {len(files)} are missing): add it or remove the image'
            )
        if loader.get('reduce_zero_label') not in (None, dataset.reduce_zero_label):
            yield ValueError(
                f'{self.loader}: the data set has reduce_zero_label={dataset.reduce_zero_label}, its transform '
                f'LoadAnnotations {loader["reduce_zero_label"]}: set both to True if 0 means unlabelled and classes '
                'count from 1, to False if classes count from 0'
            )
            return
        heads = [head for _, head in self._heads()]
        # A single channel means two classes.
        self.num_classes = max(2, min([head['num_classes'] for head in heads], default=len(self.classes)))
        self.ignored = [head.get('ignore_index', 255) for head in heads] or [255]
        self.transform = TRANSFORMS.build({**loader, '_scope_': self.config.get('default_scope')})

        present = [file for file in files if os.path.exists(file['seg_map_path'])]
        present = present if self.everything else present[:NUM_LABEL_MAPS]
        faults: dict[str, list[str]] = defaultdict(list)
        self.annotations = len(present)
        for fault, labels in in_threads(self._read_label_map, present, f'{self.loader}: label maps', self.everything):
            if fault:
                example, correction = fault
                faults[correction].append(example)
            self.per_class.update(self.classes[label] for label in labels if label < len(self.classes))
        yield from grouped(faults)

    def _read_label_map(self, file: dict) -> tuple[tuple[str, str] | None, list[int]]:
        """The problem with a label map or its image and how to correct it, and the labels it contains."""
        image, path = file['img_path'], file['seg_map_path']
        size = image_size(image, decode=self.everything) if self._opens_images() else None
        if isinstance(size, Exception):
            return (f'{image} cannot be read ({size})', 'replace it or remove it with its label map'), []
        try:
            values = mmcv.imread(path, 'unchanged', backend=self.transform.imdecode_backend).squeeze()
        except Exception as error:  # Pillow raises nearly everything for damaged files
            return (f'{path} cannot be read ({error})', 'replace it or remove it with its image'), []
        if values.ndim != 2:
            return (
                f'{path} has {values.shape[-1]} channels',
                'a label map has one channel with a class index for each pixel, not colors: convert it',
            ), []
        height, width = values.shape
        if size not in (None, (width, height)):
            return (f'{path} has {width}×{height} pixels, its image {size[0]}×{size[1]}', 'make them the same size'), []
        labels = self.transform(dict(file, seg_fields=[]))['gt_seg_map']
        wrong = (labels >= self.num_classes) & ~np.isin(labels, self.ignored) | (values > 255)
        if wrong.any():
            first = int(self.dataset.reduce_zero_label)
            return (
                f'{path} contains the values {listed(np.unique(values[wrong]).tolist())}',
                f'with num_classes={self.num_classes} and reduce_zero_label={bool(first)} classes are {first} to '
                f'{self.num_classes - 1 + first}, and 255 is ignored: correct the label map, or num_classes and '
                'metainfo=dict(classes=(...))',
            ), []
        return None, [label for label in np.unique(labels).tolist() if label not in self.ignored]


def is_local(path: str, *readers: dict) -> bool:
    """Whether a path is read from a local disk, judging by its form and by the backends in its readers' configs."""
    args = [reader.get(key) or {} for reader in readers for key in ('backend_args', 'file_client_args')]
    return '://' not in path and '.zip@' not in path and all(x.get('backend') in (None, 'local', 'disk') for x in args)


def missing_files(paths: Sequence[str]) -> list[str]:
    """The paths that do not exist. Lists folders, since a million separate queries would take minutes on a network file
    system.
    """
    folders = {os.path.dirname(path) for path in paths}
    found = {os.path.join(folder, name) for folder in folders if os.path.isdir(folder) for name in os.listdir(folder)}
    return [path for path in paths if path not in found and not os.path.exists(path)]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def mask_fault(mask: Any) -> str | None:
    """Why pycocotools cannot read a `segmentation`; None if it can."""
    if isinstance(mask, dict):
        from pycocotools import mask as mask_utils  # comes with mmdet

        try:
            counts = mask['counts']
            if isinstance(counts, list):
                mask_utils.frPyObjects(mask, *mask['size'])
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')  # of NumPy 2, about pycocotools
                    mask_utils.decode(mask)
        except Exception as error:  # its C code raises almost anything
            return f'a run-length encoded segmentation that cannot be read ({type(error).__name__}: {error})'
    elif isinstance(mask, list):
        numbers = [number for polygon in mask if isinstance(polygon, list) for number in polygon]
        if wrong := [number for number in numbers if not is_number(number)]:
            return f'{wrong[0]!r} in its segmentation'
    elif mask is not None:
        return f'segmentation={mask!r}, which is neither polygons nor run-length encoded'
    return None


def complete(entries: list, noun: str, keys: Sequence[str], faults: dict[str, list[str]]) -> list[dict]:
    """The entries of a list in a JSON file that are dicts with all keys; all others are added to the faults."""
    whole = []
    for index, entry in enumerate(entries):
        missing = [key for key in keys if entry.get(key) is None] if isinstance(entry, dict) else list(keys)
        if missing:
            key = ' and '.join(map(repr, missing))
            number = entry.get('id', f'number {index}') if isinstance(entry, dict) else f'number {index}'
            faults[f'export the file with it, {noun} by {noun}'].append(f'{noun} {number} has no {key}')
        else:
            whole.append(entry)
    return whole


def grouped(faults: dict[str, list[str]], prefix: str = '') -> Iterator[ValueError]:
    """One error for each kind of fault, grouped by correction: the first example and the number of others."""
    for correction, examples in faults.items():
        others = f' ({len(examples) - 1} more like this)' if len(examples) > 1 else ''
        yield ValueError(f'{prefix}{examples[0]}{others}; {correction}')


def image_size(path: str, decode: bool = True) -> tuple[int, int] | Exception:
    """Width and height of an image in pixels after EXIF rotation, as in mmcv; or the error if it cannot be read."""
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            width, height = image.size
            return (height, width) if image.getexif().get(EXIF_ORIENTATION, 1) >= 5 else (width, height)
    except Exception as error:  # PIL raises nearly everything for damaged files
        return error


def in_threads(function: Callable, items: list, description: str, progress: bool = True) -> Iterator:
    """A function's results in order, computed in threads: image libraries release Python's global lock."""
    console = Console(stderr=True)
    with ThreadPoolExecutor() as pool:
        yield from track(
            pool.map(function, items),
            description,
            total=len(items),
            console=console,
            transient=True,
            disable=not (progress and console.is_terminal),
        )
