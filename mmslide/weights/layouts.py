"""Key layouts of checkpoints in the wild, each turned into ours by a pure function on a state dict.

Buffers that the model computes anew are left out. Every other key that a layout's rules do not name (a classifier's,
say) is passed through unchanged, so that the loader can report it.
"""

import re
import warnings
from collections.abc import Callable

import torch

from mmslide.checkpoints import StateDict
from mmslide.ops import fixed_shift, merge_paths

Rules = list[tuple[str, str]]

MLP: Rules = [(r'\.mlp\.fc1\.', '.ffn.layers.0.0.'), (r'\.mlp\.fc2\.', '.ffn.layers.1.')]
SWIN: Rules = [
    (r'^patch_embed\.proj\.', 'stages.0.embed.projection.'),
    (r'^patch_embed\.norm\.', 'stages.0.embed.norm.'),
]
# Twins' layouts, theirs and ours: how keys begin, with # for any number; the first that fits is taken.
TWINS: Rules = [
    ('patch_embeds.#.proj.', 'stages.#.embed.projection.'),
    ('patch_embeds.#.norm.', 'stages.#.embed.norm.'),
    ('blocks.#.#.mlp.fc1.', 'stages.#.blocks.#.ffn.layers.0.0.'),
    ('blocks.#.#.mlp.fc2.', 'stages.#.blocks.#.ffn.layers.1.'),
    ('blocks.#.#.', 'stages.#.blocks.#.'),
    ('pos_block.#.proj.0.', 'stages.#.peg.proj.'),
    ('norm_list.#.', 'stages.#.norm.'),
]
MMSEG_TWINS: Rules = [
    ('patch_embeds.#.', 'stages.#.embed.'),
    ('layers.#.#.', 'stages.#.blocks.#.'),
    ('position_encodings.#.', 'stages.#.peg.'),
    ('norm_list.#.', 'stages.#.norm.'),
]
MMPRETRAIN_TWINS: Rules = [
    ('patch_embeds.#.', 'stages.#.embed.'),
    ('stages.#.#.', 'stages.#.blocks.#.'),
    ('position_encodings.#.', 'stages.#.peg.'),
    ('norm_after_stage#.', 'stages.#.norm.'),
]
COMPUTED = ('relative_position_index', 'attn_mask', 'dep_conv.weight')


def to_mmslide(state: StateDict) -> tuple[str, StateDict]:
    """Recognises the layout from the keys: its name and the state dict in our layout.

    Raises:
        ValueError: no layout has such keys.
    """
    for name, (pattern, convert) in LAYOUTS.items():
        if any(re.search(pattern, key) for key in state):
            return name, convert(state)
    raise ValueError(
        f'the checkpoint has none of the layouts {list(LAYOUTS)}; its {len(state)} keys begin with {list(state)[:3]}'
    )


def from_mmslide(state: StateDict, layout: str) -> StateDict:
    """A state dict in our layout as one of `TARGETS`.

    Raises:
        ValueError: the layout is unknown, or has no place for such weights.
    """
    if layout not in TARGETS:
        raise ValueError(f'weights can be turned into the layouts {list(TARGETS)}, got {layout!r}')
    return TARGETS[layout](state)


def _rename(state: StateDict, rules: Rules) -> StateDict:
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _ours(state: StateDict) -> StateDict:
    return dict(state)


def _swin(state: StateDict) -> StateDict:
    """The authors' Swin: https://github.com/microsoft/Swin-Transformer."""
    kept = {key: value for key, value in state.items() if not key.endswith(COMPUTED)}
    # A stage's downsampling ends it there, and begins the next one here.
    moved = {
        re.sub(r'^layers\.(\d+)\.downsample\.', lambda match: f'stages.{int(match[1]) + 1}.embed.', key): value
        for key, value in kept.items()
    }
    return _rename(moved, [*SWIN, (r'^layers\.(\d+)\.blocks\.', r'stages.\1.blocks.'), *MLP])


def _slide_swin(state: StateDict) -> StateDict:
    """The authors' Slide-Swin: Swin's keys, with Slide Attention in some blocks."""
    out = dict(state)
    for key in state:
        if key.endswith('.attn.dep_conv1.weight'):
            prefix = key.removesuffix('dep_conv1.weight')
            block = {name.removeprefix(prefix): out.pop(name) for name in state if name.startswith(prefix)}
            out.update({prefix + name: value for name, value in slide_attention(block).items()})
    return _swin(out)


