"""Argument checks: every error message has the argument and its value."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def check_integer(name: str, value: Any, *, odd: bool = False) -> None:
    if not _is_positive_integer(value) or (odd and value % 2 == 0):
        raise ValueError(f'{name} must be a positive {"odd " * odd}integer, got {name}={value!r}')


def check_rate(name: str, value: Any) -> None:
    """Checks a dropout probability."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f'{name} must be a number in [0, 1), got {name}={value!r}')


def check_heads(embed_dims: Any, num_heads: Any) -> None:
    check_integer('embed_dims', embed_dims)
    check_integer('num_heads', num_heads)
    if embed_dims % num_heads:
        raise ValueError(f'embed_dims must be divisible by num_heads, got {embed_dims=}, {num_heads=}')


def check_stages(name: str, stages: Any, count: int) -> None:
    if (
        not isinstance(stages, Collection)
        or not all(isinstance(x, int) and not isinstance(x, bool) for x in stages)
        or len(set(stages)) != len(stages)
        or not set(stages) <= set(range(count))
    ):
        raise ValueError(f'{name} must be a list of different stages from 0 to {count - 1}, got {name}={stages!r}')


def check_size(name: str, value: Any, least: int) -> tuple[int, int]:
    """One number for both sides, or (height, width), in pixels."""
    sides = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(sides, Sequence)
        or len(sides) != 2
        or not all(_is_positive_integer(x) and x >= least for x in sides)
    ):
        raise ValueError(f'{name} must be one side or (height, width), at least {least} pixels, got {name}={value!r}')
    return sides[0], sides[1]


def per_stage(name: str, value: Any, count: int, *, odd: bool = False) -> tuple[int, ...]:
    """A positive integer for each stage, from one or from as many as there are stages."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * count
    if len(values) != count:
        raise ValueError(f'{name} must be one number or one for each of the {count} stages, got {name}={value!r}')
    for number in values:
        check_integer(name, number, odd=odd)
    return values


FRACTIONS = {'mlp_ratios', 'layer_scales'}  # of an arch; all others are integers


def pick_arch(
    arch: Any, variants: Mapping[str, Mapping[str, Sequence[Any]]], optional: Mapping[str, Any]
) -> dict[str, Sequence[Any]]:
    """The row of a variant by name, or the user's own row with the same keys, after checking it.

    In the user's row, a single number is used for all stages; for embed_dims it doubles from stage to stage.

    Args:
        optional: keys that a row may omit, with their default for all stages. Their values may be 0.

    Raises:
        ValueError: the name is unknown, keys are missing or unknown, or the values do not fit together.
    """
    if isinstance(arch, str) and arch in variants:
        arch = variants[arch]
    if not isinstance(arch, Mapping):
        raise ValueError(f'arch must be one of {list(variants)} or a dict, got {arch=}')
    keys = set(next(iter(variants.values()))) - set(optional)
    if set(arch) - set(optional) != keys:
        allowed = f', and may have {sorted(optional)}' if optional else ''
        raise ValueError(f'an arch dict must have the keys {sorted(keys)}{allowed}, got {sorted(arch)}')
    depths = arch['depths']
    if not isinstance(depths, Sequence) or not depths:
        raise ValueError(f'arch must give depths as a list with one number for each stage, got {depths=}')
    count = len(depths)
    row = {
        key: [value * 2**i if key == 'embed_dims' else value for i in range(count)] if _is_number(value) else value
        for key, value in {**optional, **arch}.items()
    }
    for key, value in row.items():
        if not isinstance(value, Sequence) or len(value) != count:
            raise ValueError(f'arch must give one value for each of its {count} stages, got {key}={value!r}')
        valid = all(
            (_is_number(x) if key in FRACTIONS else _is_integer(x)) and (x > 0 or (x == 0 and key in optional))
            for x in value
        )
        if not valid:
            what = (
                f'{"non-negative" if key in optional else "positive"} {"numbers" if key in FRACTIONS else "integers"}'
            )
            raise ValueError(f'arch must have only {what}, got {key}={value!r}')
    for embed_dims, num_heads in zip(row['embed_dims'], row['num_heads'], strict=True):
        check_heads(embed_dims, num_heads)
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive_integer(value: Any) -> bool:
    return _is_integer(value) and value > 0
