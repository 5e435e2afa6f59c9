import contextlib

import pytest
import torch
import torch.nn.functional as F
from helpers import NEEDS_MODERN, randomize, relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mmslide.models import SlidePVT
from mmslide.models import mlp as mlp_module
from mmslide.models.layers import Block
from mmslide.models.mlp import MLP
from mmslide.ops import mlp
from mmslide.ops.mlp import mlp_in_blocks

ARCH = dict(embed_dims=(16, 24), depths=(2, 1), num_heads=(1, 2), mlp_ratios=4, sr_ratios=(2, 1))
HOOKS = ['forward_hook', 'forward_pre_hook', 'full_backward_hook', 'full_backward_pre_hook']
LAYERS = ['norm2', 'ffn', 'ffn.layers', *(f'ffn.layers.{name}' for name in ('0', '0.0', '0.1', '0.2', '1', '2'))]


def layers(dtype=torch.float64):
    return randomize(nn.Sequential(nn.LayerNorm(12, eps=1e-3), nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 12))).to(
        dtype
    )


def in_blocks(module, x):
    return mlp_in_blocks(x, *module.parameters(), module[0].eps)


def output_and_gradients(forward, module, x, grad):
    x = x.detach().requires_grad_()
    out = forward(x)
    return [out, *torch.autograd.grad(out, [x, *module.parameters()], grad)]


class Record(TorchDispatchMode):
    """The name of each operation and the bytes of what it returns."""

    def __init__(self):
        super().__init__()
        self.names, self.sizes = [], []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        out = function(*arguments, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        self.sizes.extend(y.untyped_storage().nbytes() for y in tree_flatten(out)[0] if isinstance(y, Tensor))
        return out


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


def test_without_gradients_no_hidden_layer_stands_whole(monkeypatch):
    monkeypatch.setattr(mlp, 'BLOCK_BYTES', 10 * 40 * 8)
    module, x = layers().requires_grad_(), torch.randn(50, 12, dtype=torch.float64)
    with torch.no_grad(), Record() as record:
        in_blocks(module, x)
    assert max(record.sizes) == 50 * 12 * 8


@pytest.mark.parametrize(
    ('needed', 'products'),
    [(range(7), 4), ([0], 2), ([1], 2), ([3, 4], 2), ([5], 1), ([6], 0), ([0, 5, 6], 3)],
    ids=str,
)
def test_only_the_gradients_that_are_needed_are_computed(needed, products):
    module, x = layers(), torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    inputs, grad = [x, *module.parameters()], torch.randn(5, 12, dtype=torch.float64)
    wanted = torch.autograd.grad(in_blocks(module, x), inputs, grad)
    for index, y in enumerate(inputs):
        y.requires_grad_(index in needed)
    out = in_blocks(module, x)
    with Record() as record:
        out.backward(grad)
    assert sum(name in ('mm', 'addmm', 'addmm_') for name in record.names) == products
    for index, (y, expected) in enumerate(zip(inputs, wanted, strict=True)):
        assert (y.grad is not None) == (index in needed)
        assert y.grad is None or torch.equal(y.grad, expected)


def test_gradients_of_gradients():
    module = layers()
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda *inputs: mlp_in_blocks(*inputs, 1e-3), (x, *module.parameters()), atol=1e-6, fast_mode=True
    )


def test_gradients_of_gradients_where_inputs_depend_on_each_other():
    module, x = layers(), torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    *parameters, bias2 = module.parameters()

    def second(function):
        (grad,) = torch.autograd.grad(function(x, *parameters, bias2 + x.sum(0)).square().sum(), x, create_graph=True)
        return grad, torch.autograd.grad(grad.square().sum(), x)[0]

    def plain(x, gamma, beta, weight1, bias1, weight2, bias2):
        hidden = F.gelu(F.linear(F.layer_norm(x, (12,), gamma, beta, 1e-3), weight1, bias1))
        return F.linear(hidden, weight2, bias2)

    for value, wanted in zip(second(lambda *inputs: mlp_in_blocks(*inputs, 1e-3)), second(plain), strict=True):
        assert relative_error(value, wanted) < 1e-12


@NEEDS_MODERN
def test_many_gradients_at_a_time():
    module, x = layers(), torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    inputs, grads = [x, *module.parameters()], torch.randn(4, 3, 12, dtype=torch.float64)
    out = in_blocks(module, x)
    batched = torch.autograd.grad(out, inputs, grads, is_grads_batched=True, retain_graph=True)
    mapped = torch.func.vmap(lambda grad: torch.autograd.grad(out, inputs, grad, retain_graph=True))(grads)
    wanted = [torch.autograd.grad(out, inputs, grad, retain_graph=True) for grad in grads]
    for first, second, expected in zip(batched, mapped, zip(*wanted, strict=True), strict=True):
        assert relative_error(first, torch.stack(expected)) < 1e-12
        assert relative_error(second, torch.stack(expected)) < 1e-12
        assert not first.requires_grad


