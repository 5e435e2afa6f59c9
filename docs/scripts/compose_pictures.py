"""Composes images of `test.py --show-dir` into one: the ground truth of each above, the predictions below.

docs/images/demo.png, after `make demo` and once more with a higher threshold for what is drawn:

    python tools/test.py configs/mini/cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py work_dirs/demo/epoch_6.pth \\
        --show-dir pictures --cfg-options default_hooks.visualization.score_thr=0.5
    python docs/scripts/compose_pictures.py pictures docs/images/demo.png 000000000002 000000000007 000000000012 \\
        000000000017 000000000027 000000000029

docs/images/demo-seg.png, after `make demo-seg`:

    python docs/scripts/compose_pictures.py work_dirs/demo-seg/pictures docs/images/demo-seg.png \\
        test_ADE_val_00000002.jpg_0 test_ADE_val_00000005.jpg_0 test_ADE_val_00000009.jpg_0 \\
        test_ADE_val_00000012.jpg_0 test_ADE_val_00000016.jpg_0 test_ADE_val_00000021.jpg_0
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

GAP = 4  # pixels
COLORS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='of test.py --show-dir')
    parser.add_argument('out', help='PNG file to write')
    parser.add_argument('names', nargs='+', help='of images in the folder or below it, without suffix')
    parser.add_argument('--side', type=int, default=140, help='pixels of each image (default: %(default)s)')
    args = parser.parse_args()
    columns = [column(args.folder, name, args.side) for name in args.names]
    image = np.concatenate(columns, axis=1)[:, :-GAP]
    # A palette, since textures with noise compress badly.
    Image.fromarray(image[..., ::-1]).quantize(COLORS, dither=Image.Dither.NONE).save(args.out, optimize=True)


def column(folder: Path, name: str, side: int) -> np.ndarray:
    """mmdet and mmseg draw the ground truth on the left and the predictions on the right."""
    (file,) = folder.rglob(f'{name}.*')
    halves = np.split(cv2.imread(str(file)), 2, axis=1)
    resized = [cv2.resize(half, (side, side), interpolation=cv2.INTER_AREA) for half in halves]
    padded = [cv2.copyMakeBorder(x, 0, GAP, 0, GAP, cv2.BORDER_CONSTANT, value=(255, 255, 255)) for x in resized]
    return np.concatenate(padded)[:-GAP]


if __name__ == '__main__':
    main()
