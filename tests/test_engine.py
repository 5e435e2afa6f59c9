import argparse
import logging
import re
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tool_error
from mmengine.config import Config
from mmengine.model import PretrainedInit

from mmslide import engine
from mmslide.build import build_model
from mmslide.checkpoints import read_checkpoint
from mmslide.messages import INPUT_ERRORS, exit_on

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


def test_work_dir_is_named_after_the_config(read, tmp_path):
    assert read().work_dir == 'work_dirs/some_config'
    assert read(work_dir='w').work_dir == 'w'


def test_unknown_options_are_refused(read):
    for key in ('modle.backbone.arch', 'train_dataloder.batch_size', 'find_unused_parameter', 'complie'):
        with pytest.raises(ValueError, match=rf"has no '{key.split('.')[0]}'; did you mean '"):
            read(**{key: 'x'})
    with pytest.warns(UserWarning, match=r"neither .*some_config\.py nor mmengine knows 'zzz'"):
        assert read(zzz=1).zzz == 1


@pytest.mark.parametrize(
    'key',
    [
        *('find_unused_parameters', 'model_wrapper_cfg', 'sync_bn', 'compile', 'activation_checkpointing'),
        *('runner_type', 'tta_model', 'tta_pipeline', 'efficient_conv_bn_eval'),
        *('randomness.seed', 'auto_scale_lr.enable', 'load_from', 'param_scheduler', 'custom_hooks', 'model.new'),
    ],
)
def test_what_the_config_or_mmengine_knows_is_accepted(key, read, recwarn):
    value = read(**{key: 1})
    for part in key.split('.'):
        value = value[part]
    assert value == 1
    assert not [x for x in recwarn if '--cfg-options' in str(x.message)]


def test_custom_imports_of_the_options_are_imported(read, tmp_path, monkeypatch):
    (tmp_path / 'imported_by_option.py').write_text('')
    monkeypatch.syspath_prepend(tmp_path)
    read(**{'custom_imports.imports': ['imported_by_option']})
    assert sys.modules.pop('imported_by_option')
    with pytest.raises(ImportError, match='no_such_module'):
        read(**{'custom_imports.imports': ['no_such_module']})


def test_what_a_config_must_have(tmp_path):
    (tmp_path / 'x.py').write_text("model = dict(type='X')")
    args = argparse.Namespace(
        config=str(tmp_path / 'x.py'), work_dir='w', cfg_options={}, launcher='none', local_rank=0
    )
    engine.read_config(args)
    with pytest.raises(ValueError, match=r'x\.py has no test_dataloader'):
        engine.read_config(args, 'test_dataloader')
    (tmp_path / 'x.py').write_text('')
    with pytest.raises(ValueError, match=r'x\.py has no model'):
        engine.read_config(args)


def test_a_config_in_the_work_dir_is_not_overwritten(read, tmp_path):
    config = read(work_dir=str(tmp_path / 'w'))
    engine.keep_config_file(config)
    assert Path(config.filename).name == 'some_config.py'
    config = read(work_dir=str(tmp_path))
    engine.keep_config_file(config)
    assert config.filename is None


def test_options_are_pairs(capsys):
    with pytest.raises(SystemExit, match=r'^2$'):
        engine.config_parser('').parse_args(['x.py', '--cfg-options', 'a=1', 'novalue'])
    assert "must be KEY=VALUE pairs, got 'novalue'" in capsys.readouterr().err


@pytest.mark.parametrize('value', ['[dict(type="EMAHook",momentum=0.1)]', "{'a':1,'b':(1,2)}"])
def test_options_are_plain_values(value, capsys):
    with pytest.raises(SystemExit, match=r'^2$'):
        engine.config_parser('').parse_args(['x.py', '--cfg-options', f'a={value}'])
    assert 'not dicts or calls: set each key of a dict separately, as in a.b=1' in capsys.readouterr().err


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_predictions_and_drawings_never_replace_inputs(scope, tmp_path):
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'w.pkl').touch()
    config = Config(
        dict(
            default_scope=scope,
            load_from=str(tmp_path / 'w.pkl'),
            test_dataloader=dict(dataset=dict(data_root=str(tmp_path), data_prefix=dict(seg_map_path='annotations'))),
            test_evaluator=[dict(type='IoUMetric')],
            default_hooks=dict(visualization=dict()),
            visualizer=dict(type='X'),
        )
    )
    out = tmp_path / ('w.pkl' if scope == 'mmdet' else 'annotations')
    with pytest.raises(ValueError, match='would overwrite the input'):
        engine.set_out(config, str(out))
    with pytest.raises(ValueError, match='would overwrite the input'):
        engine.set_show(config, False, str(tmp_path / 'annotations'), 0)
    with pytest.raises(ValueError, match='--out must be a'):
        engine.set_out(config, str(tmp_path / 'w.pkl' if scope == 'mmseg' else tmp_path / 'annotations'))
    engine.set_out(config, str(tmp_path / ('new.pkl' if scope == 'mmdet' else 'new')))
    assert str(tmp_path / 'new') in str(config.test_evaluator)


