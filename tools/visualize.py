"""Visualizes what a trained model has learned: `python tools/visualize.py CONFIG CHECKPOINT IMAGE... --out DIR`."""

import argparse
from pathlib import Path

from mmslide.figures import KINDS, draw
from mmslide.files import atomic_write
from mmslide.messages import INPUT_ERRORS, exit_on


def parse_point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(','))
    except ValueError:
        x = y = -1.0
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f'must be X,Y, fractions of width and height from 0 to 1, got {text!r}')
    return x, y


def main() -> None:
    parser = argparse.ArgumentParser(description='Visualize what a trained model has learned and what it attends to.')
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='file or URL of the weights')
    parser.add_argument('images', metavar='IMAGE', nargs='*', help='image files; not needed for kernels')
    parser.add_argument('--out', metavar='DIR', required=True, help='output folder')
    parser.add_argument('--kinds', nargs='+', choices=KINDS, help='what to draw (default: everything that applies)')
    parser.add_argument('--stages', nargs='+', type=int, help='stages from 0, as in slide_stages (default: all)')
    parser.add_argument(
        '--points',
        nargs='+',
        type=parse_point,
        default=[(0.5, 0.5)],
        metavar='X,Y',
        help='points whose attention is drawn, as fractions of width and height (default: 0.5,0.5)',
    )
    parser.add_argument(
        '--history',
        nargs='+',
        default=[],
        metavar='CHECKPOINT',
        help='training checkpoints or their folder: plots the distance of the kernels from the fixed shift',
    )
    parser.add_argument('--host-checkpoint', metavar='CHECKPOINT', help='weights of the host, for its receptive field')
    parser.add_argument('--channels', type=int, default=3, help='channels per feature map (default: %(default)s)')
    parser.add_argument('--targets', type=int, default=3, help='class activations per image (default: %(default)s)')
    parser.add_argument('--score-thr', type=float, default=0.3, help='minimum score (default: %(default)s)')
    args = parser.parse_args()
    with exit_on(*INPUT_ERRORS):
        inputs = [args.config, args.checkpoint, *args.images, *args.history]
        out = Path(args.out)
        arguments = {name: value for name, value in vars(args).items() if name != 'out'}
        for name, figure in draw(**arguments):
            out.mkdir(parents=True, exist_ok=True)
            path = out / f'{name}.png'
            with atomic_write(path, inputs=inputs) as (temporary,):
                figure.savefig(temporary, format='png')
            print(path)


if __name__ == '__main__':
    main()
