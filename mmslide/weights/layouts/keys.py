"""The building blocks of all key layouts."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mmslide.checkpoints import StateDict

# Key prefixes, theirs and ours, with # for any number; the first match is used.
Rules = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Layout:
    """How one implementation of a family names and orders its parameters.

    Args:
        name: for messages.
        pattern: matches a key that only this layout has.
        to_mmslide: converts a state dict in this layout to ours.
        target: its name for `from_mmslide`; None if that direction does not exist.
        from_mmslide: converts a state dict in our layout to this one.
    """

    name: str
    pattern: str
    to_mmslide: Callable[[StateDict], StateDict]
    target: str | None = None
    from_mmslide: Callable[[StateDict], StateDict] | None = None


@dataclass(frozen=True)
class Family:
    """Backbones that share their layouts.

    Args:
        name: for messages.
        pattern: matches a key that only this family has in our layout.
        layouts: those with more specific patterns first.
    """

    name: str
    pattern: str
    layouts: Sequence[Layout]


def rename(state: StateDict, rules: Rules) -> StateDict:
    """Renames the keys by the rules; keys that match no rule are unchanged."""
    return {_replace_begin(key, rules): value for key, value in state.items()}


def reverse(rules: Rules) -> Rules:
    return [(ours, theirs) for theirs, ours in rules]


def _replace_begin(key: str, rules: Rules) -> str:
    for begin, replacement in rules:
        match = re.match(re.escape(begin).replace(r'\#', r'(\d+)'), key)
        if match:
            for number in match.groups():
                replacement = replacement.replace('#', number, 1)
            return replacement + key[match.end() :]
    return key


def without(state: StateDict, *ends: str) -> StateDict:
    """Drops keys with these suffixes, such as buffers that the model computes."""
    return {key: value for key, value in state.items() if not key.endswith(ends)}


def split_attention(state: StateDict) -> StateDict:
    """Converts OpenMMLab's subsampled attention, an nn.MultiheadAttention at `.attn.attn.`, to q, kv and proj."""
    out = {}
    for key, value in state.items():
        if '.attn.attn.in_proj_' in key:
            dims = len(value) // 3
            stem, part = key.split('attn.attn.in_proj_')
            out[f'{stem}attn.q.{part}'], out[f'{stem}attn.kv.{part}'] = value[:dims], value[dims:]
        else:
            out[key.replace('.attn.attn.out_proj.', '.attn.proj.')] = value
    return out


def join_attention(state: StateDict) -> StateDict:
    """The inverse."""
    out = {}
    for key, value in state.items():
        block, _, part = key.rpartition('.attn.')
        if f'{block}.attn.q.weight' in state:
            if part.startswith('kv.'):
                continue
            if part.startswith('q.'):
                value = torch.cat([value, state[key.replace('.attn.q.', '.attn.kv.')]])
                key = key.replace('.attn.q.', '.attn.attn.in_proj_')
            key = key.replace('.attn.proj.', '.attn.attn.out_proj.')
        out[key] = value
    return out
