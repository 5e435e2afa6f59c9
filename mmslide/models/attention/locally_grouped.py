import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .window import Windowed


class LocallyGroupedAttention(Windowed):
    """Attention in windows that neither overlap nor shift: Twins' LSA (NeurIPS 2021, arXiv 2104.13840, section 3.2).

    The map is padded with zeros at its right and bottom to a multiple of the window.

    Args:
        embed_dims: C of the map (B, H, W, C), divisible by num_heads.
        window_size: side of a window in pixels of the map.
        mask_padding: nobody attends to the padding. False lets it take part, as in the authors' detection code, for
            weights that were trained so.
        attn_drop_rate: dropout of the attention weights.
        proj_drop_rate: dropout of the output.

    Raises:
        ValueError: embed_dims is not divisible by num_heads, or window_size is not positive.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int,
        mask_padding: bool = True,
        qkv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(embed_dims, num_heads, window_size, qkv_bias, attn_drop_rate, proj_drop_rate, init_cfg)
        self.mask_padding = mask_padding

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        padded = self._pad(x)
        mask = None
        fits = _is_true(padded.shape[1] == height) and _is_true(padded.shape[2] == width)
        if self.mask_padding and not fits:
            # Keys only: every window has a pixel inside the map, and what the padding's own queries find is cropped.
            inside = self._pad(torch.ones(1, height, width, 1, dtype=torch.bool, device=x.device))
            mask = self._partition(inside).flatten(1)[:, None, None].repeat(len(x), 1, 1, 1)
        return self.proj_drop(self.proj(self._attend_in_windows(padded, mask)[:, :height, :width]))


def _is_true(condition: bool | torch.SymBool | Tensor) -> bool:
    """A comparison of sizes: numbers, symbols while a dynamic size is exported, or tensors in `torch.jit.trace`."""
    return statically_known_true(condition) if isinstance(condition, torch.SymBool) else bool(condition)
