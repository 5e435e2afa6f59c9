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


class Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(f'{func._schema.name}.{func._schema.overload_name}'.rstrip('.'))
        return func(*args, **kwargs or {})


def test_the_list_tells_devices_apart(functions):
    assert has_mps(functions, 'add.Tensor')
    assert not has_mps(functions, '_fake_quantize_learnable_per_tensor_affine')


@NEEDS_MODERN
@pytest.mark.parametrize('backbone', BACKBONES)
def test_mps_has_every_operator(backbone, functions):
    """Forward and backward, as on neither a CPU nor CUDA; neighborhood attention is one operator of ours."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = randomize(MODELS.build(BACKBONES[backbone])).train()
    for module in model.modules():
        if isinstance(module, SlideAttention):
            module.backend = 'unrolled'
    # PyTorch chooses the kernel of its own attention by the device.
    with Record() as record, sdpa_kernel(SDPBackend.MATH):
        sum(out.sum() for out in model(torch.randn(2, 3, 64, 96))).backward()
    names = {name.removeprefix('aten::') for name in record.names if not name.startswith('mmslide::')}
    assert len(names) > 20
    missing = {name for name in names if not has_mps(functions, name)}
    assert not missing
    assert not names & {'as_strided', 'as_strided_'}
