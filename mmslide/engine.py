"""tools/train.py and tools/test.py, from their arguments to mmengine's runner."""

import ast
import difflib
import inspect
import os
import re
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from mmslide.amp import bfloat16_pays
from mmslide.build import build_model, counted, load_weights, load_what_fits
from mmslide.checkpoints import find_state_dict, meta_of, non_finite, read_checkpoint
from mmslide.data import data_prefixes, dicts, move_data, named_dicts, unwrapped
from mmslide.files import find_config, refuse_inputs
from mmslide.messages import INPUT_ERRORS, exit_on, listed, message
from mmslide.stack import check_scope
from mmslide.weights import is_pretrained

# Config keys in addition to the arguments of mmengine's Runner: those that it and the tools look up later.
RUNNER_KEYS = (
    *('activation_checkpointing', 'compile', 'custom_imports', 'efficient_conv_bn_eval', 'find_unused_parameters'),
    *('model_wrapper_cfg', 'runner_type', 'strategy', 'sync_bn', 'tta_model', 'tta_pipeline', 'data_root'),
)


class _Options(DictAction):
    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, *args: Any) -> None:
        for value in values:
            if '=' not in value:
                parser.error(f'--cfg-options must be KEY=VALUE pairs, got {value!r}')
        try:
            super().__call__(parser, namespace, values, *args)
        except RecursionError:  # raised by mmengine's parser for anything but plain values
            parser.error(
                '--cfg-options supports plain values and lists or tuples of them, not dicts or calls: set each key of '
                f'a dict separately, as in a.b=1, or write a config with _base_; got {" ".join(values)}'
            )


def config_parser(description: str) -> ArgumentParser:
    """The options of every tool that reads a config."""
    parser = ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Options,
        default={},
        help='KEY=VALUE pairs that override the config, lists as key="[a,b]"; data_root=DIR changes all data paths',
    )
    return parser


def argument_parser(description: str) -> ArgumentParser:
    """The options shared by training and testing, named as in mmdet and mmseg."""
    parser = config_parser(description)
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; ./work_dirs/CONFIG by default')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed.launch passes it as an argument, torchrun as an environment variable.
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0)
    return parser


def read_config(args: Namespace, *needed: str) -> Config:
    """Reads the config and applies the options of `argument_parser`.

    Args:
        needed: keys that the config must have in addition to model.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: it cannot be read or lacks something; or see `merge_options`.
        ImportError: see `check_scope`.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config = config_with_options(args.config, args.cfg_options)
    config.launcher = args.launcher
    for key in ('model', *needed):
        if not config.get(key):
            raise ValueError(f'config {args.config} has no {key}')
    if args.work_dir or 'work_dir' not in config:
        config.work_dir = args.work_dir or str(Path('work_dirs', Path(args.config).stem))
    return config


def config_with_options(name: str, options: dict[str, Any]) -> Config:
    """Reads a config by path or bare name and applies --cfg-options.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: it cannot be read; or see `merge_options` and `move_data`.
        ImportError: see `check_scope`.
    """
    config = config_from_file(name)
    options = dict(options)
    data_root = options.pop('data_root', None)
    merge_options(config, options)
    check_scope(config.get('default_scope'))
    if data_root is not None:
        move_data(config, data_root)
    return config


def config_from_file(name: str) -> Config:
    """Reads a config by path or bare name.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: it cannot be read, or its code raises any exception.
    """
    path = find_config(name)
    try:
        return Config.fromfile(path)
    except Exception as error:
        raise ValueError(f'config {path} cannot be read: {type(error).__name__}: {error}') from error


def merge_options(config: Config, options: dict[str, Any]) -> None:
    """Applies --cfg-options to a config; keys with dots are for nested values.

    A top-level key that neither the config nor mmengine knows is accepted with a warning.

    Raises:
        ValueError: such a key resembles a known one.
    """
    known = {*config, *inspect.signature(Runner.__init__).parameters, *RUNNER_KEYS}
    for key in sorted({option.split('.')[0] for option in options} - known):
        close = difflib.get_close_matches(key, known, n=1)
        if close:
            raise ValueError(f'--cfg-options: {config.filename} has no {key!r}; did you mean {close[0]!r}?')
        warnings.warn(f'--cfg-options: neither {config.filename} nor mmengine knows {key!r}', stacklevel=2)
    config.merge_from_dict(options)
    if any(option.startswith('custom_imports') for option in options) and config.get('custom_imports'):
        import_modules_from_strings(**config.custom_imports)  # mmengine does so only while reading the file


def build_runner(config: Config) -> Runner:
    """Builds mmengine's runner; without a GPU, distributed processes use gloo."""
    keep_config_file(config)
    if not torch.cuda.is_available() and config.launcher == 'pytorch':
        torch.distributed.init_process_group('gloo')
    return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)


