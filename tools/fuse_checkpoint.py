"""Fuses a checkpoint for inference and writes its config: `python tools/fuse_checkpoint.py CONFIG CHECKPOINT OUT`."""

import argparse

from mmslide.deploy import fuse_checkpoint
from mmslide.messages import INPUT_ERRORS, exit_on


def main() -> None:
    parser = argparse.ArgumentParser(description='Fuse a checkpoint for inference, and write a config for it.')
    parser.add_argument('config', metavar='CONFIG', help='config file used for training')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='file or URL of the trained weights')
    parser.add_argument('out', metavar='OUT', help='file to write, NAME.pth; the config becomes NAME.py')
    args = parser.parse_args()
    with exit_on(*INPUT_ERRORS):
        config = fuse_checkpoint(args.config, args.checkpoint, args.out)
    print(f'{args.checkpoint}, fused, to {args.out}; for it there is {config}')


if __name__ == '__main__':
    main()