def test_backward_inside_autocast():
    module, x = layers(torch.float32), torch.randn(5, 12, requires_grad=True)
    inputs, grad = [x, *module.parameters()], torch.randn(5, 12)
    wanted = torch.autograd.grad(in_blocks(module, x), inputs, grad)
    out = in_blocks(module, x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = torch.autograd.grad(out, inputs, grad)
    for value, expected in zip(found, wanted, strict=True):
        assert torch.equal(value, expected)


@pytest.fixture
def calls(monkeypatch):
    """How often the module has taken the blocks."""
    calls = []
    monkeypatch.setattr(mlp_module, 'mlp_in_blocks', lambda *args: calls.append(1) or mlp_in_blocks(*args))
    return calls


def block():
    return randomize(Block(nn.Identity(), MLP(12, 40), 12)).eval()


def assert_layer_by_layer(calls, module, x):
    """The block does what its layers do one after another, activation and all, and has not taken the blocks."""
    parts = module.ffn.layers
    normed = x + module.norm1(x)
    wanted = normed + parts[1](parts[0][1](parts[0][0](module.norm2(normed))))
    calls.clear()
    assert relative_error(module(x), wanted) < 1e-6
    assert not calls


@pytest.mark.parametrize('training', [False, True])
def test_a_backbone_in_blocks_is_the_backbone(monkeypatch, calls, training):
    model = randomize(SlidePVT(ARCH, drop_path_rate=0.5, out_indices=(0, 1))).train(training)
    image = torch.randn(4, 3, 32, 45)

    def step(grad):
        torch.manual_seed(0)
        outs = model(image)
        return [*outs, *(torch.autograd.grad(sum(x.square().sum() for x in outs), model.parameters()) if grad else ())]

    with monkeypatch.context() as context:
        context.setattr(MLP, '_pays_in_blocks', lambda *_: False)
        whole = step(grad=True)
    monkeypatch.setattr(mlp, 'BLOCK_BYTES', 1000)
    for grad, kept_bytes in ((True, 0), (True, 1 << 25), (False, 1 << 25)):
        calls.clear()
        monkeypatch.setattr(mlp, 'KEPT_BYTES', kept_bytes)
        with torch.set_grad_enabled(grad):
            for value, wanted in zip(step(grad), whole, strict=grad):
                assert relative_error(value, wanted) < 1e-5
        assert len(calls) == 3


def test_keys_and_positions_are_those_of_mmcv():
    from mmcv.cnn.bricks.transformer import FFN

    ours, theirs = MLP(12, 40), FFN(12, 40, act_cfg=dict(type='GELU'))
    assert [name for name, _ in ours.named_modules()] == [
        name for name, _ in theirs.named_modules() if not name.startswith(('dropout_layer', 'gamma2'))
    ]
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize('drop_rate', [0.0, 0.2])
@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_active_dropout_alone_is_layer_by_layer(calls, drop_rate, deploy, training):
    model = SlidePVT(ARCH, drop_rate=drop_rate, deploy=deploy, out_indices=(1,)).train(training)
    model(torch.randn(1, 3, 32, 32))
    assert len(calls) == (0 if drop_rate and training and not deploy else 3)


class Subclass(Tensor):
    pass


def replaced(name, make):
    def change(module):
        parent, _, child = name.rpartition('.')
        setattr(module.get_submodule(parent), child, make())

    return change


def subclassed(module):
    linear = module.ffn.layers[1]
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Subclass))


def doubled(module):
    linear = module.ffn.layers[0][0]
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize(
    'change',
    [
        replaced('ffn.layers.0.1', nn.ReLU),
        replaced('ffn.layers.0.1', lambda: nn.GELU(approximate='tanh')),
        replaced('ffn.layers.0.0', lambda: nn.Linear(12, 40, bias=False)),
        replaced('ffn.layers.1', lambda: nn.Linear(40, 12, bias=False)),
        replaced('ffn.layers.1', lambda: nn.Sequential(nn.Linear(40, 12), nn.Tanh())),
        replaced('ffn.layers.0.0', lambda: parametrizations.weight_norm(nn.Linear(12, 40))),
        replaced('norm2', lambda: nn.LayerNorm(12, elementwise_affine=False)),
        replaced('norm2', lambda: nn.LayerNorm(12, bias=False)),
        replaced('norm2', lambda: nn.LayerNorm((5, 12))),
        replaced('norm2', nn.Identity),
        pytest.param(replaced('norm2', lambda: nn.RMSNorm(12)), marks=NEEDS_MODERN),
        subclassed,
        doubled,
        lambda module: prune.l1_unstructured(module.ffn.layers[1], 'weight', 0.5),
    ],
)
def test_changed_layers_are_called(calls, change):
    module, x = block(), torch.randn(2, 3, 5, 12)
    module(x)
    assert calls
    change(module)
    assert_layer_by_layer(calls, module, x)


def test_an_added_layer_is_called(calls):
    module = block()
    module.ffn.layers.append(nn.Tanh())
    with torch.no_grad():
        module.ffn(torch.randn(2, 3, 5, 12), module.norm2)
    assert not calls


