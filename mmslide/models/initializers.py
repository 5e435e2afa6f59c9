from typing import Any

import torch
from mmengine.model import update_init_info
from torch import nn

from mmslide.registry import WEIGHT_INITIALIZERS

from .pyramid import Pyramid


@WEIGHT_INITIALIZERS.register_module()
class ZeroSumPatches:
    """Initializes the first convolution of a backbone so that it ignores the mean color of a patch; for `init_cfg`.

    When training from scratch on small data, outlines are learned sooner if color, the largest part of a patch's
    variance, does not dominate. Weights are drawn from a normal distribution and made to sum to zero over each patch
    and input channel. Biases are drawn from another, so that the following norm does not amplify the noise of a uniform
    patch to the level of edges.

    Args:
        std: standard deviation of the weights, before their mean is subtracted.
        bias_std: standard deviation of the biases.

    Raises:
        TypeError: for a module that is not one of mmslide's backbones.
    """

    def __init__(self, std: float = 0.65, bias_std: float = 0.5) -> None:
        self.std = std
        self.bias_std = bias_std

    def __call__(self, backbone: Pyramid) -> None:
        if not isinstance(backbone, Pyramid):
            raise TypeError(
                f'ZeroSumPatches must be in the init_cfg of a backbone of mmslide, got {type(backbone).__name__}'
            )
        projection: Any = next(x for x in backbone.stages[0].embed.modules() if isinstance(x, nn.Conv2d))
        with torch.no_grad():
            projection.weight.normal_(std=self.std)
            projection.weight -= projection.weight.mean((2, 3), keepdim=True)
            projection.bias.normal_(std=self.bias_std)
        if hasattr(backbone, '_params_init_info'):
            update_init_info(backbone, init_info=f'ZeroSumPatches: std={self.std}, bias_std={self.bias_std}')
