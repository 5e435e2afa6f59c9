"""Runs an exported model: `python tools/run_exported.py MODEL IMAGE OUT.png`.

Neither mmslide nor PyTorch is imported, unless the format needs PyTorch. On a machine without mmslide, copy the folder
mmslide/deploy/targets next to this script.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import cv2
import numpy as np

package = find_spec('mmslide')
beside = [Path(package.origin).parent / 'deploy'] if package and package.origin else []
sys.path[1:1] = map(str, beside)  # only the package `targets`, since mmslide imports PyTorch

from targets import TARGETS, find_target  # noqa: E402
from targets.images import prepare, read_image  # noqa: E402

COLOURS = np.random.default_rng(0).integers(0, 256, (256, 3))  # of the classes, repeated


def fail(message: str) -> NoReturn:
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)


def draw_labels(image: np.ndarray, labels: np.ndarray, size: tuple[int, int], names: Sequence) -> None:
    """Draws every pixel in the color of its class; prints the number of pixels of each class."""
    height, width = size
    # OpenCV cannot resize integers above 16 bits.
    resized = cv2.resize(labels[0, :height, :width].astype(np.float32), image.shape[1::-1], interpolation=0)
    labels = resized.astype(int)
    image[:] = (image + COLOURS[labels % len(COLOURS)]) // 2
    for label, count in enumerate(np.bincount(labels.ravel())):
        if count:
            print(names[label], count, 'pixels')


def draw_detections(image: np.ndarray, found: dict, size: tuple[int, int], names: Sequence, score_thr: float) -> None:
    """Draws masks, boxes, classes and scores, the best on top; prints them."""
    height, width = image.shape[:2]
    boxes = found['boxes'] * np.tile([width / size[1], height / size[0]], 2)
    boxes = np.minimum(boxes, [width, height, width, height])
    # Rows without a detection have score 0.
    for row in np.flatnonzero((found['scores'] >= score_thr) & (found['scores'] > 0))[::-1]:
        label, (x1, y1, x2, y2) = found['labels'][row], boxes[row].tolist()
        colour = COLOURS[label % len(COLOURS)].tolist()
        if 'masks' in found:
            mask = found['masks'][row]  # over the box, with values at pixel centers
            x, y = mask.shape[1] / max(x2 - x1, 1), mask.shape[0] / max(y2 - y1, 1)
            into_box = np.array([[x, 0, (0.5 - x1) * x - 0.5], [0, y, (0.5 - y1) * y - 0.5]])
            inside = cv2.warpAffine(mask, into_box, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
            image[inside > 0.5] = (image[inside > 0.5] + colour) // 2
        name, score = names[label], found['scores'][row]
        cv2.rectangle(image, (round(x1), round(y1)), (round(x2), round(y2)), colour)
        cv2.putText(image, f'{name} {score:.2f}', (round(x1), round(y1) + 10), cv2.FONT_HERSHEY_SIMPLEX, 0.35, colour)
        print(f'{name} {score:.3f} at', *(f'{side:.1f}' for side in (x1, y1, x2, y2)))


def draw_scores(image: np.ndarray, scores: np.ndarray, names: Sequence) -> None:
    """Draws the top five classes of an image; prints them."""
    for row, label in enumerate(np.argsort(-scores[0])[:5]):
        text = f'{names[label]} {scores[0, label]:.3f}'
        cv2.putText(image, text, (2, 12 * (row + 1)), cv2.FONT_HERSHEY_SIMPLEX, 0.35, (0, 255, 0))
        print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description='Draw the predictions of an exported model on an image.')
    parser.add_argument('model', metavar='MODEL', help=f'file written by tools/export.py: {", ".join(TARGETS)}')
    parser.add_argument('image', metavar='IMAGE', help='input image')
    parser.add_argument('out', metavar='OUT', help='output image')
    parser.add_argument('--score-thr', type=float, default=0.3, help='minimum score (default: %(default)s)')
    args = parser.parse_args()

    if not Path(args.model).exists():
        fail(f'{args.model} does not exist')
    for path in (args.model, args.image):
        if Path(args.out).exists() and Path(path).exists() and Path(args.out).samefile(path):
            fail(f'{args.out} is the input {path}, which would be overwritten: choose another OUT')
    try:
        image = read_image(args.image)
        target = find_target(args.model)
        if reason := target.why_not_run():
            fail(f'{args.model} cannot be run here, since {reason}')
        runner = target.load(Path(args.model))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        fail(str(error))
    about = runner.metadata
    if 'part' not in about:
        fail(f'{args.model} was not written by tools/export.py: it has no preprocessing metadata')
    if about['part'] != 'model':
        fail(f'{args.model} contains only the {about["part"]}, which has no predictions')

    try:
        x, size = prepare(image, about)
        found = runner.run(x)
        names = about['classes'] or range(sys.maxsize)
        if 'boxes' in found:
            draw_detections(image, found, size, names, args.score_thr)
        elif 'labels' in found:
            draw_labels(image, found['labels'], size, names)
        else:
            draw_scores(image, found['scores'], names)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, MemoryError, cv2.error) as error:
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        fail(f'{args.model} cannot be run on {args.image}: {reason}')
    try:
        written = cv2.imwrite(args.out, image)
    except cv2.error:  # unknown image format
        written = False
    if not written:
        fail(f'cannot write image {args.out}')


if __name__ == '__main__':
    main()
