"""Errors that the user can fix: one message and exit status 2 from every tool."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# What arguments, configs, data and checkpoints that do not fit raise, here and in mmengine, mmdet and mmseg. All others
# (RuntimeError, AttributeError, ...) are bugs.
INPUT_ERRORS = (OSError, ValueError, TypeError, KeyError, ImportError, AssertionError)


@contextmanager
def exit_on(*errors: type[Exception]) -> Iterator[None]:
    """Turns these errors into one message on stderr and exit status 2; others keep their traceback."""
    try:
        yield
    except errors as error:
        print(f'error: {message(error)}', file=sys.stderr)
        sys.exit(2)


def message(error: Exception) -> str:
    """The text of an error, which for one from a data loader's process is below a traceback of that process."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    if 'Original Traceback' in text:
        text = text.splitlines()[-1]
    return text or type(error).__name__


def listed(values: Sequence[Any], limit: int = 3) -> str:
    """The first values, and how many there are if not all are shown."""
    text = ', '.join(map(str, values[:limit])) or 'nothing'
    return text if len(values) <= limit else f'{text}, ... ({len(values)} in all)'
