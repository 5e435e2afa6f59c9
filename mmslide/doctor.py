"""Checks the installation: `python -m mmslide.doctor`.

Imports only the standard library at module level, since it has to run even if `import mmslide` fails.
"""

from __future__ import annotations  # lets an older Python get as far as the row that says so

import argparse
import importlib
import json
import os
import platform
import runpy
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
VERSION = SimpleNamespace(**runpy.run_path(str(HERE / 'version.py')))
TOLERANCE = 1e-4  # between a device's float32 results and the reference
FAILURES = (Exception, SystemExit)  # some packages end the process at import


@dataclass(frozen=True)
class Row:
    """One line of the table: `state` is 'ok', 'missing' (mmslide works without) or 'wrong'."""

    name: str
    found: str
    state: str = 'ok'
    advice: str = ''


def examine() -> Iterator[Row]:
    """Checks what mmslide needs, in the order of dependence; stops if something essential is missing."""
    try:
        yield from _checks()
    except FAILURES as error:
        yield Row('doctor', f'failed with {type(error).__name__}: {_line(error)}', 'wrong', 'please report this')


def _checks() -> Iterator[Row]:
    python = _python()
    yield python
    if python.state == 'wrong':
        return
    wrong: set[str] = set()
    for name in VERSION.VERSIONS:
        if wrong.intersection(VERSION.REQUIRED) and find_spec(name) is not None:
            continue  # it would fail for the same reason
        row = _package(name)
        if row.state == 'wrong':
            wrong.add(name)
        yield row
    if wrong - {'mmpretrain'}:
        return
    yield _mmcv_operators()
    mmslide = _mmslide()
    yield mmslide
    if mmslide.state == 'wrong':
        return
    yield _torchvision()
    yield _nvcc()
    yield from _devices()


def _python() -> Row:
    found = f'{platform.python_version()} (>={VERSION.PYTHON}) on {platform.platform()}'
    if sys.version_info >= tuple(map(int, VERSION.PYTHON.split('.'))):
        return Row('Python', found)
    return Row('Python', found, 'wrong', f'install Python {VERSION.PYTHON} or later')


def _package(name: str) -> Row:
    command = VERSION.install_command(name)
    fits = f'({VERSION.version_range(name)})'
    if find_spec(name) is None:
        return Row(name, f'not installed {fits}', 'wrong' if name in VERSION.REQUIRED else 'missing', command)
    try:
        module = importlib.import_module(name)
    except FAILURES as error:
        if isinstance(error, AssertionError):  # mmdet, mmseg and mmpretrain refuse a version of mmcv
            command = VERSION.install_command(name, 'mmcv')
        elif isinstance(error, ModuleNotFoundError) and (error.name or '').split('.')[0] != name:
            command = _reinstall(name, '')  # installs the dependencies that are missing
        else:
            command = _reinstall(name)
        return Row(name, f'cannot be imported: {_line(error)}', 'wrong', command)
    version = getattr(module, '__version__', None)
    if version is None:
        return Row(name, f'has no version: {module}', 'wrong', command)
    build = ''
    if name == 'torch':
        cuda = module.version.cuda or module.version.hip
        build = f', CUDA {cuda}' if cuda else ', CPU'
    found = f'{version}{build} {fits}'
    return Row(name, found) if VERSION.fits(name, version) else Row(name, found, 'wrong', command)


def _reinstall(name: str, options: str | None = None) -> str:
    """The command that repairs a broken package: in the version that is installed, if that is supported."""
    from importlib.metadata import packages_distributions, version

    if options is None:
        # The dependencies of torch are CUDA's libraries; those of the others would replace NumPy.
        options = '--force-reinstall ' if name == 'torch' else '--force-reinstall --no-deps --no-cache-dir '
    for distribution in packages_distributions().get(name, ()):
        installed = version(distribution)
        if VERSION.fits(name, installed):
            wanted = f'"{distribution}=={installed.split("+")[0]}"'
            return VERSION.install_command(name, options=options, requirements=wanted)
    return VERSION.install_command(name, options=options)


def _mmcv_operators() -> Row:
    from importlib.metadata import packages_distributions

    if find_spec('mmcv._ext') is None:
        lite = 'mmcv-lite' in packages_distributions().get('mmcv', ())
        command = f'pip uninstall -y mmcv-lite && {VERSION.install_command("mmcv")}' if lite else _reinstall('mmcv')
        return Row('mmcv.ops', 'not compiled, needed by detectors', 'missing', command)
    try:
        importlib.import_module('mmcv.ops')
    except FAILURES as error:  # mostly, they were compiled for another torch
        return Row('mmcv.ops', f'cannot be loaded: {_line(error)}', 'wrong', _reinstall('mmcv'))
    return Row('mmcv.ops', 'compiled')


def _mmslide() -> Row:
    try:
        mmslide = importlib.import_module('mmslide')
        if __package__:  # with -m it is imported without
            mmslide._set_up()
        importlib.import_module('mmslide.models')
    except FAILURES as error:
        return Row('mmslide', f'cannot be imported: {_line(error)}', 'wrong', 'reinstall it: pip install .')
    return Row('mmslide', f'{mmslide.__version__} in {HERE}')


