"""The two operators that are not in PyTorch; in PyTorch they run mmcv's code, targets have their own."""

from collections.abc import Sequence

import mmcv.ops
import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op('mmslide::nms', mutates_args=())
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, max_num: int) -> Tensor:
    """Greedy NMS among the boxes (N, 4) whose scores (N,) are not negative.

    Returns:
        (max_num,): indices of the boxes kept, highest score first, padded with -1.
    """
    candidates = (scores >= 0).nonzero().squeeze(1)
    _, kept = mmcv.ops.nms(boxes[candidates], scores[candidates], iou_threshold)
    kept = candidates[kept[:max_num]]
    return F.pad(kept, (0, max_num - len(kept)), value=-1)


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, max_num: int) -> Tensor:
    return boxes.new_empty(max_num, dtype=torch.long)


@torch.library.custom_op('mmslide::roi_align', mutates_args=())
def roi_align(
    feature: Tensor, boxes: Tensor, output_size: Sequence[int], spatial_scale: float, sampling_ratio: int
) -> Tensor:
    """RoIAlign (Mask R-CNN, section 3), averaging and aligned, of a map (1, C, H, W) in boxes (K, 4) of the image.

    Returns:
        (K, C, h, w), output_size being (h, w).
    """
    rois = F.pad(boxes, (1, 0))  # all in image 0
    return mmcv.ops.roi_align(feature, rois, tuple(output_size), spatial_scale, sampling_ratio, 'avg', True)


@roi_align.register_fake
def _(feature: Tensor, boxes: Tensor, output_size: Sequence[int], spatial_scale: float, sampling_ratio: int) -> Tensor:
    return feature.new_empty(boxes.shape[0], feature.shape[1], *output_size)
