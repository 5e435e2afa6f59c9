from pathlib import Path

import torch
from rich.table import Table

from mmslide.checkpoints import check_finite, import_safetensors, is_safetensors, read_state_dict, save_checkpoint
from mmslide.files import atomic_write

from .layouts import from_mmslide, to_mmslide
from .load import find_prefix, key_table


def convert_checkpoint(checkpoint: str | Path, out: str | Path, layout: str) -> Table:
    """Converts a checkpoint from any layout in `mmslide.weights.layouts` to another layout.

    In a complete detector, segmentor or classifier, the backbone is converted and all other weights are kept.

    Args:
        checkpoint: file or URL.
        out: the file to write, with the state dict only; in safetensors format if its name ends in .safetensors. It is
            written completely or not at all.
        layout: one of `mmslide.weights.layouts.TARGETS`. All backbones support 'mmslide', some also others.

    Returns:
        A table of the keys that were read, written and kept.

    Raises:
        OSError: the checkpoint cannot be read, or out cannot be written.
        ValueError: the checkpoint is damaged, is not of a backbone, or has NaN or infinite weights; the layout does not
            exist for it; or see `atomic_write`.
        ImportError: a .safetensors file is given, and the package safetensors is not installed.
    """
    with atomic_write(out, inputs=[checkpoint]) as (path,):
        source = read_state_dict(checkpoint)
        check_finite(source, checkpoint)
        prefix = find_prefix(source)
        backbone = {key.removeprefix(prefix): value for key, value in source.items() if key.startswith(prefix)}
        name, ours = to_mmslide(backbone)
        converted = {prefix + key: value for key, value in from_mmslide(ours, layout).items()}
        state = {key: value for key, value in source.items() if not key.startswith(prefix)} | converted
        if is_safetensors(out):
            # It rejects views and tensors that share memory, such as those of a head's tied layers.
            apart = {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}
            path.write_bytes(import_safetensors().torch.save(apart))
        else:
            save_checkpoint(state, path)
    return key_table(
        {
            f'read, {name}': [key for key in source if key not in state],
            f'written, {layout}': [key for key in state if key not in source],
            'kept': [key for key in state if key in source],
        }
    )
