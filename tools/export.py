"""Exports a trained model: `python tools/export.py CONFIG CHECKPOINT OUT.onnx --shape 512 512`."""

import argparse

from mmslide.deploy.export import export
from mmslide.deploy.graphs import PARTS
from mmslide.deploy.targets import TARGETS
from mmslide.messages import INPUT_ERRORS, exit_on


def main() -> None:
    parser = argparse.ArgumentParser(description='Fuse and export a trained model, and compare it with PyTorch.')
    parser.add_argument('config', metavar='CONFIG', help='config file for training, or of a fused checkpoint')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='file or URL of the weights')
    formats = ', '.join(f'{suffix} ({target.runtime})' for suffix, target in TARGETS.items())
    parser.add_argument('out', metavar='OUT', help=f'file to write; its suffix selects the format: {formats}')
    parser.add_argument('--part', choices=PARTS, default='model', help='what to export; default: the whole model')
    parser.add_argument('--shape', type=int, nargs=2, required=True, metavar=('HEIGHT', 'WIDTH'), help='in pixels')
    parser.add_argument('--dynamic', action='store_true', help='support any size of at least 32 pixels per side')
    parser.add_argument('--images', nargs='+', default=[], metavar='FILE', help='more images to compare the results on')
    parser.add_argument('--precision', help='fp32, fp16 or int8, depending on the format; default: its first')
    parser.add_argument('--calibration', metavar='DIR', help='folder of images to calibrate int8 with')
    args = parser.parse_args()
    with exit_on(*INPUT_ERRORS, RuntimeError):  # RuntimeError if the runtime's results differ
        lines = export(
            args.config,
            args.checkpoint,
            args.out,
            args.part,
            tuple(args.shape),
            args.dynamic,
            args.images,
            args.precision,
            args.calibration,
        )
    print(*lines, f'{args.out} is written', sep='\n')


if __name__ == '__main__':
    main()
