"""Trains Slide models and their hosts from scratch on small data, at equal budgets: what `make evidence` runs.

Every model is the detector of `make demo` with a different backbone. Each is trained in its own process, which writes
`result.json` to its folder. Finished trainings are not repeated, interrupted ones are resumed. Times and memory are
measured at the end, both models alternately in one process, so that trainings may share the machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from mmengine.config import Config

from mmslide.files import atomic_write, find_config
from mmslide.messages import INPUT_ERRORS, exit_on

from .measure import Measurement, compare
from .pairs import model_pair

ROOT = Path(__file__).parents[1]
DEMO = 'cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py'
EPOCHS, BCCD_EPOCHS = 3, 28
ARCH = dict(embed_dims=(48, 96, 160, 256), depths=(2, 2, 2, 2), num_heads=(2, 4, 5, 8), mlp_ratios=(4, 4, 4, 4))
BACKBONES: dict[str, dict] = {
    'PVT': dict(
        type='mmslide.SlidePVT',
        arch=dict(ARCH, sr_ratios=(8, 4, 2, 1)),
        pretrain_img_size=(128, 128),
        stage_norm='next',
    ),
    'Swin': dict(type='mmslide.SlideSwin', arch=ARCH),
    'PVTv2': dict(type='mmslide.SlidePVTv2', arch=dict(ARCH, sr_ratios=(8, 4, 2, 1))),
    'CSWin': dict(type='mmslide.SlideCSWin', arch=dict(ARCH, num_heads=(2, 4, 4, 8), split_sizes=(1, 2, 7, 7))),
    'NAT': dict(type='mmslide.SlideNAT', arch=ARCH),
}
SEEDS = {'PVT': (0, 1, 2), 'Swin': (0, 1, 2), 'PVTv2': (0,), 'CSWin': (0,), 'NAT': (0,)}
METRICS = {
    'generated': ('bbox_mAP', 'bbox_mAP_50', 'segm_mAP', 'segm_mAP_50'),
    'bccd': ('bbox_mAP', 'bbox_mAP_50'),
}
BCCD_CLASSES = ('RBC', 'WBC', 'Platelets')
BCCD_SCALE = (256, 192)


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        data: 'generated' or 'bccd'.
        host: key of BACKBONES.
        slide: with Slide Attention in the first two stages, or the host itself.
    """

    data: str
    host: str
    slide: bool
    seed: int

    @property
    def model(self) -> str:
        return f'Slide-{self.host}' if self.slide else self.host

    @property
    def name(self) -> str:
        return f'{self.data}_{self.model.lower()}_seed{self.seed}'


@dataclass
class Result:
    """What came out of a run.

    Args:
        metrics: box and mask AP (the latter on generated data alone), from 0 to 1.
        curve: epoch and box AP of each validation.
    """

    metrics: dict[str, float]
    curve: list[tuple[int, float]]


def all_runs(bccd: bool) -> list[Run]:
    sides = (True, False)
    generated = [Run('generated', host, slide, seed) for host in SEEDS for seed in SEEDS[host] for slide in sides]
    photographs = [Run('bccd', 'PVT', slide, seed) for seed in SEEDS['PVT'] for slide in sides]
    return generated + (photographs if bccd else [])


def run_config(run: Run, mini: str | Path, bccd: str | Path | None) -> Config:
    """The demo's config with the backbone, data and budget of a run."""
    cfg = Config.fromfile(find_config(DEMO))
    backbone = dict(
        BACKBONES[run.host],
        slide_stages=(0, 1) if run.slide else (),
        drop_path_rate=0.0,
        init_cfg=cfg.model.backbone.init_cfg,
    )
    cfg.model.backbone = backbone
    cfg.model.test_cfg.rcnn.score_thr = 0.001  # AP counts every detection
    epochs = EPOCHS if run.data == 'generated' else BCCD_EPOCHS
    cfg.train_cfg.update(max_epochs=epochs, val_interval=1 if run.data == 'generated' else 4)
    cfg.param_scheduler[1].end = epochs
    cfg.randomness.seed = run.seed
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=1)
    _move(cfg, f'{Path(mini).resolve() / "coco"}/')
    if run.data == 'bccd':
        if bccd is None:
            raise ValueError('the runs on photographs need the folder of BCCD')
        _photographs(cfg, f'{Path(bccd).resolve()}/')
    return cfg


def _loaders(cfg: Config) -> list[Any]:
    return [cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader]


def _move(cfg: Config, data_root: str) -> None:
    for loader in _loaders(cfg):
        loader.dataset.data_root = data_root
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = data_root + 'annotations/instances_val2017.json'


