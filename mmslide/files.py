import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
