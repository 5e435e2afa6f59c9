"""What users do with a trained model's whole life, in processes of their own, on a small generated data set."""

import os
import pickle
import re
import shutil
import signal
import sys
from pathlib import Path

import cv2
import pytest
import torch
from helpers import run, tool, tool_error
from torch.distributed.elastic.utils.distributed import get_free_port

from mmslide.checkpoints import read_checkpoint

REPOSITORY = Path(__file__).parent.parent
DETECTOR = REPOSITORY / 'configs/mini/cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py'
SEGMENTOR = next((REPOSITORY / 'configs/mini').glob('slide-swin-mini_upernet_*.py'))
TWINS_DETECTOR = REPOSITORY / 'configs/mini/cascade-mask-rcnn_twins-svt-mini_fpn_mini-coco.py'
TWINS_SEGMENTOR = next((REPOSITORY / 'configs/mini').glob('twins-pcpvt-mini_upernet_*.py'))
VAL_IMAGES = 6

pytestmark = pytest.mark.slow


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'mini'
    tool('make_mini_dataset', folder, '--num-train', 8, '--num-val', VAL_IMAGES, '--size', 64)
    return folder


@pytest.fixture(scope='session')
def detection(data):
    """Options that make the detection config small and quick."""
    loaders = [f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')]
    loaders += [f'{split}_dataloader.persistent_workers=False' for split in ('train', 'val', 'test')]
    hooks = ['default_hooks.logger.interval=1']
    return ['--cfg-options', f'data_root={data}/coco', *loaders, *hooks, 'train_dataloader.batch_size=4']


@pytest.fixture(scope='session')
def segmentation(data):
    loaders = [f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')]
    loaders += [f'{split}_dataloader.persistent_workers=False' for split in ('train', 'val', 'test')]
    loop = ['train_cfg.max_iters=3', 'train_cfg.val_interval=3', 'default_hooks.checkpoint.interval=3']
    return ['--cfg-options', f'data_root={data}/ade', *loaders, *loop, 'train_dataloader.batch_size=2']


@pytest.fixture(scope='session')
def detector(detection, tmp_path_factory):
    """A checkpoint of two epochs, trained with options that need a GPU."""
    work_dir = tmp_path_factory.mktemp('detector')
    options = [*detection, 'train_cfg.max_epochs=2']
    output = tool('train', DETECTOR, '--work-dir', work_dir, '--amp', '--auto-scale-lr', *options)
    assert 'mixed precision' in output or torch.cuda.is_available()
    assert 'LR is set based on batch size' in output
    assert 'loss_mask' in output
    return work_dir / 'epoch_2.pth'


@pytest.fixture(scope='session')
def segmentor(segmentation, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('segmentor')
    output = tool('train', SEGMENTOR, '--work-dir', work_dir, *segmentation, 'model.decode_head.norm_cfg.type=SyncBN')
    assert 'no GPU: SyncBN is replaced by BN' in output or torch.cuda.is_available()
    assert 'mIoU' in output
    return work_dir / 'iter_3.pth'


def test_detector_is_tested_dumped_and_drawn(detector, detection, tmp_path):
    show = ['--show-dir', tmp_path / 'pictures', '--out', tmp_path / 'out.pkl', '--work-dir', tmp_path]
    output = tool('test', DETECTOR, detector, *show, *detection, 'model.test_cfg.rcnn.score_thr=0.0')
    assert 'segm_mAP_50' in output
    predictions = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert len(predictions) == VAL_IMAGES
    assert all('masks' in x['pred_instances'] for x in predictions)
    pictures = sorted((tmp_path / 'pictures').glob('*'))
    assert len(pictures) == VAL_IMAGES
    height, width = cv2.imread(str(pictures[0])).shape[:2]
    assert width == 2 * height  # square images, ground truth and prediction side by side


@pytest.mark.exhaustive
def test_fused_detector_predicts_the_same(detector, detection, tmp_path):
    """Through the same tool, with the config that lies beside the fused checkpoint."""
    fused = tmp_path / 'fused.pth'
    tool('fuse_checkpoint', DETECTOR, detector, fused)
    assert read_checkpoint(fused)['meta']['fused'] is True
    tables, predictions = [], []
    for config, checkpoint in ((DETECTOR, detector), (fused.with_suffix('.py'), fused)):
        out = tmp_path / f'{checkpoint.stem}.pkl'
        arguments = ['--out', out, '--work-dir', tmp_path, *detection, 'model.test_cfg.rcnn.score_thr=0.0']
        output = tool('test', config, checkpoint, *arguments)
        assert 'do not match' not in output
        tables.append(re.findall(r'coco/\w+mAP\w*: [-\d.]+', output))
        predictions.append([x['pred_instances'] for x in pickle.loads(out.read_bytes())])
    assert len(tables[0]) == 12
    assert tables[0] == tables[1]
    for ours, wanted in zip(*predictions, strict=True):
        assert len(wanted['scores'])
        assert torch.allclose(ours['scores'], wanted['scores'], atol=1e-6)
        assert torch.allclose(ours['bboxes'], wanted['bboxes'], atol=1e-3)

    error = tool_error('test', DETECTOR, fused, '--work-dir', tmp_path, *detection)
    assert 'these weights are fused for inference' in error


@pytest.mark.exhaustive
def test_test_time_augmentation(detector, segmentor, detection, segmentation, tmp_path):
    options = [*detection, 'model.test_cfg.rcnn.score_thr=0.0']  # hardly trained, it is sure of nothing
    output = tool('test', DETECTOR, detector, '--tta', '--work-dir', tmp_path, *options)
    assert 'bbox_mAP' in output
    assert '--tta: mmdet merges boxes but not masks' in output
    output = tool('test', SEGMENTOR, segmentor, '--tta', '--work-dir', tmp_path, *segmentation)
    assert 'mIoU' in output


def test_segmentor_is_tested_written_and_drawn(segmentor, segmentation, tmp_path):
    show = ['--show-dir', tmp_path / 'pictures', '--out', tmp_path / 'maps', '--work-dir', tmp_path]
    output = tool('test', SEGMENTOR, segmentor, *show, *segmentation)
    assert 'mIoU' in output
    maps = sorted((tmp_path / 'maps').glob('*.png'))
    assert len(maps) == VAL_IMAGES
    assert cv2.imread(str(maps[0]), cv2.IMREAD_UNCHANGED).shape == (64, 64)
    assert len(list((tmp_path / 'pictures').rglob('*.png'))) == VAL_IMAGES


def test_apis_of_mmdet_and_mmseg(detector, segmentor, data):
    """In one process of its own: the inferencers set global state."""
    script = f"""
from mmdet.apis import DetInferencer, inference_detector, init_detector
images = sorted({str(data)!r} + '/coco/val2017/' + x for x in __import__('os').listdir({str(data)!r} + '/coco/val2017'))
config, checkpoint = {str(DETECTOR)!r}, {str(detector)!r}
model = init_detector(config, checkpoint, device='cpu')
assert inference_detector(model, images[0]).pred_instances.masks.shape[1:] == (64, 64)
result = DetInferencer(config, checkpoint, device='cpu', show_progress=False)(images[:2])
assert len(result['predictions']) == 2
from mmseg.apis import MMSegInferencer
segment = MMSegInferencer({str(SEGMENTOR)!r}, {str(segmentor)!r}, device='cpu')
assert segment(images[0])['predictions'].shape == (64, 64)
print('all three work')
"""
    assert 'all three work' in run(sys.executable, '-c', script)


# Imported by the training process through custom_imports: dies at a chosen moment, as a machine does.
KILL = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.fileio import LocalBackend

@HOOKS.register_module()
class KillHook(Hook):
    def __init__(self, iteration=None, save=None):
        self.iteration, self.save = iteration, save

    def before_run(self, runner):
        if self.save is None:
            return
        def put(backend, content, path):
            if not str(path).endswith(self.save):
                return original(backend, content, path)
            with open(path, 'wb') as file:
                file.write(content[: len(content) // 2])
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        original, LocalBackend.put = LocalBackend.put, put

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.iteration is not None and runner.iter + 1 == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ('moment', 'whole'),
    [
        pytest.param(dict(iteration=5), 2, id='between saves'),
        pytest.param(dict(save='epoch_2.pth'), 1, id='while saving'),
    ],
)
def test_training_killed_and_resumed(moment, whole, detection, tmp_path):
    (tmp_path / 'kill.py').write_text(KILL)
    config = tmp_path / 'killed.py'
    config.write_text(
        f'_base_ = {str(DETECTOR)!r}\n'
        "custom_imports = dict(imports=['mmslide', 'kill'], allow_failed_imports=False)\n"
        f"custom_hooks = [dict(type='KillHook', **{moment})]\n"
    )
    work_dir = tmp_path / 'work'
    options = ['--work-dir', work_dir, *detection, 'train_cfg.max_epochs=3', 'train_cfg.val_interval=9']
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    code, output = tool('train', config, *options, check=False, env=environment)
    assert code == -signal.SIGKILL, output[-3000:]
    assert not (work_dir / 'epoch_3.pth').exists()

    output = tool('train', DETECTOR, '--resume', *options)
    assert f'resumed epoch: {whole}' in output
    assert ('epoch_2.pth is not a readable checkpoint' in output) == (whole == 1)
    assert read_checkpoint(work_dir / 'epoch_3.pth')['meta']['epoch'] == 3


@pytest.mark.exhaustive
@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_twins_trained_resumed_and_tested(task, request, tmp_path):
    options = request.getfixturevalue(task)
    if task == 'detection':
        options = [*options, 'model.test_cfg.rcnn.score_thr=0.0']  # hardly trained, it is sure of nothing
        config, first, resumed, metric = TWINS_DETECTOR, 'epoch_1.pth', 'epoch: 1, iter: 2', 'segm_mAP_50'
        more = ['train_cfg.max_epochs={}', 'train_cfg.val_interval=9']
    else:
        config, first, resumed, metric = TWINS_SEGMENTOR, 'iter_1.pth', 'epoch: 0, iter: 1', 'mIoU'
        more = ['train_cfg.max_iters={}', 'train_cfg.val_interval=9', 'default_hooks.checkpoint.interval=1']
    train = ['train', config, '--work-dir', tmp_path, *options]
    tool(*train, *(x.format(1) for x in more))
    assert (tmp_path / first).exists()
    second = tmp_path / first.replace('1', '2')
    assert not second.exists()
    assert f'resumed {resumed}' in tool(*train, *(x.format(2) for x in more), '--resume')
    assert metric in tool('test', config, second, '--work-dir', tmp_path / 'test', *options)


FINE_TUNING = """
_base_ = {config!r}
load_from = {checkpoint!r}
metainfo = dict(classes={classes})
train_dataloader = dict(dataset=dict(metainfo=metainfo))
val_dataloader = dict(dataset=dict(metainfo=metainfo))
test_dataloader = val_dataloader
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_fine_tuned_for_other_classes(task, request, tmp_path):
    """As the configs in configs/finetune do it, with small models."""
    if task == 'detection':
        config, whole, classes = DETECTOR, 'detector', ('sports ball', 'kite', 'tv')
        heads = [f'roi_head.bbox_head.{stage}' for stage in (0, 1)]
        more, number, metric = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1'], 4, 'segm_mAP_50'
    else:
        config, whole, classes = SEGMENTOR, 'segmentor', ('wall', 'box', 'ball', 'flag')
        heads, more, number, metric = ['decode_head'], [], 2, 'mIoU'
    path = tmp_path / 'config.py'
    checkpoint = str(request.getfixturevalue(whole))
    path.write_text(FINE_TUNING.format(config=str(config), checkpoint=checkpoint, classes=classes))
    options = [*request.getfixturevalue(task), *more, *(f'model.{head}.num_classes={len(classes)}' for head in heads)]
    output = tool('train', path, '--work-dir', tmp_path / 'work', *options)
    # Of box heads classes and boxes' layers would start fresh, but these boxes are the same for all classes.
    assert f'initialized from scratch: {number} keys of another shape (' in output
    assert f'Load checkpoint from {checkpoint}' in output
    assert metric in output


def test_two_processes_on_a_cpu(detection, tmp_path):
    environment = {**os.environ, 'PATH': os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])}
    command = [REPOSITORY / 'tools/dist_train.sh', DETECTOR, 2, '--work-dir', tmp_path / 'work', *detection]
    environment['PORT'] = str(get_free_port())
    output = run(*command, 'train_cfg.max_epochs=1', env=environment)
    assert 'no GPU: distributed training uses gloo' in output or torch.cuda.is_available()
    checkpoint = tmp_path / 'work/epoch_1.pth'
    assert checkpoint.exists()
    # 8 images in batches of 4 from each of two processes: one iteration.
    assert '[1/1]' in output

    test = [REPOSITORY / 'tools/dist_test.sh', DETECTOR, checkpoint, 2, '--work-dir', tmp_path / 'test', *detection]
    environment['PORT'] = str(get_free_port())
    assert f'[{VAL_IMAGES // 2}/{VAL_IMAGES // 2}]' in run(*test, env=environment)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['data_root=/nowhere'], '/nowhere/annotations/instances_train2017.json, which train_dataloader'),
        (
            ['model.backbone.arch=huge'],
            "arch must be one of ['tiny', 'small', 'medium', 'large'] or a dict, got arch='huge'",
        ),
        (['model.backbone.slide_stages=[0,7]'], 'slide_stages must be a list of different stages from 0 to 3'),
        (['modle.backbone.arch=tiny'], "has no 'modle'; did you mean 'model'?"),
        (['model.backbone.no_such_argument=1'], "unexpected keyword argument 'no_such_argument'"),
        (['model.backbone.type=mmslide.Slide'], 'mmslide.Slide is not in the'),
        (['load_from=/nowhere/x.pth'], 'checkpoint /nowhere/x.pth does not exist'),
    ],
)
def test_one_clear_error(options, message, detection, tmp_path):
    marker = tmp_path / 'work/epoch_1.pth'
    marker.parent.mkdir()
    marker.write_text('an earlier training')
    error = tool_error('train', DETECTOR, '--work-dir', marker.parent, *detection, *options)
    assert message in error
    assert '\n' not in error
    assert marker.read_text() == 'an earlier training'


BUG = """
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class BugHook(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        raise ValueError('a bug')
"""


def test_a_bug_keeps_its_traceback(detection, tmp_path):
    (tmp_path / 'bug.py').write_text(BUG)
    config = tmp_path / 'config.py'
    config.write_text(
        f'_base_ = {str(DETECTOR)!r}\n'
        "custom_imports = dict(imports=['mmslide', 'bug'], allow_failed_imports=False)\n"
        "custom_hooks = [dict(type='BugHook')]\n"
    )
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    status, output = tool('train', config, '--work-dir', tmp_path, *detection, check=False, env=environment)
    assert status == 1
    assert 'Traceback' in output
    assert output.strip().endswith('ValueError: a bug')


def test_one_clear_error_of_what_the_runner_builds(detection, tmp_path):
    options = [*detection, 'optim_wrapper.optimizer.lrr=1']
    status, output = tool('train', DETECTOR, '--work-dir', tmp_path, *options, check=False)
    assert status == 2
    assert 'Traceback' not in output
    assert re.fullmatch(r"error: .*unexpected keyword argument 'lrr'.*", output.strip().splitlines()[-1])


def test_truncated_checkpoint_is_one_clear_error(detector, detection, tmp_path):
    broken = tmp_path / 'epoch_1.pth'
    broken.write_bytes(detector.read_bytes()[:-1000])
    options = ['--work-dir', tmp_path / 'work', *detection]
    config = tmp_path / 'pretrained.py'
    init_cfg = f"dict(_delete_=True, type='Pretrained', checkpoint={str(broken)!r})"
    config.write_text(f'_base_ = {str(DETECTOR)!r}\nmodel = dict(backbone=dict(init_cfg={init_cfg}))\n')
    for command in (
        ['test', DETECTOR, broken, *options],
        ['train', DETECTOR, '--resume', broken, *options],
        ['train', config, *options],
    ):
        error = tool_error(*command)
        assert str(broken) in error
        assert 'damaged' in error
    assert not (tmp_path / 'work').exists()


def test_no_network_is_one_message_and_no_work_dir(detection, tmp_path):
    config = tmp_path / 'pretrained.py'
    init_cfg = "dict(_delete_=True, type='Pretrained', checkpoint='http://127.0.0.1:9/pvt_tiny.pth')"
    config.write_text(f'_base_ = {str(DETECTOR)!r}\nmodel = dict(backbone=dict(init_cfg={init_cfg}))\n')
    error = tool_error('train', config, '--work-dir', tmp_path / 'work', *detection)
    for part in ('http://127.0.0.1:9/pvt_tiny.pth', 'init_cfg.checkpoint=FILE', 'init_cfg=None'):
        assert part in error
    assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize(
    'which',
    ['segmentor', *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ('empty', 'headless', 'stages', 'nothing'))],
)
def test_a_checkpoint_that_does_not_fit_is_refused(which, detector, segmentor, detection, tmp_path):
    content = read_checkpoint(detector)
    options, message = [], rf'does not fit {re.escape(str(DETECTOR))}: \d+ keys missing \(\S'
    if which == 'segmentor':
        content = read_checkpoint(segmentor)
    elif which == 'empty':
        content['state_dict'], message = {}, 'holds no state dict'
    elif which == 'headless':
        content['state_dict'] = {k: v for k, v in content['state_dict'].items() if not k.startswith('roi_head.')}
    elif which == 'stages':
        options = ['model.backbone.slide_stages=[0]']
    else:
        content, message = dict(x=1), 'holds no state dict'
    path = tmp_path / 'other.pth'
    torch.save(content, path)
    options = ['--work-dir', tmp_path / 'work', *detection, *options]
    assert re.search(message, tool_error('test', DETECTOR, path, *options))
    resumed = tool_error('train', DETECTOR, '--resume', path, *options)
    assert re.search('not a training checkpoint' if which == 'nothing' else message, resumed)
    assert not (tmp_path / 'work').exists()


DIVERGE = """
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class DivergeHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2:
            runner.model.rpn_head.rpn_cls.bias.data.fill_(float('nan'))
"""


def test_a_training_that_diverges_stops_and_keeps_its_last_checkpoint(detection, tmp_path):
    (tmp_path / 'diverge.py').write_text(DIVERGE)
    config = tmp_path / 'config.py'
    config.write_text(
        f'_base_ = {str(DETECTOR)!r}\n'
        "custom_imports = dict(imports=['mmslide', 'diverge'], allow_failed_imports=False)\n"
        "custom_hooks = [dict(type='DivergeHook')]\n"
    )
    options = [*detection, 'train_cfg.max_epochs=2', 'train_cfg.val_interval=9']
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    status, output = tool('train', config, '--work-dir', tmp_path, *options, check=False, env=environment)
    assert status == 2
    assert 'Traceback' not in output
    message = output.strip().splitlines()[-1]
    assert 'weights are NaN or infinite' in message
    assert f'The last checkpoint with finite weights is {tmp_path}/epoch_1.pth' in message
    assert [path.name for path in tmp_path.glob('*.pth')] == ['epoch_1.pth']
    assert 'DivergeHook' in config.read_text().splitlines()[-1]  # the config in the work_dir is as it was written


@pytest.mark.exhaustive
def test_a_new_run_in_an_old_ones_folder_says_so(detector, detection, tmp_path):
    shutil.copy(detector, tmp_path / 'epoch_12.pth')
    options = ['--work-dir', tmp_path, *detection, 'train_cfg.val_interval=9']
    output = tool('train', DETECTOR, *options, 'train_cfg.max_epochs=1')
    assert re.search(r'has checkpoints of an earlier run, and this one will overwrite .*: epoch_12\.pth\.', output)
    output = tool('train', DETECTOR, *options, 'train_cfg.max_epochs=2', '--resume')
    assert 'epoch_12.pth were saved by another run' in output
    assert 'was saved with a different train_cfg; training continues with the current config' in output
    assert 'resumed epoch: 1' in output
