"""Devices that are not here: whether they have the operators that backbones take on them."""

from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from helpers import BACKBONES, NEEDS_MODERN, randomize
from mmengine.registry import MODELS
from torch.utils._python_dispatch import TorchDispatchMode

from mmslide.models.attention import SlideAttention
from mmslide.ops import tiles

FUNCTIONS = Path(torchgen.__file__).parent / 'packaged/ATen/native/native_functions.yaml'


@pytest.fixture(scope='module')
def functions():
    """PyTorch's own list of operators, by name."""
    loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
    entries = yaml.load(FUNCTIONS.read_text(), Loader=loader)
    return {entry['func'].partition('(')[0]: entry for entry in entries}


def has_mps(functions, name):
    """Whether an operator has a kernel for MPS, or is made of others."""
    entry = functions[name]
    if 'structured_delegate' in entry:
        return has_mps(functions, entry['structured_delegate'])
    kernels = ','.join(entry.get('dispatch', {'Composite': ''}))
    return 'MPS' in kernels or 'Composite' in kernels


# What our own operators run on devices that have no kernels of ours.
INSIDE = {
    'mmslide::neighborhood_attention': tiles.forward,
    'mmslide::neighborhood_attention_backward': tiles.backward,
}


class Record(TorchDispatchMode):
    """The names of all operators that run, inside our own ones too."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = f'{func._schema.name}.{func._schema.overload_name}'.rstrip('.')
        if name in INSIDE:
            with self:
                return INSIDE[name](*args, **kwargs or {})
        self.names.add(name)
        return func(*args, **kwargs or {})


def test_the_list_tells_devices_apart(functions):
    assert has_mps(functions, 'add.Tensor')
    assert not has_mps(functions, '_fake_quantize_learnable_per_tensor_affine')


@NEEDS_MODERN
@pytest.mark.parametrize('backbone', BACKBONES)
def test_mps_has_every_operator(backbone, functions, monkeypatch):
    """Forward and backward, as on neither a CPU nor CUDA."""
    monkeypatch.setattr('mmslide.models.mlp.MLP._pays_in_blocks', lambda *_: False)
    monkeypatch.setattr('mmslide.models.attention.subsampled.query_parts', lambda q: 1)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = randomize(MODELS.build(BACKBONES[backbone])).train()
    for module in model.modules():
        if isinstance(module, SlideAttention):
            module.backend = 'unrolled'
    # PyTorch chooses the kernel of its own attention by the device.
    with Record() as record, sdpa_kernel(SDPBackend.MATH):
        sum(out.sum() for out in model(torch.randn(2, 3, 64, 96))).backward()
    names = {name.removeprefix('aten::') for name in record.names}
    assert 'gelu' in names
    assert ('unfold' in names) == ('NAT' in backbone)  # of the tiles
    missing = {name for name in names if name not in functions or not has_mps(functions, name)}
    assert not missing
    assert not names & {'as_strided', 'as_strided_'}
