import argparse
import shutil

import pytest
import torch
from mmengine.config import Config

from mmslide import engine
from mmslide.files import find_config

CONFIG = """
default_scope = 'mmdet'
data_root = 'data/coco/'
model = dict(
    backbone=dict(norm_cfg=dict(type='SyncBN')),
    decode_head=[dict(norm_cfg=dict(type='SyncBN'))],
)
optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic', optimizer=dict(type='AdamW'))
train_dataloader = dict(
    dataset=dict(
        type='RepeatDataset',
        dataset=dict(data_root=data_root, ann_file='annotations/train.json', data_prefix=dict(img='train/')),
    )
)
test_evaluator = dict(type='CocoMetric', ann_file=data_root + 'annotations/val.json')
other = 'data/coco2017/x'
"""


@pytest.fixture
def read(tmp_path):
    path = tmp_path / 'some_config.py'
    path.write_text(CONFIG)

    def read(**options):
        work_dir = options.pop('work_dir', None)
        launcher = options.pop('launcher', 'none')
        args = argparse.Namespace(
            config=str(path), work_dir=work_dir, cfg_options=options, launcher=launcher, local_rank=0
        )
        return engine.read_config(args)

    return read


def test_data_root_moves_every_path_below_it(read):
    config = read(data_root='/elsewhere/coco')
    assert config.data_root == '/elsewhere/coco/'
    assert config.train_dataloader.dataset.dataset.data_root == '/elsewhere/coco/'
    assert config.test_evaluator.ann_file == '/elsewhere/coco/annotations/val.json'
    assert config.other == 'data/coco2017/x'


def test_work_dir_is_named_after_the_config(read, tmp_path):
    assert read().work_dir == 'work_dirs/some_config'
    assert read(work_dir='w').work_dir == 'w'


def test_unknown_options_are_refused(read):
    with pytest.raises(ValueError, match=r"has no 'modle'; did you mean 'model'"):
        read(**{'modle.backbone.arch': 'tiny'})
    assert read(**{'randomness.seed': 3}).randomness.seed == 3  # the runner knows it, the config does not


def test_fall_back_to_cpu(read):
    config = read(launcher='pytorch')
    with pytest.warns(UserWarning, match='no GPU') as warnings:
        engine.fall_back_to_cpu(config)
    told = ' '.join(str(x.message) for x in warnings)
    assert 'float32 instead of mixed precision' in told
    assert 'BN instead of SyncBN, which the config names 2 times' in told
    assert 'gloo' in told
    assert config.optim_wrapper == dict(type='OptimWrapper', optimizer=dict(type='AdamW'))
    assert 'SyncBN' not in str(config.model)
    assert config.model_wrapper_cfg.device_ids is None


def test_last_whole_checkpoint_passes_over_damaged_ones(tmp_path):
    assert engine.last_whole_checkpoint(str(tmp_path)) is None
    for epoch in (2, 9, 10):
        torch.save(dict(x=torch.randn(1000)), tmp_path / f'epoch_{epoch}.pth')
    shutil.copy(tmp_path / 'epoch_2.pth', tmp_path / 'best_coco_bbox_mAP_epoch_11.pth')
    assert engine.last_whole_checkpoint(str(tmp_path)) == str(tmp_path / 'epoch_10.pth')
    content = (tmp_path / 'epoch_10.pth').read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    for damaged in (content[:-200], content[: len(content) // 2], b'', bytes(flipped)):
        (tmp_path / 'epoch_10.pth').write_bytes(damaged)
        with pytest.warns(UserWarning, match=r'epoch_10\.pth is incomplete'):
            assert engine.last_whole_checkpoint(str(tmp_path)) == str(tmp_path / 'epoch_9.pth')


def test_old_checkpoint_format_is_whole(tmp_path):
    path = tmp_path / 'epoch_1.pth'
    torch.save(dict(x=torch.randn(10)), path, _use_new_zipfile_serialization=False)
    engine.check_checkpoint(str(path))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match='is damaged or incomplete'):
        engine.check_checkpoint(str(path))
    with pytest.raises(FileNotFoundError, match='does not exist'):
        engine.check_checkpoint(str(tmp_path / 'none.pth'))


def test_options_that_the_config_cannot_serve_are_refused():
    config = Config(dict(default_scope='mmdet', test_evaluator=dict(type='CocoMetric')))
    with pytest.raises(ValueError, match='auto_scale_lr'):
        engine.set_auto_scale_lr(config)
    with pytest.raises(ValueError, match=r'must be a \.pkl file for detection, got out'):
        engine.set_out(config, 'out')
    with pytest.raises(ValueError, match='visualization'):
        engine.set_show(config, True, None, 0)
    with pytest.raises(ValueError, match='--tta needs tta_model and tta_pipeline'):
        engine.set_tta(config)
    config.default_scope = 'mmseg'
    with pytest.raises(ValueError, match=r'must be a folder for segmentation, got x\.pkl'):
        engine.set_out(config, 'x.pkl')
    config.default_scope = 'other'
    with pytest.raises(ValueError, match="got 'other'"):
        engine.set_out(config, 'out')


def test_find_config():
    own = find_config('mask-rcnn_slide-pvt-t_fpn_1x_coco.py')
    assert own.is_file()
    assert find_config(str(own)) == own
    for name in ('nowhere.py', 'folder/mask-rcnn_slide-pvt-t_fpn_1x_coco.py'):
        with pytest.raises(FileNotFoundError, match=f'{name} is no file, and no config of mmslide'):
            find_config(name)
