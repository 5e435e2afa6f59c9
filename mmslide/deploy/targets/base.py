"""The common base of all targets.

Nothing in this package imports PyTorch or mmslide at module level, so exported files run on machines without them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

Metadata = dict[str, Any]
# Largest relative error of an output, for targets with int8.
INT8 = 0.15


@dataclass(frozen=True)
class Runner:
    """An exported file, loaded.

    Args:
        run: an image (1, 3, H, W), float32, to the outputs by name.
        metadata: the metadata in the file, see `mmslide.deploy.export.metadata`.
    """

    run: Callable[[np.ndarray], dict[str, np.ndarray]]
    metadata: Metadata


@dataclass(frozen=True)
class Traced:
    """The inputs for writing a file.

    Args:
        program: a torch.export.ExportedProgram, the image to the outputs.
        metadata: stored in the file.
        precision: one of the target's.
        calibration: images (1, 3, H, W) that determine the ranges for int8.
    """

    program: Any
    metadata: Metadata
    precision: str = 'fp32'
    calibration: Sequence[np.ndarray] = ()


class Target:
    """A file format and its runtime.

    Attributes:
        suffix: of the file.
        runtime: its name.
        install: the requirement for pip.
        write_packages, run_packages: modules that must be installed.
        int8_packages, int8_install: the same for the additional packages for writing int8.
        precisions: precisions that can be written, the default first, each with the largest relative error of an
            output.
        runtime_precisions: others that the runtime may choose itself, likewise.
        any_size: whether a file can accept any size.
        takes_detectors: whether NMS and RoIAlign exist there.
        takes_pixels: whether the model in the file normalizes the image. Its Runner still takes a normalized image,
            like the others, and rounds it to pixel values.
        is_folder: whether the file is a folder.
    """

    suffix: ClassVar[str]
    runtime: ClassVar[str]
    install: ClassVar[str]
    write_packages: ClassVar[Sequence[str]] = ()
    run_packages: ClassVar[Sequence[str]] = ()
    int8_packages: ClassVar[Sequence[str]] = ()
    int8_install: ClassVar[str] = ''
    precisions: ClassVar[Mapping[str, float]] = {'fp32': 1e-4}
    runtime_precisions: ClassVar[Mapping[str, float]] = {}
    any_size: ClassVar[bool] = False
    takes_detectors: ClassVar[bool] = False
    takes_pixels: ClassVar[bool] = False
    is_folder: ClassVar[bool] = False

    def companions(self, path: Path) -> list[Path]:
        """Files that `write` creates in addition to `path`."""
        return []

    def write(self, traced: Traced, path: Path) -> None:
        raise NotImplementedError

    def load(self, path: Path, threads: int | None = None, precision: str | None = None) -> Runner:
        """
        Args:
            threads: CPU threads; None is the runtime's default.
            precision: one of `runtime_precisions`; None for the one written.

        Raises:
            ImportError: the runtime is not installed.
            RuntimeError: this machine cannot run the file, or it is damaged.
        """
        raise NotImplementedError

    def why_not_run(self) -> str | None:
        """Why this machine cannot run such a file, or None."""
        missing = missing_packages(self.run_packages)
        return f'{", ".join(missing)} is not installed' if missing else None

    def available_precisions(self) -> Mapping[str, float]:
        """Those of `runtime_precisions` that this machine supports."""
        return self.runtime_precisions


def parse_metadata(text: str, path: Path) -> Metadata:
    """Parses the metadata of a file from JSON; {} for an empty text.

    Raises:
        RuntimeError: it is damaged.
    """
    try:
        metadata = json.loads(text or '{}')
    except ValueError as error:
        raise RuntimeError(f'the metadata of {path} is not JSON: {error}') from error
    if not isinstance(metadata, dict):
        raise RuntimeError(f'the metadata of {path} is not a dict, but {type(metadata).__name__}')
    return metadata


def missing_packages(names: Sequence[str]) -> list[str]:
    return [name for name in names if find_spec(name) is None]


def require(target: Target, names: Sequence[str], install: str | None = None) -> None:
    """Raises ImportError with the command to install it if a package is missing."""
    if missing := missing_packages(names):
        command = f'pip install {install or target.install}'
        raise ImportError(f'{target.suffix} needs {", ".join(missing)}, which is not installed: {command}')
