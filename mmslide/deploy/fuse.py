import copy
from typing import Any

from mmengine.model import is_model_wrapper
from torch import nn

from mmslide.models.attention import SlideAttention
from mmslide.models.pyramid import Pyramid


def fuse(model: nn.Module) -> nn.Module:
    """Returns a copy of a trained model for inference, with the same results and fewer operations.

    In every Slide Attention, the fixed and the learned kernels are merged (CVPR 2023, arXiv 2304.04237, section 4.3),
    like `switch_to_deploy` in other OpenMMLab models; DropPath and dropout are removed from the backbone. In a
    half-precision model, the merged kernels stay in float32.

    Args:
        model: any model that contains backbones of this package or `SlideAttention`, such as a detector or a segmentor,
            also inside a wrapper for distributed training. It is not modified. A model that is already fused is just
            copied.

    Returns:
        The new model without the wrapper, in eval mode.

    Raises:
        ValueError: the model contains no module of this package.
    """
    plain: Any = model.module if is_model_wrapper(model) else model
    fused = copy.deepcopy(plain)
    ours = [module for module in fused.modules() if isinstance(module, Pyramid | SlideAttention)]
    if not ours:
        raise ValueError(f'only a model with a backbone of mmslide can be fused, got {type(model).__name__}')
    for module in ours:
        module.switch_to_deploy()
    return fused.eval()
