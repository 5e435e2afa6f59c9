"""Classification through mmpretrain: configs, training, and what detectors and segmentors take over from it."""

import copy
import pickle
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import GOLDEN, golden_image, golden_state, randomize, relative_error, tool, tool_error
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from test_configs import IN1K, KNOWN_KEYS, ROOT, ZOO, host_of, inner_keys, load

from mmslide import engine, stack
from mmslide.build import build_model
from mmslide.checkpoints import read_checkpoint
from mmslide.data import check_datasets
from mmslide.flops import count_complexity
from mmslide.weights import load_pretrained

pytest.importorskip('mmpretrain', reason="needs pip install 'mmslide[classification]'")

MINI = ROOT / 'configs/mini/slide-pvt-mini_mini-imagenet-64x64.py'
CLASSES = ('disk', 'rectangle', 'triangle')
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
every_config = pytest.mark.parametrize('path', IN1K, ids=lambda path: path.stem)


# Learning rate, weight decay, norm at which gradients are clipped, warm-up and all epochs, images in a step.
SLIDE_TRAINER, PVTV2, TWINS = (1e-3, 0.05, 5, 20, 300, 1024), (1e-3, 0.05, None, 5, 300, 1024), 'sbl'
CSWIN, NAT = (2e-3, 0.05, None, 20, 310, 2048), (1e-3, 0.05, 5, 20, 310, 1024)
SETTINGS = {
    'pvt-{}_8xb128': (SLIDE_TRAINER, dict(t=0.1, s=0.1, m=0.3, l=0.3)),
    'swin-{}_8xb128': (SLIDE_TRAINER, dict(t=0.2, s=0.3)),
    'swin-{}_8xb64': ((5e-4, 0.05, 5, 20, 300, 512), dict(b=0.5)),
    'pvtv2-{}_8xb128': (PVTV2, {'b0': 0.1, 'b1': 0.1, 'b2': 0.1, 'b2-li': 0.1}),
    'pvtv2-{}_8xb128 ': ((1e-3, 0.05, 1, 5, 300, 1024), dict(b3=0.3, b4=0.3, b5=0.3)),
    'cswin-{}_8xb256': (CSWIN, dict(t=0.2, s=0.4)),
    'cswin-{}_8xb128': ((1e-3, 0.1, None, 20, 310, 1024), dict(b=0.5)),
    'nat-{}_8xb128': (NAT, dict(mini=0.2, t=0.2, s=0.3, b=0.5)),
    'twins-pcpvt-{}_8xb128': ((1e-3, 0.05, 5, 5, 300, 1024), dict(s=0.2, b=0.3, l=0.5)),
    'twins-svt-{}_8xb128': ((1e-3, 0.05, 5, 5, 300, 1024), dict(s=0.2, b=0.3, l=0.5)),
}


def test_settings():
    expected = {
        f'{name.format(size).strip()}_in1k': (*settings, drop_path)
        for name, (settings, sizes) in SETTINGS.items()
        for size, drop_path in sizes.items()
    }
    for path in IN1K:
        cfg = load(path)
        optimizer, clip = cfg.optim_wrapper.optimizer, cfg.optim_wrapper.get('clip_grad')
        warmup, decay = cfg.param_scheduler
        actual = (optimizer.lr, optimizer.weight_decay, clip and clip.max_norm, warmup.end, cfg.train_cfg.max_epochs)
        images = cfg.auto_scale_lr.base_batch_size
        assert (*actual, images, cfg.model.backbone.drop_path_rate) == expected[host_of(path).stem], path.stem
        assert images == np.prod([int(x) for x in re.search(r'_(\d+)xb(\d+)_', path.name).groups()])
        assert cfg.train_dataloader.batch_size == images // 8
        assert warmup.end == decay.begin
        assert decay.end == 300
    assert set(expected) == {host_of(path).stem for path in IN1K}


@every_config
def test_config(path):
    cfg = load(path)
    assert not set(cfg.keys()) - KNOWN_KEYS - {'bgr_mean', 'bgr_std'}
    assert {key for key in inner_keys(cfg.to_dict()) if isinstance(key, str) and key.startswith('_')} <= {'_scope_'}
    row = MODELS.get(cfg.model.backbone.type).variants[cfg.model.backbone.arch]
    assert cfg.model.head.in_channels == row['embed_dims'][3]
    assert cfg.model.backbone.stage_norm == ('next' if cfg.model.backbone.type == 'mmslide.SlidePVTv2' else 'output')
    if host_of(path) != path:
        host = load(host_of(path)).to_dict()
        assert host['model']['backbone'].pop('slide_stages') == ()
        assert host == cfg.to_dict()


