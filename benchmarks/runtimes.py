"""Exported models in the installed runtimes."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from mmengine.config import Config

from mmslide.build import build_model
from mmslide.deploy import fuse, targets
from mmslide.deploy.export import compare, metadata, random_images
from mmslide.deploy.graphs import part
from mmslide.deploy.targets import TARGETS, Runner, Target, Traced
from mmslide.models.pyramid import Pyramid

# The peak memory of a process that runs a file, minus that after loading the runtime.
MEMORY = """
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from targets import find_target

def peak_kb():
    (line,) = [x for x in open('/proc/self/status') if x.startswith('VmHWM')]
    return int(line.split()[1])

path, threads, precision, *shape = sys.argv[2:]
target = find_target(path)
for name in target.run_packages:
    __import__(name)
before = peak_kb()
runner = target.load(Path(path), int(threads), precision or None)
for _ in range(2):
    runner.run(np.zeros((1, 3, *map(int, shape)), np.float32))
print(peak_kb() - before)
"""


@dataclass(frozen=True)
class Runtime:
    """A way to run a file, such as 'openvino-bf16'."""

    name: str
    target: Target
    precision: str | None = None


@dataclass(frozen=True)
class ExportedMeasurement:
    """For one image: the median time, the file size, and the memory of a process that only runs the file (on Linux)."""

    seconds: float
    file_bytes: int
    peak_bytes: int


def available_runtimes() -> dict[str, Runtime]:
    """All runtimes that this machine can write and run, by name."""
    found = []
    for target in TARGETS.values():
        if not target.why_not_run() and not targets.missing_packages(target.write_packages):
            found.append(Runtime(target.runtime, target))
            found += [Runtime(f'{target.runtime}-{name}', target, name) for name in target.available_precisions()]
    return {runtime.name: runtime for runtime in found}


def measure_exported(
    configs: Sequence[Config],
    runtimes: Sequence[Runtime],
    name: str,
    shape: tuple[int, int],
    threads: int,
    seconds: float,
) -> dict[str, list[ExportedMeasurement]]:
    """Exports models with their initial weights in the same way, compares each with PyTorch, and runs them alternately.

    Args:
        name: the part, see `mmslide.deploy.export`.
        seconds: minimum time to measure each runtime.

    Returns:
        The runtimes' names, each with one measurement per config.

    Raises:
        RuntimeError: a file's results differ from PyTorch's.
    """
    from mmslide.deploy.trace import trace  # needs PyTorch 2.9

    models: list[Any] = [build_model(config).eval() for config in configs]
    # A baseline may be from another package.
    modules = [part(fuse(x) if isinstance(x.backbone, Pyramid) else x, name, shape) for x in models]
    results = {}
    with TemporaryDirectory() as folder:
        traced = [
            Traced(trace(module, shape), metadata(config, {}, module, name, shape))
            for module, config in zip(modules, configs, strict=True)
        ]
        paths: dict[str, list[Path]] = {}
        for runtime in runtimes:
            suffix = runtime.target.suffix
            precision = next(iter(runtime.target.precisions))
            if suffix not in paths:
                paths[suffix] = [Path(folder) / f'{index}{suffix}' for index in range(len(traced))]
                for each, path, module in zip(traced, paths[suffix], modules, strict=True):
                    runtime.target.write(replace(each, precision=precision), path)
                    compare(module, runtime.target, path, random_images([shape]), precision)
            results[runtime.name] = _measure(runtime, paths[suffix], shape, threads, seconds)
    return results


def _measure(
    runtime: Runtime, paths: Sequence[Path], shape: tuple[int, int], threads: int, seconds: float
) -> list[ExportedMeasurement]:
    memory = [_peak_bytes(runtime, path, shape, threads) for path in paths]
    runners = [runtime.target.load(path, threads, runtime.precision) for path in paths]
    (load_image,) = random_images([shape]).values()
    image = load_image()
    for runner in runners:
        runner.run(image)  # warms up
    times: list[list[float]] = [[] for _ in runners]
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for runner, measured in zip(runners, times, strict=True):
            measured.append(_seconds(runner, image))
    sizes = [_size(path) + sum(map(_size, runtime.target.companions(path))) for path in paths]
    return [ExportedMeasurement(statistics.median(x), y, z) for x, y, z in zip(times, sizes, memory, strict=True)]


def _seconds(runner: Runner, image: np.ndarray) -> float:
    start = time.perf_counter()
    runner.run(image)
    return time.perf_counter() - start


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob('*') if path.is_dir() else [path]) if file.is_file())


def _peak_bytes(runtime: Runtime, path: Path, shape: tuple[int, int], threads: int) -> int:
    folder = Path(targets.__file__).parents[1]
    arguments = map(str, (folder, path, threads, runtime.precision or '', *shape))
    done = subprocess.run([sys.executable, '-c', MEMORY, *arguments], capture_output=True, text=True, check=True)
    return 1024 * json.loads(done.stdout.splitlines()[-1])
