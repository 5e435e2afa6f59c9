"""Reads checkpoints without executing code before PyTorch 2.6, where `torch.load(weights_only=True)` can be bypassed
(CVE-2025-32434).
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

STORAGES: dict[str, torch.dtype] = torch.storage._storage_type_to_dtype_map()
ARRAY_KINDS = 'biuf'


def load(file: Path, map_location: Any, globals_: dict[str, Any]) -> Any:
    """Reads a file by `torch.save`: tensors, containers, numbers, strings, NumPy arrays of numbers, and `globals_`.

    Args:
        file: in torch's zip format.
        map_location: as in `torch.load`.
        globals_: further classes and functions, by their full names in the file. Instances of these classes accept any
            state.

    Raises:
        pickle.UnpicklingError: the file contains anything else, or is a TorchScript program.
    """
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        folder = names[0].split('/')[0]
        if f'{folder}/constants.pkl' in names:
            raise pickle.UnpicklingError('a TorchScript program')
        if f'{folder}/byteorder' in names and archive.read(f'{folder}/byteorder') != b'little':
            raise pickle.UnpicklingError('GLOBAL big-endian numbers')
        with archive.open(f'{folder}/data.pkl') as stream:
            return _Unpickler(stream, archive, folder, map_location, globals_).load()


class _Storage:
    """Bytes on a device; the dtype is that of the tensors that view them."""

    def __init__(self, data: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype


class _Unpickler(pickle._Unpickler):
    """Calls only what `find_class` returns, and modifies only objects that it has created itself."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(
        self, stream: IO[bytes], archive: zipfile.ZipFile, folder: str, map_location: Any, globals_: dict[str, Any]
    ) -> None:
        super().__init__(stream)
        self.archive, self.folder = archive, folder
        self.restore_location = torch.serialization._get_restore_location(map_location)
        self.storages: dict[str, _Storage] = {}
        self.classes = tuple(value for value in globals_.values() if isinstance(value, type))
        self.globals = {
            **ALLOWED,
            **{f'torch.{name}': dtype for name, dtype in STORAGES.items()},
            **globals_,
        }

    def find_class(self, module: str, name: str) -> Any:
        found = self.globals.get(f'{module}.{name}')
        if found is None:
            raise pickle.UnpicklingError(f'GLOBAL {module}.{name}')
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, location, _ = pid
        if kind != 'storage' or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f'GLOBAL {kind}')
        if key not in self.storages:
            content = self.archive.read(f'{self.folder}/data/{key}')
            data = torch.UntypedStorage(0)
            if content:
                data = torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage()
            self.storages[key] = _Storage(self.restore_location(data, location), dtype)
        return self.storages[key]

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._new(self.stack[-1], args)

    def load_build(self) -> None:
        state = self.stack.pop()
        instance = self.stack[-1]
        if isinstance(instance, np.dtype):
            if state[1] == '>':
                raise pickle.UnpicklingError('GLOBAL big-endian numbers')
        elif type(instance) is np.ndarray or (type(instance) in self.classes and hasattr(instance, '__setstate__')):
            instance.__setstate__(state)
        elif type(instance) in (OrderedDict, *self.classes):
            vars(instance).update(state)
        else:
            raise pickle.UnpicklingError(f'GLOBAL state of {type(instance).__name__}')

    def _new(self, cls: Any, args: tuple) -> Any:
        if cls not in self.classes:
            raise pickle.UnpicklingError(f'GLOBAL {cls}')
        return cls.__new__(cls, *args)

    def refuse(self) -> None:
        raise pickle.UnpicklingError('GLOBAL an opcode that torch.save does not write')

    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    for _opcode in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[_opcode[0]] = refuse


def _tensor(
    storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], requires_grad: bool, *_: Any
) -> Tensor:
    tensor = torch.empty(0, dtype=storage.dtype, device=storage.data.device)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= storage.data.nbytes() // tensor.element_size()):
        raise pickle.UnpicklingError('GLOBAL a tensor larger than its data')
    return tensor.set_(storage.data, offset, size, stride).requires_grad_(requires_grad)


def _parameter(data: Tensor, requires_grad: bool, *_: Any) -> nn.Parameter:
    return nn.Parameter(data, requires_grad)


def _encode(text: str, encoding: str) -> bytes:
    """Decodes bytes as written by protocol 2."""
    return text.encode('latin1')


def _dtype(name: str, *_: Any) -> np.dtype:
    dtype = np.dtype(str(name))
    if dtype.kind not in ARRAY_KINDS:
        raise pickle.UnpicklingError(f'GLOBAL an array of {dtype}')
    return dtype


def _array(*_: Any) -> np.ndarray:
    """An empty array, whose state is set later."""
    return np.empty(0)


def _scalar(dtype: np.dtype, content: bytes) -> np.generic:
    return np.frombuffer(content, dtype)[0]


ALLOWED: dict[str, Any] = {
    'collections.OrderedDict': OrderedDict,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_parameter': _parameter,
    'torch.Size': torch.Size,
    'torch.device': torch.device,
    **{str(dtype): dtype for dtype in STORAGES.values()},
    '_codecs.encode': _encode,
    'builtins.set': set,
    '__builtin__.set': set,
    'numpy.dtype': _dtype,
    'numpy.ndarray': 'ndarray',  # an argument of _array, never called
    **{
        f'numpy.{package}.multiarray.{name}': function
        for package in ('core', '_core')
        for name, function in (('_reconstruct', _array), ('scalar', _scalar))
    },
}