def slide_attention(state: StateDict) -> StateDict:
    """One Slide Attention module from the authors' layout, whose qkv channels are ordered (head, [q, k, v], d).

    Where the fixed kernels have moved away from the shift, the difference is added to the learned ones.
    """
    weight, table = state['dep_conv1.weight'], state['relative_position_bias_table']
    kernel_size, heads = weight.shape[-1], table.shape[1]
    slots = kernel_size**2
    # Depthwise with groups: channel c owns the outputs c·k² to c·k² + k² - 1.
    weight = weight.view(-1, slots, kernel_size, kernel_size)
    if 'dep_conv.weight' in state:
        # In float32, where the difference from the shift's 1 is exact.
        moved = state['dep_conv.weight'].view(weight.shape).float() - fixed_shift(kernel_size).to(weight.device)
        if moved.any():
            warnings.warn(
                f'dep_conv.weight is not the fixed shift (largest difference {float(moved.abs().max()):.1e}): the '
                'difference is added to the deformed kernels',
                stacklevel=2,
            )
            weight = weight + moved
    out = {
        'deform_weight': weight,
        'deform_bias': state['dep_conv1.bias'].view(-1, slots),
        'shift_bias': state['dep_conv.bias'].view(-1, slots),
        'relative_position_bias': table.view(heads, slots),
    }
    for name, value in state.items():
        if name.startswith('qkv.'):
            out[name] = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        elif name.startswith('proj.'):
            out[name] = value
    return out


def fuse_slide_attention(state: StateDict) -> StateDict:
    """Our layout with the two paths of every Slide Attention merged, as `SlideAttention.switch_to_deploy` does."""
    out = dict(state)
    for key in state:
        prefix, found, _ = key.partition('deform_weight')
        names = [f'{prefix}{name}' for name in ('shift_bias', 'deform_weight', 'deform_bias')]
        if found and all(name in state for name in names):
            shift_bias, weight, bias = (out.pop(name) for name in names)
            shift = fixed_shift(weight.shape[-1]).to(weight.device)
            out[f'{prefix}fused_weight'], out[f'{prefix}fused_bias'] = merge_paths(shift, shift_bias, weight, bias)
    return out


def _mmdet_swin(state: StateDict) -> StateDict:
    out = {}
    for key, value in state.items():
        match = re.match(r'stages\.(\d+)\.downsample\.(.*)', key)
        if match:
            key = f'stages.{int(match[1]) + 1}.embed.{match[2]}'
            # Its merged channels are ordered (C, row, column), the authors' and ours (column, row, C).
            value = value.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)
        out[key] = value
    rules = [
        (r'^patch_embed\.', 'stages.0.embed.'),
        (r'\.attn\.w_msa\.', '.attn.'),
        (r'^norm(\d)\.', r'stages.\1.norm.'),
    ]
    return _rename({key: value for key, value in out.items() if not key.endswith(COMPUTED)}, rules)


def _pvt(state: StateDict) -> StateDict:
    """The authors' PVT: https://github.com/whai362/PVT, stages from 1."""
    renamed = _rename(state, [(r'^(patch_embed\d)\.proj\.', r'\1.projection.'), *MLP])
    return {
        re.sub(r'^(patch_embed|pos_embed|block|norm)([1-4])(\.|$)', _pvt_stage, key): value
        for key, value in renamed.items()
    }


def _pvt_stage(match: re.Match[str]) -> str:
    stage = f'stages.{int(match[2]) - 1}.'
    inner = {'patch_embed': 'embed.', 'pos_embed': 'embed.position_embedding', 'block': 'blocks.', 'norm': 'norm.'}
    return stage + inner[match[1]]


def _mmdet_pvt(state: StateDict) -> StateDict:
    out = {}
    for key, value in state.items():
        match = re.match(r'layers\.(\d+)\.1\.(\d+)\.(.*)', key)
        if match and match[3] != 'pos_embed':
            # The list of blocks begins with the position embedding.
            first = int(f'layers.{match[1]}.1.0.pos_embed' in state)
            key = f'stages.{match[1]}.blocks.{int(match[2]) - first}.{match[3]}'
            if '.ffn.' in key:
                value = value.flatten(1) if value.ndim == 4 else value  # 1×1 convolutions
            if '.in_proj_' in key:
                dims = len(value) // 3
                stem, part = key.split('attn.in_proj_')
                out[f'{stem}q.{part}'], out[f'{stem}kv.{part}'] = value[:dims], value[dims:]
                continue
        out[key] = value
    rules = [
        (r'^layers\.(\d+)\.0\.', r'stages.\1.embed.'),
        (r'^layers\.(\d+)\.1\.0\.pos_embed$', r'stages.\1.embed.position_embedding'),
        (r'^layers\.(\d+)\.2\.', r'stages.\1.norm.'),
        (r'\.attn\.attn\.out_proj\.', '.attn.proj.'),
        (r'\.ffn\.layers\.0\.', '.ffn.layers.0.0.'),
        (r'\.ffn\.layers\.3\.', '.ffn.layers.1.'),
    ]
    return _rename(out, rules)


