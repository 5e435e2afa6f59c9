"""Neighborhood attention: one PyTorch operator in front of its kernels. Only q, k, v and rpb are kept for backward."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmslide.compat import is_compiling, is_exporting, register_custom_op, register_flop_formula

from . import native, tiles
from .autocast import without_autocast


def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, *, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Neighborhood attention with a relative position bias (CVPR 2023, arXiv 2204.07143, section 3.1).

    On an axis of length n, query i attends to the k positions from min(max(i - ⌊k/2⌋, 0), n - k) on: at the border the
    window is moved inside. A CPU takes compiled kernels where they are, except for float64; everything else is done in
    tiles; in neither are windows gathered. Export and forward-mode differentiation get operations of PyTorch's alone.

    Args:
        q, k, v: (B, H, W, heads, d), one floating-point dtype, H and W at least k.
        rpb: (heads, 2k - 1, 2k - 1), k odd: added to the logits, by the key's position minus the query's, plus k - 1.
        scale: multiplies q · k; None is d ** -0.5.
        dropout_p: probability with which an attention weight is zeroed, as in `scaled_dot_product_attention`.

    Returns:
        (B, H, W, heads, d), dtype of q. Bias and softmax are in float32 at least, and so are the products of the
        compiled kernels; the tiles make them in q's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(q, k, v, rpb, dropout_p)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    rpb = rpb.to(torch.promote_types(rpb.dtype, tiles.wide(q)))
    if is_exporting() or forward_ad._current_level >= 0:  # the operator would lose tangents silently
        return tiles.whole_map(q, k, v, rpb, scale, dropout_p)
    reason = native.neighborhood_refusal(q, rpb)
    if reason and reason == native.why_none and not is_compiling():
        warnings.warn(f'the library of CPU kernels {reason}; plain PyTorch is used instead and is slower', stacklevel=2)
    dropout_mask = None
    if dropout_p > 0:
        keep = torch.rand(*q.shape[:-1], (rpb.shape[-1] + 1) ** 2 // 4, device=q.device) >= dropout_p
        dropout_mask = keep.to(tiles.wide(q)) / (1 - dropout_p)
    return custom_op(q, k, v, rpb, scale, dropout_mask)


def _check(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, dropout_p: float) -> None:
    if q.ndim != 5 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            'q, k and v must all be (B, H, W, heads, d), got '
            f'q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}'
        )
    devices = {x.device for x in (q, k, v, rpb)}
    if len(devices) > 1:
        raise ValueError(f'q, k, v and rpb must be on one device, got {sorted(map(str, devices))}')
    if rpb.ndim != 3 or rpb.shape[0] != q.shape[3] or rpb.shape[1] != rpb.shape[2] or rpb.shape[1] % 4 != 1:
        raise ValueError(
            f'rpb must be (heads, 2k - 1, 2k - 1) with heads = {q.shape[3]} as in q and k odd, got {tuple(rpb.shape)}'
        )
    kernel_size = rpb.shape[-1] // 2 + 1
    if q.shape[1] < kernel_size or q.shape[2] < kernel_size:
        raise ValueError(f'maps must be at least k = {kernel_size} pixels a side, got {tuple(q.shape[1:3])}')
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype or not rpb.is_floating_point():
        raise ValueError(
            'q, k and v must share one floating-point dtype, and rpb have one, got '
            f'{q.dtype}, {k.dtype}, {v.dtype}, {rpb.dtype}'
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f'dropout_p must be in [0, 1), got {dropout_p=}')


@register_custom_op('mmslide::neighborhood_attention', mutates_args=())
def custom_op(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, scale: float, dropout_mask: Tensor | None) -> Tensor:
    forward = tiles.forward if native.neighborhood_refusal(q, rpb) else native.neighborhood_forward
    with without_autocast(q):
        return forward(q, k, v, rpb, scale, dropout_mask)


@register_custom_op('mmslide::neighborhood_attention_backward', mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor,
    scale: float,
    dropout_mask: Tensor | None,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and rpb; an empty tensor for the last without `parameters`."""
    backward: Any = tiles.backward if native.neighborhood_refusal(q, rpb) else native.neighborhood_backward
    with without_autocast(q):
        grads = backward(grad_out, q, k, v, rpb, scale, dropout_mask, parameters)
    return grads if parameters else (*grads, rpb.new_empty(0))


@custom_op.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *maps, rpb, _scale, _dropout_mask, parameters = args
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*maps, rpb))
    return grads if parameters else (*grads[:3], rpb.new_empty(0))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, dropout_mask = inputs
    ctx.save_for_backward(*tensors, dropout_mask)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, dropout_mask = ctx.saved_tensors
    parameters = ctx.needs_input_grad[3]
    grads = _backward(grad_out, *tensors, ctx.scale, dropout_mask, parameters)
    return *grads[:3], grads[3] if parameters else None, None, None


def _refuse_second_backward(ctx: Any, *grads: Tensor) -> None:
    raise ValueError('neighborhood_attention can be differentiated once only')


custom_op.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_refuse_second_backward)


@register_flop_formula(torch.ops.mmslide.neighborhood_attention)
def _flops(
    q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, rpb_shape: torch.Size, *_: Any, **__: Any
) -> int:
    """As the paper counts: q · k and a · v for k² slots, two operations a multiply-add."""
    return 2 * math.prod(q_shape) * 2 * (rpb_shape[-1] // 2 + 1) ** 2


@register_flop_formula(torch.ops.mmslide.neighborhood_attention_backward)
def _backward_flops(grad_out_shape: torch.Size, *shapes: Any, **kwargs: Any) -> int:
    """Two products for each one of the forward pass, without what is recomputed."""
    return 2 * _flops(*shapes)
