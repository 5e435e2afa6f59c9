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


def crafted(pickled, folder, **files):
    """A torch file whose pickle is what these opcodes leave, with further files or other ones beside it."""
    path = folder / 'crafted.pth'
    with zipfile.ZipFile(saved(dict(x=torch.zeros(3)), folder)) as source, zipfile.ZipFile(path, 'w') as target:
        for name in source.namelist():
            folder_name, _, file = name.partition('/')
            content = source.read(name)
            if file == 'data.pkl':
                content = b'\x80\x02' + pickled + b'.'
            target.writestr(name, files.pop(file, content))
        for file, content in files.items():
            target.writestr(f'{folder_name}/{file}', content)
    return path


def opcodes(value):
    return pickle.dumps(value, 2)[2:-1]


def text(value):
    return b'X' + len(value).to_bytes(4, 'little') + value.encode()


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


def test_lazily_conjugated_and_negated_tensors(tmp_path):
    x = torch.tensor([1 + 2j, 3 - 4j])
    for value in (x.conj(), x.conj().imag, x.imag._neg_view(), x.conj()._neg_view(), x.conj().requires_grad_()):
        found = read(saved(value, tmp_path))
        assert torch.equal(found, value)
        assert found.is_conj() == value.is_conj()
        assert found.is_neg() == value.is_neg()
        assert found.requires_grad == value.requires_grad


