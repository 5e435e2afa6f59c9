"""Reads all checkpoints: downloads them, checks them for damage, and unpickles them with `weights_only=True`.

mmengine's own loaders unpickle downloads without `weights_only`, so `register_reader` replaces them.
"""

import argparse
import difflib
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from filelock import FileLock
from mmengine import fileio
from mmengine.logging import MMLogger
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor

from .compat import safe_load
from .messages import listed

StateDict = dict[str, Tensor]

# URL schemes that are looked up in one of mmengine's tables.
ALIASES = {
    'torchvision': mmengine_checkpoint.get_torchvision_models,
    'modelzoo': mmengine_checkpoint.get_torchvision_models,
    'open-mmlab': mmengine_checkpoint.get_external_models,
    'openmmlab': mmengine_checkpoint.get_external_models,
    'mmcls': mmengine_checkpoint.get_mmcls_models,
}
OBJECT_STORES = (r'(\S+\:)?s3://', r'(\S+\:)?petrel://')
FOLDER = 0x10  # in an entry's attributes
# The keys that weights are saved under; the first one present is read.
WRAPPERS = ('state_dict_ema', 'state_dict', 'model')
# Saved along with the weights by the authors' training scripts; read as plain containers.
HARMLESS = {'yacs.config.CfgNode': OrderedDict, 'argparse.Namespace': argparse.Namespace}


def register_reader() -> None:
    """Makes mmengine read every checkpoint through `read_checkpoint`: for resume, test, `load_from`, `init_cfg` and in
    inferencers.
    """
    prefixes = ['', 'http://', 'https://', 'pavi://', *OBJECT_STORES, *(f'{alias}://' for alias in ALIASES)]
    mmengine_checkpoint.CheckpointLoader.register_scheme(prefixes, load_from_mmslide, force=True)


def load_from_mmslide(filename: str, map_location: Any = None, **_: Any) -> Any:
    """`read_checkpoint` with the signature that mmengine calls; mmengine logs a part of this function's name."""
    content = read_checkpoint(filename, map_location)
    if filename.startswith('mmcls://'):
        return mmengine_checkpoint._process_mmcls_checkpoint(content)
    meta_of(content).pop('config', None)  # mmengine never writes it, but runs it as Python code on resume
    wrapper = _wrapper(content, filename)
    if wrapper:
        content['state_dict'] = content[wrapper]  # mmengine would treat any other wrapper as the weights
    return content


def read_checkpoint(checkpoint: str | Path, map_location: Any = 'cpu') -> Any:
    """Reads a checkpoint file or URL, including its metadata.

    Names that end in .safetensors are read as safetensors, all others with torch. No code in the file is executed.

    Args:
        checkpoint: a file, or a URL of any scheme that mmengine knows.
        map_location: as in `torch.load`.

    Raises:
        OSError: the file does not exist or is not readable, or the URL cannot be fetched.
        ValueError: the file is damaged, or holds more than tensors and plain values.
        ImportError: it is a .safetensors file, and the package safetensors is not installed.
    """
    name = str(checkpoint)
    with _local_file(name) as file:
        try:
            if file.exists() and not file.is_file():
                raise OSError(0, 'it is not a file')
            file.open('rb').close()
        except FileNotFoundError:
            raise FileNotFoundError(f'checkpoint {name} does not exist') from None
        except OSError as error:
            raise type(error)(f'checkpoint {name} is not readable: {error.strerror}') from error
        # For incomplete downloads: the next attempt would find the same file.
        hint = f'; delete {file} to download it again' if '://' in name else ''
        try:
            return _read_safetensors(file) if is_safetensors(name) else _read_torch(file, map_location)
        except ValueError as error:
            raise ValueError(f'{name} is not a readable checkpoint: {error}{hint}') from error


