"""Converts a checkpoint to another layout: `python tools/convert_checkpoint.py IN OUT --to authors`."""

import argparse

from rich.console import Console

from mmslide.messages import INPUT_ERRORS, exit_on
from mmslide.weights import convert_checkpoint
from mmslide.weights.layouts import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description='Convert a checkpoint to another layout.')
    parser.add_argument('checkpoint', metavar='IN', help='file or URL, in any supported layout')
    parser.add_argument('out', metavar='OUT', help='file to write; NAME.safetensors for that format')
    parser.add_argument(
        '--to',
        choices=TARGETS,
        default='mmslide',
        help='layout of OUT; all backbones support mmslide, some also others',
    )
    args = parser.parse_args()
    with exit_on(*INPUT_ERRORS):
        table = convert_checkpoint(args.checkpoint, args.out, args.to)
    print(f'{args.checkpoint} to {args.out}')
    Console().print(table)


if __name__ == '__main__':
    main()
