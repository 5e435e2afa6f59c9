"""Checks the installation: `python -m mmslide.doctor`.

Imports only the standard library at module level, since it has to run even if `import mmslide` fails.
"""

import argparse
import importlib
import json
import os
import platform
import re
import runpy
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOLERANCE = 1e-4  # between a device's float32 results and the reference


@dataclass(frozen=True)
class Row:
    """One line of the table: `state` is 'ok', 'missing' (mmslide works without) or 'wrong'."""

    name: str
    found: str
    state: str = 'ok'
    advice: str = ''


def examine() -> Iterator[Row]:
    """Checks what mmslide needs, in the order of dependence; stops if something essential is missing."""
    table = runpy.run_path(str(HERE / 'version.py'))
    yield Row('Python', f'{platform.python_version()} on {platform.platform()}')
    usable = True
    for name, (minimum, limit) in [*table['VERSIONS'].items(), ('mmpretrain', table['MMPRETRAIN'])]:
        wanted = table['requirement'](name, minimum, limit)
        row = _package(name, minimum, limit, f'{"pip" if name == "torch" else "mim"} install {wanted}')
        if row.state == 'missing' and name in table['REQUIRED']:
            row = Row(name, row.found, 'wrong', row.advice)
        usable &= row.state != 'wrong'
        yield row
    if not usable:
        return
    yield _mmcv_operators()
    mmslide = _mmslide()
    yield mmslide
    if mmslide.state == 'wrong':
        return
    yield _torchvision()
    yield from _devices()


def _package(name: str, minimum: str, limit: str, command: str) -> Row:
    if find_spec(name) is None:
        return Row(name, 'not installed', 'missing', command)
    try:
        module = importlib.import_module(name)
    except Exception as error:  # mmdet, mmseg and mmpretrain refuse versions of mmcv with an AssertionError
        advice = f'{command} "mmcv>=2.0.0,<2.2.0"' if isinstance(error, AssertionError) else command
        return Row(name, f'cannot be imported: {_line(error)}', 'wrong', advice)
    version = module.__version__
    found = version
    if name == 'torch':
        cuda = module.version.cuda or module.version.hip
        found += f', CUDA {cuda}' if cuda else ', CPU'
    fits = _numbers(minimum) <= _numbers(version) < _numbers(limit)
    return Row(name, found, 'ok' if fits else 'wrong', '' if fits else command)


def _mmcv_operators() -> Row:
    if not _imports('mmcv.ops'):
        return Row('mmcv.ops', 'not compiled', 'missing', 'detectors need them: install mmcv, not mmcv-lite')
    return Row('mmcv.ops', 'compiled')


def _mmslide() -> Row:
    try:
        mmslide = importlib.import_module('mmslide')
        if __package__:  # with -m it is imported without
            mmslide._set_up()
        importlib.import_module('mmslide.models')
    except Exception as error:
        return Row('mmslide', f'cannot be imported: {_line(error)}', 'wrong', 'reinstall it: pip install .')
    return Row('mmslide', f'{mmslide.__version__} in {HERE}')


def _torchvision() -> Row:
    import torch

    command = f'classification needs it: pip install torchvision torch=={torch.__version__.split("+")[0]}'
    if find_spec('torchvision') is None:
        return Row('torchvision', 'not installed', 'missing', command)
    try:
        return Row('torchvision', importlib.import_module('torchvision').__version__)
    except Exception as error:
        return Row('torchvision', f'cannot be imported: {_line(error)}', 'missing', command)


def _devices() -> Iterator[Row]:
    """The devices, the backends of Slide Attention on each, and the accuracy of the default one."""
    import torch

    from mmslide.ops.backends import BACKENDS, choose_backend

    yield Row('threads', f'{torch.get_num_threads()} of {os.cpu_count()} processors')
    devices = ['cpu', *(f'cuda:{index}' for index in range(torch.cuda.device_count()))]
    others = {'mps': torch.backends.mps, 'xpu': getattr(torch, 'xpu', None)}
    devices += [name for name, module in others.items() if module is not None and module.is_available()]
    if torch.cuda.is_available():
        path = shutil.which('nvcc')
        yield Row('nvcc', path or 'not found', 'ok' if path else 'missing', '' if path else 'only to compile mmcv')
    for device in devices:
        names = f' ({torch.cuda.get_device_name(device)})' if device.startswith('cuda') else ''
        q, weight = torch.zeros(1, 4, 4, 1, 32, device=device), torch.zeros(32, 9, 3, 3, device=device)
        for name, backend in BACKENDS.items():
            reason = backend.refusal(q, weight)
            if reason is None:
                default = ', the default' if choose_backend(q, weight) == name else ''
                yield Row(f'{name} on {device}', f'can run{default}')
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


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r'\d+', version.split('+')[0])[:3])


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table('', 'found', '', 'what to do')
    colours: dict[str, Any] = dict(ok='green', missing='yellow', wrong='red')
    for row in rows:
        table.add_row(row.name, escape(row.found), f'[{colours[row.state]}]{row.state}[/]', escape(row.advice))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog='mmslide.doctor', description='Check the installation of mmslide.')
    parser.add_argument('--json', action='store_true', help='print JSON, for bug reports')
    args = parser.parse_args()
    rows = list(examine())
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _print(rows)
    sys.exit(any(row.state == 'wrong' for row in rows))


if __name__ == '__main__':
    main()
