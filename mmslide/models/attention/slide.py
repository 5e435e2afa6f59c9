from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from mmslide.models.arguments import check_integer
from mmslide.models.plain import is_plain
from mmslide.ops import attention_weights, check_backend, fixed_shift, merge_paths, slide_attention
from mmslide.weights.layouts import fuse_slide_attention

from .base import Attention


@dataclass(eq=False, repr=False)
class SlideAttention(Attention):
    """Slide Attention (CVPR 2023, arXiv 2304.04237, section 4): local attention over k×k deformed neighbors.

    Takes and returns maps (B, H, W, C). As in the paper, two paths shift keys and values: a fixed one, whose kernels
    select one neighbor each, and a deformed one, whose kernels are learned. Both have a learned bias; they are merged
    before the op. A new module is plain local attention: learned kernels, biases and relative position bias are
    initialized to zero.

    `switch_to_deploy` merges the paths into parameters. The merged module still loads weights with two paths.

    Args:
        kernel_size: k, the side of the neighborhood, odd.
        backend: see `mmslide.ops.slide_attention`; None selects the best.

    Other arguments and errors: see `Attention`.
    """

    kernel_size: int = 3
    _: KW_ONLY
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer('kernel_size', self.kernel_size, odd=True)
        check_backend('backend', self.backend)
        embed_dims, kernel_size = self.embed_dims, self.kernel_size
        head_dims, slots = embed_dims // self.num_heads, kernel_size**2
        self.deploy = False

        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=self.qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(self.proj_drop_rate)
        # A buffer, and not in a Conv2d, so that no init_cfg or checkpoint can overwrite it: slot j selects tap j.
        self.shift: Tensor
        self._register_constants()
        self.shift_bias = nn.Parameter(torch.zeros(head_dims, slots))
        self.deform_weight = nn.Parameter(torch.zeros(head_dims, slots, kernel_size, kernel_size))
        self.deform_bias = nn.Parameter(torch.zeros(head_dims, slots))
        self.relative_position_bias = nn.Parameter(torch.zeros(self.num_heads, slots))

    def constants(self) -> dict[str, Tensor]:
        return {'shift': fixed_shift(self.kernel_size)}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in self._project(x))
        return self.proj_drop(self.proj(self.attend(q, k, v).flatten(-2)))

    def _project(self, x: Tensor) -> Sequence[Tensor]:
        """q, k and v, each (B, H, W, C)."""
        if not (torch.is_grad_enabled() and is_plain(x, [self.qkv], [[nn.Linear]])):
            return self.qkv(x).chunk(3, dim=-1)
        # Three products: with a single one, the gradients of the split result would have to be concatenated by a copy.
        weights = self.qkv.weight.chunk(3)
        biases = [None] * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weight, bias = self.kernels()
        rpb = self.relative_position_bias.to(weight.dtype)
        dropout_p = self.attn_drop_rate if self.training else 0.0
        return slide_attention(q, k, v, weight, bias, rpb, dropout_p=dropout_p, backend=self.backend)

    def attention_weights(self, x: Tensor) -> Tensor:
        """The attention weight of each slot for each pixel, (B, H, W, heads, k²), without dropout."""
        weight, bias = self.kernels()
        q, k, _ = (y.unflatten(-1, (self.num_heads, -1)).to(weight.dtype) for y in self._project(x))
        rpb = self.relative_position_bias.to(weight.dtype)
        return attention_weights(q, k, weight, bias, rpb, q.shape[-1] ** -0.5)

    def kernels(self) -> tuple[Tensor, Tensor]:
        """The merged kernels (d, k², k, k) and their bias (d, k²), at least in float32."""
        if self.deploy:
            return self.fused_weight, self.fused_bias
        return merge_paths(self.shift, self.shift_bias, self.deform_weight, self.deform_bias)

    def switch_to_deploy(self) -> None:
        """Replaces the two paths by their sum, in place, for inference; has no effect if already done."""
        if self.deploy:
            return
        with torch.no_grad():
            weight, bias = self.kernels()
        del self.shift, self.shift_bias, self.deform_weight, self.deform_bias
        self.fused_weight, self.fused_bias = nn.Parameter(weight), nn.Parameter(bias)
        self.attn_drop_rate = 0.0
        self.deploy = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Converts the dtype, but keeps the merged kernels at least in float32: see `merge_paths`."""
        kept = {name: getattr(self, name).data for name in ('fused_weight', 'fused_bias') if self.deploy}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype.itemsize < torch.float32.itemsize:
                parameter.data = value.to(parameter.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.deploy:
            own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
            state_dict.update(fuse_slide_attention(own))
        elif f'{prefix}fused_weight' in state_dict:
            # Raised here, since mmengine only logs the list of errors.
            raise ValueError(
                f'these weights are fused for inference (there is {prefix}fused_weight), and this model is not: build '
                'it with deploy=True in its backbone, as in the config of a fused checkpoint, or load the '
                'checkpoint before fusing'
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