def keep_config_file(config: Config) -> None:
    """Keeps mmengine from overwriting the config file: it writes the full config, without comments and _base_, into the
    work_dir under the same name. If that is the config file itself, the time is used as the name instead.
    """
    path = Path(config.work_dir, Path(config.filename).name)
    if path.exists() and path.samefile(config.filename):
        object.__setattr__(config, '_filename', None)


class _RunHook(Hook):
    """Records whether the first epoch has started, drops a checkpoint's references to files of other runs, and loads
    only averaged weights.

    When a better checkpoint is found, mmengine deletes the best one recorded in a resumed checkpoint, wherever it is.
    mmpretrain's EMAHook would load a checkpoint's `ema_state_dict`, which has the weights before averaging, without
    unwrapping test-time augmentation (so random weights would be tested) and without skipping heads that do not fit.
    """

    priority = 'VERY_HIGH'  # before EMAHook

    def __init__(self) -> None:
        self.started = False

    def _before_epoch(self, runner: Runner, mode: str = 'train') -> None:
        self.started = True

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not runner._resume and not any(getattr(hook, 'evaluate_on_origin', False) for hook in runner.hooks):
            checkpoint.pop('ema_state_dict', None)
        folders = [runner.work_dir, *(hook.out_dir for hook in runner.hooks if getattr(hook, 'out_dir', None))]
        info = (checkpoint.get('message_hub') or {}).get('runtime_info') or {}
        for key in [key for key in info if str(key).startswith(('best_ckpt', 'last_ckpt'))]:
            parents = Path(str(info[key])).resolve().parents
            if not any(Path(folder).resolve() in parents for folder in folders):
                runner.logger.warning(f'{key} of the checkpoint, {info[key]}, is outside {folders[0]} and is ignored')
                del info[key]


def launch(runner: Runner, start: Callable[[], Any]) -> None:
    """Calls `runner.train` or `runner.test`. During setup, errors are due to the config or the data and end the process
    with a single message. Later, only file, system and non-finite errors do; any other error is a bug.
    """
    hook = _RunHook()
    runner.register_hook(hook)
    try:
        with exit_on(OSError, FloatingPointError):
            start()
    except Exception as error:
        # Messages of mmcv and OpenCV for images that cannot be read.
        unreadable = 'failed to load image' in str(error) or "in function 'imdecode_'" in str(error)
        if unreadable:
            error = OSError(f'an image cannot be read ({message(error)}): tools/check_data.py lists all such files')
        elif hook.started:
            raise
        with exit_on(*INPUT_ERRORS):
            raise error


def fall_back_to_cpu(config: Config) -> None:
    """Without a GPU, replaces what needs one, with warnings: mixed precision, SyncBN, one device per process."""
    if torch.cuda.is_available():
        return
    wrapper = config.get('optim_wrapper')
    if wrapper and wrapper.get('type') == 'AmpOptimWrapper':
        if bfloat16_pays():
            wrapper.type = 'mmslide.BackboneAmpOptimWrapper'
            warnings.warn('no GPU: mixed precision uses bfloat16, only in the backbone', stacklevel=2)
        else:
            wrapper.type = 'OptimWrapper'
            warnings.warn(
                'no GPU, and bfloat16 is slow on this processor: training in float32 instead of mixed precision',
                stacklevel=2,
            )
        for key in ('loss_scale', 'dtype', 'use_fp64'):
            wrapper.pop(key, None)
    replaced = [node for node in dicts(config.model) if node.get('type') in ('SyncBN', 'SyncBatchNorm')]
    if replaced:
        warnings.warn(f'no GPU: SyncBN is replaced by BN ({len(replaced)} times in the config)', stacklevel=2)
        for node in replaced:
            node['type'] = 'BN'
    if config.launcher == 'pytorch':
        warnings.warn('no GPU: distributed training uses gloo', stacklevel=2)
        config.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=config.get('find_unused_parameters', False),
        )


