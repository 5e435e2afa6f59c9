"""mmslide.predict against mmdet's, mmseg's and mmpretrain's own functions on the same model."""

import json
import runpy
import sys
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import TOOLS, random_model, tool_error
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.apis import inference_model, init_model
from pycocotools import mask as rle
from pycocotools.coco import COCO

from mmslide.predict import find_inputs, output_names, predict

DETECTOR = 'cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py'
SEGMENTOR = 'slide-swin-mini_upernet_mini-ade20k-64x64.py'
CLASSIFIER = 'slide-pvt-mini_mini-imagenet-64x64.py'


@pytest.fixture(autouse=True)
def default_scope(monkeypatch):
    """mmdet's and mmseg's functions leave theirs behind."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict(DefaultScope._instance_dict))


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """All that it finds is put out."""
    test_cfg = dict(rpn=dict(max_per_img=10), rcnn=dict(score_thr=0.0, max_per_img=12))
    return random_model(DETECTOR, tmp_path_factory.mktemp('detector'), 80, test_cfg=test_cfg)


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    return random_model(SEGMENTOR, tmp_path_factory.mktemp('segmentor'), 150)


@pytest.fixture
def photos(tmp_path):
    """Two images of one name, at odd sizes, beside another file."""
    generator = np.random.default_rng(0)
    paths = [tmp_path / 'photos' / name for name in ('a/x.png', 'b/x.png')]
    for path, size in zip(paths, ((61, 83), (40, 97)), strict=True):
        path.parent.mkdir(parents=True)
        assert cv2.imwrite(str(path), generator.integers(0, 256, (*size, 3), np.uint8))
    (tmp_path / 'photos/a/notes.txt').write_text('')
    return paths


def run(model, inputs, out, **options):
    config, checkpoint = model
    predict(Config.fromfile(config), checkpoint, inputs, out, device='cpu', **options)
    return [json.loads((out / f'{name}.json').read_text()) for name in ('images', 'predictions')]


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


def test_detections_are_those_of_mmdet(detector, photos, tmp_path):
    images, results = run(detector, [path.parent for path in photos], tmp_path / 'out', score_thr=0.0)
    assert names(tmp_path / 'out') == ['drawn/a/x.jpg', 'drawn/b/x.jpg', 'images.json', 'predictions.json']
    assert [(x['file_name'], x['height'], x['width']) for x in images['images']] == [
        (str(photos[0]), 61, 83),
        (str(photos[1]), 40, 97),
    ]
    assert [x['name'] for x in images['categories']] == [f'class {label}' for label in range(80)]
    model = init_detector(*map(str, detector), device='cpu')
    for image, path in zip(images['images'], photos, strict=True):
        wanted = inference_detector(model, str(path)).pred_instances
        found = [x for x in results if x['image_id'] == image['id']]
        assert len(found) == len(wanted) == 12
        assert [x['category_id'] for x in found] == wanted.labels.tolist()
        assert [x['score'] for x in found] == wanted.scores.tolist()
        boxes = np.array([x['bbox'] for x in found])
        boxes[:, 2:] += boxes[:, :2]
        assert np.allclose(boxes, wanted.bboxes.numpy(), atol=1e-4)
        assert all(
            (rle.decode(x['segmentation']) == mask.numpy()).all() for x, mask in zip(found, wanted.masks, strict=True)
        )
        drawn, plain = (
            cv2.imread(str(x)).astype(int) for x in (tmp_path / f'out/drawn/{path.parent.name}/x.jpg', path)
        )
        assert drawn.shape == plain.shape
        assert abs(drawn - plain).max() > 30
    loaded = COCO(tmp_path / 'out/images.json').loadRes(str(tmp_path / 'out/predictions.json'))
    assert len(loaded.anns) == len(results)


def test_only_scores_above_the_threshold(detector, photos, tmp_path):
    _, everything = run(detector, photos[:1], tmp_path / 'all', score_thr=0.0, draw=False)
    threshold = sorted(x['score'] for x in everything)[6]
    _, results = run(detector, photos[:1], tmp_path / 'some', score_thr=threshold, draw=False)
    assert results == [x for x in everything if x['score'] > threshold]
    _, results = run(detector, photos[:1], tmp_path / 'none', score_thr=1.0)
    assert results == []
    assert names(tmp_path / 'none') == ['drawn/x.jpg', 'images.json', 'predictions.json']
    assert 'drawn' not in str(names(tmp_path / 'all'))


def test_label_maps_are_those_of_mmseg(segmentor, photos, tmp_path):
    config, checkpoint = segmentor
    predict(Config.fromfile(config), checkpoint, [tmp_path / 'photos/*/*.png'], tmp_path / 'out', device='cpu')
    assert names(tmp_path / 'out') == [
        *('drawn/a/x.jpg', 'drawn/b/x.jpg', 'images.json', 'labels/a/x.png', 'labels/b/x.png'),
    ]
    images = json.loads((tmp_path / 'out/images.json').read_text())['images']
    model = init_model(*map(str, segmentor), device='cpu')
    for image, path in zip(images, photos, strict=True):
        wanted = inference_model(model, str(path)).pred_sem_seg.data[0].numpy()
        found = cv2.imread(str(tmp_path / 'out' / image['label_map']), cv2.IMREAD_UNCHANGED)
        assert len(np.unique(wanted)) > 1
        assert (found == wanted).all()
        assert cv2.imread(str(tmp_path / f'out/drawn/{path.parent.name}/x.jpg')).shape == (*wanted.shape, 3)


def test_classes_are_those_of_mmpretrain(photos, tmp_path):
    apis = pytest.importorskip('mmpretrain.apis')
    model = random_model(CLASSIFIER, tmp_path)
    with DefaultScope.overwrite_default_scope('mmdet'):  # as a detector leaves it
        images, results = run(model, photos, tmp_path / 'out')
    assert [x['name'] for x in images['categories']] == ['disk', 'rectangle', 'triangle']  # of the config
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        inferencer = apis.ImageClassificationInferencer(Config.fromfile(model[0]), str(model[1]), device='cpu')
    for image, path in zip(images['images'], photos, strict=True):
        (wanted,) = inferencer(str(path))
        found = {x['category_id']: x['score'] for x in results if x['image_id'] == image['id']}
        assert max(found, key=found.get) == wanted['pred_label']
        assert [found[label] for label in range(3)] == wanted['pred_scores'].tolist()
    assert cv2.imread(str(tmp_path / 'out/drawn/a/x.jpg')) is not None


def test_a_classifier_has_one_progress_bar(photos, tmp_path, monkeypatch):
    """mmpretrain's own was left running inside it on slow machines; the next bar then ended in a RecursionError."""
    base = pytest.importorskip('mmpretrain.apis.base')
    monkeypatch.setattr(base, 'track', lambda *args, **kwargs: pytest.fail('a second progress bar'))
    images, results = run(random_model(CLASSIFIER, tmp_path), photos, tmp_path / 'out')
    assert len(images['images']) == len(photos)
    assert len(results) == 3 * len(photos)


