"""PVTv2. Authors: https://github.com/whai362/PVT; timm and transformers have their own layouts."""

import re

import torch

from mmslide.checkpoints import StateDict

from .keys import Family, Layout, Rules, join_attention, rename, reverse, split_attention
from .pvt import AUTHORS as AUTHORS_PVT

AUTHORS: Rules = [
    *((f'block{i + 1}.#.mlp.dwconv.dwconv.', f'stages.{i}.blocks.#.ffn.layers.0.2.') for i in range(4)),
    *AUTHORS_PVT,
]
MMDET: Rules = [
    ('layers.#.0.', 'stages.#.embed.'),
    ('layers.#.1.#.ffn.layers.0.', 'stages.#.blocks.#.ffn.layers.0.0.'),
    ('layers.#.1.#.ffn.layers.1.', 'stages.#.blocks.#.ffn.layers.0.2.'),
    ('layers.#.1.#.ffn.layers.4.', 'stages.#.blocks.#.ffn.layers.1.'),
    ('layers.#.1.#.', 'stages.#.blocks.#.'),
    ('layers.#.2.', 'stages.#.norm.'),
]
TIMM: Rules = [
    ('patch_embed.proj.', 'stages.0.embed.projection.'),
    ('patch_embed.norm.', 'stages.0.embed.norm.'),
    ('stages.#.downsample.proj.', 'stages.#.embed.projection.'),
    ('stages.#.downsample.norm.', 'stages.#.embed.norm.'),
    ('stages.#.blocks.#.mlp.fc1.', 'stages.#.blocks.#.ffn.layers.0.0.'),
    ('stages.#.blocks.#.mlp.dwconv.', 'stages.#.blocks.#.ffn.layers.0.2.'),
    ('stages.#.blocks.#.mlp.fc2.', 'stages.#.blocks.#.ffn.layers.1.'),
]
TRANSFORMERS: Rules = [
    ('encoder.layers.#.patch_embedding.proj.', 'stages.#.embed.projection.'),
    ('encoder.layers.#.patch_embedding.layer_norm.', 'stages.#.embed.norm.'),
    ('encoder.layers.#.blocks.#.layer_norm_1.', 'stages.#.blocks.#.norm1.'),
    ('encoder.layers.#.blocks.#.layer_norm_2.', 'stages.#.blocks.#.norm2.'),
    ('encoder.layers.#.blocks.#.attention.query.', 'stages.#.blocks.#.attn.q.'),
    ('encoder.layers.#.blocks.#.attention.key.', 'stages.#.blocks.#.attn.k.'),
    ('encoder.layers.#.blocks.#.attention.value.', 'stages.#.blocks.#.attn.v.'),
    ('encoder.layers.#.blocks.#.attention.spatial_reduction.', 'stages.#.blocks.#.attn.sr.'),
    ('encoder.layers.#.blocks.#.attention.layer_norm.', 'stages.#.blocks.#.attn.norm.'),
    ('encoder.layers.#.blocks.#.attention.', 'stages.#.blocks.#.attn.'),
    ('encoder.layers.#.blocks.#.mlp.dense1.', 'stages.#.blocks.#.ffn.layers.0.0.'),
    ('encoder.layers.#.blocks.#.mlp.dwconv.dwconv.', 'stages.#.blocks.#.ffn.layers.0.2.'),
    ('encoder.layers.#.blocks.#.mlp.dense2.', 'stages.#.blocks.#.ffn.layers.1.'),
    ('encoder.layers.#.layer_norm.', 'stages.#.norm.'),
]
LINEAR_LAYERS = re.compile(r'\.ffn\.layers\.(0\.0|1)\.weight$')


def _mmdet(state: StateDict) -> StateDict:
    return {
        key: value.flatten(1) if LINEAR_LAYERS.search(key) else value  # 1×1 convolutions
        for key, value in split_attention(rename(state, MMDET)).items()
    }


def _to_mmdet(state: StateDict) -> StateDict:
    if any(key.endswith('.attn.sr.weight') and value.shape[-1] == 1 for key, value in state.items()):
        raise ValueError("mmdet has no linear PVTv2, as these weights are: convert them to 'authors' or 'timm'")
    convolutions = {key: value[..., None, None] if LINEAR_LAYERS.search(key) else value for key, value in state.items()}
    return rename(join_attention(convolutions), reverse(MMDET))


def _transformers(state: StateDict) -> StateDict:
    out = rename({key.removeprefix('pvt_v2.'): value for key, value in state.items()}, TRANSFORMERS)
    for key in [key for key in out if '.attn.k.' in key]:
        keys, values = out.pop(key), out.pop(key.replace('.attn.k.', '.attn.v.'))
        out[key.replace('.attn.k.', '.attn.kv.')] = torch.cat([keys, values])
    return out


def _to_transformers(state: StateDict) -> StateDict:
    apart = {}
    for key, value in state.items():
        if '.attn.kv.' in key:
            for name, part in zip('kv', value.chunk(2), strict=True):
                apart[key.replace('.attn.kv.', f'.attn.{name}.')] = part
        else:
            apart[key] = value
    # As in a classifier; a model or backbone can also be loaded from such a file.
    return {
        f'pvt_v2.{key}' if key.startswith('encoder.') else key: value
        for key, value in rename(apart, reverse(TRANSFORMERS)).items()
    }


PVTV2 = Family(
    'PVTv2',
    r'\.ffn\.layers\.0\.2\.weight$',
    [
        Layout(
            "authors' PVTv2",
            r'^block\d\.\d+\.mlp\.dwconv\.dwconv\.weight$',
            lambda state: rename(state, AUTHORS),
            'authors',
            lambda state: rename(state, reverse(AUTHORS)),
        ),
        Layout('mmdet PVTv2', r'^layers\.\d+\.1\.\d+\.ffn\.layers\.4\.weight$', _mmdet, 'mmdet', _to_mmdet),
        Layout(
            'timm PVTv2',
            r'^stages\.\d+\.blocks\.\d+\.mlp\.dwconv\.weight$',
            lambda state: rename(state, TIMM),
            'timm',
            lambda state: rename(state, reverse(TIMM)),
        ),
        Layout(
            'transformers PVTv2',
            r'^(pvt_v2\.)?encoder\.layers\.\d+\.blocks\.\d+\.mlp\.dwconv\.dwconv\.weight$',
            _transformers,
            'transformers',
            _to_transformers,
        ),
    ],
)
