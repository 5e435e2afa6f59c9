"""Slide Attention as one operator of PyTorch's, so that torch.compile, autocast, activation checkpointing, DDP and the
FLOP counter know it. Its kernels keep q, k, v and the parameters for backward and nothing else.
"""

import math
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

MODULES = {'native': 'native', 'triton': 'triton_kernels'}


def _kernels(backend: str) -> Any:
    """The module with the backend's `forward` and `backward`, imported when it is wanted first."""
    return import_module(f'{__package__}.{MODULES[backend]}')


@torch.library.custom_op('mmslide::slide_attention', mutates_args=())
def fused(
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
    """See `mmslide.ops.slide_attention` for shapes; what it checks is not checked here once more."""
    return _kernels(backend).forward(q, k, v, weight, bias, rpb, scale, dropout_mask)


@torch.library.custom_op('mmslide::slide_attention_backward', mutates_args=())
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, weight, bias and rpb."""
    return _kernels(backend).backward(grad_out, q, k, v, weight, bias, rpb, scale, dropout_mask)


@fused.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *parameters: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, *parameters[:3]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *maps, ctx.scale, dropout_mask, ctx.backend = inputs
    ctx.save_for_backward(*maps, dropout_mask)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    *maps, dropout_mask = ctx.saved_tensors
    return *_backward(grad_out, *maps, ctx.scale, dropout_mask, ctx.backend), None, None, None


def _save_backend(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.backend = inputs[-1]


def _refuse_second_backward(ctx: Any, *grads: Tensor) -> None:
    raise ValueError(f"backend '{ctx.backend}' can be differentiated once only; take 'conv' for gradients of gradients")


fused.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_refuse_second_backward, setup_context=_save_backend)


@register_flop_formula(torch.ops.mmslide.slide_attention)
def _flops(
    q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any
) -> int:
    """As the paper counts: the merged kernels on K and on V, then q · K and a · V, two operations a multiply-add."""
    slots = weight_shape[1]
    return 2 * math.prod(q_shape) * 2 * (slots * slots + slots)


@register_flop_formula(torch.ops.mmslide.slide_attention_backward)
def _backward_flops(grad_out_shape: torch.Size, *shapes: Any, **kwargs: Any) -> int:
    """Two products for each one of the forward pass, without what is recomputed."""
    return 2 * _flops(*shapes)