def test_a_config_that_cannot_be_read_is_one_error(tmp_path):
    for text, message in (
        ('x = (', 'SyntaxError'),
        ("_base_ = 'none.py'", 'none.py'),
        ('x = undefined', "NameError: name 'undefined'"),
    ):
        (tmp_path / 'broken.py').write_text(text)
        with pytest.raises(ValueError, match=rf'config .*broken\.py cannot be read: .*{message}'):
            engine.config_from_file(str(tmp_path / 'broken.py'))


@pytest.mark.parametrize('pays', [False, True])
def test_fall_back_to_cpu(read, monkeypatch, pays):
    monkeypatch.setattr(engine, 'bfloat16_pays', lambda: pays)
    config = read(launcher='pytorch')
    with pytest.warns(UserWarning, match='no GPU') as warnings:
        engine.fall_back_to_cpu(config)
    told = ' '.join(str(x.message) for x in warnings)
    assert ('bfloat16, only in the backbone' if pays else 'float32 instead of mixed precision') in told
    assert 'SyncBN is replaced by BN (2 times in the config)' in told
    assert 'gloo' in told
    wrapper = 'mmslide.BackboneAmpOptimWrapper' if pays else 'OptimWrapper'
    assert config.optim_wrapper == dict(type=wrapper, optimizer=dict(type='AdamW'))
    assert 'SyncBN' not in str(config.model)
    assert config.model_wrapper_cfg.device_ids is None


@pytest.fixture
def save(tmp_path):
    """Saves a checkpoint as mmengine does, with what tells a run from another."""

    def save(name, iteration, time, cfg="model = dict(type='X')\nresume = False\n"):
        meta = dict(epoch=iteration, iter=iteration, time=time, cfg=cfg)
        content = dict(meta=meta, state_dict=dict(x=torch.randn(1000)), optimizer={}, message_hub={})
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return save


def name_last(folder, path):
    (folder / 'last_checkpoint').write_text(str(path))


