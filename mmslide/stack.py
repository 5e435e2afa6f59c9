"""What mmslide needs of the packages around it: their versions, and their place in torch's checkpoint sandbox."""

import importlib
import pickle
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.utils import digit_version

try:
    from numpy._core import multiarray
except ImportError:  # numpy < 2
    from numpy.core import multiarray  # type: ignore[no-redef]

# From the first version, up to but without the second. torch.load is safe by default from 2.6 on.
VERSIONS = {
    'torch': ('2.6', '3'),
    'mmengine': ('0.10', '1'),
    'mmcv': ('2.0.0', '3'),
    'mmdet': ('3.1', '4'),
    'mmseg': ('1.0', '2'),
}
REQUIRED = ('torch', 'mmengine', 'mmcv')
DISTRIBUTIONS = {'mmseg': 'mmsegmentation'}


def check_versions() -> None:
    """Compares the versions of torch and the MM packages that are installed with what mmslide works with.

    Raises:
        RuntimeError: one is missing, too old, too new, or refuses its own neighbours. Not an ImportError, which
            mmengine's registries swallow: users would read "SlidePVT is not in the registry".
    """
    for name, (minimum, limit) in VERSIONS.items():
        wanted = f'"{DISTRIBUTIONS.get(name, name)}>={minimum},<{limit}"'
        if find_spec(name) is None:
            if name in REQUIRED:
                raise RuntimeError(f'mmslide needs {name}, which is not installed. Run: mim install {wanted}')
            continue
        try:
            # The packages of some forks have other distribution names, so the module is asked.
            version = importlib.import_module(name).__version__
        except AssertionError as error:  # how mmdet and mmseg refuse a version of mmcv or mmengine
            raise RuntimeError(
                f'{name} refuses the packages beside it: {error} Run: mim install {wanted} "mmcv>=2.0.0,<2.2.0"'
            ) from error
        if not digit_version(minimum) <= digit_version(version) < digit_version(limit):
            raise RuntimeError(
                f'mmslide works with {wanted}, but {name} {version} is installed. Run: mim install {wanted}'
            )


STATISTICS = ('min', 'max', 'current', 'mean')
HISTORY = {'max_length', '_log_history', '_count_history'}


class HistoryBufferState(HistoryBuffer):
    """Stands in for HistoryBuffer while a checkpoint is read: it takes the history alone.

    HistoryBuffer itself would put the checkpoint's `statistics_methods` into a dict that all buffers of the process
    share.
    """

    def __setstate__(self, state: dict) -> None:
        data = {key: value for key, value in state.items() if key != 'statistics_methods'}
        if set(data) != HISTORY:
            raise pickle.UnpicklingError(f'a HistoryBuffer must have {sorted(HISTORY)}, got {sorted(data)}')
        self._set_default_statistics()
        self.__dict__.update(data)
        self.__class__ = HistoryBuffer  # as which it is saved again


def history_buffer_statistic(owner: type, name: str) -> Callable:
    """Stands in for `getattr` in a checkpoint: hands out HistoryBuffer's own statistics methods and nothing else."""
    if owner in (HistoryBuffer, HistoryBufferState) and name in STATISTICS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(
        f'a checkpoint may ask for {STATISTICS} of HistoryBuffer only, got {name!r} of {owner!r}'
    )


def register_safe_globals() -> None:
    """Lets `torch.load(weights_only=True)`, and so mmengine's resume, read the message hub in mmengine's checkpoints.

    The hub pickles HistoryBuffer objects, whose state refers to their methods through `getattr`. With the real ones a
    crafted file could reach and change anything, so both names are bound to stand-ins. NumPy's functions are bound to
    their names in NumPy 1 and 2, so that either reads what the other wrote.
    """
    dtypes = (np.float64, np.float32, np.int64, np.int32, np.bool_)
    torch.serialization.add_safe_globals(
        [
            (HistoryBufferState, f'{HistoryBuffer.__module__}.HistoryBuffer'),
            np.ndarray,
            np.dtype,
            *(type(np.dtype(x)) for x in dtypes),
            *(
                (getattr(multiarray, name), f'numpy.{package}.multiarray.{name}')
                for name in ('_reconstruct', 'scalar')
                for package in ('core', '_core')
            ),
            (history_buffer_statistic, 'builtins.getattr'),
            (history_buffer_statistic, '__builtin__.getattr'),
        ]
    )
