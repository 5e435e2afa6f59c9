"""CSWin. Authors: https://github.com/microsoft/CSWin-Transformer; same layout for classification and segmentation."""

from .keys import Family, Layout, Rules, rename, reverse

AUTHORS: Rules = [
    ('stage1_conv_embed.0.', 'stages.0.embed.projection.'),
    ('stage1_conv_embed.2.', 'stages.0.embed.norm.'),
    *(
        rule
        for i in range(4)  # theirs count from 1
        for rule in (
            (f'merge{i}.conv.', f'stages.{i}.embed.projection.'),
            (f'merge{i}.norm.', f'stages.{i}.embed.norm.'),
            (f'stage{i + 1}.#.qkv.', f'stages.{i}.blocks.#.attn.qkv.'),
            (f'stage{i + 1}.#.attns.#.get_v.', f'stages.{i}.blocks.#.attn.lepe.#.'),
            (f'stage{i + 1}.#.proj.', f'stages.{i}.blocks.#.attn.proj.'),
            (f'stage{i + 1}.#.mlp.fc1.', f'stages.{i}.blocks.#.ffn.layers.0.0.'),
            (f'stage{i + 1}.#.mlp.fc2.', f'stages.{i}.blocks.#.ffn.layers.1.'),
            (f'stage{i + 1}.#.', f'stages.{i}.blocks.#.'),
            (f'norm{i + 1}.', f'stages.{i}.norm.'),
        )
    ),
]


CSWIN = Family(
    'CSWin',
    r'\.attn\.lepe\.\d+\.',
    [
        Layout(
            "authors' CSWin",
            r'^stage1_conv_embed\.',
            lambda state: rename(state, AUTHORS),
            'authors',
            lambda state: rename(state, reverse(AUTHORS)),
        ),
    ],
)