@pytest.mark.parametrize('kind', HOOKS)
@pytest.mark.parametrize('name', LAYERS)
def test_hooks_are_called(name, kind):
    module, seen = block(), []
    getattr(module.get_submodule(name), f'register_{kind}')(lambda *_: seen.append(name))
    module(torch.randn(2, 3, 5, 12, requires_grad=True)).sum().backward()
    assert seen == [name]


@pytest.mark.parametrize('kind', HOOKS)
def test_global_hooks_are_called(kind):
    module, seen = block(), set()
    with getattr(torch_module, f'register_module_{kind}')(lambda module, *_: seen.add(module)):
        module(torch.randn(2, 3, 5, 12, requires_grad=True)).sum().backward()
    assert {module.get_submodule(name) for name in LAYERS} <= seen


def test_what_a_hook_captures_stays_as_it_was():
    module, captured = block(), []
    module.ffn.register_forward_hook(lambda module, args, out: captured.append((out, out.clone())))
    module(torch.randn(2, 3, 5, 12))
    assert torch.equal(*captured[0])


def test_a_pruned_layer_is_trained():
    """Its weight is computed anew by a hook before every call."""
    module = block()
    prune.l1_unstructured(module.ffn.layers[0][0], 'weight', 0.5)
    for _ in range(2):
        module(torch.randn(2, 3, 5, 12)).sum().backward()


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), kwargs=None):
        return function(*arguments, **(kwargs or {}))


@pytest.mark.parametrize('pixels', [7, 1000], ids=['blocks', 'all'])
@pytest.mark.parametrize('recomputed', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_it_is_as_exact_as_the_layers(monkeypatch, calls, dtype, recomputed, pixels):
    """Whether the map is float32, as after a position embedding, or bfloat16, as after a patch embedding alone."""
    monkeypatch.setattr(mlp, 'KEPT_BYTES', 0 if recomputed else 1 << 25)
    monkeypatch.setattr(mlp, 'BLOCK_BYTES', pixels * 40 * 2)
    module, norm = randomize(MLP(12, 40)), randomize(nn.LayerNorm(12))
    x = torch.randn(2, 9, 11, 12).to(dtype)
    grad = torch.randn(2, 9, 11, 12).to(torch.bfloat16)
    parameters = [*norm.parameters(), *module.parameters()]

    def step(around):
        y = x.detach().requires_grad_()
        with around:
            out = module(y, norm)
        return [out, *torch.autograd.grad(out, [y, *parameters], grad.to(out.dtype))]

    found = step(torch.autocast('cpu', dtype=torch.bfloat16))
    assert calls
    with monkeypatch.context() as context:
        context.setattr(MLP, '_pays_in_blocks', lambda *_: False)
        layer_by_layer = step(torch.autocast('cpu', dtype=torch.bfloat16))
        for y in (module, norm):
            y.double()
        x, parameters = x.double(), [*norm.parameters(), *module.parameters()]
        wanted = step(contextlib.nullcontext())
    for value, other, reference in zip(found, layer_by_layer, wanted, strict=True):
        assert value.dtype == other.dtype
        assert relative_error(value, reference) < 1.5 * relative_error(other, reference) + 2e-3


@pytest.mark.parametrize(
    'around',
    [Functions, Record, forward_ad.dual_level],
    ids=['functions', 'operations', 'dual'],
)
def test_what_follows_the_operations_sees_the_layers(calls, around):
    with around():
        block()(torch.randn(2, 3, 5, 12))
    assert not calls


@pytest.mark.parametrize(
    'x',
    [
        torch.randn(2, 5, 12, dtype=torch.float64),
        torch.randn(2, 5, 12).as_subclass(Subclass),
        torch.randn(2, 5, 12, device='meta'),
    ],
    ids=['dtype', 'subclass', 'device'],
)
def test_other_inputs_see_the_layers(calls, x):
    with contextlib.suppress(RuntimeError):  # as layers raise for another dtype
        module = block().to(x.device)
        module.ffn(x, module.norm2)
    assert not calls


def test_traced_and_compiled_it_is_the_layers(calls):
    module, x = block(), torch.randn(2, 3, 5, 12)
    wanted = module(x)
    calls.clear()
    for other in (
        torch.jit.trace(module, x, check_trace=False),
        torch.compile(module, backend='eager', fullgraph=True),
    ):
        assert relative_error(other(x), wanted) < 1e-6
    assert not calls


def test_transforms():
    """Against finite differences and against one at a time."""
    module, x = block().double(), torch.randn(3, 5, 12, dtype=torch.float64)
    direction = torch.randn_like(x)

    def loss(x):
        return module(x).square().sum()

    slope = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
    assert relative_error((torch.func.grad(loss)(x) * direction).sum(), slope) < 1e-7
    assert relative_error(torch.func.jvp(loss, (x,), (direction,))[1], slope) < 1e-7
    assert relative_error(torch.func.vmap(module)(x), module(x)) < 1e-12
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, direction)))
    assert relative_error(out.tangent, slope) < 1e-7
