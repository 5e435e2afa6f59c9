import json
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import TOOLS, tool
from mmengine.config import Config
from PIL import Image

from mmslide import data

sys.path.insert(0, str(TOOLS))
import check_data
import make_mini_dataset as mini

CONFIGS = TOOLS.parent / 'configs'
MASKS = CONFIGS / 'mini/cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py'
BOXES = CONFIGS / 'slide_pvt/retinanet_slide-pvt-t_fpn_1x_coco.py'
MAPS = CONFIGS / 'mini/slide-swin-mini_upernet_mini-ade20k-64x64.py'
SIZE = 48


@pytest.fixture(scope='module')
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'mini'
    mini.make_mini_dataset(folder, num_train=3, num_val=2, size=SIZE)
    return folder


@pytest.fixture
def coco(generated, tmp_path):
    return Path(shutil.copytree(generated / 'coco', tmp_path / 'coco'))


@pytest.fixture
def ade(generated, tmp_path):
    return Path(shutil.copytree(generated / 'ade', tmp_path / 'ade'))


def read(path, root, **options):
    config = Config.fromfile(path)
    data.move_data(config, str(root))
    config.merge_from_dict(options)
    return config


def problems(config, everything=False):
    """What is found in all data sets, held to the form that every message has."""
    checks = data.check_datasets(config, 'train_dataloader', 'val_dataloader', everything=everything)
    found = [problem for check in checks for problem in check.problems]
    assert all(type(problem) in (ValueError, FileNotFoundError) for problem in found)
    return found


def edit(root, change, split='train'):
    """Changes an annotation file: `change` gets its content and returns the new one, or None."""
    path = root / f'annotations/instances_{split}2017.json'
    content = json.loads(path.read_text())
    content = change(content) or content
    path.write_text(json.dumps(content))
    return path


def of_classes(names, *dataloaders):
    return {f'{loader}_dataloader.dataset.metainfo': dict(classes=names) for loader in dataloaders}


@pytest.mark.parametrize(
    ('old', 'new', 'moved'),
    [
        ('data/coco/', '/disk/coco', '/disk/coco'),
        ('./data/coco/', './disk//coco/', 'disk/coco'),
        ('data//coco', 's3://bucket/coco/', 's3://bucket/coco'),
        ('s3://bucket/coco', 'data/coco', 'data/coco'),
        ('s3://bucket//coco/', 'cluster:s3://other/coco', 'cluster:s3://other/coco'),
        ('/data/coco/.', '../coco', '../coco'),
        ('./', '/disk/coco', '/disk/coco'),
    ],
)
def test_data_root_in_every_form(old, new, moved):
    root = old if old.endswith('/') else f'{old}/'
    below = [f'{root}a/b.json', f'{root}/a/./b.json']
    other = ['data/coco2017/x', 's3://bucket/coco2/x', 'a/b.json', '', 'mmdet', None, 3]
    config = Config(dict(data_root=old, train=dict(data_root=old, paths=(*below, *other)), folder=f'{root}train/'))
    data.move_data(config, new)
    assert data.normalize_path(config.data_root) == moved
    assert config.train.data_root == config.data_root
    assert config.train.paths == (f'{moved}/a/b.json', f'{moved}/a/b.json', *other)
    assert config.folder == f'{moved}/train/'


@pytest.mark.parametrize('config', [dict(), dict(data_root=''), dict(data_root=None)])
def test_data_root_without_one_to_replace(config):
    with pytest.raises(ValueError, match=r'data_root=/disk/coco: the config has no data_root to replace'):
        data.move_data(Config(config), '/disk/coco')


