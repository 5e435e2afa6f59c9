"""Counts the multiply-adds and parameters of a model: `python tools/get_flops.py CONFIG`."""

from rich.console import Console

from mmslide.engine import config_parser, config_with_options
from mmslide.flops import complexity_table, count_complexity
from mmslide.messages import INPUT_ERRORS, exit_on


def main() -> None:
    parser = config_parser('Count the multiply-adds and parameters of a model.')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='image size in pixels (default: detection 800 1280, segmentation 512 2048, classification 224 224)',
    )
    with exit_on(*INPUT_ERRORS):
        args = parser.parse_args()
        config = config_with_options(args.config, args.cfg_options)
        complexity = count_complexity(config, args.shape)
    Console().print(complexity_table(complexity))


if __name__ == '__main__':
    main()
