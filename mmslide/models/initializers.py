from typing import Any

import torch
from mmengine.model import update_init_info
from torch import nn

from mmslide.registry import WEIGHT_INITIALIZERS

from .pyramid import Pyramid


@WEIGHT_INITIALIZERS.register_module()
class ZeroSumPatches:
    """For `init_cfg` of a backbone: its first convolution starts blind to a patch's mean colour.

    Training from scratch on small data finds outlines sooner when colour, the largest part of a patch's variance, does
    not drown them. Weights are drawn from a normal distribution and made to sum to zero over each patch and input
    channel. Biases are drawn from another, so that the norm behind does not raise the noise of an even patch to the
    size of edges.

    Args:
        std: of the weights, before their mean is taken off.
        bias_std: of the biases.

    Raises:
        TypeError: for a module that is not one of mmslide's backbones.
    """

    def __init__(self, std: float = 0.65, bias_std: float = 0.5) -> None:
        self.std = std
        self.bias_std = bias_std

    def __call__(self, backbone: Pyramid) -> None:
        if not isinstance(backbone, Pyramid):
            raise TypeError(
                f'ZeroSumPatches stands in the init_cfg of a backbone of mmslide, got {type(backbone).__name__}'
            )
        projection: Any = next(x for x in backbone.stages[0].embed.modules() if isinstance(x, nn.Conv2d))
        with torch.no_grad():
            projection.weight.normal_(std=self.std)
            projection.weight -= projection.weight.mean((2, 3), keepdim=True)
            projection.bias.normal_(std=self.bias_std)
        if hasattr(backbone, '_params_init_info'):
            update_init_info(backbone, init_info=f'ZeroSumPatches: std={self.std}, bias_std={self.bias_std}')
