import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / 'golden'


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max|Δ| / max|reference|, in float64 on the CPU."""
    assert value.shape == reference.shape
    value, reference = value.detach().cpu().double(), reference.detach().cpu().double()
    scale = reference.abs().max()
    difference = (value - reference).abs().max()
    assert torch.isfinite(difference)
    return float(difference / scale) if scale else float(difference)


def randomize(model: nn.Module) -> nn.Module:
    """Every parameter drawn, so that no term hides behind an initial zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if name.endswith('bias') or 'relative_position' in name or 'position_embedding' in name:
                parameter.copy_(0.1 * draw)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * draw)
            else:
                parameter.copy_(draw / parameter[0].numel() ** 0.5)
    return model


def golden_state(name: str) -> dict[str, Tensor]:
    """The authors' state dict that the golden file's outputs were computed with, drawn from the keys' names."""
    state = {}
    for key, shape in json.loads((GOLDEN / f'{name}.keys.json').read_text()).items():
        if key.endswith(('relative_position_index', 'attn_mask')):
            continue
        if key.endswith('dep_conv.weight'):
            kernel_size = shape[-1]
            slots = kernel_size**2
            state[key] = torch.eye(slots).repeat(shape[0] // slots, 1).view(shape)
            continue
        draw = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
        if key.rsplit('.', 1)[-1] == 'bias':
            draw = 0.1 * draw
        elif 'relative_position_bias_table' in key:
            draw = 0.2 * draw
        elif len(shape) == 1:
            draw = 1 + 0.1 * draw
        else:
            draw = draw / np.prod(shape[1:]) ** 0.5
        state[key] = torch.from_numpy(draw.astype(np.float32))
    return state
