"""Errors that the user can fix: one message and exit status 2 from every tool."""

import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What arguments, configs, data and checkpoints that do not fit raise, here and in mmengine, mmdet and mmseg. All others
# (RuntimeError, AttributeError, ...) are bugs.
INPUT_ERRORS = (OSError, ValueError, TypeError, KeyError, ImportError, AssertionError)


@contextmanager
def exit_on(*errors: type[Exception]) -> Iterator[None]:
    """Turns these errors into one message on stderr and exit status 2; others keep their traceback, and so do those of
    a user's own code.
    """
    try:
        yield
    except errors as error:
        if not isinstance(error, OSError) and raised_by_user(error):
            raise
        print(f'error: {message(error)}', file=sys.stderr)
        sys.exit(2)


def raised_by_user(error: BaseException) -> bool:
    """Whether an error comes from code outside this package, its tools and what is installed.

    mmengine's registries raise errors again with the name of the class; an error with a cause was made on purpose.
    """
    while error.__context__ and not error.__suppress_context__:
        error = error.__context__
    frames = traceback.extract_tb(error.__traceback__)
    places = [Path(__file__).parents[1], *(Path(path) for path in set(sysconfig.get_paths().values()))]
    return bool(frames) and not any(place in Path(frames[-1].filename).resolve().parents for place in places)


def message(error: Exception) -> str:
    """The text of an error, which for one from a data loader's process is below a traceback of that process."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    if 'Original Traceback' in text:
        text = text.splitlines()[-1]
    # A lone key or number says nothing without the kind of error.
    return text if ' ' in text else f'{type(error).__name__}: {text}'.removesuffix(': ')


def listed(values: Sequence[Any], limit: int = 3) -> str:
    """The first values, and how many there are if not all are shown."""
    text = ', '.join(map(str, values[:limit])) or 'nothing'
    return text if len(values) <= limit else f'{text}, ... ({len(values)} in all)'
