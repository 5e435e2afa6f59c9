from dataclasses import KW_ONLY, dataclass

from mmslide.models.arguments import check_heads, check_rate
from mmslide.models.base import BaseModule, InitCfg


@dataclass(eq=False, repr=False)
class Attention(BaseModule):
    """What every token mixer takes; each is a dataclass of this one, whose fields are the arguments of its own.

    Args:
        embed_dims: C of the map (B, H, W, C), divisible by num_heads.
        num_heads: of the attention.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        attn_drop_rate: dropout of the attention weights.
        proj_drop_rate: dropout of the output.
        init_cfg: mmengine's.

    Raises:
        ValueError: an argument does not fit; the message names it.
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
