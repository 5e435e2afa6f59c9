import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmseg.datasets import ADE20KDataset
from pycocotools import mask as rle
from pycocotools.coco import COCO

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tools'))
import make_mini_dataset as mini  # noqa: E402

CONFIGS = ROOT / 'configs' / 'mini'
DETECTION = 'cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py'
SEGMENTATION = 'slide-swin-mini_upernet_mini-ade20k-64x64.py'
SIZES = dict(num_train=12, num_val=4, size=96)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp('mini') / 'set'
    assert mini.make_mini_dataset(out, **SIZES)
    return out


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob('*') if file.is_file()}


def objects_of(coco, image):
    annotations = coco.loadAnns(coco.getAnnIds([image]))
    return [(annotation, coco.annToMask(annotation).astype(bool)) for annotation in annotations]


def each_image(made, split):
    """For each image its objects (annotation, mask) and its semantic map."""
    coco = COCO(made / f'coco/annotations/instances_{split}2017.json')
    maps = sorted((made / 'ade/annotations' / mini.SPLITS[split]).iterdir())
    assert len(maps) == len(coco.imgs)
    for image, file in zip(sorted(coco.imgs), maps, strict=True):
        yield objects_of(coco, image), cv2.imread(str(file), cv2.IMREAD_UNCHANGED)


def test_the_seed_decides_every_byte(made, tmp_path):
    mini.make_mini_dataset(tmp_path / 'again', **SIZES)
    assert contents(tmp_path / 'again') == contents(made)
    mini.make_mini_dataset(tmp_path / 'other', seed=1, **SIZES)
    other, first = contents(tmp_path / 'other'), contents(made)
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)


def test_images_do_not_depend_on_their_number(made, tmp_path):
    mini.make_mini_dataset(tmp_path / 'fewer', **dict(SIZES, num_train=5))
    first = contents(made)
    assert all(first[name] == data for name, data in contents(tmp_path / 'fewer').items() if name.endswith('g'))


def test_no_image_is_in_both_splits(made):
    train, val = ({file.read_bytes() for file in (made / f'coco/{split}2017').iterdir()} for split in mini.SPLITS)
    assert (len(train), len(val)) == (SIZES['num_train'], SIZES['num_val'])
    assert not train & val


@pytest.mark.parametrize('split', mini.SPLITS)
def test_annotations_fit_their_masks(made, split):
    coco = COCO(made / f'coco/annotations/instances_{split}2017.json')
    for info in coco.imgs.values():
        image = cv2.imread(str(made / f'coco/{split}2017' / info['file_name']))
        assert image.shape == (info['height'], info['width'], 3)
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        assert annotation['area'] == mask.sum() >= mini.MIN_VISIBLE_PIXELS
        assert annotation['bbox'] == box == rle.toBbox(annotation['segmentation']).tolist()


@pytest.mark.parametrize('split', mini.SPLITS)
def test_semantic_maps_agree_with_instances(made, split):
    coco_ids = {category['name']: category['id'] for category in mini.coco_categories()}
    ade_id = {coco_ids[category]: number for category, number, _ in mini.SHAPES.values()}
    for objects, semantic in each_image(made, split):
        assert 1 <= len(objects) <= mini.MAX_OBJECTS
        assert all(not (a & b).any() for (_, a), (_, b) in combinations(objects, 2))
        expected = np.full(semantic.shape, mini.WALL, np.uint8)
        for annotation, mask in objects:
            expected[mask] = ade_id[annotation['category_id']]
        assert semantic.dtype == np.uint8
        assert np.array_equal(semantic, expected)


def test_all_shapes_are_drawn(made):
    drawn = {annotation['category_id'] for objects, _ in each_image(made, 'train') for annotation, _ in objects}
    names = {category['id']: category['name'] for category in mini.coco_categories()}
    assert {names[number] for number in drawn} == {category for category, _, _ in mini.SHAPES.values()}


def test_categories_are_those_of_the_host():
    assert tuple(category['name'] for category in mini.coco_categories()) == CocoDataset.METAINFO['classes']
    ids = {category['name']: category['id'] for category in mini.coco_categories()}
    assert [ids[name] for name in ('person', 'stop sign', 'kite', 'tv', 'toothbrush')] == [1, 13, 38, 72, 90]
    classes = ADE20KDataset.METAINFO['classes']
    assert [classes[number - 1] for _, number, _ in mini.SHAPES.values()] == [
        name for _, _, name in mini.SHAPES.values()
    ]
    assert classes[mini.WALL - 1] == 'wall'


def assert_shape(shape, mask):
    # A shape's share of the smallest circle around it: 1, from 1.6/π to 2/π, at most 1.3/π; and what rasterising adds.
    least, most = dict(disk=(0.93, 1.0), rectangle=(0.48, 0.72), triangle=(0.2, 0.46))[shape]
    _, radius = cv2.minEnclosingCircle(np.argwhere(mask).astype(np.int32))
    assert least < mask.sum() / (np.pi * (radius + 0.5) ** 2) < most


def test_shapes_are_what_they_are_called():
    seen = set()
    for seed in range(60):
        shape, mask = mini.draw_scene(np.random.default_rng(seed), 256)[1][-1]  # on top of all others
        points = np.argwhere(mask)
        if points.min() > 0 and points.max() < 255:
            assert_shape(shape, mask)
            seen.add(shape)
    assert seen == set(mini.SHAPES)


