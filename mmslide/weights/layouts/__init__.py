"""Key layouts of published checkpoints, each converted to ours by a pure function on a state dict.

Buffers that the model computes itself are dropped. All other keys without a rule in a layout (such as a classifier's)
are kept unchanged, so that the loader can report them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mmslide.checkpoints import StateDict

from .cswin import CSWIN
from .keys import Layout
from .nat import NAT
from .pvt import PVT
from .pvtv2 import PVTV2
from .slide import fuse_slide_attention, slide_attention
from .swin import SWIN
from .twins import TWINS

__all__ = ['FAMILIES', 'TARGETS', 'from_mmslide', 'fuse_slide_attention', 'slide_attention', 'to_mmslide']

OURS = Layout('mmslide', r'^stages\.\d+\.embed\.', dict)
FAMILIES = (SWIN, PVT, PVTV2, CSWIN, NAT, TWINS)
LAYOUTS = (OURS, *(layout for family in FAMILIES for layout in family.layouts))  # the first match is used
TARGETS = list(dict.fromkeys(['mmslide', *(layout.target for layout in LAYOUTS if layout.target)]))


def to_mmslide(state: StateDict) -> tuple[str, StateDict]:
    """Detects the layout from the keys; returns its name and the state dict in our layout.

    Raises:
        ValueError: no layout has such keys, or one of several tensors to be joined, such as q, k and v, is missing.
    """
    for layout in LAYOUTS:
        if _has(state, layout.pattern):
            with _missing_keys(layout.name):
                return layout.name, layout.to_mmslide(state)
    raise ValueError(
        f'the checkpoint has none of the layouts {[layout.name for layout in LAYOUTS]}; its {len(state)} keys begin '
        f'with {list(state)[:3]}'
    )


def from_mmslide(state: StateDict, target: str) -> StateDict:
    """Converts a state dict in our layout to one of `TARGETS`.

    Raises:
        ValueError: the layout is unknown or does not support these weights, or tensors to be joined are missing.
    """
    if target not in TARGETS:
        raise ValueError(f'weights can be converted to the layouts {TARGETS}, got {target!r}')
    if target == 'mmslide':
        return dict(state)
    slides = [key for key in state if key.endswith(('.attn.deform_weight', '.attn.fused_weight'))]
    if slides:
        raise ValueError(f'the layout {target!r} does not support Slide Attention, got {slides[0]}')
    known = [
        (family, layout.from_mmslide)
        for family in FAMILIES
        for layout in family.layouts
        if layout.target == target and layout.from_mmslide
    ]
    convert = next((convert for family, convert in known if _has(state, family.pattern)), None)
    if convert is None:
        names = ', '.join(family.name for family, _ in known)
        raise ValueError(f'the layout {target!r} exists for {names}, but these weights are of another backbone')
    with _missing_keys('mmslide'):
        return convert(state)


def _has(state: StateDict, pattern: str) -> bool:
    return any(re.search(pattern, key) for key in state)


@contextmanager
def _missing_keys(layout: str) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise ValueError(f'the {layout} weights are incomplete: {error.args[0]} is missing') from error
