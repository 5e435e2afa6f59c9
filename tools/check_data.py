"""Checks every file of a config's data sets, and draws the output of the training pipeline."""

from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, VISUALIZERS
from mmengine.structures import PixelData
from rich.console import Console
from rich.table import Table
from torch import nn

from mmslide.data import DatasetCheck, check_datasets
from mmslide.engine import config_parser, config_with_options
from mmslide.messages import INPUT_ERRORS, exit_on

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
MAX_PROBLEMS = 20
CLASSIFIED_SIDE = 256  # pixels of the short side, for readable labels


def summary(check: DatasetCheck) -> Table:
    table = Table(show_header=False)
    for name, number in (('images', check.images), ('annotations', check.annotations)):
        table.add_row(name, 'not counted' if number is None else f'{number:,}')
    if check.per_class:
        table.add_row('per class', ', '.join(f'{name} {count:,}' for name, count in check.per_class.most_common()))
    return table


def draw(config: Config, folder: str, number: int) -> None:
    """Draws evenly spaced samples of the training data set after augmentation.

    Raises:
        ValueError: the config has no training data, or no visualizer.
    """
    for key in ('train_dataloader', 'visualizer'):
        if not config.get(key):
            raise ValueError(f'--show-dir needs {key} in the config')
    scope = dict(_scope_=config.get('default_scope'))
    dataset = DATASETS.build({**config.train_dataloader.dataset, **scope})
    visualizer = VISUALIZERS.build({**config.visualizer, **scope, 'vis_backends': None})
    visualizer.dataset_meta = dataset.metainfo
    for index in np.linspace(0, len(dataset) - 1, min(number, len(dataset))).astype(int).tolist():
        data = dataset[index]
        sample = data['data_samples']
        image = np.ascontiguousarray(data['inputs'].permute(1, 2, 0).numpy()[..., ::-1])  # pipelines load BGR
        if 'gt_instances' in sample and hasattr(sample.gt_instances.bboxes, 'tensor'):
            sample.gt_instances.bboxes = sample.gt_instances.bboxes.tensor
        if 'gt_sem_seg' in sample and sample.gt_sem_seg.shape != image.shape[:2]:  # SegRescale
            labels = nn.functional.interpolate(sample.gt_sem_seg.data[None].float(), image.shape[:2])[0]
            sample.gt_sem_seg = PixelData(data=labels.to(sample.gt_sem_seg.data.dtype))
        name = f'{index:06d}_{Path(sample.img_path).stem}'
        options = dict(draw_pred=False, out_file=str(Path(folder, f'{name}.png')))
        if hasattr(visualizer, 'visualize_cls'):  # mmpretrain's
            visualizer.visualize_cls(image, sample, resize=CLASSIFIED_SIDE, **options)
        else:
            visualizer.add_datasample(name, image, sample, **options)


def main() -> None:
    parser = config_parser(__doc__)
    parser.add_argument('--show-dir', help='folder for images with their annotations, after augmentation')
    parser.add_argument('--number', type=int, default=16, help='images in --show-dir (default: %(default)s)')
    with exit_on(*INPUT_ERRORS):
        args = parser.parse_args()
        config = config_with_options(args.config, args.cfg_options)
        checks = check_datasets(config, *LOADERS, everything=True)
        if not checks:
            raise ValueError(f'config {args.config} has no data set in {", ".join(LOADERS)}')
        for check in checks:
            print(check.name)
            Console(markup=False).print(summary(check))
        problems = list(dict.fromkeys(str(problem) for check in checks for problem in check.problems))
        if problems:
            more = [f'... and {len(problems) - MAX_PROBLEMS} more'] if len(problems) > MAX_PROBLEMS else []
            raise ValueError('\nerror: '.join([*problems[:MAX_PROBLEMS], *more]))
        if args.show_dir:
            draw(config, args.show_dir, args.number)


if __name__ == '__main__':
    main()
