from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Of the hidden layer at a time: what the caches of two cores hold.
BLOCK_BYTES = 1 << 22
# The largest hidden layer that is kept for backward. For a larger one the C library takes new memory every time, and a
# page fault every 4 KiB takes longer than computing it again.
KEPT_BYTES = 1 << 25


def pays_in_blocks(x: Tensor, norm: nn.Module, expand: nn.Module, contract: nn.Module, *around: nn.Module) -> bool:
    """Whether `mlp_in_blocks` computes the same as the layers one after another, and faster.

    Args:
        around: modules that would be called too, and whose hooks would be left out.
    """
    return (
        x.device.type == 'cpu'
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled('cpu')
        # Nothing that stands in for a layer (pruned, parametrized, quantized, with an adapter), and nobody who watches.
        and type(norm) is nn.LayerNorm
        and {type(expand), type(contract)} <= {nn.Linear, Linear}
        and not any(_has_hooks(module) for module in (norm, expand, contract, *around))
        and norm.bias is not None  # without one it may have no weight either
        and x.dtype == norm.weight.dtype == expand.weight.dtype
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def mlp_in_blocks(x: Tensor, norm: nn.LayerNorm, expand: nn.Linear, contract: nn.Linear) -> Tensor:
    """The MLP of a transformer block, contract(GELU(expand(norm(x)))), on a CPU: (..., C) to the same.

    Some pixels at a time, so that only a part of the hidden layer, 100 MB for a stage of a detector's image, of its
    activation and of their gradients stands in memory, in the caches. A small hidden layer is kept for backward.
    """
    parameters = norm.weight, norm.bias, expand.weight, expand.bias, contract.weight, contract.bias
    # Asked here, because inside the function it is always off.
    return _MLPInBlocks.apply(x, *parameters, norm.eps, torch.is_grad_enabled())


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
        keep = grad_enabled and pixels * len(weight1) * x.element_size() <= KEPT_BYTES
        hidden = x.new_empty(pixels if keep else 0, len(weight1))
        ctx.save_for_backward(x, gamma, beta, weight1, bias1, weight2, hidden)
        ctx.eps = eps
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        blocks = _Blocks(x, weight1, buffers=1)
        for part, source, result in blocks.of(x, out):
            before = hidden[part] if keep else blocks.buffer(0, part)
            torch.addmm(bias1, F.layer_norm(source, gamma.shape, gamma, beta, eps), weight1.t(), out=before)
            activated = torch.ops.aten.gelu.out(before, out=blocks.buffer(0, part))
            torch.addmm(bias2, activated, weight2.t(), out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight1, bias1, weight2, kept = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grads = [torch.zeros_like(parameter) for parameter in (gamma, beta, weight1, bias1, weight2)]
        blocks = _Blocks(x, weight1, buffers=3)
        for part, source, grad, result in blocks.of(x, grad_out, grad_x):
            normed, mean, rstd = torch.native_layer_norm(source, gamma.shape, gamma, beta, ctx.eps)
            before = kept[part] if len(kept) else torch.addmm(bias1, normed, weight1.t(), out=blocks.buffer(0, part))
            activated = torch.ops.aten.gelu.out(before, out=blocks.buffer(1, part))
            grad_hidden = torch.mm(grad, weight2, out=blocks.buffer(2, part))
            torch.ops.aten.gelu_backward.grad_input(grad_hidden, before, grad_input=grad_hidden)
            of_norm = torch.ops.aten.native_layer_norm_backward(
                grad_hidden @ weight1, source, gamma.shape, mean, rstd, gamma, beta, [True, True, True]
            )
            result.copy_(of_norm[0])
            grads[0] += of_norm[1]
            grads[1] += of_norm[2]
            grads[2].addmm_(grad_hidden.t(), normed)
            grads[3] += grad_hidden.sum(0)
            grads[4].addmm_(grad.t(), activated)
        return grad_x, *grads, grad_out.flatten(0, -2).sum(0), None, None


class _Blocks:
    """Some pixels at a time, and memory that every block uses again for what is as large as its hidden layer."""

    def __init__(self, x: Tensor, weight1: Tensor, buffers: int) -> None:
        self.pixels = x.numel() // x.shape[-1]
        self.count = max(1, min(self.pixels, BLOCK_BYTES // (len(weight1) * x.element_size())))
        self.buffers = [x.new_empty(self.count, len(weight1)) for _ in range(buffers)]

    def of(self, *maps: Tensor) -> Iterator[tuple[Any, ...]]:
        """A block's pixels, then the same pixels of each map (..., C): (count, C)."""
        flat = [x.reshape(-1, x.shape[-1]) for x in maps]
        for start in range(0, self.pixels, self.count):
            part = slice(start, min(start + self.count, self.pixels))
            yield part, *(x[part] for x in flat)

    def buffer(self, number: int, part: slice) -> Tensor:
        return self.buffers[number][: part.stop - part.start]
