import pytest
import torch
from helpers import randomize, relative_error
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmslide.models import SlidePVT
from mmslide.ops import mlp
from mmslide.ops.mlp import mlp_in_blocks, pays_in_blocks

ARCH = dict(embed_dims=(16, 24), depths=(2, 1), num_heads=(1, 2), mlp_ratios=4, sr_ratios=(2, 1))


def layers(dtype=torch.float64):
    return randomize(nn.Sequential(nn.LayerNorm(12, eps=1e-3), nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 12))).to(
        dtype
    )


def in_blocks(module, x):
    norm, expand, _, contract = module
    return mlp_in_blocks(x, norm, expand, contract)


def output_and_gradients(forward, module, x, grad):
    x = x.detach().requires_grad_()
    out = forward(x)
    return [out, *torch.autograd.grad(out, [x, *module.parameters()], grad)]


@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize('pixels', [1, 7, 70, 1000], ids=['single', 'uneven', 'an image', 'all'])
@pytest.mark.parametrize('recomputed', [True, False])
def test_output_and_gradients_agree_with_the_layers(monkeypatch, dtype, tolerance, pixels, recomputed):
    monkeypatch.setattr(mlp, 'KEPT_BYTES', 0 if recomputed else 1 << 25)
    monkeypatch.setattr(mlp, 'BLOCK_BYTES', pixels * 40 * dtype.itemsize)
    module = layers(dtype)
    x = torch.randn(3, 12, 10, 7, dtype=dtype).permute(0, 2, 3, 1)  # in memory as a convolution leaves it
    grad = torch.randn(3, 7, 12, 10, dtype=dtype).permute(0, 3, 1, 2)
    reference = layers().requires_grad_()
    reference.load_state_dict(module.state_dict())
    wanted = output_and_gradients(reference, reference, x.double(), grad.double())
    for value, expected in zip(
        output_and_gradients(lambda x: in_blocks(module, x), module, x, grad), wanted, strict=True
    ):
        assert relative_error(value, expected) < tolerance


@pytest.mark.parametrize('recomputed', [True, False])
def test_the_input_and_parameters_are_kept_and_a_small_hidden_layer(monkeypatch, recomputed):
    monkeypatch.setattr(mlp, 'KEPT_BYTES', 50 * 40 * 8 - recomputed)
    module, x = layers(), torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    kept = {}
    with saved_tensors_hooks(lambda tensor: kept.update({tensor.data_ptr(): tensor.nbytes}), lambda _: None):
        in_blocks(module, x)
    for tensor in (x, *module.parameters()):
        kept.pop(tensor.data_ptr(), None)
    assert sum(kept.values()) == (0 if recomputed else 50 * 40 * 8)


@pytest.mark.parametrize('training', [False, True])
def test_a_backbone_in_blocks_is_the_backbone(monkeypatch, training):
    model = randomize(SlidePVT(ARCH, drop_path_rate=0.5, out_indices=(0, 1))).train(training)
    image = torch.randn(4, 3, 32, 45)
    calls = []

    def step(grad):
        torch.manual_seed(0)
        outs = model(image)
        return [*outs, *(torch.autograd.grad(sum(x.square().sum() for x in outs), model.parameters()) if grad else ())]

    monkeypatch.setattr('mmslide.models.layers.pays_in_blocks', lambda *_: False)
    whole = step(grad=True)
    monkeypatch.setattr('mmslide.models.layers.pays_in_blocks', pays_in_blocks)
    monkeypatch.setattr('mmslide.models.layers.mlp_in_blocks', lambda *args: calls.append(1) or mlp_in_blocks(*args))
    monkeypatch.setattr(mlp, 'BLOCK_BYTES', 1000)
    for grad, kept_bytes in ((True, 0), (True, 1 << 25), (False, 1 << 25)):
        calls.clear()
        monkeypatch.setattr(mlp, 'KEPT_BYTES', kept_bytes)
        with torch.set_grad_enabled(grad):
            for value, wanted in zip(step(grad), whole, strict=grad):
                assert relative_error(value, wanted) < 1e-5
        assert len(calls) == 3


def test_blocks_are_left_alone_where_they_do_not_apply(monkeypatch):
    x = torch.randn(5, 12)
    norm, expand, _, contract = layers(torch.float32)
    assert pays_in_blocks(x, norm, expand, contract)
    assert not pays_in_blocks(x.to('meta'), norm, expand, contract)
    assert not pays_in_blocks(x.double(), norm, expand, contract)
    assert not pays_in_blocks(x, nn.BatchNorm1d(12), expand, contract)
    assert not pays_in_blocks(x, nn.LayerNorm(12, elementwise_affine=False), expand, contract)
    assert not pays_in_blocks(x, nn.LayerNorm(12, bias=False), expand, contract)
    with torch.autocast('cpu'):
        assert not pays_in_blocks(x, norm, expand, contract)
    traced = []
    torch.jit.trace(lambda x: traced.append(pays_in_blocks(x, norm, expand, contract)) or x, x, check_trace=False)
    assert traced == [False]
    assert not pays_in_blocks(x, norm, nn.utils.parametrizations.weight_norm(nn.Linear(12, 40)), contract)
    monkeypatch.setattr('mmslide.models.layers.mlp_in_blocks', None)  # a dropout inside the MLP
    SlidePVT(ARCH, drop_rate=0.1, out_indices=(1,)).train()(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize('name', ['norm2', 'ffn', 'ffn.layers.0.0', 'ffn.layers.1'])
def test_hooks_are_called(name):
    model, calls = SlidePVT(ARCH, out_indices=(1,)), []
    model.stages[1].blocks[0].get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    model(torch.randn(1, 3, 32, 32))
    assert calls == [name]


def test_a_pruned_layer_is_trained():
    """Its weight is computed anew by a hook before every call."""
    model = SlidePVT(ARCH, out_indices=(1,))
    prune.l1_unstructured(model.stages[0].blocks[0].ffn.layers[0][0], 'weight', 0.5)
    for _ in range(2):
        model(torch.randn(1, 3, 32, 32))[0].sum().backward()


def test_without_gradients_no_hidden_layer_stands_whole(monkeypatch):
    monkeypatch.setattr(mlp, 'BLOCK_BYTES', 10 * 40 * 8)
    module, x, sizes = layers().requires_grad_(), torch.randn(50, 12, dtype=torch.float64), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            out = function(*arguments, **(kwargs or {}))
            sizes.extend(y.untyped_storage().nbytes() for y in tree_leaves(out) if isinstance(y, torch.Tensor))
            return out

    with torch.no_grad(), Sizes():
        in_blocks(module, x)
    assert max(sizes) == 50 * 12 * 8
