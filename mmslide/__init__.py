"""Slide-Transformer and Twins backbones for MMDetection, MMSegmentation and MMPretrain."""

from .stack import check_versions, declare_torchvision_operators, register_safe_globals
from .version import __version__

check_versions()
register_safe_globals()
declare_torchvision_operators()

# After the versions are known to fit: it imports mmengine's runner.
from .checkpoints import register_reader  # noqa: E402

register_reader()

__all__ = ['__version__']
