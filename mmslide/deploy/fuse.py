import copy
from typing import Any

from mmengine.model import is_model_wrapper
from torch import nn

from mmslide.models.attention import SlideAttention
from mmslide.models.pyramid import Pyramid


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a trained model for inference, which computes the same with less.

    In every Slide Attention the fixed and the learned kernels become one (CVPR 2023, arXiv 2304.04237, section 4.3),
    as `switch_to_deploy` does for other models of OpenMMLab; DropPath and dropout leave the backbone. The merged
    kernels stay float32 in a half-precision model.

    Args:
        model: whatever contains our backbones, such as a detector or a segmentor, also inside a wrapper for
            distributed training. It stays as it is. If it is fused already, the copy is equal.

    Returns:
        The new model without the wrapper, in eval mode.

    Raises:
        ValueError: the model contains none of our modules.
    """
    plain: Any = model.module if is_model_wrapper(model) else model
    fused = copy.deepcopy(plain)
    ours = [module for module in fused.modules() if isinstance(module, Pyramid | SlideAttention)]
    if not ours:
        raise ValueError(f'only a model with a backbone of mmslide can be fused, got {type(model).__name__}')
    for module in ours:
        module.switch_to_deploy()
    return fused.eval()