@pytest.mark.parametrize('wrapper', ['RepeatDataset', 'ConcatDataset', 'MultiImageMixDataset'])
def test_missing_files_are_named(wrapper, tmp_path):
    """In data sets of unknown types too."""
    dataset = dict(data_root=str(tmp_path), ann_file='a/train.json', data_prefix=dict(img='train/', other='maps'))
    wrapped = dict(datasets=[dataset]) if wrapper == 'ConcatDataset' else dict(dataset=dataset)
    config = Config(dict(train_dataloader=dict(dataset=dict(type=wrapper, **wrapped)), val_dataloader=None))
    for name in ('a/train.json', 'train/', 'maps'):
        message = f'{tmp_path}/{name}, which train_dataloader reads, does not exist'
        with pytest.raises(FileNotFoundError, match=re.escape(message) + '.*data_root=DIR'):
            data.check_data(config, 'train_dataloader', 'val_dataloader')
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch() if path.suffix else path.mkdir()
    data.check_data(config, 'train_dataloader', 'val_dataloader')


def test_file_of_an_evaluator_is_missing(coco):
    config = read(MASKS, coco)
    config.val_evaluator.ann_file = str(coco / 'annotations/none.json')
    (problem,) = problems(config)
    assert re.search(r'annotations/none\.json, which val_dataloader reads, does not exist', str(problem))


@pytest.mark.parametrize(
    'options',
    [
        dict(backend_args=dict(backend='petrel')),
        dict(backend_args=dict(backend='memcached', server_list_cfg='x')),
        dict(data_root='s3://bucket/coco/'),
        dict(data_root='http://localhost/coco/'),
        dict(data_root='cluster:s3://bucket/coco/'),
        dict(data_root='/nowhere/coco.zip@/'),
    ],
    ids=lambda options: str(*options.values()),
)
@pytest.mark.parametrize('path', [MASKS, MAPS], ids=['coco', 'ade'])
def test_files_that_are_not_on_a_disk_are_not_looked_for(path, options):
    config = read(path, '/nowhere')
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.update(options)
    if path == MASKS:
        config.val_evaluator.update(ann_file='s3://bucket/val.json')
    assert problems(config, everything=True) == []


@pytest.mark.parametrize('key', ['backend_args', 'file_client_args'])
def test_images_in_a_database_beside_local_annotations(key, coco):
    config = read(MASKS, coco)
    for split in ('train', 'val'):
        shutil.rmtree(coco / f'{split}2017')
        loader = config[f'{split}_dataloader'].dataset.pipeline[0]
        loader[key] = dict(backend='lmdb', db_path='train.lmdb')
    assert problems(config, everything=True) == []
    edit(coco, lambda content: content['annotations'].clear())
    assert 'has no annotations' in str(problems(config)[0])


@pytest.mark.parametrize('everything', [False, True])
def test_sound_data_have_no_problem(everything, coco, ade, recwarn):
    configs = read(MASKS, coco), read(BOXES, coco), read(MAPS, ade)
    assert [problems(config, everything) for config in configs] == [[], [], []]
    assert not [str(x.message) for x in recwarn if 'reduce_zero_label' not in str(x.message)]
    (check,) = data.check_datasets(configs[0], 'train_dataloader')
    content = json.loads((coco / 'annotations/instances_train2017.json').read_text())
    assert check.images == 3
    assert check.annotations == len(content['annotations']) == check.per_class.total()
    assert check.per_class.keys() <= {'sports ball', 'tv', 'kite'}
    (check,) = data.check_datasets(configs[2], 'train_dataloader')
    assert (check.images, check.annotations, check.per_class['wall']) == (3, 3, 3)


def of_first(**changes):
    """Changes the first annotation; a value of None removes its key."""

    def change(content):
        annotation = content['annotations'][0]
        annotation.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del annotation[key]

    return change


def of_image(**changes):
    return lambda content: content['images'][0].update(changes)