def check_pretrained(config: Config) -> None:
    """Downloads and reads the checkpoints of `init_cfg` and `load_from`, before anything is written.

    Weights that `load_from` does not fill, such as heads with a different number of classes, are initialized from
    scratch, with a warning.

    Raises:
        OSError: one cannot be read or downloaded; the message shows alternatives.
        ValueError: one is damaged or has more than weights; an init_cfg has no type; no weights of `load_from` fit the
            model.
    """
    for path, node in named_dicts(config.model, 'model'):
        if path.endswith('.init_cfg') and node and not node.get('type'):
            raise ValueError(f'{path} has no type: --cfg-options {path}.type=Pretrained starts from its checkpoint')
        if node.get('checkpoint') and is_pretrained(node):
            init_cfg = re.sub(r'\.\d+$', '', path)
            try:
                read_checkpoint(node['checkpoint'])
            except OSError as error:
                raise OSError(
                    f'{error}. --cfg-options {path}.checkpoint=FILE uses a file, {init_cfg}=None trains from scratch'
                ) from error
    if config.get('load_from') and not config.get('resume'):
        state = find_state_dict(read_checkpoint(config.load_from), config.load_from)
        problems = load_what_fits(build_model(config, 'meta'), state)
        if sum(len(keys) for what, keys in problems.items() if what != 'missing') == len(state):
            raise ValueError(f'no weights in load_from={config.load_from} fit the model: {counted(problems)}')
        if problems:
            warnings.warn(
                f'load_from={config.load_from} does not fit the whole model; the rest is initialized from scratch: '
                f'{counted(problems, 20)}',
                stacklevel=2,
            )


def check_model(config: Config, name: str, checkpoint: str | None = None) -> None:
    """Builds the config's model and loads a checkpoint, which must fit completely, before anything is written.

    Args:
        name: of the config, for messages.

    Raises:
        OSError: the checkpoint cannot be read.
        ValueError: it is damaged or does not fit.
    """
    model = build_model(config, 'meta' if checkpoint is None else 'cpu')
    if checkpoint is not None:
        state = find_state_dict(read_checkpoint(checkpoint), checkpoint)
        if broken := non_finite(state):
            warnings.warn(f'{checkpoint} has NaN or infinite values in {listed(broken)}', stacklevel=2)
        load_weights(model, state, checkpoint, name)


def run_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints saved in a folder after epochs or iterations, lowest number first."""
    files = [path for path in Path(folder).glob('*.pth') if re.fullmatch(r'(epoch|iter)_\d+', path.stem)]
    return sorted(files, key=lambda path: int(path.stem.split('_')[1]))


def last_whole_checkpoint(work_dir: str | Path) -> str | None:
    """The checkpoint to resume from: the one named in `last_checkpoint`, or else the most recent.

    Damaged checkpoints are skipped with a warning; checkpoints of other runs are listed in a warning.
    """
    work_dir, metas = Path(work_dir).absolute(), {}
    last = _recorded(work_dir)
    for path in {*run_checkpoints(work_dir), *([last] if last else [])}:
        try:
            metas[path] = meta_of(read_checkpoint(path))
        except (OSError, ValueError) as error:
            warnings.warn(f'skipped: {error}', stacklevel=2)
    if not metas:
        return None
    latest = max(metas, key=lambda path: (*_moment(metas[path]), str(path)))
    chosen = last if last in metas else latest
    others = sorted(str(path) for path in metas if not same_run(metas[path], metas[chosen]))
    if others:
        warnings.warn(f'{listed(others)} were saved by another run than {chosen}, which is continued', stacklevel=2)
    return str(chosen)


def _recorded(work_dir: Path) -> Path | None:
    """The checkpoint named in the work_dir's `last_checkpoint`, if it exists.

    In a copy of a work_dir, this is the copied checkpoint, although the record still points to the original.
    """
    try:
        last = Path((work_dir / 'last_checkpoint').read_text().strip())
        return next((path for path in (work_dir / last.name, last) if path.is_file()), None)
    except (OSError, ValueError):  # no file, or anything but a path in it
        return None


def _moment(meta: dict[str, Any]) -> tuple[str, int]:
    """When a checkpoint was saved, and after how many iterations."""
    time, iteration = meta.get('time'), meta.get('iter')
    return time if isinstance(time, str) else '', iteration if isinstance(iteration, int) else 0


def same_run(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two checkpoints are of the same run: the same config, and the later iteration was saved later."""
    moments = [_moment(meta) for meta in (first, second)]
    times = [time for time, _ in sorted(moments, key=lambda moment: (moment[1], moment[0]))]
    return times[0] <= times[1] and not changed_settings(first.get('cfg'), second.get('cfg'))


