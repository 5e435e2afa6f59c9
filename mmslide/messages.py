"""Errors that the user can fix: every tool prints a single message and exits with status 2."""

import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Raised for invalid arguments, configs, data and checkpoints, here and in mmengine, mmdet and mmseg. All others
# (RuntimeError, AttributeError, ...) are bugs.
INPUT_ERRORS = (OSError, ValueError, TypeError, KeyError, ImportError, AssertionError)


@contextmanager
def exit_on(*errors: type[Exception]) -> Iterator[None]:
    """Turns these errors into a single message on stderr and exit status 2. Other errors, and errors in the user's own
    code, keep their traceback.
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

    mmengine's registries re-raise errors with the name of the class; an error with an explicit cause is intentional.
    """
    while error.__context__ and not error.__suppress_context__:
        error = error.__context__
    frames = traceback.extract_tb(error.__traceback__)
    places = [Path(__file__).parents[1], *(Path(path) for path in set(sysconfig.get_paths().values()))]
    return bool(frames) and not any(place in Path(frames[-1].filename).resolve().parents for place in places)


def message(error: Exception) -> str:
    """The text of an error; for errors from a data loader process, it follows the traceback of that process."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    if 'Original Traceback' in text:
        text = text.splitlines()[-1]
    # A bare key or number means nothing without the type of the error.
    return text if ' ' in text else f'{type(error).__name__}: {text}'.removesuffix(': ')


def listed(values: Sequence[Any], limit: int = 3) -> str:
    """The first values, with the total number if not all are shown."""
    text = ', '.join(map(str, values[:limit])) or 'nothing'
    return text if len(values) <= limit else f'{text}, ... ({len(values)} in all)'
