"""Merges the two paths of Slide Attention, as trained in the paper, into one kernel."""

import torch
from torch import Tensor


def fixed_shift(kernel_size: int) -> Tensor:
    """The kernels of the fixed path, (k², k, k): slot j selects tap j, in row-major order.

    Args:
        kernel_size: k, odd.
    """
    return torch.eye(kernel_size**2).view(-1, kernel_size, kernel_size)


def merge_paths(shift: Tensor, shift_bias: Tensor, deform_weight: Tensor, deform_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Merges both paths (CVPR 2023, arXiv 2304.04237, section 4.3) by adding their kernels and biases.

    Args:
        shift: (k², k, k).
        deform_weight: (d, k², k, k).
        shift_bias, deform_bias: (d, k²).

    Returns:
        Kernels (d, k², k, k) and bias (d, k²). At least float32: in half precision, a small learned part would be lost
        next to the shift's 1.
    """
    dtype = torch.promote_types(deform_weight.dtype, torch.float32)
    return shift.to(dtype) + deform_weight.to(dtype), shift_bias.to(dtype) + deform_bias.to(dtype)
