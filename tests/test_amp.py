import pytest
import torch
from helpers import randomize, relative_error
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.registry import OPTIM_WRAPPERS, DefaultScope
from torch import nn

from mmslide import amp
from mmslide.amp import BackboneAmpOptimWrapper
from mmslide.models import SlidePVT

ARCH = dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(2, 2), mlp_ratios=2, sr_ratios=(2, 1))


class Model(BaseModel):
    """Records the dtypes of its backbone's products and maps, and whether its head is under autocast."""

    def __init__(self):
        super().__init__()
        self.backbone = randomize(SlidePVT(ARCH, drop_path_rate=0.0, out_indices=(0, 1)))
        self.head = nn.Linear(32, 1)
        self.dtypes = []
        self.backbone.stages[0].blocks[0].attn.qkv.register_forward_hook(
            lambda module, inputs, out: self.dtypes.append(out.dtype)
        )

    def forward(self, inputs, data_samples=None, mode='loss'):
        maps = self.backbone(inputs)
        self.dtypes += [x.dtype for x in maps]
        loss = self.head(maps[1].mean((2, 3)))
        self.dtypes.append(loss.dtype)
        return dict(loss=loss.square().mean())


def wrapper(model, **kwargs):
    return BackboneAmpOptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0), **kwargs)


def test_the_backbone_alone_is_in_bfloat16():
    model = Model()
    inputs = torch.randn(2, 3, 40, 64)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        maps = model.backbone(inputs)
    loss = model.head(maps[1].float().mean((2, 3))).square().mean()
    wanted = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
    model.dtypes.clear()
    model.train_step(dict(inputs=inputs), wrapper(model, accumulative_counts=2))  # which keeps the gradients
    assert model.dtypes == [torch.bfloat16, *[torch.float32] * 3]
    for (name, parameter), value in zip(model.named_parameters(), wanted, strict=True):
        assert (parameter.grad is None) == (value is None), name
        assert value is None or relative_error(2 * parameter.grad, value) < 1e-6, name
    assert 'forward' not in vars(model.backbone)


def test_the_backbone_is_itself_again_after_an_error():
    model = Model()
    with pytest.raises(RuntimeError), wrapper(model).optim_context(model):
        model.backbone(torch.randn(1, 4, 32, 32))
    assert 'forward' not in vars(model.backbone)
    assert not torch.is_autocast_cpu_enabled()


def test_a_forward_that_was_replaced_before_stays():
    model = Model()
    calls = []
    original = model.backbone.forward
    model.backbone.forward = lambda *args: calls.append(1) or original(*args)
    mine = model.backbone.forward
    with wrapper(model).optim_context(model):
        model.backbone(torch.randn(1, 3, 32, 32))
    assert calls
    assert model.backbone.forward is mine


def test_a_distributed_model():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        model = Model()
        ddp = MMDistributedDataParallel(model, device_ids=None, broadcast_buffers=False, find_unused_parameters=True)
        ddp.train_step(dict(inputs=torch.randn(1, 3, 32, 32)), wrapper(model))
    finally:
        torch.distributed.destroy_process_group()
    assert model.dtypes == [torch.bfloat16, *[torch.float32] * 3]


def test_it_is_found_from_other_scopes_and_needs_a_backbone():
    model = nn.Linear(1, 1)
    with DefaultScope.overwrite_default_scope('mmseg'):
        built = OPTIM_WRAPPERS.build(
            dict(type='mmslide.BackboneAmpOptimWrapper', optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        )
    with pytest.raises(ValueError, match='models with a backbone, got Linear'), built.optim_context(model):
        pass


@pytest.mark.parametrize('pays', [False, True])
def test_bfloat16_pays_where_its_products_take_less_time(monkeypatch, pays):
    durations = {torch.bfloat16: 5.0 if pays else 9.0, torch.float32: 10.0}
    clock = [0.0]

    class Matrix:
        def __init__(self, *size, dtype):
            self.dtype = dtype

        def __matmul__(self, other):
            clock[0] += durations[self.dtype]

    monkeypatch.setattr(torch, 'ones', Matrix)
    monkeypatch.setattr(amp, 'perf_counter', lambda: clock[0])
    assert amp.bfloat16_pays() is pays
