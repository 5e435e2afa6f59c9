"""Runs an exported segmentor, without PyTorch: `python tools/run_onnx.py MODEL.onnx IMAGE OUT.png`."""

import json
import sys

import cv2
import numpy as np
import onnxruntime


def main() -> None:
    model, source, out = sys.argv[1:]
    session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
    meta = session.get_modelmeta().custom_metadata_map
    mean, std, divisor = (np.array(json.loads(meta[key]), np.float32) for key in ('mean', 'std', 'pad_divisor'))

    picture = cv2.imread(source)
    sides = np.array(picture.shape[:2])
    target = np.array(session.get_inputs()[0].shape[2:])  # names instead of numbers if the file takes every size
    fixed = target.dtype.kind == 'i'
    scale = min(target / sides) if fixed else 1.0
    height, width = (int(side) for side in np.maximum(1, sides * scale))
    resized = cv2.resize(picture, (width, height))
    ordered = resized[..., ::-1] if json.loads(meta['bgr_to_rgb']) else resized
    padded = target if fixed else np.maximum(32, np.ceil(np.array([height, width]) / divisor) * divisor).astype(int)
    image = np.zeros((1, 3, *padded), np.float32)
    image[0, :, :height, :width] = ((ordered - mean) / std).transpose(2, 0, 1)

    _, labels = session.run(None, {'image': image})
    labels = cv2.resize(labels[0, :height, :width].astype(np.uint8), picture.shape[1::-1], interpolation=0)
    colours = np.random.default_rng(0).integers(0, 256, (256, 3))
    cv2.imwrite(out, ((picture + colours[labels]) // 2).astype(np.uint8))
    names = json.loads(meta['classes'])
    for label, count in enumerate(np.bincount(labels.ravel())):
        if count:
            print(names[label] if names else label, count, 'pixels')


if __name__ == '__main__':
    main()
