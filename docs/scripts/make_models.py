"""Draws docs/images/models.png and writes the table of docs/models.md, both from the metafiles."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml

ROOT = Path(__file__).parents[2]
PAGE = ROOT / 'docs/models.md'
PLOT = ROOT / 'docs/images/models.png'
BEGIN, END = '<!-- table: python docs/scripts/make_models.py -->\n', '<!-- end of the table -->'

COCO = ['COCO val2017 box AP', 'COCO val2017 mask AP']
ADE20K = ['ADE20K val mIoU']
# How the configs of a task are named, with (.+) for the backbone, and what the papers report for it.
TASKS = {
    'ImageNet top-1': (r'(.+)_8xb\d+_in1k', ['ImageNet-1K val top-1']),
    'Mask R-CNN 1x': (r'mask-rcnn_(.+)_fpn_(?:8xb1-)?1x_coco', COCO),
    'Mask R-CNN 3x': (r'mask-rcnn_(.+)_fpn_ms-crop-3x_coco', COCO),
    'Semantic FPN': (r'(.+)_fpn_8xb4-\d+k_ade20k-512x512', ADE20K),
    'UperNet': (r'(.+)_upernet_8xb2-160k_ade20k-512x512', ADE20K),
}


def main() -> None:
    rows = read_metafiles()
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table(rows) + END + after)
    plot(rows)


def read_metafiles() -> dict[str, dict[str, Any]]:
    """By backbone: its family, parameters (M) and FLOPs (G) at 224×224 as measured, and the papers' results by task."""
    rows: dict[str, dict[str, Any]] = {}
    for metafile in sorted((ROOT / 'configs').rglob('metafile.yml')):
        for model in yaml.safe_load(metafile.read_text())['Models']:
            for task, (pattern, metrics) in TASKS.items():
                match = re.fullmatch(pattern, model['Name'])
                if not match:
                    continue
                row = rows.setdefault(match[1], {})
                found = [model.get('Paper Results', {}).get(metric) for metric in metrics]
                row[task] = [value for value in found if value is not None]
                if task == 'ImageNet top-1':
                    row.update({key: model['Metadata'][key] for key in ('Parameters (M)', 'FLOPs (G)')})
    return rows


def host(backbone: str) -> str:
    return backbone.removeprefix('slide-')


def family(backbone: str) -> str:
    """Of 'slide-pvtv2-b1' and of 'pvtv2-b2-li' 'pvtv2'."""
    return host(backbone).removesuffix('-li').rsplit('-', 1)[0]


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f'| backbone | params (M) | FLOPs (G) | {" | ".join(TASKS)} |', '|---' * (3 + len(TASKS)) + '|']
    for backbone in sorted(rows, key=lambda name: (family(name), rows[host(name)]['FLOPs (G)'], name != host(name))):
        row = rows[backbone]
        results = [' / '.join(map(str, row.get(task, []))) or '–' for task in TASKS]
        sizes = [str(row[key]) for key in ('Parameters (M)', 'FLOPs (G)')]
        lines.append(f'| {" | ".join([backbone, *sizes, *results])} |')
    return '\n'.join(lines) + '\n'


def curves(rows: dict[str, dict[str, Any]]) -> Iterator[tuple[str, bool, list[tuple[float, float]]]]:
    """Of each family, and of it with Slide Attention: (FLOPs, top-1), smallest first."""
    for name in dict.fromkeys(map(family, rows)):
        for slide in (False, True):
            points = sorted(
                (row['FLOPs (G)'], row['ImageNet top-1'][0])
                for backbone, row in rows.items()
                if family(backbone) == name and (backbone != host(backbone)) == slide and row['ImageNet top-1']
            )
            if points:
                yield name, slide, points


def plot(rows: dict[str, dict[str, Any]]) -> None:
    figure, ax = plt.subplots(figsize=(9, 6), layout='constrained')
    names = list(dict.fromkeys(map(family, rows)))
    for name, slide, points in curves(rows):
        flops, accuracy = zip(*points, strict=True)
        ax.plot(
            flops,
            accuracy,
            color=f'C{names.index(name)}',
            marker='o',
            linestyle='-' if slide else ':',
            markerfacecolor=None if slide else 'white',
            label=f'slide-{name}' if slide else name,
        )
    ax.set(
        xlabel='FLOPs at 224×224 (10⁹ multiply-adds, measured)',
        ylabel="ImageNet-1K top-1 (%), the papers'",
        title='Accuracy as the papers report it: nothing was trained here',
    )
    ax.grid(alpha=0.3)
    ax.legend(ncols=2)
    figure.savefig(PLOT, dpi=120)


if __name__ == '__main__':
    main()