FIRST = sorted({load(path).model.backbone.type: path for path in reversed(IN1K)}.values())


@pytest.mark.parametrize('path', FIRST, ids=lambda path: path.stem)
def test_weight_decay(path):
    """The authors' rules: weights of layers decay, and nothing else."""
    cfg = load(path)
    model = build_model(cfg, 'meta')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        optim_wrapper = build_optim_wrapper(model, dict(cfg.optim_wrapper, type='OptimWrapper'))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optim_wrapper.optimizer.param_groups:
        (parameter,) = group['params']
        name = names[id(parameter)]
        weight = name.endswith(('weight', 'position_embedding')) and parameter.ndim > 1 and '.peg.' not in name
        assert group['weight_decay'] == (cfg.optim_wrapper.optimizer.weight_decay if weight else 0), name


def test_pipelines_run():
    """RandAugment draws other transforms each time; some fail with some versions of NumPy and OpenCV."""
    image = np.random.default_rng(0).integers(256, size=(240, 300, 3), dtype=np.uint8)
    for path in (IN1K[0], MINI):
        cfg = load(path)
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            pipelines = [
                Compose([TRANSFORMS.build(transform) for transform in cfg[f'{name}_pipeline'][1:]])
                for name in ('train', 'test', 'tta')
            ]
        side = cfg.get('image_scale', (224, 224))
        for pipeline in [pipelines[0]] * 40 + pipelines[1:]:
            sample = pipeline(dict(img=image.copy(), img_shape=(240, 300), gt_label=1))
            inputs = sample['inputs'] if isinstance(sample['inputs'], list) else [sample['inputs']]
            assert {tuple(x.shape[1:]) for x in inputs} == {side}


@pytest.mark.parametrize(
    ('name', 'config'),
    [
        ('pcpvt_small_v0_cls_224', 'twins/twins-pcpvt-s_8xb128_in1k'),
        ('alt_gvt_small_cls_224', 'twins/twins-svt-s_8xb128_in1k'),
        ('pvt_v2_b1_cls_224', 'slide_pvtv2/pvtv2-b1_8xb128_in1k'),
        ('cswin_tiny_cls_224', 'slide_cswin/cswin-t_8xb256_in1k'),
        ('nat_mini_cls_224', 'slide_nat/nat-mini_8xb128_in1k'),
    ],
)
def test_classifier_of_the_authors(name, config, tmp_path):
    """Their whole file: norm, mean and head are where they have them."""
    model = build_model(load(ROOT / f'configs/{config}.py')).eval()
    state = golden_state(name)
    torch.save(state, tmp_path / 'x.pth')
    load_pretrained(model.backbone, tmp_path / 'x.pth')
    model.head.fc.load_state_dict({key: state[f'head.{key}'] for key in ('weight', 'bias')})
    with torch.no_grad():
        logits = model(golden_image(name))
    assert relative_error(logits, torch.from_numpy(np.load(GOLDEN / f'{name}.npz')['logits'])) < 1e-4


def small(backbone: dict) -> dict:
    """The same backbone with few channels and blocks, and no weights to fetch."""
    row = next(iter(MODELS.get(backbone['type']).variants.values()))
    arch = dict(row, embed_dims=[16, 32, 64, 128], depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 8], mlp_ratios=2)
    return {**copy.deepcopy(dict(backbone)), 'arch': arch, 'init_cfg': None}


def downstream(path: Path) -> tuple:
    """What of a backbone decides which weights fit."""
    backbone = load(path).model.backbone
    return backbone.type, backbone.arch, backbone.get('slide_stages')


def test_every_backbone_can_be_trained_on_imagenet():
    assert {downstream(path) for path in ZOO} <= {downstream(path) for path in IN1K}


STARTED = sorted(
    {
        repr({**load(path).model.backbone, 'arch': '', 'init_cfg': '', 'drop_path_rate': 0}): path for path in ZOO
    }.values()
)


