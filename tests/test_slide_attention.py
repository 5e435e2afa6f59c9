import copy
import json
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import GOLDEN, golden_state, randomize, relative_error
from mmengine.utils import digit_version
from torch import distributed, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import prune

from benchmarks.baselines import two_path
from mmslide.compat import torch_version
from mmslide.models import SlidePVT
from mmslide.models.attention import SlideAttention
from mmslide.models.layers import Block
from mmslide.models.mlp import MLP
from mmslide.ops import slide_attention, tapwise
from mmslide.weights import layouts

MINI = dict(embed_dims=(16, 32, 48, 64), depths=(1,) * 4, num_heads=(1, 2, 3, 4), mlp_ratios=2, sr_ratios=(8, 4, 2, 1))
NAMES = ('q', 'k', 'v', 'weight', 'bias', 'rpb')
SHAPES = [  # batch, height, width, heads, head size, kernel size
    (2, 1, 1, 2, 8, 3),
    (1, 1, 7, 1, 5, 5),
    (2, 13, 17, 3, 16, 3),
    (1, 13, 17, 2, 7, 7),
    (1, 63, 40, 1, 32, 3),
    (1, 63, 40, 2, 4, 5),
]


def arguments(batch, height, width, heads, head_dims, kernel_size, dtype=torch.float64):
    slots = kernel_size**2
    shapes = [(batch, height, width, heads, head_dims)] * 3
    shapes += [(head_dims, slots, kernel_size, kernel_size), (head_dims, slots), (heads, slots)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run(args, grad, **kwargs):
    out = slide_attention(*args, **kwargs)
    return out, *torch.autograd.grad(out, args, grad.to(out.dtype))


def test_reference_equals_the_sum_over_single_pixels():
    """The equation once more with plain loops, so that the reference itself is held against something."""
    q, k, v, weight, bias, rpb = (x.detach() for x in arguments(1, 3, 4, 2, 3, 3))
    out = slide_attention(q, k, v, weight, bias, rpb, scale=0.7, backend='reference')
    for y, x, head in [(0, 0, 0), (1, 2, 1), (2, 3, 0)]:
        keys, values = bias.clone(), bias.clone()  # (d, k²)
        for tap in range(9):
            i, j = y + tap // 3 - 1, x + tap % 3 - 1
            if 0 <= i < 3 and 0 <= j < 4:
                keys += weight[:, :, tap // 3, tap % 3] * k[0, i, j, head, :, None]
                values += weight[:, :, tap // 3, tap % 3] * v[0, i, j, head, :, None]
        logits = 0.7 * (q[0, y, x, head, :, None] * (keys + rpb[head])).sum(0)
        assert relative_error(out[0, y, x, head], values @ logits.softmax(0)) < 1e-12


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('backend', ['conv', 'tapwise', 'unrolled'])
def test_output_and_gradients_agree_with_the_reference(backend, shape):
    args = arguments(*shape)
    grad = torch.randn(shape[:5], dtype=torch.float64)
    reference = run(args, grad, backend='reference')
    for name, value, wanted in zip(('out', *NAMES), run(args, grad, backend=backend), reference, strict=True):
        assert relative_error(value, wanted) < 1e-12, name
    single = [x.detach().float().requires_grad_() for x in args]
    for name, value, wanted in zip(('out', *NAMES), run(single, grad, backend=backend), reference, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, wanted) < 1e-5, name


@pytest.mark.parametrize('rows', [1, 5, 11, 27], ids=['single rows', 'uneven', 'an image', 'two images and a rest'])
@pytest.mark.parametrize('kernel_size', [3, 5])
def test_tapwise_in_blocks_of_any_size(rows, kernel_size):
    args = arguments(3, 11, 7, 2, 4, kernel_size)
    grad = torch.randn(3, 11, 7, 2, 4, dtype=torch.float64)
    reference = run(args, grad, backend='reference')
    row_bytes = 7 * 2 * kernel_size**2 * 4 * 8
    with mock.patch.object(tapwise, 'CPU_BLOCK_BYTES', rows * row_bytes):
        for name, value, wanted in zip(('out', *NAMES), run(args, grad, backend='tapwise'), reference, strict=True):
            assert relative_error(value, wanted) < 1e-12, name


@pytest.mark.parametrize('backend', ['conv', 'native', 'tapwise', 'unrolled', 'reference'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_maps_with_float32_kernels(backend, dtype):
    """Only the inputs and the result are rounded, so the error is that of one rounding of the result."""
    args = arguments(2, 13, 17, 2, 16, 3, dtype=torch.float32)
    args[:3] = [x.detach().to(dtype).requires_grad_() for x in args[:3]]
    grad = torch.randn(2, 13, 17, 2, 16).to(dtype)
    reference = run([x.detach().double().requires_grad_() for x in args], grad.double(), backend='reference')
    epsilon = torch.finfo(dtype).eps
    for name, value, wanted in zip(('out', *NAMES), run(args, grad, backend=backend), reference, strict=True):
        assert value.dtype == (torch.float32 if name in NAMES[3:] else dtype)
        assert relative_error(value, wanted) < 0.51 * epsilon, name


@pytest.mark.parametrize('backend', ['conv', 'native', 'tapwise', 'unrolled'])
def test_autocast_does_not_round_inside(backend):
    args = arguments(1, 9, 11, 2, 8, 3, dtype=torch.float32)
    grad = torch.randn(1, 9, 11, 2, 8)
    plain = run(args, grad, backend=backend)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = slide_attention(*args, backend=backend)
    for value, wanted in zip((out, *torch.autograd.grad(out, args, grad)), plain, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize('backend', ['conv', 'tapwise', 'unrolled'])
def test_dropout_drops_the_same_weights_in_every_backend(backend):
    args = arguments(1, 6, 5, 2, 4, 3)
    grad = torch.randn(1, 6, 5, 2, 4, dtype=torch.float64)
    results = []
    for name in ('reference', backend):
        torch.manual_seed(1)
        results.append(run(args, grad, dropout_p=0.4, backend=name))
    for value, wanted in zip(results[1], results[0], strict=True):
        assert relative_error(value, wanted) < 1e-12
    assert relative_error(results[0][0], slide_attention(*args)) > 1e-2


def test_strided_maps_and_an_explicit_scale():
    """q, k and v as a module cuts them out of one tensor."""
    _, _, _, *parameters = arguments(2, 7, 6, 3, 8, 3)
    q, k, v = torch.randn(2, 7, 6, 3, 3, 8, dtype=torch.float64).unbind(3)
    for scale in (None, 0.3):
        out = slide_attention(q, k, v, *parameters, scale=scale)
        wanted = slide_attention(q, k, v, *parameters, scale=scale or 8**-0.5, backend='reference')
        assert relative_error(out, wanted) < 1e-12


def test_tapwise_never_makes_a_large_tensor():
    args = [x.detach() for x in arguments(1, 64, 48, 2, 32, 3, dtype=torch.float32)]
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            out = function(*arguments, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    sizes.append(tensor.untyped_storage().nbytes())
            return out

    # Small blocks, since a block's buffer may be as large as the budget says.
    with mock.patch.object(tapwise, 'CPU_BLOCK_BYTES', 1 << 17), Sizes():
        out = tapwise.forward(*args, 0.25, None)
        tapwise.backward(out, *args, 0.25, None, True)
    assert len(sizes) > 100
    assert max(sizes) <= args[0].nbytes


@pytest.mark.parametrize('backend', ['conv', 'native', 'reference', 'tapwise', 'unrolled', None])
@pytest.mark.parametrize('size', [(0, 4, 5), (2, 0, 5), (2, 4, 0), (0, 0, 0)], ids=str)
def test_empty_maps(backend, size):
    args = arguments(*size, 2, 8, 3, dtype=torch.float32)
    out, *grads = run(args, torch.randn(*size, 2, 8), backend=backend)
    assert out.shape == args[0].shape
    for x, grad in zip(args, grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(k=torch.randn(1, 4, 4, 2, 4)), r'q, k and v must all be'),
        (dict(weight=torch.randn(8, 9, 3, 5)), r'weight must be \(d, k², k, k\)'),
        (dict(weight=torch.randn(8, 4, 2, 2)), r'k odd'),
        (dict(bias=torch.randn(9, 8)), r'bias must be \(d, k²\) = \(8, 9\), got \(9, 8\)'),
        (dict(rpb=torch.randn(3, 9)), r'rpb must be \(heads, k²\) = \(2, 9\)'),
        (dict(weight=torch.randn(8, 9, 3, 3).bfloat16()), r'must all be float32'),
        (dict(q=torch.randn(1, 4, 4, 2, 8).half()), r'share one floating-point dtype'),
        (
            dict(backend='cuda'),
            r"backend must be one of \['conv', 'gpu', 'native', 'reference', 'tapwise', 'triton', 'unrolled'\]",
        ),
        (dict(rpb=torch.randn(2, 9, device='meta')), r"must be on one device, got \['cpu', 'meta'\]"),
        (dict(dropout_p=1.0), r'dropout_p must be in \[0, 1\)'),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = dict(zip(NAMES, arguments(1, 4, 4, 2, 8, 3, dtype=torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        slide_attention(**{**good, **change})


@pytest.mark.parametrize('name', ['slide_attention_k3', 'slide_attention_k5'])
@pytest.mark.parametrize('backend', ['conv', 'tapwise', 'unrolled', 'reference'])
def test_module_gives_the_authors_numbers(name, backend):
    golden = np.load(GOLDEN / f'{name}.npz')
    meta = json.loads(str(golden['meta']))
    state = layouts.slide_attention(golden_state(name))
    heads, slots = state['relative_position_bias'].shape
    module = SlideAttention(len(state['proj.bias']), heads, round(slots**0.5), backend=backend)
    module.load_state_dict(state)
    height, width = meta['H'], meta['W']
    tokens = np.random.default_rng(meta['token_seed']).standard_normal((2, height * width, len(state['proj.bias'])))
    out = module(torch.from_numpy(tokens.astype(np.float32)).unflatten(1, (height, width)))
    assert relative_error(out.flatten(1, 2), torch.from_numpy(golden['output'])) < 1e-5


def two_paths(module, x):
    """The module as the paper trains it."""
    q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).unbind(3)
    biases = module.shift_bias, module.deform_weight, module.deform_bias, module.relative_position_bias
    return module.proj(two_path(q, k, v, module.shift, *biases).flatten(3))


@pytest.mark.parametrize('kernel_size', [3, 5])
def test_module_equals_the_two_paths_of_the_paper(kernel_size):
    module = randomize(SlideAttention(24, 3, kernel_size)).double()
    x = torch.randn(2, 9, 10, 24, dtype=torch.float64)
    grad = torch.randn(2, 9, 10, 24, dtype=torch.float64)
    parameters = list(module.parameters())
    ours, theirs = module(x), two_paths(module, x)
    assert relative_error(ours, theirs) < 1e-12
    for value, wanted in zip(
        torch.autograd.grad(ours, parameters, grad), torch.autograd.grad(theirs, parameters, grad), strict=True
    ):
        assert relative_error(value, wanted) < 1e-10


def test_new_module_is_plain_local_attention():
    module = SlideAttention(8, 2, 3)
    x = torch.randn(1, 5, 6, 8)
    q, k, v = module.qkv(x).view(1, 5, 6, 3, 2, 4).permute(3, 0, 4, 5, 1, 2).flatten(1, 2)
    neighbours = [torch.nn.functional.unfold(y, 3, padding=1).view(2, 4, 9, 5, 6) for y in (k, v)]
    attention = (0.5 * (q.unsqueeze(2) * neighbours[0]).sum(1, keepdim=True)).softmax(2)
    out = module.proj((attention * neighbours[1]).sum(2).flatten(0, 1).permute(1, 2, 0).unsqueeze(0))
    assert relative_error(module(x), out) < 1e-5


def test_nothing_overwrites_the_shift():
    normal = [dict(type='Normal', layer=layer, std=1.0) for layer in ('Conv2d', 'Linear', 'SlideAttention')]
    module = SlideAttention(8, 2, 3, init_cfg=normal)
    module.init_weights()
    assert torch.equal(module.shift.flatten(1), torch.eye(9))
    assert 'shift' not in module.state_dict()
    assert 'shift' not in dict(module.named_parameters())


def test_a_small_learned_part_survives_half_precision():
    """In bfloat16 1 + 1e-3 is 1: summed there, the learned path on the shift's own tap would vanish."""
    module = SlideAttention(8, 2, 3)
    torch.nn.init.constant_(module.deform_weight, 1e-3)
    seen = []
    with mock.patch(
        'mmslide.models.attention.slide.slide_attention', side_effect=lambda *a, **k: seen.append(a) or a[0]
    ):
        module.bfloat16()(torch.randn(1, 4, 4, 8).bfloat16())
    weight = seen[0][3]
    assert weight.dtype == torch.float32
    assert (weight.detach()[:, 0, 0, 0] > 1.0009).all()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(embed_dims=10, num_heads=4), r'embed_dims=10, num_heads=4'),
        (dict(embed_dims=8, num_heads=0), r'num_heads must be a positive integer, got num_heads=0'),
        (dict(embed_dims=8, num_heads=2, kernel_size=4), r'kernel_size=4'),
        (dict(embed_dims=8, num_heads=2, backend='natve'), r"backend must be one of .*got backend='natve'"),
        (dict(embed_dims=8, num_heads=2, attn_drop_rate=1), r'attn_drop_rate must be a number in \[0, 1\), got'),
    ],
)
def test_module_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        SlideAttention(**arguments)


def test_module_dropouts_act_in_training_only():
    module = randomize(SlideAttention(8, 2, attn_drop_rate=0.5, proj_drop_rate=0.5))
    x = torch.randn(1, 6, 6, 8)
    assert relative_error(module(x), module(x)) > 0.1
    module.eval()
    assert torch.equal(module(x), module(x))


class LowRank(nn.Module):
    """An adapter around a linear layer, as LoRA has them."""

    def __init__(self, linear, rank=2):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def products(module, x):
    """How many products by a slice of qkv's weight the module computes."""
    with mock.patch('torch.nn.functional.linear', side_effect=torch.nn.functional.linear) as linear:
        out = module(x)
    return out, sum(call.args[1].shape[0] == module.proj.out_features for call in linear.call_args_list) - 1


@pytest.mark.parametrize('qkv_bias', [True, False])
def test_separate_products_are_the_projection(qkv_bias):
    module = randomize(SlideAttention(24, 3, qkv_bias=qkv_bias)).double()
    x, grad = torch.randn(2, 2, 5, 6, 24, dtype=torch.float64)
    out, count = products(module, x)
    assert count == 3
    with torch.no_grad():
        assert products(module, x)[1] == 0
    wanted = two_paths(module, x)
    parameters = list(module.parameters())
    for value, expected in zip(
        (out, *torch.autograd.grad(out, parameters, grad)),
        (wanted, *torch.autograd.grad(wanted, parameters, grad)),
        strict=True,
    ):
        assert relative_error(value, expected) < 1e-10


def test_an_adapter_of_qkv_acts_and_learns():
    module = SlideAttention(24, 3)
    module.qkv = LowRank(module.qkv)
    randomize(module).double()
    x = torch.randn(2, 5, 6, 24, dtype=torch.float64)
    out = module(x)
    assert relative_error(out, two_paths(module, x)) < 1e-12
    out.sum().backward()
    assert module.qkv.up.weight.grad.any()
    assert module.qkv.down.weight.grad.any()


def test_layers_after_qkv_are_called():
    module = SlideAttention(24, 3)
    module.qkv = nn.Sequential(module.qkv, nn.Tanh())
    x = torch.randn(2, 5, 6, 24)
    assert relative_error(module(x), two_paths(module, x)) < 1e-6


@pytest.mark.parametrize('kind', ['forward_hook', 'forward_pre_hook', 'full_backward_hook', 'full_backward_pre_hook'])
@pytest.mark.parametrize('everywhere', [False, True])
def test_hooks_of_qkv_are_called(kind, everywhere):
    module, seen = SlideAttention(24, 3), []
    register = (
        getattr(torch_module, f'register_module_{kind}') if everywhere else getattr(module.qkv, f'register_{kind}')
    )
    with register(lambda module, *_: seen.append(module)):
        module(torch.randn(1, 5, 6, 24, requires_grad=True)).sum().backward()
    assert seen.count(module.qkv) == 1


def test_a_pruned_qkv_is_trained():
    module = SlideAttention(24, 3)
    prune.l1_unstructured(module.qkv, 'weight', 0.5)
    for _ in range(2):
        module(torch.randn(1, 5, 6, 24)).sum().backward()
    assert module.qkv.weight_orig.grad.any()


def test_a_weight_of_another_class_is_called():
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), kwargs=None):
            out = super().__torch_function__(function, types, arguments, kwargs)
            return 2 * out.as_subclass(torch.Tensor) if function is torch.nn.functional.linear else out

    module, x = SlideAttention(24, 3, qkv_bias=False), torch.randn(1, 5, 6, 24)
    doubled = copy.deepcopy(module)
    doubled.qkv.weight = nn.Parameter(doubled.qkv.weight.detach().as_subclass(Doubled))
    module.qkv.weight.data *= 2
    assert relative_error(doubled(x), module(x)) < 1e-6


@pytest.mark.filterwarnings('ignore')
def test_dynamic_quantization():
    model = randomize(SlidePVT(MINI)).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for out, wanted in zip(quantized(image), model(image), strict=True):
            assert relative_error(out, wanted) < 0.1


@pytest.fixture
def mesh():
    """One process, which needs no port."""
    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh('cpu', (1,))
    distributed.destroy_process_group()


@pytest.mark.skipif(torch_version < digit_version('2.7'), reason='needs PyTorch 2.7, where layers are sharded on a CPU')
@pytest.mark.filterwarnings('ignore:FSDP2-wrapped')
@pytest.mark.parametrize('shard', [nn.Linear, nn.LayerNorm, MLP, SlideAttention, Block], ids=lambda cls: cls.__name__)
def test_sharded_layers(mesh, shard):
    fully_shard = pytest.importorskip('torch.distributed.fsdp').fully_shard
    model = randomize(SlidePVT(MINI, drop_path_rate=0.0))
    sharded = copy.deepcopy(model)
    for module in [module for module in sharded.modules() if type(module) is shard]:
        fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    image = torch.randn(2, 3, 64, 64)
    for net in (model, sharded):
        sum(out.square().sum() for out in net(image)).backward()
    for value, wanted in zip(sharded.parameters(), model.parameters(), strict=True):
        assert relative_error(value.grad.full_tensor(), wanted.grad) < 1e-5