@pytest.mark.parametrize('split', mini.SPLITS)
def test_single_shapes_lie_in_folders_of_their_names(made, split):
    folders = sorted((made / 'imagenet' / split).iterdir())
    assert [folder.name for folder in folders] == sorted(mini.SHAPES)
    assert sum(len(list(folder.iterdir())) for folder in folders) == SIZES[f'num_{split}']
    for shape in mini.SHAPES:
        image = mini.draw_single_shape(np.random.default_rng(0), shape, 256)
        assert_shape(shape, cv2.GaussianBlur(image, (5, 5), 0).mean(2) > 128)


def test_running_again_does_nothing(made, capsys, monkeypatch):
    before = {file: file.stat().st_mtime_ns for file in made.rglob('*')}
    monkeypatch.setattr(sys, 'argv', ['x', str(made), '--num-train', '12', '--num-val', '4', '--size', '96'])
    mini.main()
    assert 'nothing to do' in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in made.rglob('*')} == before


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    out = tmp_path / 'set'
    with monkeypatch.context() as patched:
        patched.setattr(mini.json, 'dumps', interrupt)  # behind all images of the first split
        with pytest.raises(KeyboardInterrupt):
            mini.make_mini_dataset(out, **SIZES)
    assert list(tmp_path.iterdir()) == []
    assert mini.make_mini_dataset(out, **SIZES)


def test_a_folder_with_something_else_is_left_alone(made, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='something else'):
        mini.make_mini_dataset(tmp_path, **SIZES)
    assert contents(tmp_path) == {'notes.txt': b'mine'}
    with pytest.raises(FileExistsError, match='other settings'):
        mini.make_mini_dataset(made, **dict(SIZES, seed=1))


@pytest.mark.parametrize(('name', 'value'), [('seed', -1), ('num_train', 0), ('num_val', 0), ('size', 31)])
def test_bad_numbers_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f'{name} must be at least .*, got {value}'):
        mini.make_mini_dataset(tmp_path / 'set', **{name: value})
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_give_one_line(tmp_path):
    command = [sys.executable, ROOT / 'tools/make_mini_dataset.py', tmp_path / 'set', '--size', '8']
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].endswith('error: size must be at least 32, got 8')


@pytest.fixture
def config(made, tmp_path):
    """Reads a demo config with nothing changed but data_root."""

    def read(name, folder):
        text, count = re.subn(
            r'(?m)^data_root = .*$', f'data_root = {f"{made}/{folder}/"!r}', (CONFIGS / name).read_text()
        )
        assert count == 1
        text = text.replace("'../_base_/", f"'{CONFIGS.parent.as_posix()}/_base_/")
        (tmp_path / name).write_text(text)
        return Config.fromfile(tmp_path / name)

    return read


@pytest.mark.parametrize('loader', ['train_dataloader', 'val_dataloader', 'test_dataloader'])
def test_the_detection_config_reads_it(config, made, loader):
    with DefaultScope.overwrite_default_scope('mmdet'):
        read = config(DETECTION, 'coco')
        dataset = DATASETS.build(read[loader].dataset)
        sample = dataset[0]
    assert len(dataset) == SIZES['num_train' if loader == 'train_dataloader' else 'num_val']
    instances = sample['data_samples'].gt_instances
    split = 'train' if loader == 'train_dataloader' else 'val'
    expected = objects_of(COCO(made / f'coco/annotations/instances_{split}2017.json'), 1)
    assert sample['inputs'].shape[1:] == read.image_scale
    assert len(instances.labels) == len(instances.masks) == len(expected)
    classes = dataset.metainfo['classes']
    names = {category['id']: category['name'] for category in mini.coco_categories()}
    assert [classes[label] for label in instances.labels] == [names[a['category_id']] for a, _ in expected]


@pytest.mark.parametrize('loader', ['train_dataloader', 'val_dataloader', 'test_dataloader'])
def test_the_segmentation_config_reads_it(config, loader):
    with DefaultScope.overwrite_default_scope('mmseg'):
        read = config(SEGMENTATION, 'ade')
        dataset = DATASETS.build(read[loader].dataset)
        sample = dataset[0]
    assert len(dataset) == SIZES['num_train' if loader == 'train_dataloader' else 'num_val']
    labels = sample['data_samples'].gt_sem_seg.data
    seen = set(labels.unique().tolist())
    if loader == 'train_dataloader':
        assert sample['inputs'].shape[1:] == read.crop_size
        assert labels.shape[1:] == tuple(side // 4 for side in read.crop_size)  # the stride of the head
        seen.discard(255)  # ignored: what a rotation brings in from outside the image
    assert mini.WALL - 1 in seen
    assert seen <= {mini.WALL - 1, *(number - 1 for _, number, _ in mini.SHAPES.values())}


@pytest.mark.parametrize('name', [DETECTION, SEGMENTATION])
def test_the_demo_configs_build_their_models(config, name):
    read = config(name, 'x')
    with DefaultScope.overwrite_default_scope(read.default_scope):
        model = MODELS.build(read.model)
    assert sum(parameter.numel() for parameter in model.parameters()) < 5e6
