"""PVT. Authors: https://github.com/whai362/PVT."""

import re

from mmslide.checkpoints import StateDict

from .keys import Family, Layout, Rules, rename, split_attention

STAGES = range(4)
AUTHORS: Rules = [
    rule
    for i in STAGES  # theirs count from 1
    for rule in (
        (f'patch_embed{i + 1}.proj.', f'stages.{i}.embed.projection.'),
        (f'patch_embed{i + 1}.', f'stages.{i}.embed.'),
        (f'pos_embed{i + 1}', f'stages.{i}.embed.position_embedding'),
        (f'block{i + 1}.#.mlp.fc1.', f'stages.{i}.blocks.#.ffn.layers.0.0.'),
        (f'block{i + 1}.#.mlp.fc2.', f'stages.{i}.blocks.#.ffn.layers.1.'),
        (f'block{i + 1}.#.', f'stages.{i}.blocks.#.'),
        (f'norm{i + 1}.', f'stages.{i}.norm.'),
    )
]
MMDET: Rules = [
    ('layers.#.0.', 'stages.#.embed.'),
    ('layers.#.1.#.ffn.layers.0.', 'stages.#.blocks.#.ffn.layers.0.0.'),
    ('layers.#.1.#.ffn.layers.3.', 'stages.#.blocks.#.ffn.layers.1.'),
    ('layers.#.1.#.', 'stages.#.blocks.#.'),
    ('layers.#.2.', 'stages.#.norm.'),
]


def _authors(state: StateDict) -> StateDict:
    return rename(state, AUTHORS)


def _mmdet(state: StateDict) -> StateDict:
    out = {}
    for key, value in state.items():
        match = re.fullmatch(r'layers\.(\d+)\.1\.(\d+)\.(.*)', key)
        if match:
            # The list of blocks starts with the position embedding.
            stage, index, rest = match[1], int(match[2]), match[3]
            key = f'layers.{stage}.1.{index - 1}.{rest}'
            if rest == 'pos_embed':
                key = f'layers.{stage}.0.position_embedding'
            elif rest.startswith('ffn.') and value.ndim == 4:
                value = value.flatten(1)  # 1×1 convolutions
        out[key] = value
    return rename(split_attention(out), MMDET)


PVT = Family(
    'PVT',
    r'\.position_embedding$',
    [
        Layout('mmdet PVT', r'^layers\.\d+\.1\.0\.pos_embed$', _mmdet),
        Layout("authors' PVT", r'^pos_embed1$', _authors),
    ],
)
