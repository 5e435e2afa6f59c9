import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# In a checkout, which an editable install points to, and in a wheel.
CONFIG_FOLDERS = [Path(__file__).parents[1] / 'configs', Path(__file__).parent / '.mim' / 'configs']


def find_config(name: str) -> Path:
    """A config file by its path, or one of mmslide's own by its bare name, as mim finds it.

    Raises:
        FileNotFoundError: there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if Path(name).name == name:
        for folder in CONFIG_FOLDERS:
            for path in folder.rglob(name):
                return path
    raise FileNotFoundError(f'{name} is no file, and no config of mmslide has this name')


@contextmanager
def replacing(out: str | Path) -> Iterator[Path]:
    """A temporary file beside `out`, which takes its place when the block ends well: it appears whole or not at all.

    Raises:
        ValueError: the folder of out does not exist, or out is one.
        OSError: the folder cannot be written.
    """
    out = Path(out)
    if not out.absolute().parent.is_dir():
        raise ValueError(f'the folder of {out} does not exist')
    if out.is_dir():
        raise ValueError(f'{out} is a folder, not a file to write')
    temporary = out.with_name(f'{out.name}.{os.getpid()}.tmp')
    try:
        temporary.touch()  # tells of an unwritable folder before the work is done
        yield temporary
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
