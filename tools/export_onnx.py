"""Writes a trained model as ONNX: `python tools/export_onnx.py CONFIG CHECKPOINT OUT.onnx --shape 512 512`."""

import argparse

from mmslide.deploy.onnx import PARTS, export_onnx
from mmslide.messages import INPUT_ERRORS, exit_on


def main() -> None:
    parser = argparse.ArgumentParser(description='Write a trained model, fused and compared in onnxruntime, as ONNX.')
    parser.add_argument('config', metavar='CONFIG', help='config file, of the training or of a fused checkpoint')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='file or URL of the weights')
    parser.add_argument('out', metavar='OUT', help='file to write, NAME.onnx')
    parser.add_argument('--part', choices=PARTS, default='model', help='what to export; the whole model by default')
    parser.add_argument('--shape', type=int, nargs=2, required=True, metavar=('HEIGHT', 'WIDTH'), help='in pixels')
    parser.add_argument('--dynamic', action='store_true', help='for every size from 32 pixels a side, not for one')
    parser.add_argument(
        '--images', nargs='+', default=[], metavar='FILE', help='pictures to compare the results on too'
    )
    args = parser.parse_args()
    with exit_on(*INPUT_ERRORS, RuntimeError):  # the last if onnxruntime's results differ
        lines = export_onnx(
            args.config, args.checkpoint, args.out, args.part, tuple(args.shape), args.dynamic, args.images
        )
    print(*lines, f'{args.out} is written', sep='\n')


if __name__ == '__main__':
    main()
