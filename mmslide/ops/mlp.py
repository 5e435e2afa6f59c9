from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmslide.compat import is_batched

from .autocast import without_autocast

# Of the hidden layer at a time: the size of two cores' caches.
BLOCK_BYTES = 1 << 22
# The largest hidden layer that is kept for backward. For larger ones, the C library allocates new memory every time,
# and a page fault for every 4 KiB takes longer than recomputing them.
KEPT_BYTES = 1 << 25


def mlp_in_blocks(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> Tensor:
    """The MLP of a transformer block, linear(GELU(linear(layer_norm(x)))), on a CPU: (..., C) to the same shape.

    Computed in blocks of pixels, so only a part of the hidden layer (100 MB for a stage of a detector's image), of its
    activation and of their gradients is in memory, and fits in the caches. A small hidden layer is kept for backward.

    Args:
        gamma, beta, eps: of the norm over C, which is computed in x's dtype.
        weight1, bias1: (hidden, C), (hidden); their dtype is that of both products and of the result.
        weight2, bias2: (C, hidden), (C).
    """
    # Checked here, since grad mode is always off inside the function.
    return _MLPInBlocks.apply(x, gamma, beta, weight1, bias1, weight2, bias2, eps, torch.is_grad_enabled())


class _MLPInBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        eps: float,
        grad_enabled: bool,
    ) -> Tensor:
        pixels = x.numel() // x.shape[-1]
        keep = grad_enabled and pixels * len(weight1) * weight1.element_size() <= KEPT_BYTES
        hidden = weight1.new_empty(pixels if keep else 0, len(weight1))
        ctx.save_for_backward(x, gamma, beta, weight1, bias1, weight2, bias2, hidden)
        ctx.eps = eps
        out = torch.empty_like(x, dtype=weight2.dtype, memory_format=torch.contiguous_format)
        blocks = _Blocks(x, weight1, buffers=1)
        for part, source, result in blocks.of(x, out):
            before = hidden[part] if keep else blocks.buffer(0, part)
            normed = F.layer_norm(source, gamma.shape, gamma, beta, eps).to(weight1.dtype)
            torch.addmm(bias1, normed, weight1.t(), out=before)
            activated = torch.ops.aten.gelu.out(before, out=blocks.buffer(0, part))
            torch.addmm(bias2, activated, weight2.t(), out=result)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        needed = ctx.needs_input_grad[: len(inputs)]
        with without_autocast(grad_out):
            if torch.is_grad_enabled() or is_batched(grad_out):
                grads = _differentiable_gradients(grad_out, inputs, ctx.eps, needed)
            else:
                grads = _gradients(grad_out, inputs, kept, ctx.eps, needed)
        return *grads, None, None


def _gradients(
    grad_out: Tensor, inputs: Sequence[Tensor], kept: Tensor, eps: float, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the inputs that need one. `kept` is the hidden layer (pixels, hidden), or empty."""
    x, gamma, beta, weight1, bias1, weight2, _ = inputs
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    # Sums over the blocks, at least in float32.
    grads = [grad_x, *(y.new_zeros(y.shape, dtype=torch.promote_types(y.dtype, torch.float32)) for y in inputs[1:])]
    blocks = _Blocks(x, weight1, buffers=3)
    for part, source, grad, result in blocks.of(x, grad_out, grad_x):
        normed, mean, rstd = torch.native_layer_norm(source, gamma.shape, gamma, beta, eps)
        normed = normed.to(weight1.dtype)
        before = kept[part] if len(kept) else torch.addmm(bias1, normed, weight1.t(), out=blocks.buffer(0, part))
        if needed[5]:
            _add_product(grads[5], grad.t(), torch.ops.aten.gelu.out(before, out=blocks.buffer(1, part)))
        if not any(needed[:5]):
            continue
        grad_hidden = torch.mm(grad, weight2, out=blocks.buffer(2, part))
        torch.ops.aten.gelu_backward.grad_input(grad_hidden, before, grad_input=grad_hidden)
        if needed[3]:
            _add_product(grads[3], grad_hidden.t(), normed)
        if needed[4]:
            grads[4] += grad_hidden.sum(0, dtype=grads[4].dtype)
        if any(needed[:3]):
            of_norm = torch.ops.aten.native_layer_norm_backward(
                (grad_hidden @ weight1).to(x.dtype), source, gamma.shape, mean, rstd, gamma, beta, [True, True, True]
            )
            result.copy_(of_norm[0])
            grads[1] += of_norm[1]
            grads[2] += of_norm[2]
    if needed[6]:
        grads[6] = grad_out.flatten(0, -2).sum(0)
    return [grad.to(y.dtype) if need else None for grad, y, need in zip(grads, inputs, needed, strict=True)]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _differentiable_gradients(
    grad_out: Tensor, inputs: Sequence[Tensor], eps: float, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The same with PyTorch's layers, for higher-order gradients and vmap."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [y.view_as(y) for y in inputs]  # inputs may depend on each other, which must not matter here
        x, gamma, beta, weight1, bias1, weight2, bias2 = own
        normed = F.layer_norm(x, gamma.shape, gamma, beta, eps).to(weight1.dtype)
        hidden = F.gelu(F.linear(normed, weight1, bias1))
        out = F.linear(hidden, weight2, bias2)
    wanted = [y for y, need in zip(own, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=create_graph))
    return [next(grads) if need else None for need in needed]


class _Blocks:
    """Blocks of pixels, and buffers as large as their hidden layer that all blocks reuse."""

    def __init__(self, x: Tensor, weight1: Tensor, buffers: int) -> None:
        self.pixels = x.numel() // x.shape[-1]
        self.count = max(1, min(self.pixels, BLOCK_BYTES // weight1[:, 0].nbytes))
        self.buffers = [weight1.new_empty(self.count, len(weight1)) for _ in range(buffers)]

    def of(self, *maps: Tensor) -> Iterator[tuple[Any, ...]]:
        """A block's pixels, then the same pixels of each map (..., C): (count, C)."""
        flat = [x.reshape(-1, x.shape[-1]) for x in maps]
        for start in range(0, self.pixels, self.count):
            part = slice(start, min(start + self.count, self.pixels))
            yield part, *(x[part] for x in flat)

    def buffer(self, number: int, part: slice) -> Tensor:
        return self.buffers[number][: part.stop - part.start]
