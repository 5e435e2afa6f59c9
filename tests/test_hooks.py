import json
import logging

import cv2
import numpy as np
import pytest
import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, VISBACKENDS, DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from mmengine.visualization.vis_backend import BaseVisBackend
from torch import distributed, nn

from mmslide.checkpoints import read_checkpoint
from mmslide.figures import kernel_figure, to_pixels
from mmslide.hooks import CheckNonFiniteHook, SlideKernelHook
from mmslide.models import SlidePVT
from mmslide.models.attention import SlideAttention
from mmslide.visualize import shift_distance


class Model(BaseModel):
    """Its loss, its weight or its running mean are not finite in the iterations (from 1) that a test names."""

    def __init__(self, losses=(), weights=(), statistics=()):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.norm = nn.BatchNorm1d(1)
        self.losses, self.weights, self.statistics = losses, weights, statistics
        self.iteration = 0

    def forward(self, inputs, data_samples=None, mode='loss'):
        if mode != 'loss':
            return []
        self.iteration += 1
        with torch.no_grad():
            if self.iteration in self.weights:
                self.layer.weight.fill_(float('nan'))
            if self.iteration in self.statistics:
                self.norm.running_mean.fill_(float('inf'))
        loss = self.norm(self.layer(torch.stack(inputs))).square().mean()
        bad = loss.detach() * float('inf') if self.iteration in self.losses else 0 * loss.detach()
        return dict(loss_cls=0 * loss + 1 + bad, loss_bbox=0 * loss, acc=torch.tensor(float('nan')))


@pytest.fixture
def train(tmp_path):
    """Six iterations in three epochs, a checkpoint after each one; the last alone is kept."""

    def train(model, by_epoch=True, **hook):
        data = dict(
            dataset=[dict(inputs=torch.randn(2)) for _ in range(4)],
            batch_size=2,
            sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler'),
            collate_fn=dict(type='pseudo_collate'),
        )
        runner = Runner(
            model,
            str(tmp_path),
            train_dataloader=data,
            train_cfg=dict(by_epoch=True, max_epochs=3) if by_epoch else dict(by_epoch=False, max_iters=6),
            optim_wrapper=OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0)),
            default_hooks=dict(
                checkpoint=CheckpointHook(interval=1 if by_epoch else 2, by_epoch=by_epoch, max_keep_ckpts=1)
            ),
            custom_hooks=[dict(type='mmslide.CheckNonFiniteHook', **hook)],
            experiment_name=f'{id(model)}',
            log_level=logging.ERROR,
        )
        runner.train()

    return train


def saved(folder):
    return sorted(path.name for path in folder.glob('*.pth'))


def test_it_is_found_from_other_scopes():
    with DefaultScope.overwrite_default_scope('mmseg'):
        assert isinstance(HOOKS.build(dict(type='mmslide.CheckNonFiniteHook')), CheckNonFiniteHook)
    with pytest.raises(ValueError, match='patience must be a positive number of iterations, got patience=0'):
        CheckNonFiniteHook(patience=0)


def test_single_losses_that_are_not_finite_are_let_through(train, tmp_path):
    train(Model(losses=(1, 3, 4, 6)), patience=3)
    assert saved(tmp_path) == ['epoch_3.pth']


@pytest.mark.parametrize('by_epoch', [True, False])
def test_several_losses_in_a_row_stop_the_training(by_epoch, train, tmp_path):
    name = 'epoch_1.pth' if by_epoch else 'iter_2.pth'
    message = rf'loss_cls NaN or infinite in each iteration since 2, 3 times: .*finite weights is {tmp_path}/{name}\.'
    with pytest.raises(FloatingPointError, match=message):
        train(Model(losses=(2, 3, 4)), by_epoch, patience=3)
    assert saved(tmp_path) == [name]


@pytest.mark.parametrize('by_epoch', [True, False])
@pytest.mark.parametrize('what', ['weights', 'statistics'])
def test_weights_that_are_not_finite_never_replace_finite_ones(what, by_epoch, train, tmp_path):
    name = 'epoch_2.pth' if by_epoch else 'iter_4.pth'
    key = 'layer.weight' if what == 'weights' else 'norm.running_mean'
    with pytest.raises(FloatingPointError, match=rf'{key}.*not saved\. .*finite weights is {tmp_path}/{name}\.'):
        train(Model(**{what: (5,)}), by_epoch)
    assert saved(tmp_path) == [name]
    assert read_checkpoint(tmp_path / name)['state_dict'][key].isfinite().all()


def test_before_the_first_checkpoint(train, tmp_path):
    with pytest.raises(FloatingPointError, match='No checkpoint has been saved yet'):
        train(Model(losses=(1,)), patience=1)
    assert saved(tmp_path) == []


class SlideModel(BaseModel):
    def __init__(self, slide_stages=(0,)):
        super().__init__()
        arch = dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2), mlp_ratios=2, sr_ratios=(8, 4))
        self.backbone = SlidePVT(arch, out_indices=(1,), slide_stages=slide_stages)

    def forward(self, inputs, data_samples=None, mode='loss'):
        (feature,) = self.backbone(torch.stack(inputs))
        return dict(loss=feature.std()) if mode == 'loss' else []


