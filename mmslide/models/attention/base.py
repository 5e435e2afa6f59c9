from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from torch import Tensor
from typing_extensions import Self

from mmslide.models.arguments import check_heads, check_rate
from mmslide.models.base import BaseModule, InitCfg


@dataclass(eq=False, repr=False)
class Attention(BaseModule):
    """The arguments of every token mixer, which is a dataclass derived from this one with fields of its own.

    Args:
        embed_dims: channels C of the map (B, H, W, C), divisible by num_heads.
        num_heads: number of attention heads.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        attn_drop_rate: dropout of the attention weights.
        proj_drop_rate: dropout of the output.
        init_cfg: see mmengine.

    Raises:
        ValueError: an argument is invalid; the message names it.
    """

    embed_dims: int
    num_heads: int
    _: KW_ONLY
    qkv_bias: bool = True
    attn_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    init_cfg: InitCfg = None

    def __post_init__(self) -> None:
        super().__init__(self.init_cfg)
        check_heads(self.embed_dims, self.num_heads)
        check_rate('attn_drop_rate', self.attn_drop_rate)
        check_rate('proj_drop_rate', self.proj_drop_rate)

    def constants(self) -> dict[str, Tensor]:
        """Non-persistent buffers."""
        return {}

    def _register_constants(self) -> None:
        for name, value in self.constants().items():
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Recomputes the constants when leaving the meta device, since they are not in checkpoints."""
        on_meta = [name for name, value in self.named_buffers(recurse=False) if value.is_meta]
        super()._apply(fn, recurse)
        for name in on_meta:
            if not getattr(self, name).is_meta:
                setattr(self, name, self.constants()[name].to(getattr(self, name)))
        return self