def test_a_training_checkpoint(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    content = dict(
        state_dict=model.state_dict(),
        parameter=nn.Parameter(torch.ones(2), requires_grad=False),
        optimizer=optimizer.state_dict(),
        meta=dict(
            epoch=3, cfg='x = 1', seed=None, time=0.5, flags={1, 2}, raw=b'\x00\xff', size=torch.Size([1, 2]), z=1 + 2j
        ),
        message_hub=dict(loss=HistoryBuffer([1.0, 2.0, 6.0], [1, 1, 1])),
        numpy=dict(
            array=np.arange(6.0).reshape(2, 3).T,
            large=np.arange(1e3) * 1j,
            empty=np.zeros((0, 3), np.float16),
            single=np.array(3, np.int8),
            scalar=np.float32(2.5),
            flag=np.bool_(True),
        ),
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
    for key, value in content['numpy'].items():
        assert type(found['numpy'][key]) is type(value)
        assert found['numpy'][key].dtype == value.dtype
        assert np.array_equal(found['numpy'][key], value)
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
    'view',
    [
        b'K\x00' + opcodes((np.int8(17),)) + opcodes((np.int8(8),)),  # int8 would wrap
        opcodes(np.int8(0)) + b'K\x03\x85K\x01\x85',
        b'K\x00\x88\x85K\x01\x85',
        b'K\x00]K\x03a]K\x01a',
    ],
)
def test_sizes_are_tuples_of_int(view, tmp_path):
    with pytest.raises(pickle.UnpicklingError, match='in place of'):
        read(crafted(REBUILD + STORAGE + view + b'\x89NtR', tmp_path))


ARRAY = opcodes(np.arange(4.0).reshape(2, 2))
UNFILLED_ARRAY = b'cnumpy.core.multiarray\n_reconstruct\n)R'
BUFFER = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
NAMESPACE = b'cargparse\nNamespace\n)\x81'
# HistoryBuffer.current, which gives a view of the last row
CURRENT = b'cbuiltins\ngetattr\n' + BUFFER + text('current') + b'\x86R'
F8 = np.dtype('f8')


@pytest.mark.parametrize(
    'state',
    [
        (1, (2**62, 4), F8, False, b''),
        (1, (0, -1), F8, False, b''),
        (1, (-1, -1), F8, False, bytes(8)),
        (1, (3,), F8, False, bytes(16)),
        (1, (1,), F8, False, bytes(16)),
        (1, (1,), F8, False, '\0' * 8),
        (1, (np.int8(1),), F8, False, bytes(8)),
        (1, [1], F8, False, bytes(8)),
        (1, (1,), 'f8', False, bytes(8)),
        (1, (1,), 'O', False, [None]),
    ],
)
def test_states_of_arrays_that_numpy_never_writes(state, tmp_path):
    with pytest.raises(pickle.UnpicklingError, match=r'wrong state|in place of'):
        read(crafted(UNFILLED_ARRAY + opcodes(state) + b'b', tmp_path))


@pytest.mark.parametrize(
    'pickled',
    [
        b'ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb',  # attributes of a function of ours
        b'ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb',  # of a class
        b'ctorch\nfloat32\n}X\x01\x00\x00\x00aK\x01sb',
        b'}}X\x01\x00\x00\x00aK\x01sb',
        b'ctorch\nSize\n)\x81',  # __new__ of a class that is made by a call
        BUFFER + b']]\x86R',  # a call of a class that is made by __new__
        CURRENT + NAMESPACE + b'}' + text('_log_history') + ARRAY + b'sb\x85R',  # of what a call has given
        CURRENT + b'}' + text('a') + b'K\x01sb',
        ARRAY + opcodes(np.zeros((2, 2)).__reduce__()[2]) + b'b',  # frees the array's first content
        ARRAY + b'K\x00K\x01s',  # writes into it
        b'ccollections\nOrderedDict\n)RK\x01a',
        NAMESPACE + b'(K\x01K\x01u',
        ARRAY + b'(K\x01e',
        b'c_codecs\nencode\n' + NAMESPACE + text('latin1') + b'\x86R',
        b'cnumpy.core.multiarray\nscalar\n' + text('f8') + opcodes(bytes(8)) + b'\x86R',
        b'cnumpy.core.multiarray\nscalar\n' + opcodes(F8) + ARRAY + b'\x86R',
        b'ctorch._utils\n_rebuild_parameter\n' + NAMESPACE + b'\x88N\x87R',
        REBUILD + STORAGE + b'K\x00K\x03\x85K\x01\x85\x89N}' + text('other') + b'\x88stR',
        REBUILD + NAMESPACE + b'K\x00K\x03\x85K\x01\x85\x89NtR',
        b'cnumpy\ndtype\n' + text('>f8') + b'\x85R',
        b'cnumpy\ndtype\n' + text('f8,f8') + b'\x85R',
        b'X\x01\x00\x00\x00aQ',
        b'(X\x01\x00\x00\x00actorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x03tQ',
        b'ctorch\nSize\n(X\x01\x00\x00\x00atR',
    ],
)
def test_what_torch_never_writes_is_refused(pickled, tmp_path):
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        read(crafted(pickled, tmp_path))
    assert not hasattr(OrderedDict, 'a')
    assert not hasattr(HistoryBuffer.current, 'a')


@pytest.mark.parametrize(
    'pickled',
    [
        ARRAY + b'\x98',  # READONLY_BUFFER
        b'ccollections\nOrderedDict\n)}\x92',  # NEWOBJ_EX
        b'(icollections\nOrderedDict\n',  # INST
        b'(ccollections\nOrderedDict\no',  # OBJ
        b'\x82\x01',  # EXT1
        b'P0\n',  # PERSID
        text('builtins') + text('set') + b'\x93',  # STACK_GLOBAL
        b'\x8f(K\x01\x90',  # ADDITEMS
        b'\x96' + bytes(8),  # BYTEARRAY8
    ],
)
def test_opcodes_that_torch_never_writes_are_refused(pickled, tmp_path):
    with pytest.raises(pickle.UnpicklingError, match='Unsupported operand'):
        read(crafted(pickled, tmp_path))


def test_methods_come_from_classes(tmp_path):
    """Not from a file's attributes, which may bear any name."""
    shadowed = NAMESPACE + b'}' + text('__setstate__') + CURRENT + b'sb}' + text('a') + b'K\x01sb'
    assert read(crafted(shadowed, tmp_path)).a == 1


def test_big_endian_files_are_refused(tmp_path):
    with pytest.raises(pickle.UnpicklingError, match='big-endian'):
        read(crafted(b'N', tmp_path, byteorder=b'big'))
