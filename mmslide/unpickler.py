"""Reads checkpoints without running them before PyTorch 2.6, whose `torch.load(weights_only=True)` can be bypassed
(CVE-2025-32434).
"""

import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar('T')

STORAGES: dict[str, torch.dtype] = torch.storage._storage_type_to_dtype_map()
ARRAY_KINDS = 'biufc'
UNFILLED = np.dtype('V1')  # of arrays that still lack their state; `_dtype` never gives it


def load(file: Path, map_location: Any, globals_: dict[str, Any]) -> Any:
    """What `torch.save` wrote: tensors, containers, numbers, strings, NumPy's arrays of numbers, and `globals_`.

    Args:
        file: in torch's zip format, with the default `pickle_protocol`.
        map_location: as in `torch.load`.
        globals_: further functions and classes, by their full names in the file, which may call the functions with any
            arguments, and give instances of the classes any dict as their state.

    Raises:
        pickle.UnpicklingError: the file holds anything else, or is a TorchScript program.
    """
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        folder = names[0].split('/')[0]
        if f'{folder}/constants.pkl' in names:
            raise pickle.UnpicklingError('a TorchScript program')
        if f'{folder}/byteorder' in names and archive.read(f'{folder}/byteorder') != b'little':
            raise pickle.UnpicklingError('big-endian numbers')
        return _Reader(archive, folder, map_location, globals_).read(archive.read(f'{folder}/data.pkl'))