def without(key):
    return lambda content: {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (without('images'), r"has no list 'images': a file in COCO format is a dict of"),
        (without('categories'), r"has no list 'categories'"),
        (without('annotations'), r"has no list 'annotations'"),
        (lambda content: content['annotations'], r"has no list 'images'"),
        (lambda content: content['annotations'].clear(), r'has no annotations: .* is empty'),
        (lambda content: content['images'].clear(), r'has no images: .* is empty'),
        (lambda content: [x.update(area=0) for x in content['annotations']] and None, r'mmdet uses none of its annot'),
        (of_first(area=None), r"annotation 1 has no 'area'; export the file with it"),
        (of_first(bbox=None), r"annotation 1 has no 'bbox'"),
        (lambda content: content['annotations'].append(5), r"annotation number \d+ has no 'id'"),
        (of_image(width=None), r"image 1 has no 'width'"),
        (of_image(width='48'), r"image 1 has height=48, width='48'; set both in pixels"),
        (lambda content: content['categories'][0].pop('name') and None, r"category 1 has no 'name'"),
        (of_first(bbox=[1, 1, float('nan'), 9]), r'annotation 1 has bbox=\[1, 1, nan, 9\]; .* correct or remove it'),
        (of_first(bbox=[float('-inf'), 1, 9, 9]), r'annotation 1 has bbox=\[-inf, 1, 9, 9\]'),
        (of_first(bbox=[9, 9, -4, 4]), r'annotation 1 has bbox=\[9, 9, -4, 4\]'),
        (of_first(bbox=[9, 9, 4]), r'annotation 1 has bbox=\[9, 9, 4\]'),
        (of_first(bbox='9 9 4 4'), r"annotation 1 has bbox='9 9 4 4'"),
        (of_first(area=float('nan')), r'annotation 1 has area=nan; set it to a finite number'),
        (of_first(image_id=99), r'annotation 1 has image_id=99, which is not .*; add the image or remove the ann'),
        (of_first(category_id=12), r'annotation 1 has category_id=12, which is not .*; add the category or remove'),
        (of_first(id=2), r'2 annotations have the id 2; number them from 1'),
        (of_image(id=2), r'2 images have the id 2; number them from 1'),
        (of_first(segmentation=[1, 2, 3, 4, 5, 6]), r'annotation 1 has segmentation=\[1, 2, .*list of polygons'),
        (
            of_first(segmentation=dict(size=[9, 9], counts=[81])),
            r'annotation 1 has a mask of size \[9, 9\], its image \[48, 48\]; .* must be the same',
        ),
        (
            of_first(segmentation=None),
            r"1 of \d+ annotations have no 'segmentation', the first one in .*1\.jpg.*RetinaNet",
        ),
        (
            lambda content: content['categories'].append(dict(id=99, name='tv')),
            r"several categories named 'tv', so its labels go up to 80, at or above num_classes=80: merge them",
        ),
        (of_image(file_name='none.jpg'), r'/train2017/none\.jpg does not exist, an image of .*json: .*img=FOLDER'),
    ],
)
def test_annotation_file(change, message, coco):
    path = edit(coco, change)
    found = problems(read(MASKS, coco))
    assert any(re.search(message, str(problem)) for problem in found), found
    assert all(str(path) in str(problem) for problem in found)


def test_faults_of_a_kind_are_one_message(coco):
    edit(coco, lambda content: [x.update(bbox=[0, 0, -1, 1]) for x in content['annotations']] and None)
    edit(coco, lambda content: [x.update(file_name=f'{x["id"]}.png') for x in content['images']] and None)
    boxes, images = map(str, problems(read(MASKS, coco)))
    assert re.search(r'annotation 1 has bbox=\[0, 0, -1, 1\] \(\d+ more like this\); a box is', boxes)
    assert re.search(r'/1\.png does not exist, 3 of the 3 images of', images)


@pytest.mark.parametrize('everything', [False, True])
@pytest.mark.parametrize('large', [False, True])
def test_truncated_annotation_file(large, everything, coco, monkeypatch):
    path = coco / 'annotations/instances_val2017.json'
    if large:
        monkeypatch.setattr(data, 'MAX_JSON_BYTES', 200)
    text = path.read_text()
    for whole in (text, f'{text}\n'):
        path.write_text(whole)
        assert problems(read(MASKS, coco), everything) == []
    path.write_text(text[:-300])
    (problem,) = problems(read(MASKS, coco), everything)
    assert str(problem).startswith(f'{path} is truncated')
    assert 'copy or export it again' in str(problem)


