"""The one place where backbones and token mixers check their arguments."""

from collections.abc import Mapping, Sequence
from typing import Any


def pick_arch(arch: str | Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The table row of a variant by name, or a row of the user's own with the same keys, checked.

    In a user's row one number stands for all stages, and for embed_dims it doubles from stage to stage.

    Raises:
        ValueError: the name is unknown, keys are missing or unknown, or the values do not fit together.
    """
    if isinstance(arch, str):
        if arch not in variants:
            raise ValueError(f'arch must be one of {list(variants)} or a dict, got {arch=}')
        return dict(variants[arch])
    keys = set(next(iter(variants.values())))
    if set(arch) != keys:
        raise ValueError(f'an arch dict must have the keys {sorted(keys)}, got {sorted(arch)}')
    count = len(arch['depths'])
    row = {
        key: [value * 2**i if key == 'embed_dims' else value for i in range(count)] if isinstance(value, int) else value
        for key, value in arch.items()
    }
    for key, value in row.items():
        if len(value) != count:
            raise ValueError(f'arch must give one value for each of its {count} stages, got {key}={value}')
    for embed_dims, num_heads in zip(row['embed_dims'], row['num_heads'], strict=True):
        if embed_dims % num_heads:
            raise ValueError(
                f'embed_dims must be divisible by num_heads in each stage, got {embed_dims=}, {num_heads=}'
            )
    return row


def check_stages(name: str, stages: Sequence[int], count: int) -> None:
    if isinstance(stages, int) or len(set(stages)) != len(stages) or not set(stages) <= set(range(count)):
        raise ValueError(f'{name} must be a list of different stages from 0 to {count - 1}, got {name}={stages}')


def per_stage(name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    values = (value,) * count if isinstance(value, int) else tuple(value)
    if len(values) != count:
        raise ValueError(f'{name} must be one number or one for each of the {count} stages, got {name}={value}')
    return values