@pytest.mark.parametrize('path', STARTED, ids=lambda path: path.stem)
def test_a_classifier_starts_detectors_and_segmentors(path, tmp_path):
    """By init_cfg.checkpoint alone, with all weights but the norm before the classifier's head."""
    backbone = load(path).model.backbone
    source = next(x for x in IN1K if downstream(x)[::2] == downstream(path)[::2])
    config = copy.deepcopy(load(source))
    config.model.update(backbone=small(config.model.backbone), head=dict(config.model.head, in_channels=128))
    classifier = randomize(build_model(config))
    torch.save(dict(state_dict=classifier.state_dict()), tmp_path / 'epoch_1.pth')
    started = MODELS.build(
        {**small(backbone), 'init_cfg': dict(backbone.init_cfg, checkpoint=str(tmp_path / 'epoch_1.pth'))}
    )
    started.init_weights()
    expected, actual = classifier.backbone.state_dict(), started.state_dict()
    fresh = {key for key in actual if re.match(r'stages\.\d\.norm\.', key)}
    if backbone.type == 'mmslide.SlidePVTv2':
        fresh = set()  # its norms belong to the stages
    for key, value in actual.items():
        assert torch.equal(value, torch.full_like(value, key.endswith('weight')) if key in fresh else expected[key]), (
            key
        )


def test_a_classifier_starts_from_a_classifier(tmp_path):
    """The norm before the head too, from our checkpoints as from the authors'."""
    config = dict(type='mmslide.SlideSwin', out_indices=(3,))
    first, second = MODELS.build(small(config)), MODELS.build(small(config))
    torch.save({f'backbone.{key}': value for key, value in randomize(first).state_dict().items()}, tmp_path / 'x.pth')
    load_pretrained(second, tmp_path / 'x.pth')
    assert all(torch.equal(value, first.state_dict()[key]) for key, value in second.state_dict().items())


def write_images(folder: Path, classes=CLASSES, splits=('train', 'val')) -> Path:
    for split in splits:
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            cv2.imwrite(str(folder / split / name / f'{name}.png'), np.zeros((40, 40, 3), np.uint8))
    return folder


def problems(data_root, **changes) -> list[str]:
    config = copy.deepcopy(load(MINI))
    config.merge_from_dict(changes)
    engine.move_data(config, str(data_root))
    checks = check_datasets(config, *LOADERS, everything=True)
    assert len(checks) == 2
    return [str(problem) for check in checks for problem in check.problems]


def test_data_that_fits(tmp_path):
    assert not problems(write_images(tmp_path))
    (check, *_) = check_datasets(
        engine.config_with_options(str(MINI), dict(data_root=str(tmp_path))), 'val_dataloader', everything=True
    )
    assert (check.images, check.annotations, dict(check.per_class)) == (3, 3, dict.fromkeys(CLASSES, 1))


@pytest.mark.parametrize(
    ('fault', 'message'),
    [
        ('folder', r'val, which val_dataloader reads, does not exist\. docs/train\.md'),
        ('class', r'train must have a folder for each of the 3 classes, but has 4 \(car, disk, rectangle, '),
        ('images', r'train has no image: none of its files ends in .*\.jpeg, \.jpg, \.pgm, \.png'),
        ('damaged', r'disk\.png cannot be read .*replace it or remove it'),
        (
            'number',
            r'has 3 classes .*model\.data_preprocessor\.num_classes=4 and model\.head\.num_classes=4: set num_cl',
        ),
        ('topk', r'has 3 classes, but Accuracy has topk=\(1, 5\)'),
    ],
)
def test_data_that_does_not(fault, message, tmp_path):
    changes = {}
    if fault == 'number':
        changes = {'model.head.num_classes': 4, 'model.data_preprocessor.num_classes': 4}
    elif fault == 'topk':
        changes = {'val_evaluator.topk': (1, 5), 'test_evaluator.topk': (1, 5)}
    write_images(tmp_path, splits=('train',) if fault == 'folder' else ('train', 'val'))
    if fault == 'class':
        (tmp_path / 'train/car').mkdir()
    for image in (tmp_path / 'train').rglob('*.png'):
        if fault == 'images':
            image.rename(image.with_suffix('.txt'))
        elif fault == 'damaged' and image.stem == 'disk':
            image.write_bytes(b'x')
    assert re.search(message, '\n'.join(problems(tmp_path, **changes)))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('disk.png 0\nrectangle.png 1\n', None),
        ('disk.png 0\ngone.png 1\n', r'val/gone\.png does not exist, 1 of 2 images of val_dataloader: .*meta/val\.txt'),
        ('disk.png 0\nrectangle.png 3\n', r'rectangle\.png has the label 3; labels of 3 classes are 0 to 2'),
        ('disk.png 0\nrectangle.png disk\n', r"meta/val\.txt must have .* but line 2 is 'rectangle\.png disk'"),
        ('disk.png 0\n\n', r"but line 2 is ''"),
        ('', r'but it is empty'),
    ],
)
def test_the_file_that_names_images_is_read_before_training(text, message, tmp_path):
    write_images(tmp_path)
    for name in CLASSES:
        (tmp_path / f'val/{name}/{name}.png').rename(tmp_path / f'val/{name}.png')
    (tmp_path / 'meta').mkdir()
    (tmp_path / 'meta/val.txt').write_text(text)
    config = engine.config_with_options(str(MINI), dict(data_root=str(tmp_path)))
    (check,) = check_datasets(config, 'val_dataloader')
    found = '\n'.join(map(str, check.problems))
    assert re.search(message, found) if message else not found