def test_large_annotation_file_is_only_read_by_the_tool(coco, monkeypatch):
    monkeypatch.setattr(data, 'MAX_JSON_BYTES', 200)
    edit(coco, of_first(bbox=[0, 0, -1, 1]))
    assert problems(read(MASKS, coco)) == []
    assert len(problems(read(MASKS, coco), everything=True)) == 1


def test_empty_annotation_file(coco):
    path = coco / 'annotations/instances_train2017.json'
    path.write_text('')
    with pytest.raises(ValueError, match=re.escape(f'{path} is empty; copy or export it again')):
        data.check_data(read(MASKS, coco), 'train_dataloader')


def test_annotation_file_that_cannot_be_read(coco):
    path = coco / 'annotations/instances_train2017.json'
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=re.escape(str(path))):
        data.check_data(read(MASKS, coco), 'train_dataloader')


def test_data_set_without_annotation_file(coco):
    config = read(MASKS, coco)
    config.train_dataloader.dataset.ann_file = ''
    assert 'train_dataloader: the data set has no ann_file' in str(problems(config)[0])


CELLS = ('red', 'white', 'platelet')


def cells(content):
    """The categories of another data set."""
    content['categories'] = [dict(id=number, name=name) for number, name in enumerate(CELLS)]
    for number, annotation in enumerate(content['annotations']):
        annotation['category_id'] = number % len(CELLS)


def test_categories_that_the_config_does_not_know(coco):
    path = edit(coco, cells)
    with pytest.raises(ValueError, match='none of its categories') as error:
        data.check_data(read(BOXES, coco), 'train_dataloader')
    message = str(error.value)
    assert str(path) in message
    assert "(red, white, platelet) is in the config's classes (person, bicycle, " in message
    assert "metainfo=dict(classes=('red', 'white', 'platelet'))" in message
    assert 'num_classes=3 in every head' in message


def test_own_classes_with_boxes_and_masks(coco):
    """The way through from COCO's config: classes, then num_classes, then masks."""
    for split in ('train', 'val'):
        edit(coco, cells, split)
        edit(coco, lambda content: [x.pop('segmentation') for x in content['annotations']] and None, split)
    classes = of_classes(CELLS, 'train', 'val')
    found = problems(read(BOXES, coco, **classes))
    assert len(found) == 2
    assert 'has 3 classes (red, white, platelet), but the model has model.bbox_head.num_classes=80' in str(found[0])
    assert 'set num_classes=3' in str(found[0])
    assert problems(read(BOXES, coco, **classes, **{'model.bbox_head.num_classes': 3})) == []

    masks = read(MASKS, coco, **classes, **{'model.roi_head.mask_head.num_classes': 3})
    for head in masks.model.roi_head.bbox_head:
        head.num_classes = 3
    for problem in problems(masks):
        assert re.search(r"(\d+) of \1 annotations have no 'segmentation'.*but the pipeline loads masks", str(problem))
    assert len(problems(masks)) == 2
    masks.model.roi_head.bbox_head[1].num_classes = 4
    assert 'model.roi_head.bbox_head.1.num_classes=4:' in str(problems(masks)[0])


def test_heads_with_classes_of_their_own(coco):
    config = read(MASKS, coco)
    config.model.rpn_head.num_classes = 1
    config.model.roi_head.semantic_head = dict(type='FusedSemanticHead', num_classes=183)
    config.model.backbone.num_classes = 1000
    assert problems(config) == []


def test_num_classes_of_an_open_vocabulary(coco):
    config = read(BOXES, coco, **{'model.bbox_head.num_classes': 256})
    assert len(problems(config)) == 2
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.return_classes = True
    assert problems(config) == []