def _authors_twins(state: StateDict) -> StateDict:
    """The authors' Twins, https://github.com/Meituan-AutoML/Twins: all their copies, and timm's."""
    return {_replace_begin(key, TWINS): value for key, value in state.items()}


def _mmseg_twins(state: StateDict) -> StateDict:
    out = {}
    for key, value in state.items():
        key = _replace_begin(key, MMSEG_TWINS)
        if '.attn.attn.in_proj_' in key:
            dims = len(value) // 3
            stem, part = key.split('attn.attn.in_proj_')
            out[f'{stem}attn.q.{part}'], out[f'{stem}attn.kv.{part}'] = value[:dims], value[dims:]
        else:
            out[key.replace('.attn.attn.out_proj.', '.attn.proj.')] = value
    return out


def _mmpretrain_twins(state: StateDict) -> StateDict:
    # An ImageNet classifier has one norm, behind the last stage, which is the authors' `norm`.
    rules = (
        MMPRETRAIN_TWINS
        if 'norm_after_stage0.weight' in state
        else [('norm_after_stage3.', 'norm.'), *MMPRETRAIN_TWINS]
    )
    return {_replace_begin(key, rules): value for key, value in state.items()}


def _to_authors_twins(state: StateDict) -> StateDict:
    _check_twins(state, 'authors')
    rules = [(ours, theirs) for theirs, ours in TWINS]
    return {_replace_begin(key, rules): value for key, value in state.items()}


def _to_mmseg_twins(state: StateDict) -> StateDict:
    _check_twins(state, 'mmseg')
    rules = [(ours, theirs) for theirs, ours in MMSEG_TWINS]
    out = {}
    for key, value in state.items():
        block, _, part = key.rpartition('.attn.')
        if f'{block}.attn.q.weight' in state:  # GSA: there inside an nn.MultiheadAttention
            if part.startswith('kv.'):
                continue
            if part.startswith('q.'):
                value = torch.cat([value, state[key.replace('.attn.q.', '.attn.kv.')]])
                key = key.replace('.attn.q.', '.attn.attn.in_proj_')
            key = key.replace('.attn.proj.', '.attn.attn.out_proj.')
        out[_replace_begin(key, rules)] = value
    return out


def _check_twins(state: StateDict, layout: str) -> None:
    if not any(re.match(r'stages\.\d+\.peg\.', key) for key in state):
        raise ValueError(f'only Twins can be turned into the layout {layout!r}, and these weights have no PEG')
    slides = [key for key in state if key.endswith(('.attn.deform_weight', '.attn.fused_weight'))]
    if slides:
        raise ValueError(f'the layout {layout!r} has no place for Slide Attention, but there is {slides[0]}')


def _replace_begin(key: str, rules: Rules) -> str:
    """The first rule whose left side begins the key replaces that by its right side, with the same numbers for #."""
    for begin, replacement in rules:
        match = re.match(re.escape(begin).replace(r'\#', r'(\d+)'), key)
        if match:
            for number in match.groups():
                replacement = replacement.replace('#', number, 1)
            return replacement + key[match.end() :]
    return key


# name: (a key that only this layout has, conversion); the first that fits is taken
LAYOUTS: dict[str, tuple[str, Callable[[StateDict], StateDict]]] = {
    'mmslide': (r'^stages\.\d+\.embed\.', _ours),
    "authors' Slide-Swin": (r'\.attn\.dep_conv1\.weight$', _slide_swin),
    'mmdet Swin': (r'^stages\.\d+\.blocks\.\d+\.attn\.w_msa\.qkv\.weight$', _mmdet_swin),
    "authors' Swin": (r'^layers\.\d+\.blocks\.\d+\.attn\.qkv\.weight$', _swin),
    'mmdet PVT': (r'^layers\.\d+\.1\.0\.pos_embed$', _mmdet_pvt),
    "authors' PVT": (r'^pos_embed1$', _pvt),
    "authors' Twins": (r'^pos_block\.\d+\.proj\.0\.weight$', _authors_twins),
    'mmseg Twins': (r'^layers\.\d+\.\d+\.ffn\.layers\.0\.0\.weight$', _mmseg_twins),
    'mmpretrain Twins': (r'^stages\.\d+\.\d+\.ffn\.layers\.0\.0\.weight$', _mmpretrain_twins),
}

TARGETS: dict[str, Callable[[StateDict], StateDict]] = {
    'mmslide': _ours,
    'authors': _to_authors_twins,
    'mmseg': _to_mmseg_twins,
}
