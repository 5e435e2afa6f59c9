"""Predicts on images and videos: `python tools/predict.py CONFIG CHECKPOINT INPUT... --out DIR`."""

from mmslide.engine import config_parser, config_with_options
from mmslide.messages import INPUT_ERRORS, exit_on
from mmslide.predict import predict


def main() -> None:
    parser = config_parser('Predict on images and videos with a trained detector, segmentor or classifier.')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('inputs', nargs='+', metavar='INPUT', help='image, folder of images, glob pattern or video')
    parser.add_argument('--out', required=True, metavar='DIR', help='output folder, new or empty')
    parser.add_argument('--score-thr', type=float, default=0.3, help='minimum score (default: %(default)s)')
    parser.add_argument('--device', help='cpu, cuda:1, ...; default: a GPU if there is one')
    parser.add_argument('--no-draw', action='store_true', help='do not draw images, only write the predictions')
    args = parser.parse_args()
    with exit_on(*INPUT_ERRORS):
        config = config_with_options(args.config, args.cfg_options)
        predict(config, args.checkpoint, args.inputs, args.out, args.score_thr, args.device, not args.no_draw)
    print(f'{args.out} is written')


if __name__ == '__main__':
    main()