@pytest.mark.parametrize('where', ['s3://bucket/coco', 'large'])
def test_num_classes_beside_annotations_that_are_not_read(where, coco, monkeypatch):
    monkeypatch.setattr(data, 'MAX_JSON_BYTES', 200)
    config = read(BOXES, coco if where == 'large' else where, **{'model.bbox_head.num_classes': 3})
    assert all('has 80 classes' in str(problem) for problem in problems(config))
    assert len(problems(config)) == 2


@pytest.mark.parametrize('classes', [None, 'red'])
def test_classes_that_are_no_list_of_names(classes, coco):
    found = problems(read(BOXES, coco, **of_classes(classes, 'train')))
    assert re.search(rf'train_dataloader: the data set has classes={classes!r};.*trailing comma', str(found[0]))


@pytest.mark.parametrize(
    ('classes', 'message'),
    [
        (('red', 'white', 'platelet', 'dust'), r"has no category dust, which is among the config's classes$"),
        (
            ('red', 'dust', 'white', 'platelet'),
            r"has no category dust.* 'white' gets the label of 'dust': set the order in .* to red, white, platelet$",
        ),
        (('white', 'red', 'platelet'), r"in a different order than.* 'red' gets the label of 'white':"),
    ],
)
def test_labels_that_mmdet_numbers_otherwise(classes, message, coco):
    edit(coco, cells)
    config = read(BOXES, coco, **of_classes(classes, 'train'), **{'model.bbox_head.num_classes': len(classes)})
    with pytest.warns(UserWarning, match=message):
        data.check_data(config, 'train_dataloader')


def test_annotations_are_not_needed_for_predictions_alone(coco):
    edit(coco, without('annotations'), 'val')
    config = read(MASKS, coco)
    assert "has no list 'annotations'" in str(problems(config)[0])
    config.val_evaluator.update(format_only=True, outfile_prefix='x')
    assert problems(config, everything=True) == []


def test_evaluation_needs_iscrowd(coco):
    for split in ('train', 'val'):
        edit(coco, of_first(iscrowd=None), split)
    (problem,) = problems(read(MASKS, coco))
    assert re.search(r"val2017\.json: annotation 1 has no 'iscrowd'", str(problem))


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), r'cannot be read \(.*truncated.*\); replace it or'),
        (lambda path: path.write_text('no image'), r'cannot be read \(cannot identify.*\); replace it or'),
        (lambda path: Image.new('RGB', (40, 30)).save(path), r'has 40×30 pixels, in .*json 48×48; correct one'),
    ],
    ids=['truncated', 'text', 'size'],
)
def test_images_are_read_by_the_tool(damage, message, coco):
    path = sorted((coco / 'train2017').iterdir())[1]
    damage(path)
    assert problems(read(MASKS, coco)) == []
    (problem,) = problems(read(MASKS, coco), everything=True)
    assert re.search(re.escape(f'{path} ') + message, str(problem))


def test_images_are_turned_as_their_exif_data_say(coco):
    path = sorted((coco / 'train2017').iterdir())[0]
    exif = Image.Exif()
    exif[data.EXIF_ORIENTATION] = 6
    Image.new('RGB', (40, 30)).save(path, exif=exif)
    assert cv2.imread(str(path)).shape[:2] == (40, 30)
    edit(coco, of_image(height=40, width=30))
    edit(coco, lambda content: [x.pop('segmentation') for x in content['annotations']] and None)
    assert problems(read(BOXES, coco), everything=True) == []


def label_map(root, change):
    """Changes the first label map of the training images."""
    path = sorted((root / 'annotations/training').iterdir())[0]
    values = change(np.array(Image.open(path)))
    Image.fromarray(values).save(path)
    return path


def with_pixel(value, dtype=np.uint8):
    def change(values):
        values = values.astype(dtype)
        values[0, 0] = value
        return values

    return change


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda values: np.stack([values] * 3, 2), r' has 3 channels; a label map has one'),
        (lambda values: values[:, :-4], r' has 44×48 pixels, its image 48×48; make them the same size'),
        (
            with_pixel(151),
            r' contains the values 151; with num_classes=150 and reduce_zero_label=True classes are 1 to 150',
        ),
        (with_pixel(257, np.uint16), r' contains the values 257; with num_classes=150'),
    ],
    ids=['channels', 'size', 'label', '16 bits'],
)
@pytest.mark.parametrize('everything', [False, True])
def test_label_map(change, message, everything, ade):
    path = label_map(ade, change)
    (problem,) = problems(read(MAPS, ade), everything)
    assert re.search(re.escape(str(path)) + message, str(problem))


