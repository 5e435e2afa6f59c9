"""Composes images of `test.py --show-dir` into one: the ground truth of each above, the predictions below."""

import argparse
from pathlib import Path

import cv2
import numpy as np

GAP = 4  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path, help='of test.py --show-dir')
    parser.add_argument('out', help='PNG file to write')
    parser.add_argument('names', nargs='+', help='of images in the folder or below it, without suffix')
    parser.add_argument('--side', type=int, default=150, help='pixels of each image (default: %(default)s)')
    args = parser.parse_args()
    columns = [column(args.folder, name, args.side) for name in args.names]
    image = np.concatenate(columns, axis=1)[:, :-GAP]
    cv2.imwrite(args.out, image, [cv2.IMWRITE_PNG_COMPRESSION, 9])


def column(folder: Path, name: str, side: int) -> np.ndarray:
    """mmdet and mmseg draw the ground truth on the left and the predictions on the right."""
    (file,) = folder.rglob(f'{name}.*')
    halves = np.split(cv2.imread(str(file)), 2, axis=1)
    resized = [cv2.resize(half, (side, side), interpolation=cv2.INTER_AREA) for half in halves]
    padded = [cv2.copyMakeBorder(x, 0, GAP, 0, GAP, cv2.BORDER_CONSTANT, value=(255, 255, 255)) for x in resized]
    return np.concatenate(padded)[:-GAP]


if __name__ == '__main__':
    main()
