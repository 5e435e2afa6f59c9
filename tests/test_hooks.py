import logging

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, DefaultScope
from mmengine.runner import Runner
from torch import nn

from mmslide.checkpoints import read_checkpoint
from mmslide.hooks import CheckNonFiniteHook


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