@pytest.mark.parametrize('everything', [False, True])
def test_damaged_label_map(everything, ade):
    path = sorted((ade / 'annotations/training').iterdir())[2]
    path.write_bytes(path.read_bytes()[:60])
    (problem,) = problems(read(MAPS, ade), everything)
    assert str(problem).startswith(f'{path} cannot be read (')


@pytest.mark.parametrize('value', [0, 150, 255])
def test_labels_that_are_ignored(value, ade):
    label_map(ade, with_pixel(value))
    assert problems(read(MAPS, ade)) == []


def own_maps(ade, classes=('wall', 'ball'), num_classes=2, **options):
    """A data set whose labels count from 0, and a config for it."""
    for path in (ade / 'annotations').rglob('*.png'):
        Image.fromarray(np.minimum(np.array(Image.open(path)) - 1, 1)).save(path)
    config = read(MAPS, ade)
    config.model.decode_head.num_classes = num_classes
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.update(
            type='BaseSegDataset', metainfo=dict(classes=classes) if classes else {}, reduce_zero_label=False, **options
        )
        for transform in data.dicts(loader.dataset.pipeline):
            transform.pop('reduce_zero_label', None)
    return config


@pytest.mark.parametrize('num_classes', [1, 2])
def test_own_classes_of_a_segmentor(num_classes, ade):
    config = own_maps(ade, num_classes=num_classes)
    assert problems(config, everything=True) == []
    label_map(ade, with_pixel(2))
    message = str(problems(config)[0])
    assert 'contains the values 2; with num_classes=2 and reduce_zero_label=False classes are 0 to 1' in message


def test_num_classes_of_a_segmentor(ade):
    found = problems(own_maps(ade, num_classes=3))
    assert len(found) == 2
    assert re.search(
        r'has 2 classes \(wall, ball\), but the model has model\.decode_head\.num_classes=3', str(found[0])
    )


def test_ignored_label_of_a_head(ade):
    config = own_maps(ade)
    label_map(ade, with_pixel(7))
    assert len(problems(config)) == 1
    config.model.decode_head.ignore_index = 7
    assert problems(config) == []


def test_classes_of_a_segmentor_are_named(ade):
    config = own_maps(ade, classes=None)
    assert 'train_dataloader: the data set has classes=None' in str(problems(config)[0])
    config = read(MAPS, ade, **of_classes(('wall', 'cell'), 'train'))
    assert re.search(r"'cell'\).* is not a subset of.* need type='BaseSegDataset'", str(problems(config)[0]), re.S)


def test_two_ways_to_count_labels(ade):
    config = own_maps(ade)
    config.train_dataloader.dataset.pipeline[1].reduce_zero_label = True
    (problem,) = problems(config)
    assert 'train_dataloader: the data set has reduce_zero_label=False, its transform LoadAnnotations True' in str(
        problem
    )


def test_images_and_label_maps_have_nothing_in_common(ade):
    for path in (ade / 'annotations/training').iterdir():
        path.rename(path.with_name(f'{path.stem}_labels.png'))
    (problem,) = problems(read(MAPS, ade))
    assert re.search(
        r'have no image in common: ADE_train_00000001\.jpg needs ADE_train_00000001\.png, found '
        r'ADE_train_00000001_labels\.png, .*set the .* seg_map_suffix',
        str(problem),
    )


def test_label_map_is_missing(ade):
    path = sorted((ade / 'annotations/training').iterdir())[1]
    path.unlink()
    (problem,) = problems(read(MAPS, ade))
    assert str(problem).startswith(f'{path} does not exist, the label map of ')
    assert '(1 of 3 are missing): add it or remove the image' in str(problem)


