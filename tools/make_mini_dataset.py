"""Generates small data sets of drawn shapes in the formats of COCO, ADE20K and ImageNet, for demos and tests."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from numpy.random import Generator
from pycocotools import mask as rle

# Increased whenever the same settings give different files.
VERSION = 2
# Shape, and folder in ImageNet's layout: its COCO category and its ADE20K class (number and name).
SHAPES = {
    'disk': ('sports ball', 120, 'ball'),
    'rectangle': ('tv', 42, 'box'),
    'triangle': ('kite', 150, 'flag'),
}
WALL = 1  # the ADE20K class of the background
MIN_SIZE = 32
MAX_OBJECTS = 5
# Objects with a smaller visible part of their area are dropped: their shape could not be recognized.
MIN_VISIBLE = 0.2
MIN_VISIBLE_PIXELS = 16
SPLITS = {'train': 'training', 'val': 'validation'}
SETTINGS_FILE = 'mini_dataset.json'

# Supercategory: categories in COCO's order. Ids count from 1 over all of them, skipping these numbers.
COCO_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_CATEGORIES = {
    'person': 'person',
    'vehicle': 'bicycle, car, motorcycle, airplane, bus, train, truck, boat',
    'outdoor': 'traffic light, fire hydrant, stop sign, parking meter, bench',
    'animal': 'bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe',
    'accessory': 'backpack, umbrella, handbag, tie, suitcase',
    'sports': (
        'frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, '
        'tennis racket'
    ),
    'kitchen': 'bottle, wine glass, cup, fork, knife, spoon, bowl',
    'food': 'banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake',
    'furniture': 'chair, couch, potted plant, bed, dining table, toilet',
    'electronic': 'tv, laptop, mouse, remote, keyboard, cell phone',
    'appliance': 'microwave, oven, toaster, sink, refrigerator',
    'indoor': 'book, clock, vase, scissors, teddy bear, hair drier, toothbrush',
}


def make_mini_dataset(
    out_dir: str | Path, seed: int = 0, num_train: int = 1600, num_val: int = 128, size: int = 160
) -> bool:
    """Generates the data set in a new folder, which is created only when it is complete.

    In out_dir, `coco/` has the layout of COCO 2017 and `ade/` that of ADE20K; both show the same scenes. `imagenet/`
    has the layout of ImageNet and shows single shapes. The same settings give the same files, and image i of a split
    does not depend on the number of images.

    Args:
        size: height and width of the images in pixels, at least 32.

    Returns:
        False if out_dir already has this data set and nothing was done.

    Raises:
        ValueError: a number is out of range.
        FileExistsError: out_dir contains something else.
    """
    for name, value, least in (
        ('seed', seed, 0),
        ('num_train', num_train, 1),
        ('num_val', num_val, 1),
        ('size', size, MIN_SIZE),
    ):
        if value < least:
            raise ValueError(f'{name} must be at least {least}, got {value}')
    out = Path(out_dir)
    settings = dict(version=VERSION, seed=seed, num_train=num_train, num_val=num_val, size=size)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if out.exists():
        file = out / SETTINGS_FILE
        found = json.loads(file.read_text()) if file.is_file() else None
        if found == settings:
            return False
        what = f'a data set with other settings: {found}' if found else 'something else'
        raise FileExistsError(f'{out} already contains {what}; remove it or choose another folder')

    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'.{out.name}-unfinished-', dir=out.parent) as temporary:
        # A folder inside, because temporary folders are not accessible to other users.
        root = Path(temporary) / 'root'
        for index, (split, count) in enumerate((('train', num_train), ('val', num_val))):
            _write_split(root, split, count, [seed, index], size)
            _write_single_shapes(root / 'imagenet' / split, count, [seed, index], size)
        (root / SETTINGS_FILE).write_text(json.dumps(settings) + '\n')
        root.rename(out)
    return True


def draw_scene(rng: Generator, size: int) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    """One image and its visible objects.

    Returns:
        The image, uint8 (size, size, 3), and for each object, from bottom to top, the name of its shape and the bool
        mask (size, size) of its visible part. Masks do not overlap.
    """
    objects: list[tuple[str, np.ndarray]] = []
    for _ in range(rng.integers(1, MAX_OBJECTS + 1)):
        shape = rng.choice(list(SHAPES)).item()
        objects.append((shape, _draw_shape(rng, shape, size)))
    # From top to bottom. Dropped objects do not hide those below.
    covered = np.zeros((size, size), bool)
    visible = []
    for shape, mask in reversed(objects):
        part = mask & ~covered
        if part.sum() >= max(MIN_VISIBLE_PIXELS, MIN_VISIBLE * mask.sum()):
            visible.append((shape, part))
            covered |= mask
    visible.reverse()
    return _paint(rng, [mask for _, mask in visible], size), visible


def draw_single_shape(rng: Generator, shape: str, size: int) -> np.ndarray:
    """An image, uint8 (size, size, 3), of one large, complete shape that is lighter than the background, since one
    label per image is a weaker training signal than boxes and masks.
    """
    while True:
        mask = _draw_shape(rng, shape, size, least=0.2)
        if not (mask[[0, -1]].any() or mask[:, [0, -1]].any()):
            return _paint(rng, [mask], size, dark=(0, 96), light=(160, 255))


def _paint(
    rng: Generator,
    masks: Sequence[np.ndarray],
    size: int,
    dark: tuple[int, int] = (0, 255),
    light: tuple[int, int] = (0, 255),
) -> np.ndarray:
    """An image of shapes with colors in the range `light` on a background with colors in the range `dark`."""
    # Colors and textures have the same distribution for all shapes, so they carry no class information.
    image, strength = _texture(rng, size, dark)
    noise = np.full((size, size), strength, np.float32)
    for mask in masks:
        texture, strength = _texture(rng, size, light)
        image[mask] = texture[mask]
        noise[mask] = strength
    image += noise[..., None] * rng.standard_normal(image.shape, np.float32)
    return image.round().clip(0, 255).astype(np.uint8)


def coco_categories() -> list[dict]:
    """COCO's 80 categories as in its JSON files: id, name, supercategory."""
    names = [(name, above) for above, line in COCO_CATEGORIES.items() for name in line.split(', ')]
    ids = [number for number in range(1, 91) if number not in COCO_UNUSED_IDS]
    return [dict(supercategory=above, id=number, name=name) for number, (name, above) in zip(ids, names, strict=True)]


