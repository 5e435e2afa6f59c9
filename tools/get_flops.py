"""Counts the multiply-adds and parameters of a whole model: `python tools/get_flops.py CONFIG`."""

import argparse

from mmengine.config import Config, DictAction
from rich.console import Console

from mmslide.files import find_config
from mmslide.flops import complexity_table, count_complexity


def main() -> None:
    parser = argparse.ArgumentParser(description='Count the multiply-adds and parameters of a whole model.')
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='of the image in pixels; 800 1280 for detection and 512 2048 for segmentation if not given',
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='changes to the config, as key=value')
    args = parser.parse_args()
    cfg = Config.fromfile(find_config(args.config))
    cfg.merge_from_dict(args.cfg_options or {})
    Console().print(complexity_table(count_complexity(cfg, args.shape)))


if __name__ == '__main__':
    main()
