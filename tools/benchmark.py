"""Benchmarks ops, backbones, whole models and exported models against other implementations: time and memory.

Runs only in a checkout: the package `benchmarks` is not part of the wheel.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import geometric_mean

import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    BACKBONES,
    Cost,
    ExportedMeasurement,
    Machine,
    Measurement,
    Pair,
    available_runtimes,
    backbone_pair,
    compare,
    compare_exported,
    measure_cost,
    measure_exported,
    measure_machine,
    model_pair,
    neighborhood_pair,
    op_pair,
    plot_cost,
)
from mmslide.deploy.graphs import PARTS
from mmslide.files import find_config
from mmslide.messages import INPUT_ERRORS, exit_on, message

# Errors that stop one measurement but not the others; RuntimeError if results differ or memory is insufficient.
ERRORS = (*INPUT_ERRORS, RuntimeError)

# Height, width, channels, heads: stages with Slide Attention, at the sizes of detection.
MAPS = ['200x320x64x1', '100x160x128x2', '200x200x96x3', '100x100x192x6']
# Those of NAT-T and NAT-Mini.
NEIGHBORHOOD_MAPS = ['200x320x64x2', '100x160x128x4', '50x80x256x8', '25x40x512x16']
SIDES = (224, 400, 448, 800, 896, 1600)


def main() -> None:
    args = parse_args()
    MMLogger.get_current_instance().setLevel('WARNING')  # hides messages about loading the baselines' weights
    console = Console(width=max(150, Console().width))
    if args.threads:
        torch.set_num_threads(args.threads)
    run = {'onnx': run_layers, 'exported': run_exported}.get(args.command, run_in_torch)
    records: list[dict] = []
    with exit_on(*ERRORS):
        try:
            for record in run(args, console):
                records.append(record)
        finally:
            if args.json:
                args.json.write_text(json.dumps(records, indent=1) + '\n')


def run_in_torch(args: argparse.Namespace, console: Console) -> Iterator[dict]:
    settings = dict(batch=args.batch, dtype=getattr(torch, args.dtype), device=args.device, training=args.training)
    where = torch.cuda.get_device_name(args.device) if args.device.startswith('cuda') else f'{args.threads} CPU threads'
    what = f'{"forward and backward" if args.training else "inference"}, batch {args.batch}, {args.dtype}, {where}'
    run = run_cost if args.plot else run_pairs
    return run(args, settings, what, console)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    measuring = argparse.ArgumentParser(add_help=False)
    measuring.add_argument('--threads', type=int, default=2, help='CPU threads')
    measuring.add_argument('--seconds', type=float, default=4.0, help='minimum time to measure each pair')
    measuring.add_argument('--json', type=Path, metavar='FILE', help='also write the results to this file')
    common = argparse.ArgumentParser(add_help=False, parents=[measuring])
    common.add_argument('--training', action='store_true', help='forward and backward instead of inference')
    common.add_argument('--batch', type=int, default=1, help='images per step')
    common.add_argument('--dtype', choices=['float32', 'float16', 'bfloat16'], default='float32')
    common.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    plot = argparse.ArgumentParser(add_help=False)
    plot.add_argument('--plot', type=Path, metavar='FILE', help='measure at increasing sizes and plot the cost')
    plot.add_argument('--backend', help='backend of Slide Attention, see mmslide.ops.slide_attention')

    commands = parser.add_subparsers(dest='command', required=True)

    def sizes(maps: list[str], kernel_size: int) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument('--maps', nargs='+', default=maps, metavar='HxWxCxHEADS', help='default: %(default)s')
        parser.add_argument('--kernel-size', type=int, default=kernel_size, help='default: %(default)s')
        return parser

    maps = sizes(MAPS, kernel_size=3)
    op = commands.add_parser('op', parents=[common, plot, maps], help='only Slide Attention')
    op.add_argument(
        '--baseline', default='two-path', help='two-path, im2col, flex, natten or a backend; default: %(default)s'
    )
    commands.add_parser(
        'neighborhood',
        parents=[common, sizes(NEIGHBORHOOD_MAPS, kernel_size=7)],
        help='neighborhood attention, compared with gathering all windows',
    )
    backbone = commands.add_parser('backbone', parents=[common, plot], help="and mmdet's, mmseg's or a plain one")
    backbone.add_argument('names', nargs='*', choices=[[], *BACKBONES], help='default: all')
    backbone.add_argument('--with-cp', action='store_true', help='use with_cp in backbones of mmslide')
    onnx = commands.add_parser('onnx', parents=[measuring, maps], help='fused compared with two-path, in onnxruntime')
    onnx.add_argument('--mlp-ratio', type=float, default=0, help='of a transformer block; default: only attention')
    exported = commands.add_parser('exported', parents=[measuring], help='one or two exported configs, in each runtime')
    exported.add_argument('config')
    exported.add_argument('baseline', nargs='?', help='config of the baseline')
    exported.add_argument(
        '--runtimes', nargs='+', choices=list(available_runtimes()), help='default: all that are installed'
    )
    exported.add_argument('--part', choices=PARTS, default='backbone', help='default: %(default)s')
    model = commands.add_parser('model', parents=[common], help='two configs')
    model.add_argument('config')
    model.add_argument('baseline', help='config of the baseline')
    for command in (backbone, exported, model):
        command.add_argument('--shape', type=int, nargs=2, default=(800, 1280), metavar=('HEIGHT', 'WIDTH'))
    args = parser.parse_args()
    args.plot = getattr(args, 'plot', None)
    if args.plot and args.command == 'backbone' and len(args.names) > 1:
        parser.error(f'--plot supports a single backbone, got {" ".join(args.names)}')
    return args


def pairs(args: argparse.Namespace, settings: dict) -> Iterator[tuple[str, Callable[[], Pair]]]:
    """The name of each pair and a function that builds it."""
    if args.command == 'op':
        for text in args.maps:
            yield text, partial(op_pair, *map(int, text.split('x')), **op_settings(args, settings))
    elif args.command == 'neighborhood':
        for text in args.maps:
            sizes = map(int, text.split('x'))
            yield text, partial(neighborhood_pair, *sizes, kernel_size=args.kernel_size, **settings)
    elif args.command == 'backbone':
        for name in args.names or BACKBONES:
            own = dict(backend=args.backend, with_cp=args.with_cp)
            yield name, partial(backbone_pair, name, *args.shape, **own, **settings)
    else:
        configs = map(read_config, (args.config, args.baseline))
        yield args.config, partial(model_pair, *configs, *args.shape, **settings)


def read_config(name: str) -> Config:
    """A config file, one of mmslide's, or another package's in mmengine's notation: mmdet::swin/NAME.py."""
    return get_config(name) if '::' in name else Config.fromfile(find_config(name))


