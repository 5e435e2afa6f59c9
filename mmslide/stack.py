"""Integration with other packages: checks their versions, declares torchvision's operators, and registers mmslide with
mmengine, and mmengine's classes with torch's restricted unpickler.
"""

import importlib
import pickle
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer

from .compat import add_safe_globals
from .files import configs_folder, find_config
from .version import REQUIRED, VERSIONS, fits, install_command, version_range

try:
    from numpy._core import multiarray
except ImportError:  # numpy < 2
    from numpy.core import multiarray  # type: ignore[no-redef]

# Operators that `import torchvision` registers metadata for, whether or not its compiled operators were loaded.
TORCHVISION_OPERATORS = ('nms', 'qnms')


def check_versions() -> None:
    """Checks that the installed versions of torch and the MM packages are supported.

    Raises:
        RuntimeError: one is missing, too old, too new, or incompatible with the others. Not an ImportError, which
            mmengine's registries swallow: users would see "SlidePVT is not in the registry".
    """
    for name in VERSIONS:
        if name == 'mmpretrain':  # takes seconds to import: see check_scope
            continue
        if find_spec(name) is not None:
            problem = _problem(name)
        elif name in REQUIRED:
            problem = f'mmslide needs {name}, which is not installed. Run: {install_command(name)}'
        else:
            continue
        if problem:
            raise RuntimeError(problem)


def check_scope(scope: str | None) -> None:
    """Checks that the default_scope of a config can be used: classification needs mmpretrain, which is optional.

    Raises:
        ImportError: mmpretrain or torchvision, which it imports, is missing or broken, or mmpretrain is too old, too
            new, or incompatible with the others.
    """
    if scope != 'mmpretrain':
        return
    if find_spec(scope) is None:
        raise ImportError(
            "classification needs mmpretrain, which is not installed. Run: pip install 'mmslide[classification]'"
        )
    try:
        importlib.import_module('torchvision')  # mmpretrain imports it later, in the middle of building a model
    except Exception as error:
        # Not part of the extra: without torch in the command, pip would install another version of torch.
        torch_version = torch.__version__.split('+')[0]
        raise ImportError(
            f'mmpretrain needs torchvision, which cannot be imported ({type(error).__name__}: {error}). '
            f'Run: pip install torchvision torch=={torch_version}'
        ) from error
    if problem := _problem(scope):
        raise ImportError(problem)


def _problem(name: str) -> str | None:
    """Why an installed package is incompatible, and the command that fixes it."""
    try:
        # Some forks have other distribution names, so the version is read from the module.
        version = getattr(importlib.import_module(name), '__version__', 'of unknown version')
    except AssertionError as error:  # how mmdet, mmseg and mmpretrain refuse a version of mmcv or mmengine
        return f'{name} is incompatible with other packages: {error} Run: {install_command(name, "mmcv")}'
    if fits(name, version):
        return None
    return (
        f'mmslide works with {name} {version_range(name)}, but {name} {version} is installed. '
        f'Run: {install_command(name)}'
    )


def declare_torchvision_operators() -> None:
    """Makes `import torchvision`, which mmpretrain and mmengine need, work even if its compiled operators do not load.

    Its wheels on PyPI are built for CUDA. With a CPU build of torch, the import fails with "operator torchvision::nms
    does not exist", since torchvision refers to operators that were not loaded. They are declared here, without an
    implementation: transforms work, and `torchvision.ops` still reports that its operators are missing.
    """
    spec = find_spec('torchvision')
    if spec is None or not spec.origin or 'torchvision' in sys.modules or hasattr(torch.ops.torchvision, 'nms'):
        return
    for library in Path(spec.origin).parent.glob('_C*'):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return
    for name in TORCHVISION_OPERATORS:
        _torchvision.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')


# Operators exist as long as the library object that declared them.
_torchvision = torch.library.Library('torchvision', 'FRAGMENT')