def test_images_of_another_suffix(ade):
    for path in (ade / 'images/training').iterdir():
        path.rename(path.with_suffix('.png'))
    (problem,) = problems(read(MAPS, ade))
    message = r"images/training has no image \*\.jpg, only ADE_train_00000001\.png, .*: set the data set's img_suffix"
    assert re.search(message, str(problem))


def test_list_of_images_names_a_missing_one(ade):
    (ade / 'train.txt').write_text('ADE_train_00000001\nnone\n')
    config = read(MAPS, ade, **{'train_dataloader.dataset.ann_file': 'train.txt'})
    (problem,) = problems(config)
    assert re.search(r'images/training/none\.jpg does not exist, 1 of 2 images of .*train\.txt', str(problem))


def test_data_set_without_label_maps(ade):
    config = read(MAPS, ade)
    del config.train_dataloader.dataset.data_prefix['seg_map_path']
    (problem,) = problems(config)
    assert 'set data_prefix=dict(seg_map_path=FOLDER)' in str(problem)
    config.train_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
    assert problems(config, everything=True) == []


def test_damaged_image_of_a_segmentor(ade):
    path = sorted((ade / 'images/training').iterdir())[0]
    path.write_bytes(path.read_bytes()[:-200])
    assert problems(read(MAPS, ade)) == []
    (problem,) = problems(read(MAPS, ade), everything=True)
    assert str(problem).startswith(f'{path} cannot be read (')


def test_label_maps_before_training_are_a_sample(ade, monkeypatch):
    monkeypatch.setattr(data, 'NUM_LABEL_MAPS', 2)
    Image.new('RGB', (SIZE, SIZE)).save(sorted((ade / 'annotations/training').iterdir())[2])
    assert problems(read(MAPS, ade)) == []
    assert len(problems(read(MAPS, ade), everything=True)) == 1


WRAPPERS = {
    'repeat': lambda dataset: dict(type='RepeatDataset', times=2, dataset=dataset),
    'concat': lambda dataset: dict(type='ConcatDataset', datasets=[dataset, dataset]),
    'balanced': lambda dataset: dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=dataset),
    'nested': lambda dataset: dict(
        type='MultiImageMixDataset', dataset=dict(type='RepeatDataset', times=2, dataset=dataset), pipeline=[]
    ),
}


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_wrapped_data_sets(wrapper, coco):
    config = read(MASKS, coco)
    config.train_dataloader.dataset = WRAPPERS[wrapper](config.train_dataloader.dataset)
    assert problems(config) == []
    path = edit(coco, of_first(bbox=[0, 0, -1, 1]))
    (problem,) = problems(config)
    assert str(path) in str(problem)


@pytest.fixture
def run_tool(tmp_path, capsys, monkeypatch):
    """tools/check_data.py in this process: its exit status, and its lines on stdout and stderr."""

    def run(config, *options):
        config.dump(tmp_path / 'config.py')
        monkeypatch.setattr(sys, 'argv', ['check_data.py', str(tmp_path / 'config.py'), *map(str, options)])
        code = 0
        try:
            check_data.main()
        except SystemExit as end:
            code = end.code
        return code, *(text.strip().splitlines() for text in capsys.readouterr())

    return run


@pytest.mark.parametrize('wrapper', [None, *WRAPPERS])
def test_tool_draws_what_a_detector_is_trained_with(wrapper, coco, tmp_path, run_tool):
    config = read(MASKS, coco)
    dataset = config.train_dataloader.dataset
    dataset.pipeline[3].prob = [0.0, 0.0]  # RandomFlip
    if wrapper:
        config.train_dataloader.dataset = WRAPPERS[wrapper](dataset)
    code, output, _ = run_tool(config, '--show-dir', tmp_path / 'show', '--number', 2)
    assert code == 0
    assert re.search(r'images +│ 3 ', '\n'.join(output))
    shown = sorted((tmp_path / 'show').iterdir())
    assert len(shown) == 2
    for path in shown:
        drawn = cv2.imread(str(path))
        plain = cv2.imread(str(coco / 'train2017' / f'{path.stem.split("_")[1]}.jpg'))
        plain = cv2.resize(plain, (128, 128))
        assert drawn.shape == plain.shape
        # Where nothing is drawn the image is the same, colors in the same order.
        changed = (cv2.absdiff(drawn, plain) > 3).any(2).mean()
        assert 0.01 < changed < 0.9