def read_state_dict(checkpoint: str | Path, map_location: Any = 'cpu') -> StateDict:
    """The tensors of a checkpoint file or URL, without the prefix 'module.'.

    They may be nested under 'state_dict_ema', 'state_dict' or 'model'. If a file has both of the first two, as saved by
    timm's training scripts, the moving average is read.

    Args:
        checkpoint: a file, or a URL of any scheme that mmengine knows.
        map_location: as in `torch.load`.

    Raises:
        OSError, ImportError: see `read_checkpoint`.
        ValueError: see `read_checkpoint`, or it has no state dict.
    """
    return find_state_dict(read_checkpoint(checkpoint, map_location), checkpoint)


def find_state_dict(content: Any, checkpoint: str | Path) -> StateDict:
    """The tensors in the result of `read_checkpoint`. See `read_state_dict`."""
    wrapper = _wrapper(content, checkpoint)
    if wrapper:
        content = content[wrapper]
    if not isinstance(content, dict) or not any(isinstance(x, Tensor) for x in content.values()):
        raise ValueError(f'{checkpoint} holds no state dict, but {_described(content)}')
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    odd = [key for key, value in state.items() if not isinstance(key, str) or value.is_meta]
    if odd:
        raise ValueError(
            f'{checkpoint} holds no state dict: the names must be strings and the tensors have data, got {odd[0]!r}'
        )
    if any(key.startswith('module.') for key in state):
        state = {key.removeprefix('module.'): value for key, value in state.items()}
    return state


def _wrapper(content: Any, checkpoint: str | Path) -> str | None:
    """The key that contains the weights; None if there is none."""
    found = [name for name in WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)]
    if found[:2] == ['state_dict_ema', 'state_dict']:
        MMLogger.get_current_instance().info(
            '%s holds state_dict and state_dict_ema: the averaged weights, state_dict_ema, are loaded', checkpoint
        )
    return found[0] if found else None


def meta_of(content: Any) -> dict[str, Any]:
    """The metadata in the result of `read_checkpoint`; {} if there is none."""
    meta = content.get('meta') if isinstance(content, dict) else None
    return meta if isinstance(meta, dict) else {}


def dataset_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The data set's part of a checkpoint's metadata, such as classes and palette, with keys in lower case."""
    given = meta.get('dataset_meta')
    return {str(key).lower(): value for key, value in given.items()} if isinstance(given, dict) else {}


def class_names(meta: Mapping[str, Any]) -> list[str]:
    """The classes that a checkpoint was trained on, from its metadata; [] if they are not stored."""
    return list(dataset_meta(meta).get('classes') or ())


def save_checkpoint(content: Any, file: Path) -> None:
    """`torch.save`.

    Raises:
        OSError: the file cannot be written (torch raises RuntimeError).
    """
    try:
        torch.save(content, file)
    except RuntimeError as error:
        raise OSError(f'cannot write {file.name}: {str(error).splitlines()[0]}') from error


def check_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises:
    ValueError: weights are NaN or infinite; the message names the first ones.
    """
    names = non_finite(state)
    if names:
        raise ValueError(
            f'{source} has NaN or infinite values in {len(names)} of {len(state)} tensors: {listed(names)}'
        )


