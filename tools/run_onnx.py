"""Runs an exported detector or segmentor, without PyTorch: `python tools/run_onnx.py MODEL.onnx IMAGE OUT.png`."""

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

import cv2
import numpy as np
import onnxruntime

COLOURS = np.random.default_rng(0).integers(0, 256, (256, 3))


def fail(message: str) -> NoReturn:
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)


def prepare(picture: np.ndarray, target: list, meta: dict) -> tuple[np.ndarray, tuple[int, int]]:
    """The image (1, 3, H, W) that the model takes, and the size, (height, width), of the picture in its corner."""
    sides = np.array(picture.shape[:2])
    fixed = isinstance(target[0], int)  # a name instead if the file takes every size
    scale = min(target / sides) if fixed else 1.0
    height, width = (max(1, int(side * scale + 0.5)) for side in sides)
    divisor = meta['pad_divisor']
    padded = target if fixed else [max(32, -(-side // divisor) * divisor) for side in (height, width)]
    resized = cv2.resize(picture, (width, height))
    ordered = resized[..., ::-1] if meta['bgr_to_rgb'] else resized
    image = np.full((1, 3, *padded), meta['pad_value'], np.float32)
    image[0, :, :height, :width] = ((ordered - np.array(meta['mean'])) / meta['std']).transpose(2, 0, 1)
    return image, (height, width)


def draw_labels(picture: np.ndarray, labels: np.ndarray, size: tuple[int, int], names: list) -> None:
    """Every pixel in the colour of its class; prints how many pixels which class has."""
    height, width = size
    labels = cv2.resize(labels[0, :height, :width].astype(np.uint8), picture.shape[1::-1], interpolation=0)
    picture[:] = (picture + COLOURS[labels]) // 2
    for label, count in enumerate(np.bincount(labels.ravel())):
        if count:
            print(names[label], count, 'pixels')


def draw_detections(picture: np.ndarray, found: dict, size: tuple[int, int], names: list, score_thr: float) -> None:
    """Masks, boxes, classes and scores, the best on top; prints them."""
    height, width = picture.shape[:2]
    boxes = found['boxes'] * np.tile([width / size[1], height / size[0]], 2)
    boxes = np.minimum(boxes, [width, height, width, height])
    for row in np.flatnonzero(found['scores'] >= score_thr)[::-1]:
        label, (x1, y1, x2, y2) = found['labels'][row], boxes[row].tolist()
        colour = COLOURS[label].tolist()
        if 'masks' in found:
            mask = found['masks'][row]  # over the box, a pixel's value standing in its middle
            x, y = mask.shape[1] / max(x2 - x1, 1), mask.shape[0] / max(y2 - y1, 1)
            into_box = np.array([[x, 0, (0.5 - x1) * x - 0.5], [0, y, (0.5 - y1) * y - 0.5]])
            inside = cv2.warpAffine(mask, into_box, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
            picture[inside > 0.5] = (picture[inside > 0.5] + colour) // 2
        name, score = names[label], found['scores'][row]
        cv2.rectangle(picture, (round(x1), round(y1)), (round(x2), round(y2)), colour)
        cv2.putText(picture, f'{name} {score:.2f}', (round(x1), round(y1) + 10), cv2.FONT_HERSHEY_SIMPLEX, 0.35, colour)
        print(f'{name} {score:.3f} at', *(f'{side:.1f}' for side in (x1, y1, x2, y2)))


def main() -> None:
    parser = argparse.ArgumentParser(description='Draw what an exported detector or segmentor sees in a picture.')
    parser.add_argument('model', metavar='MODEL', help='file of tools/export_onnx.py with the whole model')
    parser.add_argument('picture', metavar='IMAGE', help='picture to look at')
    parser.add_argument('out', metavar='OUT', help='picture to write')
    parser.add_argument('--score-thr', type=float, default=0.3, help='of detections (default: %(default)s)')
    args = parser.parse_args()

    for path in (args.model, args.picture):
        if not Path(path).is_file():
            fail(f'there is no file {path}')
        if Path(args.out).exists() and Path(args.out).samefile(path):
            fail(f'{args.out} is the input {path}, which would be overwritten: choose another OUT')
    try:
        session = onnxruntime.InferenceSession(args.model, providers=['CPUExecutionProvider'])
    except Exception as error:  # onnxruntime's errors have no base of their own
        fail(f'{args.model} is not an ONNX model that onnxruntime can load: {str(error).splitlines()[0]}')
    properties = session.get_modelmeta().custom_metadata_map
    if 'part' not in properties:
        fail(f'{args.model} was not written by tools/export_onnx.py: it does not say how to prepare images')
    meta = {key: json.loads(value) for key, value in properties.items()}
    if meta['part'] != 'model':
        fail(f'{args.model} holds the {meta["part"]} alone, which finds nothing by itself')
    picture = cv2.imread(args.picture)
    if picture is None:
        fail(f'{args.picture} is not a readable picture')

    image, size = prepare(picture, session.get_inputs()[0].shape[2:], meta)
    names = meta['classes'] or range(len(COLOURS))
    outputs = [output.name for output in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, {'image': image}), strict=True))
    if 'boxes' in found:
        draw_detections(picture, found, size, names, args.score_thr)
    else:
        draw_labels(picture, found['labels'], size, names)
    try:
        written = cv2.imwrite(args.out, picture)
    except cv2.error:  # no format is known by this name
        written = False
    if not written:
        fail(f'cannot write a picture to {args.out}')


if __name__ == '__main__':
    main()
