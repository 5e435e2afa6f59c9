import argparse
import io
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
from mmengine import fileio
from mmengine.logging import MMLogger
from mmengine.runner.checkpoint import CheckpointLoader
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .layouts import StateDict, fuse_slide_attention, to_ours

# What a host's weights cannot have: Slide Attention's own parameters, which start as plain local attention, and the
# norms of a backbone's outputs.
OPTIONAL = re.compile(
    r'\.(shift_bias|deform_weight|deform_bias|fused_weight|fused_bias|relative_position_bias)$|^stages\.\d+\.norm\.'
)


def load_pretrained(model: nn.Module, checkpoint: str, prefix: str | None = None, map_location: Any = 'cpu') -> None:
    """Starts a backbone from a checkpoint of any layout in `mmslide.weights.layouts`.

    Position embeddings and relative position bias tables are resized; for a model with deploy=True the two paths of
    Slide Attention are merged. What was missing, unexpected or resized is logged
    as one table.

    Args:
        model: one of our backbones.
        checkpoint: a file or URL; the state dict may lie under 'state_dict' or 'model', its keys may begin with
            'module.' or 'backbone.'.
        prefix: takes only the keys that begin with it. None finds 'backbone.' by itself.

    Raises:
        ValueError: the file cannot be read, holds something else, or weights of another host or another size, or fused
            ones for a model that is not.
        ImportError: it is a .safetensors file, and the package safetensors is not installed.
    """
    content = read_state_dict(checkpoint, map_location)
    if prefix is None:
        prefix = find_prefix(content)
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    stripped = {key[len(prefix) :]: value for key, value in content.items() if key.startswith(prefix)}
    if not stripped:
        raise ValueError(f'no key of {checkpoint} begins with {prefix=}; the first ones are {list(content)[:3]}')
    layout, state = to_ours(stripped)
    target = model.state_dict()
    if any(key.endswith('.fused_weight') for key in target):
        state = fuse_slide_attention(state)
    state, resized = _fit(state, target)

    missing = [key for key in target if key not in state]
    unexpected = [key for key in state if key not in target]
    essential = [key for key in target if not OPTIONAL.search(key)]
    absent = [key for key in essential if key in missing]
    wrong = [
        f'{key} {tuple(state[key].shape)} instead of {tuple(target[key].shape)}'
        for key in target
        if key in state and state[key].shape != target[key].shape
    ]
    foreign = sorted(_host_kinds(state) - _host_kinds(target))
    if wrong or foreign or len(absent) > len(essential) // 2:
        if wrong:
            problem = f'{len(wrong)} shapes differ: {"; ".join(wrong[:3])}'
        elif foreign:
            problem = f'it has {foreign[0]}, which this model has not'
        else:
            problem = f'it lacks {len(absent)} of {len(essential)} parameters, {absent[:3]} among them'
        raise ValueError(
            f'{checkpoint} ({layout} layout) does not fit this {type(model).__name__}: {problem}. '
            'Check the arch and the host of the checkpoint.'
        )
    model.load_state_dict(state, strict=False)
    groups = {'missing, own initial value': missing, 'unexpected, not used': unexpected, 'resized': resized}
    table = key_table(groups if missing or unexpected or resized else {'all keys match': ['']})
    text = io.StringIO()
    Console(file=text, width=140).print(table)
    logger = MMLogger.get_current_instance()
    log = logger.warning if absent else logger.info
    log('pretrained weights of %s, %s layout\n%s', checkpoint, layout, text.getvalue())


def read_state_dict(checkpoint: str, map_location: Any = 'cpu') -> StateDict:
    """The tensors of a checkpoint file or URL, out of their wrappers 'state_dict', 'model' and 'module.'.

    A name that ends in .safetensors is read as that format, everything else as torch's.

    Raises:
        ValueError: the file cannot be read (in torch's sandbox), or holds no state dict.
        ImportError: it is a .safetensors file, and the package safetensors is not installed.
    """
    return find_state_dict(read_checkpoint(checkpoint, map_location), checkpoint)


def read_checkpoint(checkpoint: str, map_location: Any = 'cpu') -> Any:
    """What a checkpoint file or URL holds, meta data and all. See `read_state_dict`."""
    return _read_safetensors(checkpoint) if is_safetensors(checkpoint) else _read_torch(checkpoint, map_location)


def find_state_dict(content: Any, checkpoint: str) -> StateDict:
    """The tensors of what `read_checkpoint` has read. See `read_state_dict`."""
    for wrapper in ('state_dict', 'model'):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not any(isinstance(x, Tensor) for x in content.values()):
        raise ValueError(f'{checkpoint} holds no state dict, but {type(content).__name__}')
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if any(key.startswith('module.') for key in state):
        state = {key.removeprefix('module.'): value for key, value in state.items()}
    return state