def changed_settings(first: Any, second: Any) -> list[str]:
    """The top-level names that differ between two configs' texts, except those that may change between starts.

    The texts may come from an untrusted checkpoint, so they are parsed but not executed.
    """
    ignored = {'work_dir', 'load_from', 'resume', 'launcher', 'model_wrapper_cfg'}
    settings = []
    for text in (first, second):
        try:
            nodes = ast.parse(text if isinstance(text, str) else '').body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            nodes = []
        assignments = [node for node in nodes if isinstance(node, ast.Assign)]
        settings.append({ast.unparse(node.targets[0]): ast.dump(node.value) for node in assignments})
    names = sorted({*settings[0], *settings[1]} - ignored)
    return [name for name in names if settings[0].get(name) != settings[1].get(name)]


def set_resume(config: Config, resume: str | None) -> None:
    """Resumes from a checkpoint file, or with 'auto' from `last_whole_checkpoint` of the work_dir, if there is any.

    Without `resume`, or with a file in another folder, checkpoints of earlier runs in the work_dir are listed in a
    warning.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, or is not a training checkpoint.
    """
    if config.get('resume') and not resume:  # by --cfg-options or in the file
        resume, config.resume = config.get('load_from') or 'auto', False
    if resume == 'auto':
        resume = last_whole_checkpoint(config.work_dir)
        if resume is None:
            warnings.warn(
                f'--resume: no usable checkpoint in {config.work_dir}, training starts from the beginning', stacklevel=2
            )
            return
    earlier = [path.name for path in run_checkpoints(config.work_dir)]
    if earlier and (resume is None or Path(resume).resolve().parent != Path(config.work_dir).resolve()):
        warnings.warn(
            f'{config.work_dir} has checkpoints of an earlier run, and this one will overwrite those of the same name: '
            f'{listed(earlier, 10)}. Use --resume to continue it, or --work-dir DIR to keep both',
            stacklevel=2,
        )
    if resume is None:
        return
    content = read_checkpoint(resume)
    content, meta = content if isinstance(content, dict) else {}, meta_of(content)
    missing = [key for key in ('state_dict', 'optimizer', 'message_hub') if key not in content]
    missing += [f'meta.{key}' for key in ('epoch', 'iter') if key not in meta]
    if not config.get('default_hooks', {}).get('checkpoint', {}).get('save_optimizer', True):
        missing = [key for key in missing if key != 'optimizer']
    if missing:
        raise ValueError(
            f'{resume} is not a training checkpoint and cannot be resumed: it has no {", ".join(missing)}. '
            f'Use --cfg-options load_from={resume} to start a new training run from its weights'
        )
    changed = changed_settings(meta.get('cfg', config.pretty_text), config.pretty_text)
    if changed:
        warnings.warn(
            f'{resume} was saved with a different {listed(changed, 10)}; training continues with the current config',
            stacklevel=2,
        )
    config.resume, config.load_from = True, resume


def set_auto_scale_lr(config: Config) -> None:
    """Scales the learning rate by the actual batch size divided by `auto_scale_lr.base_batch_size`.

    Raises:
        ValueError: the config has no base batch size.
    """
    if not (config.get('auto_scale_lr') or {}).get('base_batch_size'):
        raise ValueError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config')
    config.auto_scale_lr.enable = True


