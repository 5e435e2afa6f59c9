"""Finds config files by name, and writes outputs atomically."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

# In a wheel, and in a checkout, which an editable install points to. Never both: next to a wheel's package there may be
# a `configs` folder of another distribution.
WHEEL_CONFIGS = Path(__file__).parent / '.mim' / 'configs'
CHECKOUT_CONFIGS = Path(__file__).parents[1] / 'configs'
# Names of the temporary folders and of files in them.
PREFIX, SUFFIX, LOCK, BACKUP = '.mmslide-', '.tmp', '.lock', '.old'


def configs_folder() -> Path:
    """The folder of mmslide's own configs."""
    return WHEEL_CONFIGS if WHEEL_CONFIGS.is_dir() else CHECKOUT_CONFIGS


def find_config(name: str | Path) -> Path:
    """A config file by path, or one of mmslide's own by its bare name, as in mim.

    Args:
        name: a path, or a name such as `mask-rcnn_slide-pvt-t_fpn_1x_coco.py`.

    Raises:
        FileNotFoundError: neither exists.
    """
    if Path(name).is_file():
        return Path(name)
    if Path(name).name == str(name):
        for path in configs_folder().rglob(str(name)):
            return path
    raise FileNotFoundError(f'{name} is not a file, and mmslide has no config with this name')


@contextmanager
def atomic_write(
    *outs: str | Path, inputs: Iterable[str | Path] = (), folders: bool = False
) -> Iterator[tuple[Path, ...]]:
    """Temporary paths for `outs`; if the block ends without an error, they replace all of them, else none.

    (Only a process killed between the renames of several outputs, which are done in immediate succession, may replace
    just some.) Each temporary path has its output's name, in a hidden folder next to it. Such folders of killed
    processes are removed. An existing output keeps its mode; if an output is a symlink, its target is replaced.

    Args:
        inputs: files that the outputs are made from; may include URLs.
        folders: the outputs are folders, not files.

    Raises:
        ValueError: an output is one of the inputs or contains one, two outputs are the same, an output exists and is
            not a file (or a folder), or its parent folder does not exist.
        OSError: an output cannot be written.
    """
    targets = [_check_output(out, inputs, folders) for out in outs]
    if len(set(targets)) < len(targets):
        raise ValueError(f'the outputs must have different names, got {", ".join(map(str, outs))}')
    with ExitStack() as stack:
        temporaries = [stack.enter_context(_temporary(target)) for target in targets]
        yield tuple(temporaries)
        _replace_all(temporaries, targets)


def refuse_inputs(out: str | Path, inputs: Iterable[str | Path]) -> Path:
    """The path that an output is written to, with symlinks and ~ resolved.

    Raises:
        ValueError: it is one of the inputs.
    """
    target = _real_path(out)
    for given in inputs:
        source = _real_path(given)
        if target == source or (target.exists() and source.exists() and target.samefile(source)):
            raise ValueError(f'{out} would overwrite the input {given}: choose another name')
    return target


def _real_path(path: str | Path) -> Path:
    return Path(os.path.realpath(os.path.expanduser(path)))


def _check_output(out: str | Path, inputs: Iterable[str | Path], folders: bool) -> Path:
    target = _real_path(out)
    if not target.parent.is_dir():
        raise ValueError(f'the folder of {out} does not exist')
    if not folders and target.is_dir():
        raise ValueError(f'{out} is a folder, not a file to write')
    if target.exists() and not (target.is_dir() if folders else target.is_file()):
        raise ValueError(f'{out} exists and is not a regular {"folder" if folders else "file"}')
    # A folder must not contain an input either.
    return refuse_inputs(out, [x for given in inputs for x in (given, *(_real_path(given).parents if folders else ()))])


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    _remove_leftovers(target.parent)
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, suffix=SUFFIX, dir=target.parent))
        except OSError as error:
            raise OSError(f'cannot write to the folder {target.parent}: {error.strerror}') from error
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except (Timeout, FileNotFoundError, FileExistsError):  # another process removed the folder before it was locked
            continue
        break
    try:
        yield folder / target.name
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Removes temporary folders of dead processes, which hold no lock."""
    for leftover in folder.glob(f'{PREFIX}*{SUFFIX}'):
        if leftover.is_dir() and not leftover.is_symlink():
            try:
                with FileLock(leftover / LOCK, timeout=0):
                    shutil.rmtree(leftover, ignore_errors=True)
            except (Timeout, OSError):
                continue


def _replace_all(temporaries: Sequence[Path], targets: Sequence[Path]) -> None:
    """Replaces the targets in immediate succession; everything slow is done before."""
    existed = [target.exists() for target in targets]
    backups = [temporary.parent / BACKUP for temporary in temporaries]
    for temporary, target, backup, exists in zip(temporaries, targets, backups, existed, strict=True):
        if temporary.is_file():
            with temporary.open('rb+') as file:
                os.fsync(file.fileno())
        if exists:  # afterwards, since it may not be writable
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            if target.is_file() and len(targets) > 1:
                shutil.copy2(target, backup)
    with ExitStack() as undo:
        for temporary, target, backup, exists in zip(temporaries, targets, backups, existed, strict=True):
            if target.is_dir():  # a folder with files cannot be replaced
                os.replace(target, backup)
                undo.callback(os.replace, backup, target)
            os.replace(temporary, target)
            if target.is_dir() or not exists:
                undo.callback(_remove, target)
            elif len(targets) > 1:
                undo.callback(os.replace, backup, target)
        undo.pop_all()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
