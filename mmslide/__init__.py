"""Slide-Transformer and Twins backbones for MMDetection and MMSegmentation."""

from .stack import check_versions, register_safe_globals
from .version import __version__

check_versions()
register_safe_globals()

__all__ = ['__version__']
