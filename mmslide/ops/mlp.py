from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Of the hidden layer at a time: what the caches of two cores hold.
BLOCK_BYTES = 1 << 22
# Backward computes again what is larger than this, in which the C library never hands out the same memory twice: a page
# fault every 4 KiB takes more time.
RECOMPUTED_BYTES = 1 << 25


def pays_in_blocks(x: Tensor, norm: nn.Module, expand: nn.Linear) -> bool:
    """Whether `mlp_in_blocks` computes the same as the layers one after another, and faster."""
    hidden_bytes = x.numel() // x.shape[-1] * expand.out_features * x.element_size()
    return (
        x.device.type == 'cpu'
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled('cpu')
        and isinstance(norm, nn.LayerNorm)
        and norm.bias is not None  # without one it may have no weight either
        and x.dtype == norm.weight.dtype == expand.weight.dtype
        and (hidden_bytes > RECOMPUTED_BYTES or not torch.is_grad_enabled())
    )


def mlp_in_blocks(x: Tensor, norm: nn.LayerNorm, expand: nn.Linear, contract: nn.Linear) -> Tensor:
    """The MLP of a transformer block, contract(GELU(expand(norm(x)))), on a CPU: (..., C) to the same.

    Some pixels at a time, so that the hidden layer, which is 100 MB for a stage of a detector's image, never leaves the
    caches. Backward computes it again.
    """
    parameters = norm.weight, norm.bias, expand.weight, expand.bias, contract.weight, contract.bias
    return _MLPInBlocks.apply(x, *parameters, norm.eps)


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
    ) -> Tensor:
        ctx.save_for_backward(x, gamma, beta, weight1, bias1, weight2)
        ctx.eps = eps
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        count, (buffer,) = _buffers(x, weight1, 1)
        for pixels, result in _in_blocks(count, x, out):
            hidden = buffer[: len(pixels)]
            torch.addmm(bias1, F.layer_norm(pixels, gamma.shape, gamma, beta, eps), weight1.t(), out=hidden)
            torch.addmm(bias2, torch.ops.aten.gelu_(hidden), weight2.t(), out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight1, bias1, weight2 = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grads = [torch.zeros_like(parameter) for parameter in (gamma, beta, weight1, bias1, weight2)]
        count, buffers = _buffers(x, weight1, 3)
        for pixels, grad, result in _in_blocks(count, x, grad_out, grad_x):
            hidden, activated, grad_hidden = (buffer[: len(pixels)] for buffer in buffers)
            normed, mean, rstd = torch.native_layer_norm(pixels, gamma.shape, gamma, beta, ctx.eps)
            torch.addmm(bias1, normed, weight1.t(), out=hidden)
            torch.ops.aten.gelu.out(hidden, out=activated)
            torch.mm(grad, weight2, out=grad_hidden)
            torch.ops.aten.gelu_backward.grad_input(grad_hidden, hidden, grad_input=grad_hidden)
            of_norm = torch.ops.aten.native_layer_norm_backward(
                grad_hidden @ weight1, pixels, gamma.shape, mean, rstd, gamma, beta, [True, True, True]
            )
            result.copy_(of_norm[0])
            grads[0] += of_norm[1]
            grads[1] += of_norm[2]
            grads[2].addmm_(grad_hidden.t(), normed)
            grads[3] += grad_hidden.sum(0)
            grads[4].addmm_(grad.t(), activated)
        return grad_x, *grads, grad_out.flatten(0, -2).sum(0), None


def _buffers(x: Tensor, weight1: Tensor, number: int) -> tuple[int, list[Tensor]]:
    """How many pixels make a block, and memory for its hidden layer, so many times."""
    count = max(1, min(x.numel() // x.shape[-1], BLOCK_BYTES // (len(weight1) * x.element_size())))
    return count, [x.new_empty(count, len(weight1)) for _ in range(number)]


def _in_blocks(count: int, *maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same pixels of each map (..., C), so many at a time: (count, C)."""
    return zip(*(x.reshape(-1, x.shape[-1]).split(count) for x in maps), strict=True)