@pytest.fixture
def train_slide(tmp_path):
    """Four iterations; the model's kernels at each of them and the runner."""

    def train_slide(model, interval=2, backend='LocalVisBackend', **options):
        plain = model.module if hasattr(model, 'module') else model
        modules = {name: x for name, x in plain.named_modules() if isinstance(x, SlideAttention)}
        kernels = []

        class Recorder(Hook):
            def before_train(self, *args, **kwargs):
                kernels.append({name: module.kernels()[0].detach() for name, module in modules.items()})

            after_train_iter = before_train

        hooks = [dict(type='mmslide.SlideKernelHook', interval=interval), *options.pop('custom_hooks', [])]
        runner = Runner(
            model,
            str(tmp_path),
            train_dataloader=dict(
                dataset=[dict(inputs=torch.randn(3, 32, 32)) for _ in range(2)],
                batch_size=1,
                sampler=dict(type='InfiniteSampler'),
                collate_fn=dict(type='pseudo_collate'),
            ),
            train_cfg=dict(by_epoch=False, max_iters=4),
            optim_wrapper=OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0)),
            default_hooks=dict(checkpoint=None),
            custom_hooks=[*hooks, Recorder()],
            visualizer=dict(type='Visualizer', vis_backends=[dict(type=backend)], name=f'v{id(model)}'),
            experiment_name=f'{id(model)}',
            log_level=logging.ERROR,
            **options,
        )
        runner.train()
        return kernels

    return train_slide


def sent(folder):
    """The images that were sent, by step, and the scalars, by name and step."""
    images = {int(path.stem.split('_')[-1]): cv2.imread(str(path))[..., ::-1] for path in folder.rglob('slide_*.png')}
    scalars = {}
    for path in folder.rglob('scalars.json'):
        for line in map(json.loads, path.read_text().splitlines()):
            scalars.update({(name, line['step']): value for name, value in line.items() if 'slide_kernels' in name})
    return images, scalars


def assert_sent(kernels, folder, steps):
    images, scalars = sent(folder)
    assert sorted(images) == steps
    assert np.array_equal(images[steps[-1]], to_pixels(kernel_figure(kernels[steps[-1]])))
    assert not np.array_equal(images[steps[-1]], images[0])
    name = 'backbone.stages.0.blocks.0.attn'
    expected = {(f'slide_kernels/{name}', step): shift_distance(kernels[step][name]) for step in steps}
    assert scalars == pytest.approx(expected)
    assert sorted(scalars.values()) == list(scalars.values())
    assert scalars[f'slide_kernels/{name}', 0] == 0 < scalars[f'slide_kernels/{name}', steps[-1]]


def test_kernels_are_sent_to_the_visualizer(train_slide, tmp_path):
    kernels = train_slide(SlideModel())
    assert_sent(kernels, tmp_path, [0, 2, 4])


class RecordingBackend(BaseVisBackend):
    """What any backend is handed, such as W&B's."""

    experiment = None

    def __init__(self, save_dir):
        super().__init__(save_dir)
        self.images, self.scalars = {}, {}

    def _init_env(self):
        pass

    def add_image(self, name, image, step=0, **kwargs):
        self.images[name, step] = image

    def add_scalars(self, scalar_dict, step=0, file_path=None, **kwargs):
        self.scalars.update({(name, step): value for name, value in scalar_dict.items()})


def test_kernels_are_sent_to_any_backend(train_slide, monkeypatch):
    monkeypatch.setitem(VISBACKENDS.module_dict, 'RecordingBackend', RecordingBackend)
    model = SlideModel()
    kernels = train_slide(model, backend='RecordingBackend')
    backend = Visualizer.get_instance(f'v{id(model)}').get_backend('RecordingBackend')
    assert list(backend.images) == [('slide_kernels', step) for step in (0, 2, 4)]
    assert np.array_equal(backend.images['slide_kernels', 4], to_pixels(kernel_figure(kernels[4])))
    scalars = {key: value for key, value in backend.scalars.items() if 'slide_kernels' in key[0]}
    name = 'backbone.stages.0.blocks.0.attn'
    assert scalars == {(f'slide_kernels/{name}', step): shift_distance(kernels[step][name]) for step in (0, 2, 4)}


def test_kernels_are_sent_to_tensorboard(train_slide, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kernels = train_slide(SlideModel(), backend='TensorboardVisBackend')
    (file,) = tmp_path.rglob('events.out.tfevents.*')
    events = EventAccumulator(str(file)).Reload()
    assert [image.step for image in events.Images('slide_kernels')] == [0, 2, 4]
    image = cv2.imdecode(np.frombuffer(events.Images('slide_kernels')[-1].encoded_image_string, np.uint8), 1)
    assert np.array_equal(image[..., ::-1], to_pixels(kernel_figure(kernels[4])))
    name = 'backbone.stages.0.blocks.0.attn'
    scalars = events.Scalars(f'slide_kernels/{name}')
    assert [scalar.step for scalar in scalars] == [0, 2, 4]
    assert [scalar.value for scalar in scalars] == pytest.approx([shift_distance(kernels[i][name]) for i in (0, 2, 4)])


def test_kernels_of_a_wrapped_model_beside_an_average(train_slide, tmp_path):
    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    try:
        kernels = train_slide(MMDistributedDataParallel(SlideModel()), interval=3, custom_hooks=[dict(type='EMAHook')])
    finally:
        distributed.destroy_process_group()
    assert_sent(kernels, tmp_path, [0, 3])


def test_the_first_process_alone_sends(train_slide, tmp_path, monkeypatch):
    monkeypatch.setattr('mmslide.hooks.is_main_process', lambda: False)
    train_slide(SlideModel())
    assert sent(tmp_path) == ({}, {})


def test_a_model_without_kernels_does_not_start(train_slide):
    message = 'this SlideModel has no Slide Attention: slide_stages of its backbone is empty'
    with pytest.raises(ValueError, match=message):
        train_slide(SlideModel(slide_stages=()))
    with pytest.raises(ValueError, match='interval must be a positive number of iterations, got interval=0'):
        SlideKernelHook(interval=0)