def _photographs(cfg: Config, data_root: str) -> None:
    """BCCD's boxes and classes: no masks, up to 30 objects per image, and few images, hence the random sizes."""
    _move(cfg, data_root)
    cfg.model.roi_head.update(mask_head=None, mask_roi_extractor=None)
    for head in cfg.model.roi_head.bbox_head:
        head.num_classes = len(BCCD_CLASSES)
    for stage, num in zip(cfg.model.train_cfg.rcnn, (128, 64), strict=True):
        stage.sampler.num = num
    for loader in _loaders(cfg):
        loader.dataset.metainfo = dict(classes=BCCD_CLASSES)
        for step in loader.dataset.pipeline:
            if step.type == 'Resize':
                step.scale = BCCD_SCALE
            if step.type == 'LoadAnnotations':
                step.with_mask = False
    for step in cfg.train_dataloader.dataset.pipeline:
        if step.type == 'Resize':
            step.update(type='RandomResize', ratio_range=(0.8, 1.2))
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.metric = 'bbox'
    if 'pretrain_img_size' in cfg.model.backbone:
        cfg.model.backbone.pretrain_img_size = BCCD_SCALE[::-1]


def train(run: Run, folder: Path, mini: str | Path, bccd: str | Path | None, threads: int) -> Result:
    """Trains and evaluates in a process of its own, or returns what it has left before."""
    file = folder / 'result.json'
    if file.is_file():
        return Result(**json.loads(file.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f'{run.name}.py'
    run_config(run, mini, bccd).dump(config)
    command = [sys.executable, str(ROOT / 'tools' / 'train.py'), str(config), '--work-dir', str(folder), '--resume']
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    with open(folder / 'output.txt', 'a') as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
    if done.returncode:
        raise ValueError(f'the training {run.name} failed: see {output.name}')
    result = read_result(folder, METRICS[run.data])
    with atomic_write(file) as (path,):
        path.write_text(json.dumps(asdict(result), indent=1))
    return result


def read_result(folder: Path, names: Sequence[str]) -> Result:
    """From mmengine's scalars of a training, of all its parts if it was interrupted."""
    lines = [
        json.loads(line)
        for file in sorted(folder.glob('*/vis_data/scalars.json'))
        for line in file.read_text().splitlines()
    ]
    tests = {line['step']: line for line in lines if 'loss' not in line}
    if not tests:
        raise ValueError(f'{folder} has no validation: delete it, and run this again')

    def metric(line: dict[str, float], name: str) -> float:
        return line.get(f'coco/{name}', 0.0)  # mmdet leaves all out where nothing was detected

    metrics = {name: metric(tests[max(tests)], name) for name in names}
    return Result(metrics, [(step, metric(tests[step], 'bbox_mAP')) for step in sorted(tests)])


def measure(data: str, host: str, mini: str | Path, bccd: str | Path | None) -> dict[str, Measurement]:
    """Forward and backward of both models, from images to the RPN's outputs, by the model's name."""
    slide, plain = (Run(data, host, slide, 0) for slide in (True, False))
    ours, theirs = (run_config(run, mini, bccd) for run in (slide, plain))
    width, height = BCCD_SCALE if data == 'bccd' else ours.image_scale
    pair = model_pair(ours, theirs, height, width, batch=ours.train_dataloader.batch_size, training=True)
    measurements = compare(pair.ours, pair.baseline, True, pair.tolerance, seconds=20)
    return dict(zip((slide.model, plain.model), measurements, strict=True))


def table(results: dict[Run, Result], costs: dict[str, Measurement], metrics: Sequence[str]) -> str:
    """Markdown: a row for each model, mean and spread (sample standard deviation) over the seeds."""
    heads = {'bbox_mAP': 'box AP', 'bbox_mAP_50': 'box AP50', 'segm_mAP': 'mask AP', 'segm_mAP_50': 'mask AP50'}
    columns = ['model', 'seeds', *(heads[name] for name in metrics), 'ms', 'MB']
    rows = [columns, ['---'] * len(columns)]
    for model in dict.fromkeys(run.model for run in results):
        found = [result for run, result in results.items() if run.model == model]
        values = [_mean([result.metrics[name] for result in found]) for name in metrics]
        cost = costs[model]
        rows.append([model, str(len(found)), *values, f'{1e3 * cost.seconds:.0f}', f'{cost.peak_bytes / 1e6:.0f}'])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _mean(values: Sequence[float]) -> str:
    spread = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.3f}{spread}'


def plot(results: dict[Run, Result]) -> Figure:
    """Box AP against epochs, a panel for each host and data set, each seed a line."""
    panels = list(dict.fromkeys((run.data, run.host) for run in results))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 * columns, 3 * rows), layout='constrained')
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax, (data, host) in zip(axes, panels, strict=False):
        for slide, color in ((True, 'tab:orange'), (False, 'tab:blue')):
            found = [(run, x) for run, x in results.items() if (run.data, run.host, run.slide) == (data, host, slide)]
            for index, (run, result) in enumerate(found):
                label = None if index else run.model
                ax.plot(*zip(*result.curve, strict=True), color=color, label=label, marker='.', alpha=0.8)
        ax.set(title=f'{host}, {data}', xlabel='epoch', ylabel='box AP', ylim=(0, None))
        ax.locator_params(axis='x', integer=True)
        ax.legend()
    return figure


