from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from mmslide.build import build_model, load_weights
from mmslide.checkpoints import check_finite, find_state_dict, is_safetensors, meta_of, read_checkpoint, save_checkpoint
from mmslide.files import atomic_write, find_config

from .fuse import fuse

MARK = '# Written by tools/fuse_checkpoint.py, for the checkpoint of the same name.\n'


def load_model(config: str | Path, checkpoint: str | Path) -> tuple[Config, nn.Module, dict[str, Any]]:
    """Builds the model of a config with the weights of a checkpoint.

    Args:
        config: path or bare name of a config.
        checkpoint: file or URL.

    Returns:
        The config, the model in eval mode, and the checkpoint's metadata.

    Raises:
        OSError: one of the files cannot be read.
        ValueError: the config's model has no backbone; or the checkpoint is damaged, does not match, or has NaN or
            infinite weights.
    """
    cfg = Config.fromfile(find_config(config))
    if 'backbone' not in cfg.get('model', {}):
        raise ValueError(f'{config} must have a model with a backbone')
    if 'data_preprocessor' in cfg:  # at the top level; mmengine's Runner moves it into the model
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    content = read_checkpoint(checkpoint)
    state = find_state_dict(content, checkpoint)
    check_finite(state, checkpoint)
    model = build_model(cfg).eval()
    load_weights(model, state, checkpoint, config)
    return cfg, model, meta_of(content)


def fuse_checkpoint(config: str | Path, checkpoint: str | Path, out: str | Path) -> Path:
    """Fuses a checkpoint (see `fuse`) and writes it, marked `meta['fused']`, with the config that builds its model.

    Writes both files completely, or none. Training state (optimizer, schedules, logs) is dropped.

    Args:
        config: path or bare name of the model's config.
        checkpoint: file or URL of the trained weights.
        out: the checkpoint to write; the config gets the same name with .py.

    Returns:
        The path of the config.

    Raises:
        ValueError: see `load_model` and `atomic_write`; out is a .safetensors file; or the config would overwrite a
            file that this function did not write.
        OSError: see `load_model`; or out cannot be written.
    """
    if is_safetensors(out):
        raise ValueError(f'fused checkpoints are written in torch format: name it NAME.pth, not {out}')
    out_config = Path(out).with_suffix('.py')
    if out_config.exists() and not out_config.read_bytes().startswith(MARK.encode()):
        raise ValueError(
            f'{out_config} exists and is not the config of a fused checkpoint: choose another name for {out}'
        )
    with atomic_write(out, out_config, inputs=[find_config(config), checkpoint]) as (weights, text):
        cfg, model, meta = load_model(config, checkpoint)
        cfg.model.backbone.update(deploy=True, init_cfg=None)
        meta = {**meta, 'cfg': cfg.pretty_text, 'fused': True}
        save_checkpoint(dict(meta=meta, state_dict=fuse(model).state_dict()), weights)
        text.write_text(MARK + cfg.pretty_text, encoding='utf-8')
    return out_config
