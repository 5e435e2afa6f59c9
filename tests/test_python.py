"""mmslide's configs by name, and in the Python interfaces of mmengine, mmdet and mmseg."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from helpers import random_model, tool_error
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.config import Config
from mmengine.hub import get_config, get_model
from mmengine.registry import DATASETS, DefaultScope
from mmseg.apis import MMSegInferencer, inference_model, init_model

from mmslide.build import build_model
from mmslide.files import find_config
from mmslide.models import SlidePVT

CONFIGS = Path(__file__).parents[1] / 'configs'
ZOO = ['slide_pvt/mask-rcnn_slide-pvt-t_fpn_1x_coco.py', 'slide_swin/slide-swin-t_upernet_8xb2-160k_ade20k-512x512.py']
DETECTOR = 'cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py'
SEGMENTOR = 'slide-swin-mini_upernet_mini-ade20k-64x64.py'


@pytest.fixture(autouse=True)
def default_scope(monkeypatch):
    """mmdet's and mmseg's functions leave theirs behind."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict(DefaultScope._instance_dict))


@pytest.mark.parametrize('name', ZOO)
def test_a_base_of_another_folder(name, tmp_path):
    config = tmp_path / 'mine.py'
    config.write_text(f"_base_ = 'mmslide::{name}'\nmodel = dict(backbone=dict(arch='small', init_cfg=None))\n")
    ours = Config.fromfile(CONFIGS / name)
    ours.merge_from_dict({'model.backbone.arch': 'small', 'model.backbone.init_cfg': None})
    cfg = Config.fromfile(config)
    assert cfg.to_dict() == ours.to_dict()
    build_model(cfg, 'meta')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True))


def test_bases_of_two_packages(tmp_path):
    """mmdet's keep their scope."""
    config = tmp_path / 'mine.py'
    config.write_text("_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', 'mmslide::_base_/schedules/pvt_1x.py']\n")
    cfg = Config.fromfile(config)
    assert cfg.model._scope_ == 'mmdet'
    assert '_scope_' not in cfg.optim_wrapper


def test_a_base_that_does_not_exist(tmp_path):
    config = tmp_path / 'mine.py'
    config.write_text("_base_ = 'mmslide::slide_pvt/none.py'\n")
    assert f'mmslide has no config slide_pvt/none.py, which {config} names in _base_' in tool_error('get_flops', config)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package folder as an installed wheel has it."""
    mim = tmp_path / 'mmslide/.mim'
    mim.mkdir(parents=True)
    for path in (CONFIGS, CONFIGS.parent / 'model-index.yml'):
        (mim / path.name).symlink_to(path)
    monkeypatch.setattr('mmengine.hub.hub.get_installed_path', lambda package: str(tmp_path / package))


@pytest.mark.parametrize('name', [*ZOO, f'mini/{DETECTOR}'])
def test_hub(name, installed):
    assert get_config(f'mmslide::{name}').to_dict() == Config.fromfile(CONFIGS / name).to_dict()


@pytest.mark.parametrize('name', [f'mini/{DETECTOR}', f'mini/{SEGMENTOR}'])
def test_a_model_of_the_hub(name, installed):
    model = get_model(f'mmslide::{name}')
    wanted = build_model(Config.fromfile(CONFIGS / name), 'meta')
    assert {key: x.shape for key, x in model.state_dict().items()} == {
        key: x.shape for key, x in wanted.state_dict().items()
    }
    assert isinstance(model.backbone, SlidePVT) == ('slide-pvt' in name)


@pytest.fixture(scope='module')
def image():
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)


def test_mmdet_inferencer(image, tmp_path):
    test_cfg = dict(rpn=dict(max_per_img=10), rcnn=dict(score_thr=0.0, max_per_img=9))
    config, checkpoint = map(str, random_model(DETECTOR, tmp_path, 80, test_cfg=test_cfg))
    wanted = inference_detector(init_detector(config, checkpoint, device='cpu'), image).pred_instances
    assert len(wanted) == 9
    for given in (config, Config.fromfile(config)):
        inferencer = DetInferencer(given, checkpoint, device='cpu')
        (found,) = inferencer(image)['predictions']
        assert found['scores'] == wanted.scores.tolist()
        assert found['bboxes'] == wanted.bboxes.tolist()
    assert inferencer.visualizer.dataset_meta['classes'][79] == 'class 79'


def test_mmseg_inferencer(image, tmp_path):
    config, checkpoint = map(str, random_model(SEGMENTOR, tmp_path, 150))
    wanted = inference_model(init_model(config, checkpoint, device='cpu'), image).pred_sem_seg.data[0]
    found = MMSegInferencer(config, checkpoint, device='cpu')(image)['predictions']
    assert len(wanted.unique()) > 1
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize(('inferencer', 'name'), [(DetInferencer, DETECTOR), (MMSegInferencer, SEGMENTOR)])
def test_inferencers_by_bare_config_name(inferencer, name, image):
    with pytest.warns(UserWarning, match='Checkpoint is not loaded'):
        found = inferencer(name.removesuffix('.py'), device='cpu')
    assert found.cfg.filename == str(find_config(name))
    assert found(image)['predictions'] is not None


@pytest.mark.parametrize('name', ['nothing', SEGMENTOR.removesuffix('.py')])
def test_a_bare_name_that_is_no_detector(name):
    with pytest.raises(ValueError, match=f'Cannot find model: {name} in mmdet'):
        DetInferencer(name, device='cpu')


def test_mmdet_finds_its_own_models_first():
    """Some have the name of one of ours, and weights."""
    inferencer = DetInferencer.__new__(DetInferencer)
    inferencer.scope = 'mmdet'
    cfg, weights = inferencer._load_model_from_metafile('retinanet_pvt-t_fpn_1x_coco')
    assert '/mmdet/' in cfg.filename
    assert weights.startswith('https://')


def test_init_detector_by_bare_config_name(image):
    model = init_detector(find_config(DETECTOR), device='cpu')
    assert inference_detector(model, image).pred_instances is not None
