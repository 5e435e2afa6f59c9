"""Twins. Authors: https://github.com/Meituan-AutoML/Twins; timm has their keys."""

from mmslide.checkpoints import StateDict

from .keys import Family, Layout, Rules, join_attention, rename, reverse, split_attention

AUTHORS: Rules = [
    ('patch_embeds.#.proj.', 'stages.#.embed.projection.'),
    ('patch_embeds.#.norm.', 'stages.#.embed.norm.'),
    ('blocks.#.#.mlp.fc1.', 'stages.#.blocks.#.ffn.layers.0.0.'),
    ('blocks.#.#.mlp.fc2.', 'stages.#.blocks.#.ffn.layers.1.'),
    ('blocks.#.#.', 'stages.#.blocks.#.'),
    ('pos_block.#.proj.0.', 'stages.#.peg.proj.'),
    ('norm_list.#.', 'stages.#.norm.'),
]
MMSEG: Rules = [
    ('patch_embeds.#.', 'stages.#.embed.'),
    ('layers.#.#.', 'stages.#.blocks.#.'),
    ('position_encodings.#.', 'stages.#.peg.'),
    ('norm_list.#.', 'stages.#.norm.'),
]
MMPRETRAIN: Rules = [
    ('patch_embeds.#.', 'stages.#.embed.'),
    ('stages.#.#.', 'stages.#.blocks.#.'),
    ('position_encodings.#.', 'stages.#.peg.'),
    ('norm_after_stage#.', 'stages.#.norm.'),
]


def _mmpretrain(state: StateDict) -> StateDict:
    # An ImageNet classifier has one norm, after the last stage, which is the authors' `norm`.
    rules = MMPRETRAIN if 'norm_after_stage0.weight' in state else [('norm_after_stage3.', 'norm.'), *MMPRETRAIN]
    return rename(state, rules)


TWINS = Family(
    'Twins',
    r'^stages\.\d+\.peg\.',
    [
        Layout(
            "authors' Twins",
            r'^pos_block\.\d+\.proj\.0\.weight$',
            lambda state: rename(state, AUTHORS),
            'authors',
            lambda state: rename(state, reverse(AUTHORS)),
        ),
        Layout(
            'mmseg Twins',
            r'^layers\.\d+\.\d+\.ffn\.layers\.0\.0\.weight$',
            lambda state: split_attention(rename(state, MMSEG)),
            'mmseg',
            lambda state: rename(join_attention(state), reverse(MMSEG)),
        ),
        Layout('mmpretrain Twins', r'^stages\.\d+\.\d+\.ffn\.layers\.0\.0\.weight$', _mmpretrain),
    ],
)
