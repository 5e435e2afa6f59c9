import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmslide.ops import slide_attention


class SlideAttention(BaseModule):
    """Slide Attention (CVPR 2023, arXiv 2304.04237, section 4): local attention over k×k deformed neighbours.

    Two paths shift keys and values, as the paper trains them: the fixed one, whose kernels pick one neighbour each, and
    the deformed one, whose kernels are learned. Both have a learned bias; they are merged before the op. A new module
    is plain local attention: the learned kernels, all shift biases and the relative position bias start at zero.

    Args:
        embed_dims: C of the map (B, H, W, C), divisible by num_heads.
        kernel_size: k, odd.
        attn_drop_rate: dropout of the attention weights.
        proj_drop_rate: dropout of the output.
        backend: of `mmslide.ops.slide_attention`; None lets the op choose.

    Raises:
        ValueError: embed_dims is not divisible by num_heads, or kernel_size is even.
    """

    shift: Tensor

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        kernel_size: int = 3,
        qkv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        backend: str | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if embed_dims % num_heads:
            raise ValueError(f'embed_dims must be divisible by num_heads, got {embed_dims=}, {num_heads=}')
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be a positive odd number, got {kernel_size=}')
        head_dims, slots = embed_dims // num_heads, kernel_size**2
        self.num_heads = num_heads
        self.attn_drop_rate = attn_drop_rate
        self.backend = backend

        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop_rate)
        # A buffer, and not in a Conv2d, so that no init_cfg and no checkpoint can overwrite it: slot j picks tap j.
        self.register_buffer('shift', torch.eye(slots).view(slots, kernel_size, kernel_size), persistent=False)
        self.shift_bias = nn.Parameter(torch.zeros(head_dims, slots))
        self.deform_weight = nn.Parameter(torch.zeros(head_dims, slots, kernel_size, kernel_size))
        self.deform_bias = nn.Parameter(torch.zeros(head_dims, slots))
        self.relative_position_bias = nn.Parameter(torch.zeros(num_heads, slots))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        q, k, v = self.qkv(x).view(batch, height, width, 3, self.num_heads, -1).unbind(3)
        # At least float32 before the sum: next to the shift's 1 a small learned part would be lost in half precision.
        dtype = torch.promote_types(self.deform_weight.dtype, torch.float32)
        out = slide_attention(
            q,
            k,
            v,
            self.shift.to(dtype) + self.deform_weight.to(dtype),
            self.shift_bias.to(dtype) + self.deform_bias.to(dtype),
            self.relative_position_bias.to(dtype),
            dropout_p=self.attn_drop_rate if self.training else 0.0,
            backend=self.backend,
        )
        return self.proj_drop(self.proj(out.reshape(batch, height, width, channels)))
