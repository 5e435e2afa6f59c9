import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.model import PretrainedInit
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmslide.checkpoints import StateDict, read_state_dict
from mmslide.registry import WEIGHT_INITIALIZERS

from .layouts import fuse_slide_attention, to_mmslide

# Not part of a host's weights: Slide Attention's own parameters, which are initialized to plain local attention, and
# the norms of a backbone's outputs.
OPTIONAL = re.compile(
    r'\.(shift_bias|deform_weight|deform_bias|fused_weight|fused_bias|relative_position_bias)$|^stages\.\d+\.norm\.'
)


def is_pretrained(init_cfg: Mapping[str, Any]) -> bool:
    """Whether an init_cfg is mmengine's PretrainedInit, by name or (in Python configs) by class."""
    kind = init_cfg.get('type')
    return (WEIGHT_INITIALIZERS.get(kind) if isinstance(kind, str) else kind) is PretrainedInit


def load_pretrained(
    model: nn.Module, checkpoint: str | Path, prefix: str | None = None, map_location: Any = 'cpu'
) -> None:
    """Loads a checkpoint of any layout in `mmslide.weights.layouts` into a backbone.

    Position embeddings and relative position bias tables are resized; for a model with deploy=True, the two paths of
    Slide Attention are merged. Missing, unexpected and resized keys are logged as a table.

    Args:
        model: a backbone of this package.
        checkpoint: file or URL, see `read_state_dict`; its keys may begin with 'backbone.'.
        prefix: load only keys that begin with this prefix. None detects 'backbone.'.
        map_location: as in `torch.load`.

    Raises:
        OSError, ImportError: the file cannot be read, see `mmslide.checkpoints.read_checkpoint`.
        ValueError: it is damaged or not a checkpoint, its weights are of another host or size, or they are fused and
            the model is not.
    """
    content = read_state_dict(checkpoint, map_location)
    if prefix is None:
        prefix = find_prefix(content)
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    stripped = {key[len(prefix) :]: value for key, value in content.items() if key.startswith(prefix)}
    if not stripped:
        raise ValueError(f'no key of {checkpoint} begins with {prefix=}; the first ones are {list(content)[:3]}')
    layout, state = to_mmslide(stripped)
    target = model.state_dict()
    if any(key.endswith('.fused_weight') for key in target):
        state = fuse_slide_attention(state)
    state, resized = _fit(_place_last_norm(state, target), target)

    missing = [key for key in target if key not in state]
    unexpected = [key for key in state if key not in target]
    essential = [key for key in target if not OPTIONAL.search(key)]
    absent = [key for key in essential if key in missing]
    wrong = [
        f'{key} {tuple(state[key].shape)} instead of {tuple(target[key].shape)}'
        for key in target
        if key in state and state[key].shape != target[key].shape
    ]
    built = {_stage(key) for key in target}  # a backbone that returns only finer maps has no last stages
    foreign = sorted(_host_kinds(key for key in state if _stage(key) in built) - _host_kinds(target))
    if wrong or foreign or len(absent) > len(essential) // 2:
        if wrong:
            problem = f'{len(wrong)} shapes differ: {"; ".join(wrong[:3])}'
        elif foreign:
            problem = f'it has {foreign[0]}, which this model does not have'
        else:
            problem = f'it lacks {len(absent)} of {len(essential)} parameters, such as {absent[:3]}'
        raise ValueError(
            f'{checkpoint} ({layout} layout) does not fit this {type(model).__name__}: {problem}. '
            'Check the arch and the host of the checkpoint.'
        )
    model.load_state_dict(state, strict=False)
    groups = {'missing, keeps its initial value': missing, 'unexpected, not used': unexpected, 'resized': resized}
    table = key_table(groups if missing or unexpected or resized else {'all keys match': ['']})
    text = io.StringIO()
    Console(file=text, width=140).print(table)
    logger = MMLogger.get_current_instance()
    blocks = {_block(key) for key in target}
    deeper = any('.blocks.' in key and _stage(key) in built and _block(key) not in blocks for key in unexpected)
    log = logger.warning if absent or deeper else logger.info
    log('pretrained weights of %s, %s layout\n%s', checkpoint, layout, text.getvalue())


def find_prefix(state: StateDict) -> str:
    """The prefix of the backbone's keys."""
    return 'backbone.' if any(key.startswith('backbone.') for key in state) else ''


def key_table(groups: Mapping[str, Sequence[str]]) -> Table:
    """A table with one row in each group for all keys that differ only in their numbers."""
    table = Table()
    for column in ('', 'keys', 'number'):
        table.add_column(column)
    for what, keys in groups.items():
        for pattern, count in Counter(re.sub(r'\.\d+(?=\.)', '.*', key) for key in keys).items():
            table.add_row(what, pattern, str(count) if pattern else '')
        table.add_section()
    return table


def _stage(key: str) -> str:
    return '.'.join(key.split('.')[:2])


def _block(key: str) -> str:
    return '.'.join(key.split('.')[:4])


def _place_last_norm(state: StateDict, target: StateDict) -> StateDict:
    """A classifier's norm after the last stage, `norm` in most layouts, for a model whose only norm this is.

    It is not the norm of an output: those of detectors and segmentors are always initialized from scratch.
    """
    last = max((_stage(key) for key in state if key.startswith('stages.')), default='')
    norm = f'{last}.norm.'
    lone = [
        {_stage(key) for key in keys if re.match(r'stages\.\d+\.norm\.', key)} == {last} for keys in (state, target)
    ]
    for found, before, after in zip(lone, (norm, 'norm.'), ('norm.', norm), strict=True):
        if found:
            names = {key: after + key[len(before) :] for key in state if key.startswith(before)}
            state = {names.get(key, key): value for key, value in state.items()}
    return state


def _host_kinds(keys: Iterable[str]) -> set[str]:
    """The keys that distinguish hosts: all except those of token mixers, without stage and block numbers."""
    return {
        re.sub(r'(?<=^stages\.)\d+|(?<=\.blocks\.)\d+', '*', key)
        for key in keys
        if key.startswith('stages.') and '.attn.' not in key and not OPTIONAL.search(key)
    }


def _fit(state: StateDict, target: StateDict) -> tuple[StateDict, list[str]]:
    """Adapts a state dict in our layout to the shapes of a model: joins q and kv, resizes maps and tables."""
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
        if count - size[0] * size[1] not in (0, 1):
            raise ValueError(
                f'a position embedding with {count} positions fits neither the {height}×{width} map of this model nor '
                'a square map: build the model with the pretrain_img_size of the checkpoint'
            )
        value = value[:, count - size[0] * size[1] :].unflatten(1, size)
    if value.shape == wanted.shape:
        return value
    resized = F.interpolate(value.permute(0, 3, 1, 2), size=(height, width), mode='bilinear')
    return resized.permute(0, 2, 3, 1)


def _resize_table(value: Tensor, count: int) -> Tensor:
    """A relative position bias table ((2w - 1)², heads) resized for another window."""
    old, new = int(len(value) ** 0.5), int(count**0.5)
    if old == new:
        return value
    table = F.interpolate(value.t().unflatten(1, (old, old)).unsqueeze(0), size=(new, new), mode='bicubic')
    return table[0].flatten(1).t()
