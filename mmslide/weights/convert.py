import torch
from rich.table import Table

from mmslide.files import replacing

from .layouts import from_ours, to_ours
from .load import find_prefix, import_safetensors, is_safetensors, key_table, read_state_dict


def convert_checkpoint(checkpoint: str, out: str, layout: str) -> Table:
    """Writes the weights of a checkpoint of any layout in `mmslide.weights.layouts` in another layout.

    The backbone of a whole detector, segmentor or classifier is converted in its place, all other weights are kept.

    Args:
        checkpoint: file or URL.
        out: the file to write, which then holds the state dict alone, as safetensors if its name ends so. It appears
            whole or not at all.
        layout: 'mmslide', or for Twins 'authors' or 'mmseg'.

    Returns:
        What was read, written and kept.

    Raises:
        ValueError: the checkpoint cannot be read or is no backbone's, the layout has no place for it, or the folder of
            out does not exist.
        OSError: out cannot be written.
        ImportError: a .safetensors file is named, and the package safetensors is not installed.
    """
    with replacing(out) as path:
        source = read_state_dict(checkpoint)
        prefix = find_prefix(source)
        backbone = {key.removeprefix(prefix): value for key, value in source.items() if key.startswith(prefix)}
        name, ours = to_ours(backbone)
        converted = {prefix + key: value for key, value in from_ours(ours, layout).items()}
        state = {key: value for key, value in source.items() if not key.startswith(prefix)} | converted
        if is_safetensors(out):
            contiguous = {key: value.contiguous() for key, value in state.items()}  # it refuses others
            import_safetensors(out).torch.save_file(contiguous, path)
        else:
            torch.save(state, path)
    return key_table(
        {
            f'read, {name}': [key for key in source if key not in state],
            f'written, {layout}': [key for key in state if key not in source],
            'kept': [key for key in state if key in source],
        }
    )