def test_last_whole_checkpoint_skips_damaged_ones(save, tmp_path):
    assert engine.last_whole_checkpoint(tmp_path) is None
    for epoch in (2, 9, 10):
        save(f'epoch_{epoch}.pth', epoch, f'20260101_0000{epoch:02}')
    shutil.copy(tmp_path / 'epoch_2.pth', tmp_path / 'best_coco_bbox_mAP_epoch_11.pth')
    name_last(tmp_path, tmp_path / 'epoch_10.pth')
    assert engine.last_whole_checkpoint(tmp_path) == str(tmp_path / 'epoch_10.pth')
    content = (tmp_path / 'epoch_10.pth').read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    for damaged in (content[:-200], content[: len(content) // 2], b'', bytes(flipped)):
        (tmp_path / 'epoch_10.pth').write_bytes(damaged)
        with pytest.warns(UserWarning, match=r'skipped: .*epoch_10\.pth is not a readable checkpoint'):
            assert engine.last_whole_checkpoint(tmp_path) == str(tmp_path / 'epoch_9.pth')


@pytest.mark.parametrize('record', ['there', 'missing', 'moved', 'damaged'])
def test_the_interrupted_run_is_continued_not_the_highest_number(record, save, tmp_path):
    """An old run got as far as epoch 12; a new one was interrupted after epoch 2."""
    for epoch in (11, 12):
        save(f'epoch_{epoch}.pth', epoch, f'20260101_0000{epoch}')
    for epoch in (1, 2):
        save(f'epoch_{epoch}.pth', epoch, f'20260202_0000{epoch:02}', 'model = dict(type="X")\nresume = True\n')
    wanted = tmp_path / 'epoch_2.pth'
    if record != 'missing':
        name_last(tmp_path, '/elsewhere/epoch_2.pth' if record == 'moved' else wanted)
    if record == 'damaged':
        wanted.write_bytes(wanted.read_bytes()[:-100])
        wanted = tmp_path / 'epoch_1.pth'
    with pytest.warns(UserWarning, match='saved by another run') as warnings:
        assert engine.last_whole_checkpoint(tmp_path) == str(wanted)
    told = str(warnings[-1].message)
    assert re.search(rf'epoch_11\.pth, .*epoch_12\.pth were saved by another run than {wanted}', told)
    assert not re.search(r'epoch_[12]\.pth', told.split(' were saved')[0])


def test_the_last_checkpoint_is_preferred_to_a_later_one(save, tmp_path):
    first, second = save('epoch_1.pth', 1, '20260101_000001'), save('epoch_2.pth', 2, '20260101_000002')
    name_last(tmp_path, first)
    assert engine.last_whole_checkpoint(tmp_path) == first
    name_last(tmp_path, second)
    assert engine.last_whole_checkpoint(tmp_path) == second


def test_what_differs_between_two_configs():
    text = "model = dict(depth=1)\nlr = 1e-4\nwork_dir = 'a'\nload_from = None\n"
    assert not engine.changed_settings(text, text.replace("'a'", "'b'").replace('None', "'x.pth'"))
    assert engine.changed_settings(text, text.replace('depth=1', 'depth=2') + 'more = 1') == ['model', 'more']
    assert engine.changed_settings('a = 1', 'not python (') == ['a']
    assert engine.changed_settings('a = ' + '(' * 10000, '') == []


def test_a_copied_work_dir_continues_its_own_checkpoint(save, tmp_path):
    save('epoch_1.pth', 1, '20260101_000001')
    name_last(tmp_path, tmp_path / 'epoch_1.pth')
    copied = tmp_path / 'copied'
    copied.mkdir()
    for name in ('epoch_1.pth', 'last_checkpoint'):
        shutil.copy(tmp_path / name, copied)
    assert engine.last_whole_checkpoint(copied) == str(copied / 'epoch_1.pth')


@pytest.mark.parametrize('record', [b'', b'\xff\x00garbage', b'x' * 10000, b'/', b'.'])
def test_a_record_that_names_nothing(record, save, tmp_path):
    path = save('epoch_1.pth', 1, '20260101_000001')
    (tmp_path / 'last_checkpoint').write_bytes(record)
    assert engine.last_whole_checkpoint(tmp_path) == path


def test_odd_meta_data_do_not_stop_resuming(save, tmp_path):
    path = save('epoch_1.pth', 1, '20260101_000001')
    torch.save(dict(meta=dict(iter='x', time=3, cfg=[1])), tmp_path / 'epoch_2.pth')
    with pytest.warns(UserWarning, match=r'epoch_2\.pth were saved by another run'):
        assert engine.last_whole_checkpoint(tmp_path) == path


def test_resume_by_the_config(save, tmp_path):
    path = save('epoch_1.pth', 1, '20260101_000001')
    config = Config(dict(work_dir=str(tmp_path), model=dict(type='X'), resume=True))
    assert resumed(config, None) == path
    config = Config(dict(work_dir=str(tmp_path / 'new'), model=dict(type='X'), resume=True))
    with pytest.warns(UserWarning, match='training starts from the beginning'):
        assert resumed(config, None) is None


@pytest.mark.parametrize('where', ['inside', 'outside'])
def test_a_checkpoint_does_not_name_files_to_delete(where, tmp_path):
    """mmengine removes `best_ckpt` of a resumed training when there is a better one."""
    best = tmp_path / ('work/best.pth' if where == 'inside' else 'best.pth')
    runner = SimpleNamespace(work_dir=str(tmp_path / 'work'), hooks=[], logger=logging.getLogger(), _resume=True)
    info = dict(best_ckpt=str(best), last_ckpt=str(best), best_score=1, iter=3)
    engine._RunHook().after_load_checkpoint(runner, dict(message_hub=dict(runtime_info=info)))
    assert set(info) == {'best_score', 'iter', *(['best_ckpt', 'last_ckpt'] if where == 'inside' else [])}


def resumed(config, resume):
    engine.set_resume(config, resume)
    return config.get('load_from') if config.get('resume') else None


def test_resume(save, tmp_path):
    config = Config(dict(work_dir=str(tmp_path / 'work'), lr=1))
    with pytest.warns(UserWarning, match='no usable checkpoint in .*work, training starts from the beginning'):
        assert resumed(config, 'auto') is None
    path = save('epoch_1.pth', 1, '20260101_000001', config.pretty_text)
    assert resumed(config, path) == path
    config.lr = 2
    with pytest.warns(
        UserWarning, match=r'epoch_1\.pth was saved with a different lr; training continues with the current'
    ):
        assert resumed(config, path) == path


@pytest.mark.parametrize('resume', [None, 'elsewhere'])
def test_a_new_run_names_the_checkpoints_of_an_earlier_one(resume, save, tmp_path, monkeypatch):
    save('epoch_1.pth', 1, '20260101_000001')
    save('iter_20.pth', 20, '20260101_000002')
    if resume:
        (tmp_path / resume).mkdir()
        resume = shutil.copy(tmp_path / 'epoch_1.pth', tmp_path / resume)
    config = Config(dict(work_dir=str(tmp_path), model=dict(type='X')))
    with pytest.warns(
        UserWarning,
        match=r'has checkpoints of an earlier run, .*overwrite.*: epoch_1\.pth, iter_20\.pth\. Use --resume',
    ):
        assert resumed(config, resume) == resume


@pytest.mark.parametrize('missing', ['optimizer', 'message_hub', 'meta', 'everything'])
def test_resume_from_what_is_no_checkpoint_of_a_training(missing, save, tmp_path):
    path = save('x.pth', 1, '20260101_000001')
    content = read_checkpoint(path)
    content.pop(missing, None)
    torch.save([1, 2] if missing == 'everything' else content, path)
    message = {'meta': 'meta.epoch, meta.iter', 'everything': 'state_dict, optimizer'}.get(missing, missing)
    config = Config(dict(work_dir=str(tmp_path / 'work'), model=dict(type='X')))
    with pytest.raises(ValueError, match=rf'not a training checkpoint.*it has no {message}.*load_from={path}'):
        engine.set_resume(config, path)
    if missing == 'optimizer':
        config.default_hooks = dict(checkpoint=dict(type='CheckpointHook', save_optimizer=False))
        assert resumed(config, path) == path


@pytest.mark.parametrize('checkpoint', ['http://127.0.0.1:9/pvt.pth', '/nowhere/pvt.pth'])
@pytest.mark.parametrize('kind', ['Pretrained', PretrainedInit])
def test_pretrained_weights_that_cannot_be_had(checkpoint, kind, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    pretrained = dict(type=kind, checkpoint=checkpoint)
    for init_cfg, key in ((pretrained, 'init_cfg.checkpoint'), ([pretrained], r'init_cfg\.0\.checkpoint')):
        config = Config(dict(model=dict(backbone=dict(init_cfg=init_cfg))))
        message = rf'{re.escape(checkpoint)}.*--cfg-options model.backbone.{key}=FILE.*model.backbone.init_cfg=None'
        with pytest.raises(OSError, match=message):
            engine.check_pretrained(config)
    with pytest.raises(OSError, match=re.escape(checkpoint)):
        engine.check_pretrained(Config(dict(model={}, load_from=checkpoint)))


def test_an_init_cfg_needs_a_type():
    """Configs for ImageNet have no init_cfg, so that an option for its checkpoint makes one."""
    config = Config(dict(model=dict(backbone=dict(init_cfg=dict(checkpoint='x.pth')), neck=dict(init_cfg={}))))
    with pytest.raises(ValueError, match=r'model\.backbone\.init_cfg has no type: .*init_cfg\.type=Pretrained'):
        engine.check_pretrained(config)


def test_what_load_from_does_not_fill_is_named(tmp_path):
    mini = Path(__file__).parents[1] / 'configs/mini'
    config = Config.fromfile(next(mini.glob('slide-swin-mini_upernet_*.py')))
    state, config.load_from = build_model(config).state_dict(), str(tmp_path / 'whole.pth')
    torch.save(dict(state_dict=state), config.load_from)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'load_from')
        engine.check_pretrained(config)

    config.model.decode_head.num_classes = 4
    weight = re.escape('(decode_head.conv_seg.weight (150, 64, 1, 1) instead of (4, 64, 1, 1), ')
    with pytest.warns(
        UserWarning, match=f'{config.load_from} .* initialized from scratch: 2 keys of another shape {weight}'
    ):
        engine.check_pretrained(config)
    config.resume = True  # then it has to fit whole, and is compared elsewhere
    engine.check_pretrained(config)

    config.update(resume=False, load_from=str(tmp_path / 'other.pth'))
    torch.save({'decode_head.conv_seg.bias': state['decode_head.conv_seg.bias'], 'x': torch.ones(1)}, config.load_from)
    with pytest.raises(
        ValueError, match=r'no weights in .*other\.pth fit .* 1 keys unexpected \(x\), 1 keys of another'
    ):
        engine.check_pretrained(config)


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


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            ['retinanet_slide-pvt-t_fpn_1x_coco.py', '--cfg-options', 'modle.backbone.arch=small'],
            "did you mean 'model'",
        ),
        (['retinanet_slide-pvt-t_fpn_1x_coco.py', '--cfg-options', 'model.backbone.arch=smal'], "got arch='smal'"),
        (['none.py'], 'none.py is not a file'),
    ],
)
def test_get_flops_checks_its_options(arguments, message):
    assert message in tool_error('get_flops', *arguments)