class _Storage:
    """Bytes on their device; the dtype is that of the tensors that view them."""

    def __init__(self, data: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype


class _Reader:
    """Calls nothing but `functions`, and changes no object but what it has made itself."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, map_location: Any, globals_: dict[str, Any]) -> None:
        self.archive, self.folder = archive, folder
        self.restore_location = torch.serialization._get_restore_location(map_location)
        self.storages: dict[str, _Storage] = {}
        self.globals = {**ALLOWED, **{f'torch.{name}': dtype for name, dtype in STORAGES.items()}, **globals_}
        self.classes = [value for value in globals_.values() if isinstance(value, type)]
        self.functions = [*ALLOWED.values(), *(value for value in globals_.values() if not isinstance(value, type))]

    def read(self, pickled: bytes) -> Any:
        """Runs the opcodes that `torch.save` writes, and refuses all others."""
        stack: list[Any] = []
        below: list[list[Any]] = []  # the stacks below each mark
        memo: dict[int, Any] = {}
        value: Any
        for opcode, value, _ in pickletools.genops(pickled):
            match opcode.name:
                case 'PROTO' | 'STOP':
                    pass
                case 'BININT' | 'BININT1' | 'BININT2' | 'LONG1' | 'BINFLOAT' | 'BINUNICODE':
                    stack.append(value)
                case 'NONE':
                    stack.append(None)
                case 'NEWTRUE' | 'NEWFALSE':
                    stack.append(opcode.name == 'NEWTRUE')
                case 'EMPTY_TUPLE':
                    stack.append(())
                case 'EMPTY_LIST':
                    stack.append([])
                case 'EMPTY_DICT':
                    stack.append({})
                case 'BINPUT' | 'LONG_BINPUT':
                    memo[value] = stack[-1]
                case 'BINGET' | 'LONG_BINGET':
                    stack.append(memo[value])
                case 'MARK':
                    below.append(stack)
                    stack = []
                case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                    length = int(opcode.name[-1])
                    stack[-length:] = [tuple(stack[-length:])]
                case 'TUPLE':
                    items, stack = stack, below.pop()
                    stack.append(tuple(items))
                case 'APPEND':
                    item = stack.pop()
                    _of(list, stack[-1]).append(item)
                case 'APPENDS':
                    items, stack = stack, below.pop()
                    _of(list, stack[-1]).extend(items)
                case 'SETITEM':
                    item, key = stack.pop(), stack.pop()
                    _set_items(stack[-1], [key, item])
                case 'SETITEMS':
                    items, stack = stack, below.pop()
                    _set_items(stack[-1], items)
                case 'GLOBAL':
                    stack.append(self.find(value.replace(' ', '.')))
                case 'REDUCE':
                    args, function = stack.pop(), stack.pop()
                    stack.append(_one_of(self.functions, function)(*_of(tuple, args)))
                case 'NEWOBJ':
                    args, cls = stack.pop(), stack.pop()
                    stack.append(_one_of(self.classes, cls).__new__(cls, *_of(tuple, args)))
                case 'BUILD':
                    state = stack.pop()
                    self.build(stack[-1], state)
                case 'BINPERSID':
                    stack.append(self.storage(*_of(tuple, stack.pop())))
                case _:
                    raise pickle.UnpicklingError(f'Unsupported operand {opcode.name}')
        return stack.pop()

    def find(self, name: str) -> Any:
        if name not in self.globals:
            raise pickle.UnpicklingError(name)
        return self.globals[name]

    def storage(self, kind: Any, dtype: Any, key: Any, location: Any, _: Any) -> _Storage:
        if _of(str, kind) != 'storage':
            raise pickle.UnpicklingError(f'a persistent {kind}')
        if _of(str, key) not in self.storages:
            content = self.archive.read(f'{self.folder}/data/{key}')
            data = torch.UntypedStorage(0)
            if content:
                data = torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage()
            data = self.restore_location(data, _of(str, location))
            self.storages[key] = _Storage(data, _of(torch.dtype, dtype))
        return self.storages[key]

    def build(self, instance: Any, state: Any) -> None:
        if isinstance(instance, np.dtype):  # complete since `_dtype` made it
            if _of(tuple, state)[1] not in ('<', '|'):
                raise pickle.UnpicklingError('big-endian numbers')
        elif type(instance) is np.ndarray:
            _fill(instance, *_of(tuple, state))
        elif hasattr(_one_of([OrderedDict, *self.classes], type(instance)), '__setstate__'):
            instance.__setstate__(_of(dict, state))
        else:
            vars(instance).update(_of(dict, state))


def _of(cls: type[T], value: Any) -> T:
    if type(value) is not cls:
        raise pickle.UnpicklingError(f'{type(value).__name__} in place of {cls.__name__}')
    return value


def _one_of(allowed: list[Any], value: Any) -> Any:
    if not any(value is x for x in allowed):  # by identity: what a file makes may equal anything
        raise pickle.UnpicklingError(f'a call or a state of a {type(value).__name__}')
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    if type(target) is not OrderedDict:
        _of(dict, target)
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[key] = value


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, _: Any, metadata: Any = None
) -> Tensor:
    storage = _of(_Storage, storage)
    numbers = [_of(int, n) for n in (offset, *_of(tuple, size), *_of(tuple, stride))]
    tensor = torch.empty(0, dtype=storage.dtype, device=storage.data.device)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(numbers) < 0 or (0 not in size and last >= storage.data.nbytes() // tensor.element_size()):
        raise pickle.UnpicklingError('a tensor larger than its data')
    tensor.set_(storage.data, offset, size, stride)
    for flag, value in _of(dict, metadata or {}).items():
        if flag not in ('conj', 'neg') or value is not True:
            raise pickle.UnpicklingError(f'a tensor with {flag}={value}')
        tensor = tensor.conj() if flag == 'conj' else tensor._neg_view()
    return tensor.requires_grad_(_of(bool, requires_grad))


def _parameter(data: Any, requires_grad: Any, _: Any) -> nn.Parameter:
    return nn.Parameter(_of(Tensor, data), _of(bool, requires_grad))


def _encode(text: Any, _: Any) -> bytes:
    """How protocol 2 writes bytes."""
    return _of(str, text).encode('latin1')


def _dtype(name: Any, *_: Any) -> np.dtype:
    dtype = np.dtype(_of(str, name))
    if dtype.kind not in ARRAY_KINDS or not dtype.isnative:
        raise pickle.UnpicklingError(f'an array of {dtype}')
    return dtype


def _array(*_: Any) -> np.ndarray:
    """An empty one, for `_fill`."""
    return np.empty(0, UNFILLED)


def _fill(array: np.ndarray, version: Any, shape: Any, dtype: Any, fortran: Any, content: Any) -> None:
    """Once only, since NumPy frees what the array held before."""
    sizes = [_of(int, n) for n in _of(tuple, shape)]
    whole = min(sizes, default=0) >= 0 and isinstance(dtype, np.dtype)
    if array.dtype != UNFILLED or not whole or math.prod(sizes) * dtype.itemsize != len(_of(bytes, content)):
        raise pickle.UnpicklingError('an array with a wrong state')
    array.__setstate__((version, shape, dtype, fortran, content))


def _scalar(dtype: Any, content: Any) -> np.generic:
    if not isinstance(dtype, np.dtype):
        raise pickle.UnpicklingError('a scalar without a dtype')
    (value,) = np.frombuffer(_of(bytes, content), dtype)
    return value


ALLOWED: dict[str, Any] = {
    'collections.OrderedDict': OrderedDict,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_parameter': _parameter,
    'torch.Size': torch.Size,
    'torch.device': torch.device,
    **{str(dtype): dtype for dtype in STORAGES.values()},
    '_codecs.encode': _encode,
    **{f'{module}.{cls.__name__}': cls for module in ('builtins', '__builtin__') for cls in (bytes, complex, set)},
    'numpy.dtype': _dtype,
    'numpy.ndarray': 'ndarray',  # an argument of _array, never called
    **{
        f'numpy.{package}.multiarray.{name}': function
        for package in ('core', '_core')
        for name, function in (('_reconstruct', _array), ('scalar', _scalar))
    },
}
