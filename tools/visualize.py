"""Visualizes what a trained model has learned: `python tools/visualize.py CONFIG CHECKPOINT IMAGE... --out DIR`."""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from mmslide import figures, visualize
from mmslide.checkpoints import class_names
from mmslide.deploy import load_model
from mmslide.deploy.targets.images import read_image
from mmslide.files import atomic_write
from mmslide.messages import INPUT_ERRORS, exit_on
from mmslide.models.arguments import check_integer, check_stages

KINDS = ('features', 'attention', 'kernels', 'erf', 'cam')
IMAGE_KINDS = {'features', 'attention', 'erf', 'cam'}
SLIDE_KINDS = {'attention', 'kernels'}
NO_SLIDE_ATTENTION = 'the model has no Slide Attention in these stages'


def parse_point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(','))
    except ValueError:
        x = y = -1.0
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f'must be X,Y, fractions of width and height from 0 to 1, got {text!r}')
    return x, y


def chosen_kinds(args: argparse.Namespace, has_slide_attention: bool) -> list[str]:
    """The kinds to draw: --kinds, or everything possible with the given images and model.

    Raises:
        ValueError: an option needs something that the model or the arguments lack, or there is nothing to draw.
    """
    problems = {} if args.images else dict.fromkeys(IMAGE_KINDS, 'no image is given')
    if not has_slide_attention:
        problems.update(dict.fromkeys(SLIDE_KINDS, NO_SLIDE_ATTENTION))
    for kind in [*(args.kinds or ()), *(['kernels'] if args.history else ())]:
        if kind in problems:
            raise ValueError(f'cannot draw {kind}: {problems[kind]}')
    kinds = [kind for kind in args.kinds or KINDS if kind not in problems]
    if not kinds:
        raise ValueError(f'nothing to draw: no image is given, and {NO_SLIDE_ATTENTION}')
    if args.host_checkpoint and not ('erf' in kinds and has_slide_attention):
        raise ValueError('--host-checkpoint needs the kind erf and a model with Slide Attention')
    return kinds


def draw(args: argparse.Namespace) -> Iterator[tuple[str, Figure]]:
    """The name and the figure of each file to write."""
    cfg, model, meta = load_model(args.config, args.checkpoint)
    backbone = visualize.find_backbone(model)
    stages = range(len(backbone.stages)) if args.stages is None else args.stages
    check_stages('--stages', stages, len(backbone.stages))
    check_integer('--channels', args.channels)
    check_integer('--targets', args.targets)
    prefixes = tuple(f'stages.{stage}.' for stage in stages)
    blocks = [name for name in visualize.slide_attentions(backbone) if name.startswith(prefixes)]
    kinds = chosen_kinds(args, bool(blocks))
    for image in args.images:
        read_image(image)  # reports invalid images before doing any work
    if 'kernels' in kinds:
        kernels = visualize.merged_kernels(backbone)
        yield 'kernels', figures.kernel_figure({name: kernels[name] for name in blocks})
    if args.history:
        labels, iterations, distances = visualize.kernel_history(args.config, args.history)
        yield 'history', figures.history_figure(labels, {name: distances[name] for name in blocks}, iterations)
    stems = [Path(image).stem for image in args.images]
    if len(set(stems)) < len(stems):
        stems = [f'{index}_{stem}' for index, stem in enumerate(stems)]
    images = []
    for stem, image in zip(stems, args.images, strict=True):
        sample = visualize.load_sample(cfg, model, image)
        images.append(sample.inputs)
        if 'features' in kinds:
            maps = visualize.feature_maps(backbone, sample.inputs)
            drawn = {stage: maps[stage] for stage in stages}
            yield f'features_{stem}', figures.feature_figure(sample, drawn, backbone.strides, args.channels)
        if 'attention' in kinds:
            height, width = sample.pixels.shape[:2]
            for x, y in args.points:
                point = x * width, y * height
                slots = visualize.attended_slots(backbone, sample.inputs, point, stages)
                yield f'attention_{stem}_{x:g}-{y:g}', figures.attention_figure(sample, point, slots)
        if 'cam' in kinds:
            found, reason = [], f'no detection has a score of {args.score_thr} or more'
            try:
                found = visualize.class_activations(model, sample, class_names(meta), args.targets, args.score_thr)
            except ValueError as error:
                if args.kinds:
                    raise
                reason = str(error)
            if found:
                yield f'cam_{stem}', figures.activation_figure(sample, found, stages, backbone.strides)
            else:
                print(f'{image}: no class activation, since {reason}')
    if 'erf' in kinds:
        crops = visualize.centre_crops(images, backbone.strides[-1])
        backbones = {type(backbone).__name__: backbone}
        if blocks:
            weights = 'its own weights' if args.host_checkpoint else 'attention untrained'
            host = visualize.build_host(cfg, backbone, args.host_checkpoint)
            backbones[f'slide_stages=()\n{weights}'] = host
        fields = {
            name: visualize.receptive_fields(partial(visualize.stage_maps, x), crops) for name, x in backbones.items()
        }
        yield 'erf', figures.receptive_field_figure(fields, stages, backbone.strides, len(images))


def main() -> None:
    parser = argparse.ArgumentParser(description='Visualize what a trained model has learned and what it attends to.')
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='file or URL of the weights')
    parser.add_argument('images', metavar='IMAGE', nargs='*', help='image files; not needed for kernels')
    parser.add_argument('--out', metavar='DIR', required=True, help='output folder')
    parser.add_argument('--kinds', nargs='+', choices=KINDS, help='what to draw (default: everything that applies)')
    parser.add_argument('--stages', nargs='+', type=int, help='stages from 0, as in slide_stages (default: all)')
    parser.add_argument(
        '--points',
        nargs='+',
        type=parse_point,
        default=[(0.5, 0.5)],
        metavar='X,Y',
        help='points whose attention is drawn, as fractions of width and height (default: 0.5,0.5)',
    )
    parser.add_argument(
        '--history',
        nargs='+',
        metavar='CHECKPOINT',
        help='training checkpoints or their folder: plots the distance of the kernels from the fixed shift',
    )
    parser.add_argument('--host-checkpoint', metavar='CHECKPOINT', help='weights of the host, for its receptive field')
    parser.add_argument('--channels', type=int, default=3, help='channels per feature map (default: %(default)s)')
    parser.add_argument('--targets', type=int, default=3, help='class activations per image (default: %(default)s)')
    parser.add_argument('--score-thr', type=float, default=0.3, help='minimum score (default: %(default)s)')
    args = parser.parse_args()
    with exit_on(*INPUT_ERRORS):
        Path(args.out).mkdir(parents=True, exist_ok=True)
        inputs = [args.config, args.checkpoint, *args.images, *(args.history or [])]
        for name, figure in draw(args):
            path = Path(args.out, f'{name}.png')
            with atomic_write(path, inputs=inputs) as (temporary,):
                figure.savefig(temporary, format='png')
            print(path)


if __name__ == '__main__':
    main()