def test_tool_draws_what_a_segmentor_is_trained_with(ade, tmp_path, run_tool):
    config = read(MAPS, ade)
    config.visualizer.alpha = 1.0
    config.train_dataloader.dataset = WRAPPERS['repeat'](config.train_dataloader.dataset)
    code, output, _ = run_tool(config, '--show-dir', tmp_path / 'show', '--number', 4)
    assert code == 0
    assert 'wall 3' in '\n'.join(output)
    shown = [cv2.imread(str(path)) for path in (tmp_path / 'show').iterdir()]
    assert {image.shape for image in shown} == {(64, 64, 3)}
    assert len(shown) == 4
    wall = [(image == 120).all(2).mean() for image in shown]
    assert min(wall) > 0.05


def test_tool_lists_every_problem(coco, tmp_path, run_tool, monkeypatch):
    edit(coco, of_first(bbox=[0, 0, -1, 1], area=float('nan')))
    (coco / 'annotations/instances_val2017.json').write_text('')
    sorted((coco / 'train2017').iterdir())[0].write_text('')
    config = read(MASKS, coco)
    code, _, errors = run_tool(config, '--show-dir', tmp_path / 'show')
    assert code == 2
    assert [line.startswith('error: ') for line in errors] == [True] * 4
    assert not (tmp_path / 'show').exists()
    monkeypatch.setattr(check_data, 'MAX_PROBLEMS', 3)
    assert run_tool(config)[2] == [*errors[:3], 'error: ... and 1 more']


def test_tool_without_training_data(coco, tmp_path, run_tool):
    config = read(MASKS, coco, train_dataloader=None)
    assert run_tool(config)[0] == 0
    code, _, errors = run_tool(config, '--show-dir', tmp_path / 'show')
    assert code == 2
    assert errors == ['error: --show-dir needs train_dataloader in the config']
    config.update(val_dataloader=None, test_dataloader=None)
    assert ' has no data set in train_dataloader, ' in run_tool(config)[2][0]


@pytest.mark.slow
def test_tool_as_a_process(coco):
    path = coco / 'annotations/instances_val2017.json'
    assert f'val_dataloader: {path}\n' in tool('check_data', MASKS, '--cfg-options', f'data_root={coco}')
    code, output = tool('check_data', MASKS, '--cfg-options', 'data_root=/nowhere', check=False)
    assert code == 2
    assert output.count('error: /nowhere/annotations/instances_train2017.json, which train_dataloader') == 1
    assert 'Traceback' not in output


@pytest.mark.parametrize(
    ('segmentation', 'message'),
    [
        ([[1, 2, float('nan'), 3, 4, 5]], 'nan in its segmentation'),
        (dict(size=[64, 64], counts='!!!'), 'segmentation that cannot be read'),
        (dict(size=[64, 64]), "segmentation that cannot be read (KeyError: 'counts')"),
        ('abc', "segmentation='abc', which is neither polygons nor run-length encoded"),
    ],
)
def test_masks_that_end_training_in_a_traceback(segmentation, message, coco):
    edit(coco, of_first(segmentation=segmentation))
    told = [str(problem) for problem in problems(read(MASKS, coco))]
    assert any(message in text and 'correct or remove it' in text for text in told)
    assert problems(read(BOXES, coco)) == []


def test_class_agnostic_heads_have_a_num_classes_of_their_own(coco):
    config = read(MASKS, coco)
    config.model.roi_head.mask_head.update(class_agnostic=True, num_classes=1)
    assert problems(config) == []