def is_safetensors(path: str) -> bool:
    return path.endswith('.safetensors')


def import_safetensors(path: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f'{path} needs the package safetensors. Run: pip install safetensors') from error
    return safetensors


def find_prefix(state: StateDict) -> str:
    """What the backbone's keys begin with."""
    return 'backbone.' if any(key.startswith('backbone.') for key in state) else ''


def key_table(groups: Mapping[str, Sequence[str]]) -> Table:
    """For each group of keys one row for all that differ in their numbers only."""
    table = Table()
    for column in ('', 'keys', 'number'):
        table.add_column(column)
    for what, keys in groups.items():
        for pattern, count in Counter(re.sub(r'\.\d+(?=\.)', '.*', key) for key in keys).items():
            table.add_row(what, pattern, str(count) if pattern else '')
        table.add_section()
    return table


def _read_safetensors(checkpoint: str) -> Any:
    safetensors = import_safetensors(checkpoint)
    try:
        return safetensors.torch.load(fileio.get(checkpoint))
    except safetensors.SafetensorError as error:
        raise ValueError(f'{checkpoint} is not a readable checkpoint: {error}') from error


def _read_torch(checkpoint: str, map_location: Any) -> Any:
    # What the authors' training scripts keep beside the weights; read as plain containers, here only.
    harmless: list = [(OrderedDict, 'yacs.config.CfgNode'), (argparse.Namespace, 'argparse.Namespace')]
    try:
        with torch.serialization.safe_globals(harmless):
            # torch.load inside, with weights_only=True as its default.
            return CheckpointLoader.load_checkpoint(checkpoint, map_location=map_location)
    except (FileNotFoundError, PermissionError, URLError):
        raise
    except Exception as error:  # a damaged file can fail anywhere in the unpickler, in any way
        raise ValueError(
            f'{checkpoint} is not a readable checkpoint (damaged, or more than weights): {error}'
        ) from error


def _host_kinds(state: StateDict) -> set[str]:
    """What tells one host's keys from another's: all but the token mixers, numbers aside."""
    return {
        re.sub(r'\d+', '*', key)
        for key in state
        if key.startswith('stages.') and '.attn.' not in key and not OPTIONAL.search(key)
    }


def _fit(state: StateDict, target: StateDict) -> tuple[StateDict, list[str]]:
    """Brings a state dict in our layout to the shapes of one model: joins q and kv, resizes maps and tables."""
    state, resized = dict(state), []
    for key, wanted in target.items():
        split = key.replace('.attn.qkv.', '.attn.q.'), key.replace('.attn.qkv.', '.attn.kv.')
        if key not in state and split[0] in state and split[1] in state:
            state[key] = torch.cat([state.pop(part) for part in split])
        value = state.get(key)
        if value is None:
            continue
        fitted = value
        if key.endswith('position_embedding'):
            fitted = _fit_map(value, wanted)
        elif key.endswith('relative_position_bias_table') and value.shape[1:] == wanted.shape[1:]:
            fitted = _resize_table(value, len(wanted))
        if fitted.numel() != value.numel():
            resized.append(f'{key} {tuple(value.shape)} to {tuple(fitted.shape)}')
        state[key] = fitted
    return state, resized


def _fit_map(value: Tensor, wanted: Tensor) -> Tensor:
    """A position embedding (1, N, C) or (1, h, w, C) as (1, H, W, C) of the model; a class token is dropped."""
    height, width, channels = wanted.shape[1:]
    if value.shape[-1] != channels:
        return value
    if value.ndim == 3:
        count = value.shape[1]
        side = int(count**0.5)
        size = (height, width) if count in (height * width, height * width + 1) else (side, side)
        value = value[:, count - size[0] * size[1] :].unflatten(1, size)
    if value.shape == wanted.shape:
        return value
    resized = F.interpolate(value.permute(0, 3, 1, 2), size=(height, width), mode='bilinear')
    return resized.permute(0, 2, 3, 1)


def _resize_table(value: Tensor, count: int) -> Tensor:
    """A relative position bias table ((2w - 1)², heads) for another window."""
    old, new = int(len(value) ** 0.5), int(count**0.5)
    if old == new:
        return value
    table = F.interpolate(value.t().unflatten(1, (old, old)).unsqueeze(0), size=(new, new), mode='bicubic')
    return table[0].flatten(1).t()
