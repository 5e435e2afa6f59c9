"""Swin and Slide-Swin.

Authors: https://github.com/microsoft/Swin-Transformer and https://github.com/LeapLabTHU/Slide-Transformer.
"""

from mmslide.checkpoints import StateDict

from .keys import Family, Layout, Rules, rename, without
from .slide import slide_attention

COMPUTED = ('relative_position_index', 'attn_mask', 'dep_conv.weight')
AUTHORS: Rules = [
    ('patch_embed.proj.', 'stages.0.embed.projection.'),
    ('patch_embed.norm.', 'stages.0.embed.norm.'),
    # A stage's downsampling ends it there, and begins the next one here.
    *((f'layers.{i}.downsample.', f'stages.{i + 1}.embed.') for i in range(3)),
    ('layers.#.blocks.#.mlp.fc1.', 'stages.#.blocks.#.ffn.layers.0.0.'),
    ('layers.#.blocks.#.mlp.fc2.', 'stages.#.blocks.#.ffn.layers.1.'),
    ('layers.#.blocks.#.', 'stages.#.blocks.#.'),
]
MMDET: Rules = [
    ('patch_embed.', 'stages.0.embed.'),
    *((f'stages.{i}.downsample.', f'stages.{i + 1}.embed.') for i in range(3)),
    ('stages.#.blocks.#.attn.w_msa.', 'stages.#.blocks.#.attn.'),
    ('norm#.', 'stages.#.norm.'),
]


def _authors(state: StateDict) -> StateDict:
    return rename(without(state, *COMPUTED), AUTHORS)


def _authors_slide(state: StateDict) -> StateDict:
    """Swin's keys, with Slide Attention in some blocks."""
    out = dict(state)
    for key in state:
        if key.endswith('.attn.dep_conv1.weight'):
            prefix = key.removesuffix('dep_conv1.weight')
            block = {name.removeprefix(prefix): out.pop(name) for name in state if name.startswith(prefix)}
            out.update({prefix + name: value for name, value in slide_attention(block).items()})
    return _authors(out)


def _mmdet(state: StateDict) -> StateDict:
    # Its merged channels are ordered (C, row, column), the authors' and ours (column, row, C).
    ordered = {
        key: value.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3) if '.downsample.' in key else value
        for key, value in without(state, *COMPUTED).items()
    }
    return rename(ordered, MMDET)


SWIN = Family(
    'Swin',
    r'\.attn\.relative_position_bias_table$',
    [
        Layout("authors' Slide-Swin", r'\.attn\.dep_conv1\.weight$', _authors_slide),
        Layout('mmdet Swin', r'^stages\.\d+\.blocks\.\d+\.attn\.w_msa\.qkv\.weight$', _mmdet),
        Layout("authors' Swin", r'^layers\.\d+\.blocks\.\d+\.attn\.qkv\.weight$', _authors),
    ],
)
