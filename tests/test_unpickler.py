"""The reader of checkpoints before PyTorch 2.6; it is tested on every version."""

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from mmslide.checkpoints import HARMLESS
from mmslide.stack import HISTORY_GLOBALS
from mmslide.unpickler import load

GLOBALS = {**HISTORY_GLOBALS, **HARMLESS}
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def read(path, map_location='cpu'):
    return load(path, map_location, GLOBALS)


def saved(content, folder):
    path = folder / 'x.pth'
    torch.save(content, path)
    return path


def crafted(opcodes, folder, **files):
    """A torch file whose pickle is what the opcodes leave, with further files or other ones beside it."""
    path = folder / 'crafted.pth'
    with zipfile.ZipFile(saved(dict(x=torch.zeros(3)), folder)) as source, zipfile.ZipFile(path, 'w') as target:
        for name in source.namelist():
            folder_name, _, file = name.partition('/')
            content = source.read(name)
            if file == 'data.pkl':
                content = b'\x80\x02' + opcodes + b'.'
            target.writestr(name, files.pop(file, content))
        for file, content in files.items():
            target.writestr(f'{folder_name}/{file}', content)
    return path


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_tensors_of_every_dtype(dtype, tmp_path):
    x = torch.randn(3, 4).mul(50).to(dtype)
    assert torch.equal(read(saved(x, tmp_path)), x)


def test_views_share_their_storage(tmp_path):
    x = torch.randn(4, 6)
    whole, part, transposed, empty = read(saved((x, x[1:, ::2], x.t(), x[:0]), tmp_path))
    assert torch.equal(whole, x)
    assert torch.equal(part, x[1:, ::2])
    assert torch.equal(transposed, x.t())
    assert empty.shape == (0, 6)
    part.zero_()
    assert not whole[1:, ::2].any()
    assert not transposed.t()[1:, ::2].any()


def test_a_training_checkpoint(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    content = dict(
        state_dict=model.state_dict(),
        parameter=nn.Parameter(torch.ones(2), requires_grad=False),
        optimizer=optimizer.state_dict(),
        meta=dict(epoch=3, cfg='x = 1', seed=None, time=0.5, flags={1, 2}, raw=b'\x00\xff', size=torch.Size([1, 2])),
        message_hub=dict(loss=HistoryBuffer([1.0, 2.0, 6.0], [1, 1, 1])),
        numpy=dict(array=np.arange(6.0).reshape(2, 3).T, scalar=np.float32(2.5), flag=np.bool_(True)),
        args=argparse.Namespace(lr=0.1),
    )
    found = read(saved(content, tmp_path))
    assert type(found['state_dict']) is OrderedDict
    assert found['state_dict']._metadata == content['state_dict']._metadata
    assert list(found['state_dict']) == list(content['state_dict'])
    for key, value in content['state_dict'].items():
        assert torch.equal(found['state_dict'][key], value)
    optimizer.load_state_dict(found['optimizer'])
    assert found['meta'] == content['meta']
    assert type(found['parameter']) is nn.Parameter
    assert not found['parameter'].requires_grad
    buffer = found['message_hub']['loss']
    assert type(buffer) is HistoryBuffer
    assert buffer.mean() == 3.0
    assert np.array_equal(found['numpy']['array'], content['numpy']['array'])
    assert found['numpy']['scalar'] == 2.5
    assert found['numpy']['flag']
    assert found['args'] == content['args']


@pytest.mark.parametrize(
    'map_location', [None, 'cpu', torch.device('cpu'), {'cpu': 'cpu'}, lambda storage, location: storage]
)
def test_map_location(map_location, tmp_path):
    assert torch.equal(read(saved(torch.ones(2), tmp_path), map_location), torch.ones(2))


class Call:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ('content', 'name'),
    [
        (Call(os.system, ('true',)), 'posix.system'),
        (Call(eval, ('1',)), r'__builtin__\.eval'),
        (Call(getattr, (HistoryBuffer, '__init__')), 'a checkpoint may only access'),
        (nn.Linear(1, 1), 'torch.nn.modules.linear.Linear'),
        (np.array([None]), 'an array of object'),
        (np.zeros(1, [('a', 'f4')]), 'an array of'),
        (np.zeros(1, '>f8'), 'big-endian'),
        (Call(dict, ()), r'__builtin__\.dict'),
    ],
)
def test_everything_else_is_refused(content, name, tmp_path):
    with pytest.raises(pickle.UnpicklingError, match=name):
        read(saved(dict(x=torch.zeros(1), evil=content), tmp_path))


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / 'x.pth')
    with pytest.raises(pickle.UnpicklingError, match='TorchScript'):
        read(tmp_path / 'x.pth')


STORAGE = b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x03tQ'
REBUILD = b'ctorch._utils\n_rebuild_tensor_v2\n('


@pytest.mark.parametrize(
    ('view', 'refused'),
    [
        (b'K\x00K\x03\x85K\x01\x85', False),  # offset, (size,), (stride,)
        (b'K\x00K\x04\x85K\x01\x85', True),
        (b'K\x01K\x03\x85K\x01\x85', True),
        (b'K\x00K\x02\x85K\x03\x85', True),
        (b'J\xff\xff\xff\xffK\x01\x85K\x01\x85', True),
        (b'K\x02K\x02\x85J\xff\xff\xff\xff\x85', True),
    ],
)
def test_tensors_end_with_their_data(view, refused, tmp_path):
    path = crafted(REBUILD + STORAGE + view + b'\x89NtR', tmp_path)
    if not refused:
        assert torch.equal(read(path), torch.zeros(3))
        return
    with pytest.raises(pickle.UnpicklingError, match='larger than its data'):
        read(path)


@pytest.mark.parametrize(
    'opcodes',
    [
        b'ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb',  # attributes of a function of ours
        b'ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb',  # of a class
        b'ctorch\nfloat32\n}X\x01\x00\x00\x00aK\x01sb',
        b'}}X\x01\x00\x00\x00aK\x01sb',
        b'ctorch\nSize\n)\x81',  # __new__ of a class that is made by a call
        b'ccollections\nOrderedDict\n)}\x92',
        b'(icollections\nOrderedDict\n',
        b'(ccollections\nOrderedDict\no',
        b'\x82\x01',
        b'X\x01\x00\x00\x00aQ',
        b'(X\x01\x00\x00\x00actorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x03tQ',
        b'ctorch\nSize\n(X\x01\x00\x00\x00atR',
    ],
)
def test_opcodes_that_torch_never_writes_change_nothing(opcodes, tmp_path):
    with pytest.raises((pickle.UnpicklingError, TypeError, ValueError)):
        read(crafted(opcodes, tmp_path))
    assert not hasattr(OrderedDict, 'a')


def test_big_endian_files_are_refused(tmp_path):
    with pytest.raises(pickle.UnpicklingError, match='big-endian'):
        read(crafted(b'N', tmp_path, byteorder=b'big'))