@pytest.mark.parametrize('task', ['detector', 'segmentor'])
def test_frames_of_a_video(task, tmp_path, request):
    config, checkpoint = request.getfixturevalue(task)
    writer = cv2.VideoWriter(str(tmp_path / 'clip.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 10.0, (80, 64))
    for frame in np.random.default_rng(0).integers(0, 256, (3, 64, 80, 3), np.uint8):
        writer.write(frame)
    writer.release()
    out = tmp_path / 'out'
    predict(Config.fromfile(config), checkpoint, [tmp_path / 'clip.avi'], out, score_thr=0.0, device='cpu')
    images = json.loads((out / 'images.json').read_text())['images']
    assert [image['frame'] for image in images] == [0, 1, 2]
    frames = [cv2.VideoCapture(str(path)) for path in (tmp_path / 'clip.avi', out / 'drawn/clip.mp4')]
    assert frames[1].get(cv2.CAP_PROP_FPS) == 10
    frames = [[video.read()[1] for _ in range(3)] for video in frames]
    assert frames[1][2].shape == (64, 80, 3)
    if task == 'detector':
        wanted = inference_detector(init_detector(str(config), str(checkpoint), device='cpu'), frames[0][2])
        found = [x for x in json.loads((out / 'predictions.json').read_text()) if x['image_id'] == images[2]['id']]
        assert [x['score'] for x in found] == wanted.pred_instances.scores.tolist()
    else:
        wanted = inference_model(init_model(str(config), str(checkpoint), device='cpu'), frames[0][2])
        found = cv2.imread(str(out / 'labels/clip/000002.png'), cv2.IMREAD_UNCHANGED)
        assert found.tolist() == wanted.pred_sem_seg.data[0].tolist()


def test_what_inputs_stand_for(photos, tmp_path):
    first, second = photos
    assert find_inputs([second, tmp_path / 'photos/*/x.*', first.parent, first]) == [second, first]
    for given, message in ((tmp_path / 'photos', 'has no images'), (tmp_path / '*.jpg', 'does not exist')):
        with pytest.raises(FileNotFoundError, match=message):
            find_inputs([given])
    with pytest.raises(ValueError, match=r'notes\.txt is not an image or video'):
        find_inputs([tmp_path / 'photos/a/notes.txt'])


def test_names_of_outputs():
    files = ['p/a/x.jpg', 'p/b/x.jpg', 'p/b/x.PNG', 'p/b/y.jpg', 'p/y.jpg']
    assert output_names([Path(file) for file in files]) == ['a/x', 'b/x.jpg', 'b/x.PNG', 'b/y', 'y']
    assert output_names([Path('p/a/x.jpg')]) == ['x']


def test_a_file_that_cannot_be_read_does_not_stop_the_others(segmentor, photos, tmp_path):
    config, checkpoint = segmentor
    broken = [tmp_path / name for name in ('cut.png', 'empty.jpg', 'broken.mp4')]
    for path, content in zip(broken, (photos[0].read_bytes()[:50], b'', b'x'), strict=True):
        path.write_bytes(content)
    out = tmp_path / 'out'
    arguments = Config.fromfile(config), checkpoint
    with pytest.raises(
        OSError, match=rf'cannot read {broken[0]}, {broken[1]}, {broken[2]}; the predictions of the other'
    ):
        predict(*arguments, [*broken, photos[0]], out, device='cpu')
    assert names(out / 'labels') == ['photos/a/x.png']
    with pytest.raises(OSError, match=rf'cannot read {broken[0]}$'):
        predict(*arguments, broken[:1], tmp_path / 'other', device='cpu')
    assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize(
    'meta', [None, {}, dict(dataset_meta=dict(CLASSES=('only one',), palette='x')), dict(dataset_meta=3)]
)
def test_odd_classes_in_a_checkpoint(meta, segmentor, photos, tmp_path):
    config, checkpoint = segmentor
    content = torch.load(checkpoint, weights_only=True)
    torch.save(dict(content, meta=meta), tmp_path / 'odd.pth')
    config = Config.fromfile(config)
    config.pop('visualizer')
    predict(config, tmp_path / 'odd.pth', photos, tmp_path / 'out', device='cpu')
    categories = json.loads((tmp_path / 'out/images.json').read_text())['categories']
    assert len(categories) == 150
    assert categories[0]['name'] == ('only one' if 'only' in str(meta) else 'wall')


def test_tool(segmentor, photos, tmp_path, monkeypatch, capsys):
    arguments = [*segmentor, *photos, '--out', tmp_path / 'out', '--no-draw', '--device', 'cpu']
    monkeypatch.setattr(sys, 'argv', ['predict.py', *map(str, arguments)])
    runpy.run_path(str(TOOLS / 'predict.py'), run_name='__main__')
    assert names(tmp_path / 'out') == ['images.json', 'labels/a/x.png', 'labels/b/x.png']
    assert f'{tmp_path / "out"} is written' in capsys.readouterr().out
    assert 'out is not empty' in tool_error('predict', *arguments)
    config, checkpoint = segmentor
    torch.save({'backbone.x': torch.ones(1)}, tmp_path / 'other.pth')
    out = ['--out', tmp_path / 'new']
    for changed, message in (
        ([config, tmp_path / 'other.pth', *photos, *out], f'other.pth does not fit {config}'),
        ([config, tmp_path / 'none.pth', *photos, *out], 'none.pth does not exist'),
        ([config, checkpoint, tmp_path / 'none.jpg', *out], 'none.jpg does not exist'),
        ([config, checkpoint, *photos, '--out', tmp_path / 'photos'], 'photos is not empty'),
        ([config, checkpoint, *photos, *out, '--device', 'cuda:99'], 'device cuda:99 cannot be used'),
        ([config, checkpoint, *photos, *out, '--cfg-options', 'default_scope=x'], 'default_scope must be one of'),
        ([config, checkpoint, *photos, '--out', tmp_path / 'no/out'], 'the folder of'),
    ):
        assert message in tool_error('predict', *changed)
    assert not (tmp_path / 'new').exists()
