import json

import pytest
import torch
from helpers import NEEDS_MODERN, tool
from mmengine.config import Config

from benchmarks.evidence import (
    BACKBONES,
    METRICS,
    Result,
    Run,
    all_runs,
    measure,
    page,
    plot,
    read_result,
    run_config,
    table,
    train,
)
from benchmarks.measure import Measurement
from mmslide.build import build_model
from mmslide.models.attention import SlideAttention

RUNS = [Run('generated', host, slide, 0) for host in BACKBONES for slide in (True, False)]


def test_every_host_has_its_slide_model_and_the_same_seeds():
    runs = all_runs(bccd=True)
    assert len({run.name for run in runs}) == len(runs) == 18 + 6
    assert {run for run in runs if run.slide} == {
        Run(run.data, run.host, True, run.seed) for run in runs if not run.slide
    }
    assert not any(run.data == 'bccd' for run in all_runs(bccd=False))


@pytest.mark.parametrize(
    'run',
    [x if x.host == 'PVT' else pytest.param(x, marks=pytest.mark.exhaustive) for x in RUNS],
    ids=lambda run: run.model,
)
def test_both_sides_differ_in_the_attention_of_the_first_two_stages_alone(run, tmp_path):
    run_config(run, 'data/mini', None).dump(tmp_path / 'config.py')
    cfg = Config.fromfile(tmp_path / 'config.py')
    backbone = build_model(Config(dict(model=cfg.model.backbone, default_scope='mmdet')))
    slide = [any(isinstance(x, SlideAttention) for x in stage.modules()) for stage in backbone.stages]
    assert slide == [run.slide, run.slide, False, False]
    assert [x.shape[1] for x in backbone(torch.randn(1, 3, 64, 64))] == cfg.model.neck.in_channels
    other = run_config(Run(run.data, run.host, not run.slide, run.seed), 'data/mini', None)
    other.model.backbone.slide_stages = cfg.model.backbone.slide_stages
    assert other.to_dict() == cfg.to_dict()


def test_photographs_have_their_classes_and_no_masks():
    cfg = run_config(Run('bccd', 'PVT', True, 2), 'data/mini', 'cells')
    assert cfg.randomness.seed == 2
    assert [head.num_classes for head in cfg.model.roi_head.bbox_head] == [3, 3]
    assert cfg.model.roi_head.mask_head is None
    assert cfg.train_dataloader.dataset.data_root.endswith('/cells/')
    for loader, resize in ((cfg.train_dataloader, 'RandomResize'), (cfg.val_dataloader, 'Resize')):
        assert loader.dataset.metainfo.classes == ('RBC', 'WBC', 'Platelets')
        steps = {step.type: step for step in loader.dataset.pipeline}
        assert steps[resize].scale == (256, 192)
        assert not steps['LoadAnnotations'].with_mask
    with pytest.raises(ValueError, match='need the folder of BCCD'):
        run_config(Run('bccd', 'PVT', True, 2), 'data/mini', None)


def result(box):
    return Result(dict(bbox_mAP=box, bbox_mAP_50=2 * box), [(1, box / 2), (2, box)])


COSTS = {'Slide-PVT': Measurement(0.5, 10**8, 0), 'PVT': Measurement(0.25, 2 * 10**8, 0)}


def test_the_table_has_means_and_spreads():
    results = {
        Run('generated', 'PVT', True, 0): result(0.1),
        Run('generated', 'PVT', True, 1): result(0.3),
        Run('generated', 'PVT', False, 0): result(0.25),
    }
    lines = table(results, COSTS, ('bbox_mAP', 'bbox_mAP_50')).splitlines()
    assert lines[2] == '| Slide-PVT | 2 | 0.200 ± 0.141 | 0.400 ± 0.283 | 500 | 100 |'
    assert lines[3] == '| PVT | 1 | 0.250 | 0.500 | 250 | 200 |'
    for x in results.values():
        x.metrics.update(segm_mAP=0.5, segm_mAP_50=0.75)
    costs = dict(generated=COSTS, bccd=COSTS)
    assert '## Photographs' not in page(results, costs)
    assert '## Photographs' in page({**results, Run('bccd', 'PVT', True, 0): result(0.5)}, costs)


@pytest.mark.parametrize('hosts', [('PVT',), ('PVT', 'Swin', 'PVTv2', 'NAT')])
def test_every_training_is_a_curve(hosts):
    runs = [Run('generated', host, slide, seed) for host in hosts for slide in (True, False) for seed in (0, 1)]
    axes = plot({run: result(0.1) for run in runs}).axes
    assert [len(ax.lines) for ax in axes if ax.axison] == [4] * len(hosts)


def test_an_interrupted_training_is_read_whole(tmp_path):
    parts = [
        [dict(loss=3.0, time=0.2, step=50), dict(time=9.0, step=1)],  # nothing was detected
        [dict(loss=2.0, time=0.4, step=100), dict(loss=1.0, time=0.3, step=150)],
        [{'coco/bbox_mAP': 0.3, 'coco/bbox_mAP_50': 0.6, 'step': 2}],
    ]
    with pytest.raises(ValueError, match='has no validation'):
        read_result(tmp_path, METRICS['bccd'])
    for number, lines in enumerate(parts):
        folder = tmp_path / f'2026010{number}' / 'vis_data'
        folder.mkdir(parents=True)
        (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))
    found = read_result(tmp_path, METRICS['bccd'])
    assert found.metrics == dict(bbox_mAP=0.3, bbox_mAP_50=0.6)
    assert found.curve == [(1, 0.0), (2, 0.3)]


@NEEDS_MODERN
def test_both_sides_are_measured_as_they_train(monkeypatch):
    monkeypatch.setattr('benchmarks.evidence.compare', lambda ours, baseline, training, *_, **__: (ours, baseline))
    sides = measure('bccd', 'PVT', 'data/mini', 'cells')
    assert [side.inputs['image'].shape for side in sides.values()] == [(4, 3, 192, 256)] * 2
    assert list(sides) == ['Slide-PVT', 'PVT']


@pytest.mark.exhaustive
def test_a_run_trains_once(tmp_path, monkeypatch):
    mini = tmp_path / 'mini'
    tool('make_mini_dataset', mini, '--num-train', 8, '--num-val', 4, '--size', 64)
    monkeypatch.setattr('benchmarks.evidence.EPOCHS', 1)
    run = Run('generated', 'PVT', True, 0)
    found = train(run, tmp_path / run.name, mini, None, threads=1)
    assert set(found.metrics) == {'bbox_mAP', 'bbox_mAP_50', 'segm_mAP', 'segm_mAP_50'}
    monkeypatch.setattr('subprocess.run', None)
    again = train(run, tmp_path / run.name, mini, None, threads=1)
    assert again.metrics == found.metrics