def op_settings(args: argparse.Namespace, settings: dict) -> dict:
    return dict(settings, kernel_size=args.kernel_size, backend=args.backend, baseline=args.baseline)


def run_pairs(args: argparse.Namespace, settings: dict, what: str, console: Console) -> Iterator[dict]:
    """Prints and yields each pair as soon as it is measured; failures are listed at the end.

    Raises:
        RuntimeError: some failed.
    """
    machine = measure_machine(settings['dtype'], torch.device(args.device))
    print(
        f'{what}. Copies: {machine.copy_rate / 1e9:.1f} GB/s, matrix products: {machine.matrix_rate / 1e9:.0f} Gop/s.'
    )
    print('× floor: our time divided by the minimum for the bytes and operations on this machine\n')
    columns = ['ours ms', 'baseline ms', 'ratio', 'images/s', '× floor', 'ours MB', 'baseline MB', 'ratio']
    if args.training:
        columns += ['ours kept MB', 'baseline kept MB', 'ratio']
    print_row(['', 'baseline'], columns, columns)
    ratios, failures = [], []
    for name, build in pairs(args, settings):
        try:
            with console.status(name):
                pair = build()
                ours, baseline = compare(pair.ours, pair.baseline, args.training, pair.tolerance, args.seconds)
        except ERRORS as error:
            failures.append(f'{name}: {message(error)}')
            continue
        print_row([pair.name, pair.baseline.name], row(pair, ours, baseline, machine, args.training), columns)
        ratios.append(baseline.seconds / ours.seconds)
        yield dict(
            name=pair.name, against=pair.baseline.name, settings=what, ours=asdict(ours), baseline=asdict(baseline)
        )
    if len(ratios) > 1:
        print(f'geometric mean of the ratios of times: {geometric_mean(ratios):.2f}')
    if failures:
        raise RuntimeError(f'not measured: {"; ".join(failures)}')


def print_row(names: Sequence[str], cells: Sequence[str], columns: Sequence[str]) -> None:
    """Prints the names at the left, and the cells below the names of their columns."""
    aligned = [f'{cell:>{max(len(column), 6)}}' for cell, column in zip(cells, columns, strict=True)]
    print(*(f'{name:30}' for name in names), *aligned, sep='  ', flush=True)


def row(pair: Pair, ours: Measurement, baseline: Measurement, machine: Machine, training: bool) -> list[str]:
    cells = [
        f'{1e3 * ours.seconds:.1f}',
        f'{1e3 * baseline.seconds:.1f}',
        f'{baseline.seconds / ours.seconds:.2f}',
        f'{pair.images / ours.seconds:.2f}',
        f'{ours.seconds / machine.floor(pair.moved_bytes, pair.operations):.1f}',
    ]
    memory = [(ours.peak_bytes, baseline.peak_bytes)]
    if training:
        memory.append((ours.saved_bytes, baseline.saved_bytes))
    for our_bytes, their_bytes in memory:
        cells += [f'{our_bytes / 1e6:.1f}', f'{their_bytes / 1e6:.1f}', f'{their_bytes / our_bytes:.2f}']
    return cells