def set_out(config: Config, out: str) -> None:
    """Writes the predictions of a test: a pickle file for detection and classification, a folder of label maps for
    segmentation.

    Raises:
        ValueError: the path does not suit the task or is an input, or the config's default_scope is not mmdet, mmseg or
            mmpretrain.
    """
    scope = config.get('default_scope')
    evaluators = config.test_evaluator if isinstance(config.test_evaluator, list) else [config.test_evaluator]
    if scope in ('mmdet', 'mmpretrain'):
        task, dump = ('detection', 'DumpDetResults') if scope == 'mmdet' else ('classification', 'DumpResults')
        if not out.endswith(('.pkl', '.pickle')) or os.path.isdir(out):
            raise ValueError(f'--out must be a .pkl file for {task}, got {out}')
        config.test_evaluator = [*evaluators, dict(type=dump, out_file_path=out)]
    elif scope == 'mmseg':
        if out.endswith(('.pkl', '.pickle')) or os.path.isfile(out):
            raise ValueError(f'--out must be a folder for segmentation, got {out}')
        for evaluator in evaluators:
            evaluator.update(output_dir=out, keep_results=True)
    else:
        raise ValueError(f"--out needs a config with default_scope 'mmdet', 'mmseg' or 'mmpretrain', got {scope!r}")
    refuse_inputs(out, _inputs(config))


def set_show(config: Config, show: bool, show_dir: str | None, wait_time: float) -> None:
    """Draws every prediction next to its ground truth: in a window, or into `show_dir`.

    Raises:
        ValueError: the config has no visualization hook or no visualizer, or show_dir is an input.
    """
    hook = config.get('default_hooks', {}).get('visualization')
    if hook is None or not config.get('visualizer'):
        raise ValueError('--show and --show-dir need default_hooks.visualization and visualizer in the config')
    if show_dir:
        refuse_inputs(show_dir, _inputs(config))
    scope = config.default_scope
    hook['enable' if scope == 'mmpretrain' else 'draw'] = True
    if show:
        hook.update(show=True, wait_time=wait_time)
    if show_dir and scope == 'mmdet':
        hook.test_out_dir = os.path.abspath(show_dir)  # a relative one would go into the time-stamped folder
    elif show_dir and scope == 'mmpretrain':
        hook.out_dir = show_dir
    elif show_dir:
        config.visualizer.save_dir = show_dir
    if scope in ('mmseg', 'mmpretrain'):
        hook.interval = 1


def _inputs(config: Config) -> list[str]:
    """The files and folders that a test reads."""
    paths = [config.filename, config.get('load_from')]
    for dataset in dicts(config.get('test_dataloader')):
        parts = [dataset.get('ann_file'), *data_prefixes(dataset)]
        paths += [os.path.join(dataset.get('data_root') or '', part) for part in parts if isinstance(part, str)]
    return [path for path in paths if path]


def set_tta(config: Config) -> None:
    """Tests with the config's test-time augmentation, without a mask head: mmdet merges boxes but not masks.

    Raises:
        ValueError: the config has none, or draws predictions with mmpretrain, which cannot draw augmented images.
    """
    missing = [key for key in ('tta_model', 'tta_pipeline') if not config.get(key)]
    if missing:
        raise ValueError(f'--tta needs {" and ".join(missing)} in the config')
    if config.get('default_scope') == 'mmpretrain' and config.get('default_hooks', {}).get('visualization', {}).get(
        'enable'
    ):
        raise ValueError('mmpretrain cannot draw augmented images: use --tta or --show-dir (--show), not both')
    roi_head = config.model.get('roi_head', {})
    if roi_head.get('mask_head'):
        warnings.warn('--tta: mmdet merges boxes but not masks, so the mask head is removed', stacklevel=2)
        roi_head.update(mask_head=None, mask_roi_extractor=None)
        for evaluator in dicts(config.test_evaluator):
            if not isinstance(evaluator.get('metric', ''), str):
                evaluator['metric'] = [metric for metric in evaluator['metric'] if metric != 'segm']
    config.model = ConfigDict(**config.tta_model, module=config.model)
    for dataset in unwrapped(config.test_dataloader.dataset):
        dataset['pipeline'] = config.tta_pipeline
