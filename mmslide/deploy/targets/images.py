"""Reads an image file and prepares the input of an exported model."""

from pathlib import Path

import cv2
import numpy as np

from .base import Metadata

MIN_SIDE = 32


def read_image(file: str | Path) -> np.ndarray:
    """Reads an image: (H, W, 3), BGR, uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f'{file} {"is a folder" if Path(file).is_dir() else "does not exist"}')
    content = np.fromfile(file, np.uint8)  # cv2.imread does not support names outside the code page of Windows
    image = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    if image is None:
        raise ValueError(f'{file} is not a readable image')
    return image


def prepare(
    image: np.ndarray, metadata: Metadata, shape: tuple[int, int] | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """The input for an image (H, W, 3), BGR: (1, 3, H', W'), float32, and the (height, width) that the image fills.

    Depending on `metadata['resize']`, it is resized to fit into the shape and padded at the bottom and right ('fit'),
    or resized to `resize_ratio` times the shape, keeping the aspect ratio ('crop') or not ('stretch'), and
    center-cropped.

    Args:
        shape: None is the shape in the metadata; a dynamic file then accepts images that would be fitted without
            resizing.
    """
    how = metadata['resize']
    if shape is None and not (metadata['dynamic'] and how == 'fit'):
        shape = metadata['shape'][0], metadata['shape'][1]
    if shape and how != 'fit':
        image = _cropped(image, shape, metadata['resize_ratio'], keep_ratio=how == 'crop')
    elif shape:
        scale = min(side / length for side, length in zip(shape, image.shape, strict=False))
        image = cv2.resize(image, [max(1, int(side * scale + 0.5)) for side in image.shape[1::-1]])
    height, width = image.shape[:2]
    divisor = metadata['pad_divisor']
    padded = shape or [max(MIN_SIDE, -(-side // divisor) * divisor) for side in (height, width)]
    ordered = image[..., ::-1] if metadata['bgr_to_rgb'] else image
    out = np.full((1, 3, *padded), metadata['pad_value'], np.float32)
    out[..., :height, :width] = normalize(ordered, metadata)
    return out, (height, width)


def normalize(pixels: np.ndarray, metadata: Metadata) -> np.ndarray:
    """(H, W, 3), 0 to 255, in the model's channel order, to its input (1, 3, H, W), float32."""
    image = (pixels - np.array(metadata['mean'])) / metadata['std']
    return image.transpose(2, 0, 1)[None].astype(np.float32)


def to_pixels(image: np.ndarray, metadata: Metadata) -> np.ndarray:
    """The inverse of `normalize`, rounded and clipped to uint8."""
    pixels = image[0].transpose(1, 2, 0) * metadata['std'] + metadata['mean']
    return pixels.round().clip(0, 255).astype(np.uint8)


def _cropped(image: np.ndarray, shape: tuple[int, int], ratio: float, keep_ratio: bool) -> np.ndarray:
    """The center of the image after scaling it to `ratio` times `shape`, or to cover that."""
    scales = [ratio * side / length for side, length in zip(shape, image.shape, strict=False)]
    if keep_ratio:
        scales = [max(scales)] * 2
    sides = [max(side, round(length * x)) for side, length, x in zip(shape, image.shape, scales, strict=False)]
    resized = cv2.resize(image, sides[::-1])
    top, left = ((length - side) // 2 for length, side in zip(sides, shape, strict=True))
    return resized[top : top + shape[0], left : left + shape[1]]