def non_finite(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the floating-point tensors with NaN or infinite values."""
    floats = {key: value.detach() for key, value in state.items() if value.is_floating_point()}
    floats = {key: value.coalesce().values() if value.is_sparse else value for key, value in floats.items()}
    if not floats:
        return []
    finite = [value.isfinite().all() for value in floats.values()]
    # Stacked, so that a GPU is synchronized only once.
    flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()
    return [key for key, flag in zip(floats, flags, strict=True) if not flag]


def is_safetensors(path: str | Path) -> bool:
    return str(path).endswith('.safetensors')


def import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('.safetensors files need the package safetensors. Run: pip install safetensors') from error
    return safetensors


@contextmanager
def _local_file(checkpoint: str) -> Iterator[Path]:
    if checkpoint.partition('://')[0] in ALIASES:
        checkpoint = _resolve_alias(checkpoint)
    if checkpoint.startswith(('http://', 'https://')):
        yield fetch(checkpoint)
    elif any(re.match(pattern, checkpoint) for pattern in OBJECT_STORES):
        with fileio.get_local_path(checkpoint, backend_args={'backend': 'petrel'}) as path:
            yield Path(path)
    elif '://' in checkpoint:
        raise ValueError(f'{checkpoint}: checkpoints are read from files, http://, https://, s3:// and petrel://')
    else:
        yield Path(checkpoint).expanduser()


def _resolve_alias(alias: str) -> str:
    """The URL or file in mmengine's tables for an address such as openmmlab://NAME.

    Raises:
        ValueError: there is no such entry.
        ImportError: the address needs torchvision, which cannot be imported.
    """
    scheme, _, name = alias.partition('://')
    try:
        table = ALIASES[scheme]()
    except ImportError as error:
        raise ImportError(f'checkpoint {alias} needs torchvision, which cannot be imported: {error}') from error
    if scheme in ('openmmlab', 'open-mmlab'):
        name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        raise ValueError(f'mmengine knows no checkpoint {alias}' + (f'; did you mean {close[0]}?' if close else ''))
    found = table[name]
    # The user's own table, open_mmlab.json in that folder, may also list files there.
    return found if '://' in found else os.path.join(mmengine_checkpoint._get_mmengine_home(), found)


def fetch(url: str) -> Path:
    """Downloads a file into torch.hub's cache folder, which mmengine also uses, unless it is already there.

    Raises:
        OSError: it cannot be downloaded.
    """
    file = Path(torch.hub.get_dir(), 'checkpoints', os.path.basename(urlparse(url).path))
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f'{file}.lock'):  # only one of the processes on this machine downloads
        if not file.exists():
            try:
                torch.hub.download_url_to_file(url, str(file), progress=os.isatty(2))
            except (OSError, ValueError, HTTPException) as error:
                raise OSError(f'cannot download {url}: {error}') from error
    return file


def _read_safetensors(file: Path) -> Any:
    safetensors = import_safetensors()
    try:
        return safetensors.torch.load(file.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error


def _read_torch(file: Path, map_location: Any) -> Any:
    damaged = 'it is damaged or incomplete (a training killed while saving leaves such a file)'
    if not _is_whole(file):
        raise ValueError(damaged)
    try:
        return safe_load(file, map_location, HARMLESS)
    except torch.cuda.OutOfMemoryError:
        raise
    except MemoryError as error:
        raise ValueError('it is damaged, or does not fit into memory') from error
    except Exception as error:  # a damaged file can fail anywhere in the unpickler, in any way
        # Without torch's advice to read the file with weights_only=False, which would execute its code.
        pattern = r'(?:GLOBAL|WeightsUnpickler error:)\s+([^\n]+?)(?: was not| whose module|\n|$)'
        refusal = re.search(pattern, str(error))
        what = 'a TorchScript program' if 'TorchScript' in str(error) else refusal and refusal[1]
        if (what and 'Unsupported operand' in what) or (not what and _is_no_zip(file)):
            reason = 'it is damaged, or not a zip file of torch.save with its default pickle_protocol; save it again'
        elif what:
            reason = f'it is damaged, or holds more than tensors and plain values ({what})'
        else:
            reason = damaged
        raise ValueError(reason) from error


def _is_no_zip(file: Path) -> bool:
    """Whether a file does not even start like a zip file, unlike a truncated one."""
    with file.open('rb') as stream:
        return stream.read(2) not in (b'PK', b'')


def _is_whole(file: Path) -> bool:
    """Whether the checksums of a zip file are correct, which torch does not check; other formats have none."""
    try:
        if not zipfile.is_zipfile(file):
            return True
        with zipfile.ZipFile(file) as archive:
            # For entries marked as folders, torch reads nothing and returns uninitialized memory.
            folders = any(entry.external_attr & FOLDER for entry in archive.infolist())
            return not folders and archive.testzip() is None
    except Exception:  # a flipped bit anywhere in the archive's own structures
        return False


def _described(content: Any) -> str:
    if not isinstance(content, dict):
        return type(content).__name__
    return f'a dict with the keys {list(content)[:5]}' if content else 'an empty dict'
