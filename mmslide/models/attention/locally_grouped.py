from dataclasses import dataclass

import torch
from torch import Tensor

from mmslide.compat import statically_known_true

from .window import WindowAttentionBase


@dataclass(eq=False, repr=False)
class LocallyGroupedAttention(WindowAttentionBase):
    """Attention in windows without overlap or shift: Twins' LSA (NeurIPS 2021, arXiv 2104.13840, section 3.2).

    The map is padded with zeros on the right and bottom to a multiple of the window.

    Args:
        mask_padding: whether to mask the padding. With False it is attended to, as in the authors' detection code, for
            weights that were trained that way.

    Other arguments and errors: see `WindowAttentionBase`.
    """

    mask_padding: bool = True

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        padded = self._pad(x)
        mask = None
        fits = is_true(padded.shape[1] == height) and is_true(padded.shape[2] == width)
        if self.mask_padding and not fits:
            # Only keys: every window has a pixel inside the map, and the output at the padding is cropped.
            inside = self._pad(torch.ones(1, height, width, 1, dtype=torch.bool, device=x.device))
            mask = self._partition(inside).flatten(1)[:, None, None].repeat(len(x), 1, 1, 1)
        return self.proj_drop(self.proj(self._attend_in_windows(padded, mask)[:, :height, :width]))


def is_true(condition: bool | torch.SymBool | Tensor) -> bool:
    """Compares sizes: numbers, symbols while a dynamic size is exported, or tensors in `torch.jit.trace`."""
    return statically_known_true(condition) if isinstance(condition, torch.SymBool) else bool(condition)