def _torchvision() -> Row:
    import torch

    command = f'pip install torchvision torch=={torch.__version__.split("+")[0]}'
    if find_spec('torchvision') is None:
        return Row('torchvision', 'not installed, needed for classification', 'missing', command)
    try:
        return Row('torchvision', importlib.import_module('torchvision').__version__)
    except FAILURES as error:
        return Row('torchvision', f'cannot be imported, needed for classification: {_line(error)}', 'missing', command)


def _nvcc() -> Row:
    """CUDA's compiler, where torch looks for it when mmcv is compiled."""
    try:
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError as error:
        return Row('nvcc', f'cannot be looked for: {_line(error)}', 'missing', 'pip install setuptools')
    path = CUDA_HOME and shutil.which('nvcc', path=str(Path(CUDA_HOME, 'bin')))
    if not path:
        where = f' in {CUDA_HOME}' if CUDA_HOME else ''
        return Row('nvcc', f'not found{where}, needed only to compile mmcv for a GPU', 'missing')
    return Row('nvcc', path)


def _devices() -> Iterator[Row]:
    """The devices, the backends of Slide Attention on each, and the accuracy of the default one."""
    import torch

    from mmslide.ops.backends import BACKENDS, WANTED, choose_backend

    yield Row('threads', f'{torch.get_num_threads()} of {os.cpu_count()} processors')
    devices = ['cpu', *(f'cuda:{index}' for index in range(torch.cuda.device_count()))]
    others = {'mps': torch.backends.mps, 'xpu': getattr(torch, 'xpu', None)}
    devices += [name for name, module in others.items() if module is not None and module.is_available()]
    for device in devices:
        names = f' ({torch.cuda.get_device_name(device)})' if device.startswith('cuda') else ''
        q, weight = torch.zeros(1, 4, 4, 1, 32, device=device), torch.zeros(32, 9, 3, 3, device=device)
        try:
            default = choose_backend(q, weight)
        except ValueError:  # for MMSLIDE_BACKEND; the last row has the message
            default = None
        for name, backend in BACKENDS.items():
            reason = backend.refusal(q, weight)
            if reason is None:
                chosen = ', chosen by MMSLIDE_BACKEND' if WANTED else ', the default'
                yield Row(f'{name} on {device}', f'can run{chosen if name == default else ""}')
            elif device == 'cpu' or 'CPU tensors' not in reason:
                yield Row(f'{name} on {device}', reason, 'missing')
        start = time.perf_counter()
        try:
            error = max(_deviation(device, 'op'), _deviation(device, 'block'))
            found = f'differs from the reference by {error:.0e} ({time.perf_counter() - start:.1f} s){names}'
            yield Row(f'Slide Attention on {device}', found, 'ok' if error < TOLERANCE else 'wrong')
        except Exception as error:
            yield Row(f'Slide Attention on {device}', _line(error), 'wrong')


def _deviation(device: str, what: str) -> float:
    """The largest relative error of outputs and gradients, for the op or for a transformer block with it."""
    import torch
    from torch import Tensor

    from mmslide.models.attention import SlideAttention
    from mmslide.models.layers import Block
    from mmslide.models.mlp import MLP
    from mmslide.ops import slide_attention

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def results(device: str, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
        generator.manual_seed(0)
        if what == 'op':
            inputs = [*(random(1, 9, 7, 2, 32) for _ in range(3)), random(32, 9, 3, 3), random(32, 9), random(2, 9)]
            inputs = [x.to(device, dtype).requires_grad_() for x in inputs]
            out = slide_attention(*inputs, backend=backend)
        else:
            block = Block(SlideAttention(64, 2, backend=backend), MLP(64, 128), 64).to(device, dtype)
            with torch.no_grad():
                for parameter in block.parameters():
                    parameter.copy_(0.2 * random(*parameter.shape))
            inputs = [random(1, 9, 7, 64).to(device, dtype).requires_grad_(), *block.parameters()]
            out = block(inputs[0])
        grads = torch.autograd.grad(out, inputs, random(*out.shape).to(out))
        return [x.detach().cpu().double() for x in (out, *grads)]

    pairs = zip(results(device, torch.float32, None), results('cpu', torch.float64, 'reference'), strict=True)
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _text(row: Row) -> str:
    """Commands have a line of their own, for copying."""
    advice = f'\n    {row.advice}' if row.advice else ''
    return f'{row.name:25} {row.state:8} {row.found}{advice}'


def main() -> None:
    parser = argparse.ArgumentParser(prog='mmslide.doctor', description='Check the installation of mmslide.')
    parser.add_argument('--json', action='store_true', help='print JSON, for bug reports')
    args = parser.parse_args()
    out, states = sys.stdout, set()
    separator = '[\n '
    with redirect_stdout(sys.stderr):  # for what packages print at import
        # One by one, since compiled code that does not fit can end the process.
        for row in examine():
            states.add(row.state)
            if args.json:
                print(separator, json.dumps(asdict(row)), sep='', end='', file=out, flush=True)
                separator = ',\n '
            else:
                print(_text(row), file=out, flush=True)
    if args.json:
        print('\n]')
    elif 'wrong' in states:
        print('\nFix what is wrong from the top, then run this again.')
    sys.exit('wrong' in states)


if __name__ == '__main__':
    main()
