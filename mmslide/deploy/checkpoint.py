from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmslide.files import find_config, replacing
from mmslide.weights.load import find_state_dict, read_checkpoint

from .fuse import fuse


def load_model(config: str, checkpoint: str) -> tuple[Config, nn.Module, dict[str, Any]]:
    """The config, its model with the weights of a checkpoint, in eval mode, and the checkpoint's meta data.

    Raises:
        ValueError: the config's model has no backbone, or the checkpoint cannot be read or does not fit it.
        FileNotFoundError: one of the files does not exist.
    """
    cfg = Config.fromfile(find_config(config))
    if 'backbone' not in cfg.get('model', {}):
        raise ValueError(f'{config} must have a model with a backbone')
    if 'data_preprocessor' in cfg:  # at the top level: mmengine's Runner puts it into the model
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    content = read_checkpoint(checkpoint)
    state = find_state_dict(content, checkpoint)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes
        raise ValueError(f'{checkpoint} does not fit {config}: {error}') from error
    if missing or unexpected:
        lists = {'missing': missing, 'unexpected': unexpected}
        problem = ', '.join(f'{len(keys)} keys {what} ({keys[0]}, ...)' for what, keys in lists.items() if keys)
        raise ValueError(f'{checkpoint} does not fit {config}: {problem}')
    return cfg, model, content.get('meta') or {}


def fuse_checkpoint(config: str, checkpoint: str, out: str) -> Path:
    """Writes a trained model's checkpoint fused (see `fuse`) to `out`, marked `meta['fused']`, and beside it the config
    that builds the model for it, under the same name with .py.

    Both appear whole or not at all. The state of the training (optimizer, schedules, logs) is left out.

    Returns:
        The path of the config.

    Raises:
        ValueError, FileNotFoundError: see `load_model`; or out or the config beside it is one of the inputs.
        OSError: out cannot be written.
    """
    out_config = Path(out).with_suffix('.py')
    for path in (Path(out), out_config):
        if path.resolve() in (Path(config).resolve(), Path(checkpoint).resolve()):
            raise ValueError(f'{path} would be overwritten: choose another name or folder for {out}')
    with replacing(out) as weights, replacing(out_config) as text:
        cfg, model, meta = load_model(config, checkpoint)
        cfg.model.backbone.update(deploy=True, init_cfg=None)
        meta = {**meta, 'cfg': cfg.pretty_text, 'fused': True}
        torch.save(dict(meta=meta, state_dict=fuse(model).state_dict()), weights)
        text.write_text(cfg.pretty_text)
    return out_config