def register_package() -> None:
    """Makes `mmslide::FOLDER/CONFIG.py` work in `_base_`, `mmengine.hub.get_config` and `get_model`.

    mmengine has a list of packages, and adds the scope of the package to all classes in its configs. The classes in
    mmslide's configs belong to mmdet, mmseg and mmpretrain, so no scope is added to them.
    """
    MODULE2PACKAGE['mmslide'] = 'mmslide'
    config_path = Config._get_cfg_path

    def config_path_or_ours(cfg_path: str, filename: str) -> tuple[str, str | None]:
        package, _, name = cfg_path.partition('::')
        if package != 'mmslide' or not name:
            return config_path(cfg_path, filename)
        path = configs_folder() / name
        if not path.is_file():
            raise FileNotFoundError(f'mmslide has no config {name}, which {filename} names in _base_')
        return str(path), None

    Config._get_cfg_path = staticmethod(config_path_or_ours)


def register_bare_names() -> None:
    """Makes mmdet's and mmseg's inferencers accept the bare names of mmslide's configs, without `.py`.

    The models of their own package take precedence.
    """
    from mmengine.infer import BaseInferencer  # imports mmengine's runner

    load_model = BaseInferencer._load_model_from_metafile

    def load_model_or_ours(self: BaseInferencer, model: str) -> tuple[Config, str | None]:
        try:
            return load_model(self, model)
        except ValueError:  # the package of the inferencer has no such model
            try:
                config = Config.fromfile(find_config(f'{model}.py'))
            except FileNotFoundError:
                config = Config()
            if config.get('default_scope') != self.scope:
                raise
            return config, None  # there are no weights

    BaseInferencer._load_model_from_metafile = load_model_or_ours


STATISTICS = ('min', 'max', 'current', 'mean')
HISTORY = {'max_length', '_log_history', '_count_history'}


class HistoryBufferState(HistoryBuffer):
    """Replaces HistoryBuffer while a checkpoint is read: it restores only the history.

    HistoryBuffer itself would put the checkpoint's `statistics_methods` into a dict that all buffers of the process
    share.
    """

    def __setstate__(self, state: dict) -> None:
        data = {key: value for key, value in state.items() if key != 'statistics_methods'}
        if set(data) != HISTORY:
            raise pickle.UnpicklingError(f'a HistoryBuffer must have {sorted(HISTORY)}, got {sorted(data)}')
        self._set_default_statistics()
        self.__dict__.update(data)
        self.__class__ = HistoryBuffer  # so that it is saved as one


def history_buffer_statistic(owner: type, name: str) -> Callable:
    """Replaces `getattr` in a checkpoint: returns only HistoryBuffer's own statistics methods."""
    if owner in (HistoryBuffer, HistoryBufferState) and name in STATISTICS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(
        f'a checkpoint may only access {STATISTICS} of HistoryBuffer, got {name!r} of {owner!r}'
    )


# By their names in mmengine's checkpoints. With the real `getattr`, a crafted file could access and change anything.
HISTORY_GLOBALS = {
    f'{HistoryBuffer.__module__}.HistoryBuffer': HistoryBufferState,
    'builtins.getattr': history_buffer_statistic,
    '__builtin__.getattr': history_buffer_statistic,
}


def register_safe_globals() -> None:
    """Allows `torch.load(weights_only=True)`, and thus mmengine's resume, to read the message hub of its checkpoints.

    The hub pickles HistoryBuffer objects, whose state refers to their methods through `getattr`: see `HISTORY_GLOBALS`.
    NumPy's functions are registered under their names in both NumPy 1 and 2, so that each can read the other's files.
    """
    dtypes = (np.float64, np.float32, np.int64, np.int32, np.bool_)
    add_safe_globals(
        [
            *((value, name) for name, value in HISTORY_GLOBALS.items()),
            np.ndarray,
            np.dtype,
            *(type(np.dtype(x)) for x in dtypes),
            *(
                (getattr(multiarray, name), f'numpy.{package}.multiarray.{name}')
                for name in ('_reconstruct', 'scalar')
                for package in ('core', '_core')
            ),
        ]
    )