def _draw_shape(rng: Generator, shape: str, size: int, least: float = 0.08) -> np.ndarray:
    """The complete shape, before occlusion: bool (size, size). Its radius is at least `least` of the image."""
    mask = np.zeros((size, size), np.uint8)
    radius = size * math.exp(rng.uniform(math.log(least), math.log(0.3)))
    center = rng.uniform(0.1 * size, 0.9 * size, 2)
    if shape == 'disk':
        cv2.circle(mask, center.round().astype(int).tolist(), round(radius), 1, cv2.FILLED)
        return mask.astype(bool)
    if shape == 'rectangle':
        half = math.atan(rng.uniform(0.5, 1))  # half the angle between the diagonals
        angles = np.array([half, math.pi - half, math.pi + half, -half])
    else:
        angles = np.arange(3) * 2 * math.pi / 3 + rng.uniform(-0.4, 0.4, 3)
    angles += rng.uniform(0, 2 * math.pi)
    # Corners are further out than a disk's rim, for areas of similar size.
    corners = center + 1.25 * radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    cv2.fillPoly(mask, [corners.round().astype(np.int32)], 1)
    return mask.astype(bool)


def _texture(rng: Generator, size: int, colors: tuple[int, int]) -> tuple[np.ndarray, float]:
    """A surface in two colors, float32 (size, size, 3), and the standard deviation of its noise."""
    first, second = rng.uniform(*colors, (2, 3)).astype(np.float32)
    angle, period = rng.uniform(0, math.pi), size * rng.uniform(0.04, 0.2)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kind = rng.choice(['plain', 'stripes', 'checks', 'gradient'])
    if kind == 'plain':
        share = np.zeros_like(u)
    elif kind == 'stripes':
        share = np.floor(u / period) % 2
    elif kind == 'checks':
        share = (np.floor(u / period) + np.floor(v / period)) % 2
    else:
        share = (u - u.min()) / (u.max() - u.min())
    return first + share[..., None] * (second - first), rng.uniform(2, 16)


def _write_split(root: Path, split: str, count: int, seed: list[int], size: int) -> None:
    coco_images = root / 'coco' / f'{split}2017'
    ade_images = root / 'ade' / 'images' / SPLITS[split]
    ade_maps = root / 'ade' / 'annotations' / SPLITS[split]
    annotation_file = root / 'coco' / 'annotations' / f'instances_{split}2017.json'
    for folder in (coco_images, ade_images, ade_maps, annotation_file.parent):
        folder.mkdir(parents=True, exist_ok=True)

    categories = coco_categories()
    ids = {category['name']: category['id'] for category in categories}
    images, annotations = [], []
    for number in range(1, count + 1):
        image, objects = draw_scene(np.random.default_rng([*seed, number]), size)
        semantic = np.full((size, size), WALL, np.uint8)
        for shape, mask in objects:
            category, ade_id, _ = SHAPES[shape]
            semantic[mask] = ade_id
            code = rle.encode(np.asfortranarray(mask, np.uint8))
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=ids[category],
                    segmentation=dict(size=code['size'], counts=code['counts'].decode()),
                    area=int(mask.sum()),
                    bbox=rle.toBbox(code).tolist(),
                    iscrowd=0,
                )
            )
        name, ade_name = f'{number:012d}', f'ADE_{split}_{number:08d}'
        images.append(dict(id=number, file_name=f'{name}.jpg', height=size, width=size))
        jpeg = _jpeg(image)
        (coco_images / f'{name}.jpg').write_bytes(jpeg)
        (ade_images / f'{ade_name}.jpg').write_bytes(jpeg)
        (ade_maps / f'{ade_name}.png').write_bytes(cv2.imencode('.png', semantic)[1].tobytes())
    info = dict(description='Drawn shapes in the format of COCO 2017', version=str(VERSION))
    annotation_file.write_text(
        json.dumps(dict(info=info, licenses=[], images=images, annotations=annotations, categories=categories))
    )


def _write_single_shapes(root: Path, count: int, seed: list[int], size: int) -> None:
    for shape in SHAPES:
        (root / shape).mkdir(parents=True)
    for number in range(1, count + 1):
        shape = list(SHAPES)[number % len(SHAPES)]
        image = draw_single_shape(np.random.default_rng([*seed, number, 1]), shape, size)
        (root / shape / f'{shape}_{number:08d}.jpg').write_bytes(_jpeg(image))


def _jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out_dir', help='folder to create; the demo configs expect data/mini')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--num-train', type=int, default=1600, help='training images (default: %(default)s)')
    parser.add_argument('--num-val', type=int, default=128, help='validation images (default: %(default)s)')
    parser.add_argument('--size', type=int, default=160, help='pixels per side (default: %(default)s)')
    args = parser.parse_args()
    try:
        made = make_mini_dataset(**vars(args))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if made:
        print(f'{args.out_dir}: {args.num_train} training and {args.num_val} validation images')
    else:
        print(f'{args.out_dir}: already exists, nothing to do')


if __name__ == '__main__':
    main()
