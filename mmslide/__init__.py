"""Slide-Transformer and Twins backbones for MMDetection, MMSegmentation and MMPretrain."""

import sys

from .version import __version__


def _set_up() -> None:
    from .stack import (
        check_versions,
        declare_torchvision_operators,
        register_bare_names,
        register_package,
        register_safe_globals,
    )

    check_versions()
    register_safe_globals()
    register_package()
    declare_torchvision_operators()

    # After the version check, since both import mmengine's runner.
    from .checkpoints import register_reader

    register_reader()
    register_bare_names()


# `python -m mmslide.doctor` has to run even if the versions of other packages are incompatible.
# While Python looks for the module of `-m`, argv is ['-m', *arguments], and the module's name precedes the arguments.
if sys.argv[:1] != ['-m'] or sys.orig_argv[-len(sys.argv)] != 'mmslide.doctor':
    _set_up()

__all__ = ['__version__']
