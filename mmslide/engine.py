"""What tools/train.py and tools/test.py do between their arguments and mmengine's runner."""

import difflib
import inspect
import os
import re
import warnings
import zipfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmslide.data import dicts, move_data
from mmslide.files import find_config


def argument_parser(description: str) -> ArgumentParser:
    """The options that training and testing share, as mmdet and mmseg name them."""
    parser = ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; ./work_dirs/CONFIG by default')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='KEY=VALUE pairs that override the config, lists as key="[a,b]". data_root=DIR moves all data sets.',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed.launch passes it by argument, torchrun by environment variable.
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0)
    return parser


def read_config(args: Namespace) -> Config:
    """The config with the options of `argument_parser` applied.

    Raises:
        ValueError: an option overrides something that no config and no runner knows.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config = Config.fromfile(find_config(args.config))
    options = dict(args.cfg_options)
    known = {*config, *inspect.signature(Runner.__init__).parameters}
    for key in (option.split('.')[0] for option in options):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f'; did you mean {close[0]!r}?' if close else ''
            raise ValueError(f'--cfg-options: {args.config} has no {key!r}{hint}')
    if 'data_root' in options:
        move_data(config, options.pop('data_root'))
    config.merge_from_dict(options)
    config.launcher = args.launcher
    if args.work_dir or 'work_dir' not in config:
        config.work_dir = args.work_dir or str(Path('work_dirs', Path(args.config).stem))
    return config


def build_runner(config: Config) -> Runner:
    """mmengine's runner, on a machine without a GPU with what works there."""
    if not torch.cuda.is_available():
        fall_back_to_cpu(config)
        if config.launcher == 'pytorch':
            torch.distributed.init_process_group('gloo')
    return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)


def fall_back_to_cpu(config: Config) -> None:
    """Replaces what needs a GPU, and says so: mixed precision, SyncBN, one device for each process."""
    wrapper = config.get('optim_wrapper')
    if wrapper and wrapper.get('type') == 'AmpOptimWrapper':
        warnings.warn('no GPU: training in float32 instead of mixed precision', stacklevel=2)
        wrapper.type = 'OptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fp64'):
            wrapper.pop(key, None)
    replaced = [node for node in dicts(config.model) if node.get('type') in ('SyncBN', 'SyncBatchNorm')]
    if replaced:
        warnings.warn(f'no GPU: BN instead of SyncBN, which the config names {len(replaced)} times', stacklevel=2)
        for node in replaced:
            node['type'] = 'BN'
    if config.launcher == 'pytorch':
        warnings.warn('no GPU: the processes talk through gloo', stacklevel=2)
        config.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=config.get('find_unused_parameters', False),
        )


def check_checkpoint(path: str) -> None:
    """Looks whether a local checkpoint file is there and whole.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged.
    """
    if '://' in path:
        return
    if not os.path.isfile(path):
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    if not is_whole(path):
        raise ValueError(
            f'checkpoint {path} is damaged or incomplete (a training killed while saving leaves such a file)'
        )


def is_whole(path: str | Path) -> bool:
    """Whether a checkpoint file was written to its end."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        except (zipfile.BadZipFile, OSError, EOFError):
            return False
    try:  # torch's format before 1.6
        torch.load(path, map_location='cpu', weights_only=True)
    except Exception:
        return False
    return True


def last_whole_checkpoint(work_dir: str) -> str | None:
    """The newest checkpoint in a work_dir that was written to its end; those that were not are named in a warning."""
    files = [path for path in Path(work_dir).glob('*.pth') if re.fullmatch(r'(epoch|iter)_\d+', path.stem)]
    for path in sorted(files, key=lambda path: int(path.stem.split('_')[1]), reverse=True):
        if is_whole(path):
            return str(path)
        warnings.warn(f'{path} is incomplete (killed while saving?) and passed over', stacklevel=2)
    return None


def set_resume(config: Config, resume: str) -> None:
    """Continues from a checkpoint file, or with 'auto' from the last whole one in the work_dir, if there is any.

    Raises:
        FileNotFoundError, ValueError: the file is not there or damaged.
    """
    if resume == 'auto':
        found = last_whole_checkpoint(config.work_dir)
        if found is None:
            warnings.warn(f'--resume: no whole checkpoint in {config.work_dir}, training starts anew', stacklevel=2)
            return
        resume = found
    else:
        check_checkpoint(resume)
    config.resume, config.load_from = True, resume


def set_auto_scale_lr(config: Config) -> None:
    """Scales the learning rate by the batch size at hand over `auto_scale_lr.base_batch_size`.

    Raises:
        ValueError: the config does not name a base batch size.
    """
    if 'base_batch_size' not in config.get('auto_scale_lr', {}):
        raise ValueError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config')
    config.auto_scale_lr.enable = True


def set_out(config: Config, out: str) -> None:
    """Writes the test's predictions: one pickle file for detection, a folder of label maps for segmentation.

    Raises:
        ValueError: the path does not fit the task, or the config's default_scope is neither mmdet nor mmseg.
    """
    scope = config.get('default_scope')
    if scope == 'mmdet':
        if not out.endswith(('.pkl', '.pickle')):
            raise ValueError(f'--out must be a .pkl file for detection, got {out}')
        evaluators = config.test_evaluator if isinstance(config.test_evaluator, list) else [config.test_evaluator]
        config.test_evaluator = [*evaluators, dict(type='DumpDetResults', out_file_path=out)]
    elif scope == 'mmseg':
        if out.endswith(('.pkl', '.pickle')):
            raise ValueError(f'--out must be a folder for segmentation, got {out}')
        config.test_evaluator.update(output_dir=out, keep_results=True)
    else:
        raise ValueError(f"--out needs a config with default_scope 'mmdet' or 'mmseg', got {scope!r}")


def set_show(config: Config, show: bool, show_dir: str | None, wait_time: float) -> None:
    """Draws every prediction beside its ground truth: in a window, or into `show_dir`.

    Raises:
        ValueError: the config has no visualization hook.
    """
    hook = config.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ValueError('--show and --show-dir need default_hooks.visualization in the config')
    hook.draw = True
    if show:
        hook.update(show=True, wait_time=wait_time)
    if show_dir and config.default_scope == 'mmdet':
        hook.test_out_dir = os.path.abspath(show_dir)  # a relative one would go below the work_dir's time stamp
    elif show_dir:
        config.visualizer.save_dir = show_dir
    if config.default_scope == 'mmseg':
        hook.interval = 1


def set_tta(config: Config) -> None:
    """Tests with the config's test-time augmentation, without a mask head: mmdet merges boxes, but no masks.

    Raises:
        ValueError: the config has none.
    """
    missing = [key for key in ('tta_model', 'tta_pipeline') if key not in config]
    if missing:
        raise ValueError(f'--tta needs {" and ".join(missing)} in the config')
    roi_head = config.model.get('roi_head', {})
    if roi_head.get('mask_head'):
        warnings.warn('--tta: mmdet merges boxes but no masks, so the mask head is left out', stacklevel=2)
        roi_head.update(mask_head=None, mask_roi_extractor=None)
        for evaluator in dicts(config.test_evaluator):
            if not isinstance(evaluator.get('metric', ''), str):
                evaluator['metric'] = [metric for metric in evaluator['metric'] if metric != 'segm']
    config.model = ConfigDict(**config.tta_model, module=config.model)
    dataset = config.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = config.tta_pipeline