def run_layers(args: argparse.Namespace, console: Console) -> Iterator[dict]:
    block = f'with norms and an MLP of ratio {args.mlp_ratio:g}' if args.mlp_ratio else 'alone'
    print(f'Slide Attention with its projections {block}, in onnxruntime, float32, {args.threads} CPU threads\n')
    columns = ['fused ms', 'two-path ms', 'ratio']
    print_row([''], columns, columns)
    for text in args.maps:
        sizes = [int(x) for x in text.split('x')]
        sides = compare_exported(*sizes, args.kernel_size, args.mlp_ratio, args.seconds)
        ours, baseline = (1e3 * side.seconds for side in sides)
        print_row([text], [f'{ours:.1f}', f'{baseline:.1f}', f'{baseline / ours:.2f}'], columns)
        yield dict(name=text, mlp_ratio=args.mlp_ratio, fused_ms=ours, two_path_ms=baseline)


def run_exported(args: argparse.Namespace, console: Console) -> Iterator[dict]:
    names = [args.config, *([args.baseline] if args.baseline else [])]
    console.print(f'{args.part} of {" and ".join(names)}, {args.shape[0]}×{args.shape[1]}, {args.threads} CPU threads')
    runtimes = available_runtimes()
    chosen = [runtimes[name] for name in args.runtimes or runtimes]
    configs = [read_config(name) for name in names]
    with console.status('exporting'):
        results = measure_exported(configs, chosen, args.part, tuple(args.shape), args.threads, args.seconds)
    table = Table('runtime')
    for column in ('ms', 'file MB', 'memory MB'):
        for name in ('', 'baseline ', 'ratio of ')[: 3 if args.baseline else 1]:
            table.add_column(name + column, justify='right')
    for name, measurements in results.items():
        cells = []
        for figures in zip(*(_figures(x) for x in measurements), strict=True):
            cells += [f'{figure:.1f}' for figure in figures]
            cells += [f'{figures[1] / figures[0]:.2f}'] if args.baseline else []
        table.add_row(name, *cells)
        yield dict(runtime=name, configs=names, measurements=[asdict(x) for x in measurements])
    console.print(table)


def _figures(x: ExportedMeasurement) -> tuple[float, float, float]:
    return 1e3 * x.seconds, x.file_bytes / 1e6, x.peak_bytes / 1e6


def run_cost(args: argparse.Namespace, settings: dict, what: str, console: Console) -> Iterator[dict]:
    if args.command == 'op':
        _, _, channels, heads = map(int, args.maps[0].split('x'))
        title = f'Slide Attention, {channels} channels at a quarter of the image'
        names = args.backend or 'ours', args.baseline

        def build(side: int) -> Pair:
            return op_pair(side // 4, side // 4, channels, heads, **op_settings(args, settings))
    else:
        (name,) = args.names or ['slide-swin-t']
        title, names = name, ('ours', BACKBONES[name].baseline)

        def build(side: int) -> Pair:
            return backbone_pair(name, side, side, backend=args.backend, **settings)

    def report(cost: Cost) -> None:
        apart = f', of which global attention {1e3 * cost.global_seconds:.0f} ms' if cost.global_seconds else ''
        console.print(
            f'{cost.pixels / 1e6:.3f} Mpixels: {1e3 * cost.ours.seconds:.1f} ms{apart}, '
            f'{cost.ours.peak_bytes / 1e6:.0f} MB; {names[1]}: {1e3 * cost.baseline.seconds:.1f} ms, '
            f'{cost.baseline.peak_bytes / 1e6:.0f} MB'
        )

    console.print(f'{title}: {what}')
    costs = measure_cost(build, SIDES, args.training, args.seconds, report)
    for small in costs:
        for large in costs:
            if large.pixels == 4 * small.pixels:
                local = [cost.ours.seconds - cost.global_seconds for cost in (small, large)]
                console.print(
                    f'{small.pixels / 1e6:.3f} to {large.pixels / 1e6:.3f} Mpixels: time × {local[1] / local[0]:.2f}'
                    f'{" without global attention" if large.global_seconds else ""}, '
                    f'memory × {large.ours.peak_bytes / small.ours.peak_bytes:.2f}'
                )
    plot_cost(costs, f'{title}\n{what}', names, args.plot)
    console.print(f'drawn: {args.plot}')
    yield from (asdict(cost) for cost in costs)


if __name__ == '__main__':
    main()