@pytest.mark.parametrize('fault', ['order', 'folders'])
def test_class_folders_that_change_the_meaning_of_labels(fault, tmp_path):
    changes, message = {}, r'train has .* in a different order.* set the order in .* to disk, rectangle, triangle'
    write_images(tmp_path)
    if fault == 'order':
        changes = {f'{loader}.dataset.metainfo.classes': CLASSES[::-1] for loader in LOADERS}
    else:
        (tmp_path / 'val/disk').rename(tmp_path / 'val/zebra')
        message = r'train and val_dataloader: .*val have different class folders \(disk, zebra\)'
    with pytest.warns(UserWarning, match=message):
        assert not problems(tmp_path, **changes)


def test_own_classes_may_be_left_to_the_folders(tmp_path):
    dataset = dict(_delete_=True, type='CustomDataset', data_root='data/mini/imagenet/', data_prefix='train')
    assert not problems(write_images(tmp_path), **{'train_dataloader.dataset': {**dataset, 'pipeline': []}})


def test_without_mmpretrain(tmp_path, monkeypatch):
    broken = tmp_path / 'torchvision.py'
    broken.write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
        monkeypatch.delitem(sys.modules, module)
    for found in (r'RuntimeError: operator torchvision::nms does not exist', r'ModuleNotFoundError: .*torchvision.*'):
        error = tool_error('get_flops', IN1K[0])
        assert re.search(
            rf'torchvision, which cannot .*\({found}\)\. Run: pip install torchvision torch==[\d.]+$', error
        )
        monkeypatch.setitem(sys.modules, 'torchvision', None)
    monkeypatch.setattr(stack, 'find_spec', lambda name: None)
    assert tool_error('get_flops', IN1K[0]).endswith("Run: pip install 'mmslide[classification]'")
    stack.check_scope('mmdet')


def test_torchvision_can_be_imported():
    """Its wheel on PyPI is built for CUDA; with a CPU build of torch its operators do not load."""
    import torchvision

    try:
        torchvision.extension._assert_has_ops()
    except RuntimeError:
        with pytest.raises(RuntimeError, match="Couldn't load custom C"):
            torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


def test_parts_of_the_count():
    complexity = count_complexity(load(MINI))
    assert complexity.shape == (224, 224)
    assert [part.name for part in complexity.parts] == ['backbone', 'neck', 'classification head']
    assert complexity.parts[-1].macs == 192 * 3


@pytest.fixture(scope='module')
def options(tmp_path_factory):
    data = tmp_path_factory.mktemp('data') / 'mini'
    tool('make_mini_dataset', data, '--num-train', 12, '--num-val', 6, '--size', 64)
    loaders = [
        f'{split}_dataloader.{key}'
        for split in ('train', 'val', 'test')
        for key in ('num_workers=0', 'persistent_workers=False')
    ]
    return ['--cfg-options', f'data_root={data}/imagenet', *loaders, 'train_dataloader.batch_size=4']


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """The mini config with averaged weights."""
    path = tmp_path_factory.mktemp('config') / 'classifier.py'
    path.write_text(
        f'_base_ = {str(MINI)!r}\n'
        "custom_hooks = [dict(type='EMAHook', momentum=0.5, priority='ABOVE_NORMAL')]\n"
        'train_cfg = dict(max_epochs=1, val_interval=1)\n'
        'param_scheduler = []\n'
    )
    return path


