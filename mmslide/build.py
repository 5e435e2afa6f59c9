import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmslide.checkpoints import StateDict
from mmslide.messages import listed


def build_model(cfg: Config, device: str = 'cpu') -> nn.Module:
    """Builds the model of a config of mmdet, mmseg or mmpretrain, with SyncBN replaced by BN.

    On the device 'meta' this takes almost no memory or time, unless a module reads tensors while it is built, as
    mmdet's Swin does.
    """

    def build() -> nn.Module:
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            # A copy, since mmdet's detectors add to the config of their heads.
            return revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model)))

    try:
        with torch.device(device):
            return build()
    except Exception:
        if device == 'cpu':
            raise
        return build().to(device)


def load_weights(model: nn.Module, state: StateDict, checkpoint: str | Path, config: str | Path) -> None:
    """Loads a state dict that must fit the model of a config whole.

    Raises:
        ValueError: keys are missing, unexpected, or of another shape.
    """
    try:
        problems = load_what_fits(model, state)
    except (RuntimeError, ValueError) as error:  # of modules that convert what they load
        raise ValueError(f'{checkpoint} does not fit {config}: {error}') from error
    if problems:
        raise ValueError(f'{checkpoint} does not fit {config}: {counted(problems)}')


def load_what_fits(model: nn.Module, state: StateDict) -> dict[str, list[str]]:
    """Loads the tensors of a state dict that fit a model; the keys that do not, by what is wrong with them."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    other = [key for key in state if shapes.get(key, tuple(state[key].shape)) != tuple(state[key].shape)]
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*copying from a non-meta parameter', UserWarning)
        missing, unexpected = model.load_state_dict(
            {key: value for key, value in state.items() if key not in other}, strict=False
        )
    problems = {
        # PyTorch before 0.4.1 counted no batches.
        'missing': [key for key in missing if key not in other and not key.endswith('num_batches_tracked')],
        'unexpected': unexpected,
        'of another shape': [f'{key} {tuple(state[key].shape)} instead of {shapes[key]}' for key in other],
    }
    return {what: keys for what, keys in problems.items() if keys}


def counted(problems: Mapping[str, Sequence[str]], limit: int = 3) -> str:
    """What `load_what_fits` returns, in words."""
    return ', '.join(f'{len(keys)} keys {what} ({listed(keys, limit)})' for what, keys in problems.items())