def page(results: dict[Run, Result], costs: dict[str, dict[str, Measurement]]) -> str:
    """docs/evidence.md; `costs` by data set and model."""
    tables = {
        data: table({run: x for run, x in results.items() if run.data == data}, costs[data], METRICS[data])
        for data in dict.fromkeys(run.data for run in results)
    }
    text = PAGE.format(epochs=EPOCHS, cores=os.cpu_count(), table=tables['generated'])
    if 'bccd' in tables:
        text += BCCD_PAGE.format(epochs=BCCD_EPOCHS, table=tables['bccd'])
    return text


PAGE = """\
# Evidence that it learns

Slide Attention compared with its host at equal budgets: the detector of `make demo` (Mask R-CNN in a cascade of two),
trained from scratch for {epochs} epochs on the 1600 generated training images. Both models have the same widths,
depths, data, order of images and schedule; Slide Attention is in the first two stages. They are small: 48 to 256
channels, two blocks per stage. The table has the mean ± sample standard deviation over the seeds. AP includes all
detections with a score of at least 0.001.

<!-- not run: trains for hours -->
```shell
make evidence              # continues where it was interrupted
make evidence BCCD=FOLDER  # with the photographs below
```

{table}

"ms" and "MB" are time and peak memory of a forward and backward pass of backbone, neck and RPN with four images,
measured in turn with the other model of the pair on {cores} CPU cores.

![Box AP against epochs](images/evidence.png)

**What this shows.** Slide Attention trains from scratch to the accuracy above, with the time and memory above, on this
data. **What it does not show.** Anything about COCO or ImageNet: images are 128 pixels wide and have three classes, and
the models are small. Nor which model is better after longer training: after {epochs} epochs AP still rises steeply, and
seeds of one model differ a lot. Differences below two standard deviations are noise, and a single seed says little.
"""

BCCD_PAGE = """
## Photographs

[BCCD](https://github.com/Shenggan/BCCD_Dataset): 364 microscope photographs of blood cells (292 for training, 72 for
validation) with boxes of three classes, under the MIT license, converted to COCO's format. The detector has no mask
head and more RoIs per image than the demo's, and is trained from scratch for {epochs} epochs at 256×192, resized by 0.8
to 1.2.

{table}
"""


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description='Train Slide models and their hosts at equal budgets.')
    parser.add_argument('--mini', default='data/mini', help='generated data set (default: %(default)s)')
    parser.add_argument('--bccd', help='BCCD in the layout of COCO 2017; default: without it')
    parser.add_argument('--jobs', type=int, default=1, help='trainings at a time, which share the cores (default: 1)')
    parser.add_argument('--work-dir', default='work_dirs/evidence', help='of the trainings (default: %(default)s)')
    parser.add_argument('--page', default='docs/evidence.md', help='page to write (default: %(default)s)')
    args = parser.parse_args(None if arguments is None else list(arguments))
    if args.jobs < 1:
        parser.error(f'--jobs must be at least 1, got {args.jobs}')
    data = args.mini, args.bccd
    threads = max(1, (os.cpu_count() or 1) // args.jobs)

    def train_and_report(run: Run) -> Result:
        result = train(run, Path(args.work_dir, run.name), *data, threads)
        print(f'{run.name}: {result.metrics}', flush=True)
        return result

    with exit_on(*INPUT_ERRORS):
        runs = all_runs(bool(args.bccd))
        with ThreadPoolExecutor(args.jobs) as pool:
            results = dict(zip(runs, pool.map(train_and_report, runs), strict=True))
        costs: dict[str, dict[str, Measurement]] = {}
        for name, host in dict.fromkeys((run.data, run.host) for run in runs):
            costs.setdefault(name, {}).update(measure(name, host, *data))
        image = Path(args.page).parent / 'images' / 'evidence.png'
        image.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.page, image) as (text, drawing):
            text.write_text(page(results, costs))
            plot(results).savefig(drawing, format='png', dpi=100)
    print(f'{args.page} is written')


if __name__ == '__main__':
    main()
