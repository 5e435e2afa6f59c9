"""One PyTorch operator that wraps all backends not made of plain tensor operations, so that torch.compile, autocast,
activation checkpointing, DDP and the FLOP counter support them. Only q, k, v and the parameters are kept for backward.
"""

import math
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mmslide.compat import register_custom_op, register_flop_formula

from .autocast import without_autocast
from .check import trusted

# The module of each backend, with a `forward` and a `backward`. They take q, k and v in their own dtype and upcast them
# part by part.
KERNELS = {'native': 'native', 'tapwise': 'tapwise', 'triton': 'triton_kernels'}


def _kernels(backend: str, q: Tensor, weight: Tensor) -> Any:
    """Imports the module on first use. 'gpu' is 'triton' if it passes its check, which is done here, so that eager,
    compiled and distributed code use the same backend.
    """
    if backend == 'gpu':
        backend = 'triton' if trusted(q, weight) else 'tapwise'
    return import_module(f'{__package__}.{KERNELS[backend]}')


@register_custom_op('mmslide::slide_attention', mutates_args=())
def custom_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: Tensor,
    scale: float,
    dropout_mask: Tensor | None,
    backend: str,
) -> Tensor:
    """See `mmslide.ops.slide_attention` for shapes; arguments are not checked again."""
    return _kernels(backend, q, weight).forward(q, k, v, weight, bias, rpb, scale, dropout_mask)


@register_custom_op('mmslide::slide_attention_backward', mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: Tensor,
    scale: float,
    dropout_mask: Tensor | None,
    parameters: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, weight, bias and rpb; empty tensors for the last three without `parameters`."""
    with without_autocast(grad_out):
        kernels = _kernels(backend, q, weight)
        grads = kernels.backward(grad_out, q, k, v, weight, bias, rpb, scale, dropout_mask, parameters)
    return grads if parameters else (*grads, *_empty(weight, bias, rpb))


def _empty(*parameters: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) for x in parameters)


@custom_op.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, _scale, _dropout_mask, parameters, _backend = args
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
    return grads if parameters else (*grads[:3], *_empty(*tensors[3:]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *maps, ctx.scale, dropout_mask, ctx.backend = inputs
    ctx.save_for_backward(*maps, dropout_mask)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, dropout_mask = ctx.saved_tensors
    parameters = any(ctx.needs_input_grad[3:6])
    grads = _backward(grad_out, *tensors, ctx.scale, dropout_mask, parameters, ctx.backend)
    return *grads[:3], *(grads[3:] if parameters else [None] * 3), None, None, None


def _save_backend(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.backend = inputs[-1]


def _refuse_second_backward(ctx: Any, *grads: Tensor) -> None:
    raise ValueError(f"backend '{ctx.backend}' can be differentiated only once; use 'conv' for higher-order gradients")


custom_op.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_refuse_second_backward, setup_context=_save_backend)


@register_flop_formula(torch.ops.mmslide.slide_attention)
def _flops(
    q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any
) -> int:
    """As counted in the paper: the merged kernels on K and V, then q · K and a · V, two operations per multiply-add."""
    slots = weight_shape[1]
    return 2 * math.prod(q_shape) * 2 * (slots * slots + slots)


@register_flop_formula(torch.ops.mmslide.slide_attention_backward)
def _backward_flops(grad_out_shape: torch.Size, *shapes: Any, **kwargs: Any) -> int:
    """Two products for each product in the forward pass, without recomputation."""
    return 2 * _flops(*shapes)
