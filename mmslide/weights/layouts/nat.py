"""NAT. Authors: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer.

DiNAT's files have the same keys as NAT's and do not contain its dilations.
"""

import re

import torch

from mmslide.checkpoints import StateDict

from .keys import Family, Layout, Rules, rename, reverse

STAGES = range(4)
AUTHORS: Rules = [
    ('patch_embed.proj.', 'stages.0.embed.projection.'),
    ('patch_embed.', 'stages.0.embed.'),
    # A stage's downsampling ends it there, and begins the next one here.
    *((f'levels.{i}.downsample.reduction.', f'stages.{i + 1}.embed.projection.') for i in STAGES[:-1]),
    *((f'levels.{i}.downsample.', f'stages.{i + 1}.embed.') for i in STAGES[:-1]),
    ('levels.#.blocks.#.mlp.fc1.', 'stages.#.blocks.#.ffn.layers.0.0.'),
    ('levels.#.blocks.#.mlp.fc2.', 'stages.#.blocks.#.ffn.layers.1.'),
    ('levels.#.blocks.#.gamma1', 'stages.#.blocks.#.scale1.weight'),
    ('levels.#.blocks.#.gamma2', 'stages.#.blocks.#.scale2.weight'),
    ('levels.#.blocks.#.', 'stages.#.blocks.#.'),
    ('norm#.', 'stages.#.norm.'),  # in the code for detection and segmentation; in the classifier it is `norm`
]
TRANSFORMERS: Rules = [
    ('embeddings.patch_embeddings.projection.', 'stages.0.embed.projection.'),
    ('embeddings.', 'stages.0.embed.'),
    *((f'encoder.levels.{i}.downsample.reduction.', f'stages.{i + 1}.embed.projection.') for i in STAGES[:-1]),
    *((f'encoder.levels.{i}.downsample.', f'stages.{i + 1}.embed.') for i in STAGES[:-1]),
    ('encoder.levels.#.layers.#.layernorm_before.', 'stages.#.blocks.#.norm1.'),
    ('encoder.levels.#.layers.#.layernorm_after.', 'stages.#.blocks.#.norm2.'),
    ('encoder.levels.#.layers.#.attention.output.dense.', 'stages.#.blocks.#.attn.proj.'),
    ('encoder.levels.#.layers.#.attention.self.', 'stages.#.blocks.#.attn.'),
    ('encoder.levels.#.layers.#.intermediate.dense.', 'stages.#.blocks.#.ffn.layers.0.0.'),
    ('encoder.levels.#.layers.#.output.dense.', 'stages.#.blocks.#.ffn.layers.1.'),
    ('encoder.levels.#.layers.#.', 'stages.#.blocks.#.'),
    *((f'hidden_states_norms.stage{i + 1}.', f'stages.{i}.norm.') for i in STAGES),
]
QKV = ('query', 'key', 'value')


def _transformers(state: StateDict) -> StateDict:
    """A backbone, or a classifier or model under `nat.`; q, k and v are separate, and both gammas are one tensor."""
    renamed = rename({key.removeprefix('nat.'): value for key, value in state.items()}, TRANSFORMERS)
    out = {}
    for key, value in renamed.items():
        if match := re.fullmatch(r'(.*\.attn\.)(query|key|value)\.(weight|bias)', key):
            if match[2] == QKV[0]:
                out[f'{match[1]}qkv.{match[3]}'] = torch.cat([renamed[f'{match[1]}{name}.{match[3]}'] for name in QKV])
        elif key.endswith('.layer_scale_parameters'):
            block = key.removesuffix('layer_scale_parameters')
            out[f'{block}scale1.weight'], out[f'{block}scale2.weight'] = value
        else:
            out[key] = value
    return out


def _to_transformers(state: StateDict) -> StateDict:
    """The keys of a backbone."""
    out = {}
    for key, value in state.items():
        if match := re.fullmatch(r'(.*\.attn\.)qkv\.(weight|bias)', key):
            for name, part in zip(QKV, value.chunk(3), strict=True):
                out[f'{match[1]}{name}.{match[2]}'] = part
        elif key.endswith('.scale1.weight'):
            block = key.removesuffix('scale1.weight')
            out[f'{block}layer_scale_parameters'] = torch.stack([value, state[f'{block}scale2.weight']])
        elif not key.endswith('.scale2.weight'):
            out[key] = value
    return rename(out, reverse(TRANSFORMERS))


NAT = Family(
    'NAT',
    r'^stages\.0\.embed\.projection\.0\.',
    [
        Layout(
            "authors' NAT",
            r'^levels\.\d+\.blocks\.\d+\.attn\.rpb$',
            lambda state: rename(state, AUTHORS),
            'authors',
            lambda state: rename(state, reverse(AUTHORS)),
        ),
        Layout(
            'transformers NAT',
            r'(^|\.)encoder\.levels\.\d+\.layers\.\d+\.attention\.self\.rpb$',
            _transformers,
            'transformers',
            _to_transformers,
        ),
    ],
)
