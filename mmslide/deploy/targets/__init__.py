"""Export formats, one file each: how they are written and run.

The package needs only NumPy (and OpenCV for `images`); each target imports its own packages when it is used.
"""

from pathlib import Path

from .base import Metadata, Runner, Target, Traced, missing_packages, require
from .coreml import CoreMl
from .executorch import ExecuTorch
from .onnx import Onnx
from .openvino import OpenVino
from .torch_export import TorchExport

_TARGETS: list[Target] = [Onnx(), OpenVino(), ExecuTorch(), CoreMl(), TorchExport()]
TARGETS: dict[str, Target] = {target.suffix: target for target in _TARGETS}

__all__ = ['TARGETS', 'Metadata', 'Runner', 'Target', 'Traced', 'find_target', 'missing_packages', 'require']


def find_target(path: str | Path) -> Target:
    """The target for the suffix of a file.

    Raises:
        ValueError: there is none for this suffix.
    """
    suffix = Path(path).suffix
    if suffix not in TARGETS:
        raise ValueError(f'{path} must end in one of {", ".join(TARGETS)}')
    return TARGETS[suffix]