class Runner:
    """Raises an error before or after the first epoch begins, as mmengine's does."""

    def __init__(self, error, after):
        self.error, self.after = error, after

    def register_hook(self, hook):
        self.hook = hook

    def train(self):
        if self.after:
            self.hook.before_train_epoch(self)
        raise self.error


WORKER = """Caught FileNotFoundError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "somewhere.py", line 1, in <module>
FileNotFoundError: [Errno 2] No such file or directory: 'x.jpg'
"""


@pytest.mark.parametrize(
    ('error', 'after', 'message'),
    [
        (ValueError('no such arch'), False, 'no such arch'),
        (KeyError('X is not in the registry'), False, 'X is not in the registry'),
        (FileNotFoundError(WORKER), True, "FileNotFoundError: [Errno 2] No such file or directory: 'x.jpg'"),
        (FloatingPointError('loss is NaN'), True, 'loss is NaN'),
        (AssertionError(), False, 'AssertionError'),
        (KeyError('lr'), False, 'KeyError: lr'),
        (RuntimeError("OpenCV: !buf.empty() in function 'imdecode_'"), True, 'an image cannot be read (OpenCV: !buf.e'),
        (TypeError("unexpected argument 'imdecode_backnd'"), False, "unexpected argument 'imdecode_backnd'"),
        (
            AssertionError('failed to load image: x.jpg'),
            True,
            'an image cannot be read (failed to load image: x.jpg): ',
        ),
        (ValueError('a bug'), True, None),
        (KeyError('a bug'), True, None),
        (RuntimeError('a bug'), False, None),
        (AttributeError('a bug'), False, None),
    ],
    ids=repr,
)
def test_errors_of_the_user_are_messages_and_bugs_tracebacks(error, after, message, capsys):
    runner = Runner(error, after)
    with pytest.raises(type(error) if message is None else SystemExit) as raised:
        engine.launch(runner, runner.train)
    if message is None:
        assert raised.value is error
    else:
        assert raised.value.code == 2
        assert capsys.readouterr().err.startswith(f'error: {message}')


def test_what_a_users_own_code_raises_keeps_its_traceback(tmp_path, capsys):
    """Also where mmengine's registry raises it again; but not what is raised from it on purpose."""
    code = compile("def fail(): return {}['missing']", str(tmp_path / 'users_hook.py'), 'exec')
    namespace = {}
    exec(code, namespace)

    def build():
        try:
            namespace['fail']()
        except Exception as error:
            raise type(error)(f'class Hook: {error}')  # noqa: B904

    def read():
        try:
            namespace['fail']()
        except Exception as error:
            raise ValueError('config x.py cannot be read') from error

    with pytest.raises(KeyError), exit_on(*INPUT_ERRORS):
        build()
    with pytest.raises(SystemExit), exit_on(*INPUT_ERRORS):
        read()
    assert capsys.readouterr().err == 'error: config x.py cannot be read\n'