@pytest.fixture(scope='module')
def checkpoint(config, options, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('classifier')
    output = tool('train', config, '--work-dir', work_dir, '--auto-scale-lr', *options)
    assert 'accuracy/top1' in output
    return work_dir / 'epoch_1.pth'


@pytest.mark.slow
def test_averaged_weights_are_what_others_start_from(checkpoint):
    content = read_checkpoint(checkpoint)
    averaged, raw = content['state_dict'], content['ema_state_dict']
    key = 'backbone.stages.3.blocks.1.ffn.layers.1.weight'
    assert not torch.equal(averaged[key], raw[f'module.{key}'])
    backbone = {k: v for k, v in Config.fromfile(MINI).model.backbone.items() if k not in ('stage_norm', 'out_indices')}
    started = MODELS.build({**backbone, 'init_cfg': dict(type='Pretrained', checkpoint=str(checkpoint))})
    started.init_weights()
    assert all(torch.equal(value, averaged[f'backbone.{name}']) for name, value in started.state_dict().items())


@pytest.mark.slow
def test_classifier_is_tested_dumped_and_drawn(checkpoint, config, options, tmp_path):
    show = ['--show-dir', tmp_path / 'pictures', '--out', tmp_path / 'out.pkl', '--work-dir', tmp_path]
    output = tool('test', config, checkpoint, *show, *options)
    assert 'accuracy/top1' in output
    predictions = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert [len(x['pred_score']) for x in predictions] == [3] * 6
    pictures = sorted((tmp_path / 'pictures').glob('*'))
    assert len(pictures) == 6
    assert cv2.imread(str(pictures[0])).shape == (256, 256, 3)
    status, output = tool('test', config, checkpoint, '--tta', *show, *options, check=False)
    assert status == 2
    assert 'error: mmpretrain cannot draw augmented images' in output


@pytest.mark.exhaustive
def test_test_time_augmentation_uses_the_averaged_weights(checkpoint, config, options, tmp_path):
    scores = []
    for name in (config, MINI):  # with EMAHook and without
        tool('test', name, checkpoint, '--tta', '--out', tmp_path / 'out.pkl', '--work-dir', tmp_path, *options)
        scores.append(torch.stack([x['pred_score'] for x in pickle.loads((tmp_path / 'out.pkl').read_bytes())]))
    assert relative_error(*scores) < 1e-6


@pytest.mark.exhaustive
def test_averaged_weights_are_fine_tuned_for_other_classes(checkpoint, config, options, tmp_path):
    write_images(tmp_path / 'data', ('cat', 'dog', 'fox', 'owl'))
    path = tmp_path / 'other.py'
    path.write_text(
        f'_base_ = {str(config)!r}\n'
        f'load_from = {str(checkpoint)!r}\n'
        "metainfo = dict(classes=('cat', 'dog', 'fox', 'owl'))\n"
        'train_dataloader = dict(dataset=dict(metainfo=metainfo))\n'
        'val_dataloader = dict(dataset=dict(metainfo=metainfo))\n'
        'test_dataloader = val_dataloader\n'
        'model = dict(data_preprocessor=dict(num_classes=4), head=dict(num_classes=4))\n'
    )
    moved = [option if 'data_root' not in option else f'data_root={tmp_path}/data' for option in options]
    output = tool('train', path, '--work-dir', tmp_path / 'work', *moved, 'optim_wrapper.optimizer.lr=0')
    assert 'head.fc.weight (3, 192) instead of (4, 192)' in output
    states = [read_checkpoint(file)['state_dict'] for file in (checkpoint, tmp_path / 'work/epoch_1.pth')]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items() if 'backbone' in key)


@pytest.mark.exhaustive
def test_classifier_is_resumed(checkpoint, config, options, tmp_path):
    output = tool('train', config, '--work-dir', tmp_path, '--resume', checkpoint, *options, 'train_cfg.max_epochs=2')
    assert 'resumed epoch: 1' in output
    assert (tmp_path / 'epoch_2.pth').exists()


@pytest.mark.slow
def test_check_data_draws(options, tmp_path):
    output = tool('check_data', MINI, '--show-dir', tmp_path, '--number', 3, *options)
    assert 'rectangle 4' in output
    assert len(list(tmp_path.iterdir())) == 3
