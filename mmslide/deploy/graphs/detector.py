"""Whole detectors of mmdet, from image to detections, as one graph of tensors with static shapes.

mmdet's own predict cannot be traced, since its sizes depend on the data. Here, lists of boxes have a fixed length and
are padded with rows marked as not found; boxes that mmdet filters are masked instead. NMS and RoIAlign, which are not
in PyTorch, are operators in `mmslide.deploy.graphs.operators`.
"""

from collections.abc import Sequence
from typing import Any

import mmcv.ops
import torch
import torch.nn.functional as F
from mmcv.ops.point_sample import generate_grid, point_sample, rel_roi_point_to_rel_img_point
from mmdet.models import (
    BaseDetector,
    CascadeRCNN,
    CascadeRoIHead,
    ConvFCBBoxHead,
    FasterRCNN,
    FCNMaskHead,
    MaskRCNN,
    RetinaHead,
    RetinaNet,
    RPNHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
    SingleRoIExtractor,
    StandardRoIHead,
)
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder
from mmdet.models.task_modules.coders.delta_xywh_bbox_coder import delta2bbox
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor, nn

from .base import EXACT, Exportable
from .operators import nms, roi_align

# boxes (K, 4), labels (K,), scores (K,) and, if the model has a mask head, masks (K, h, w).
Detections = Sequence[Tensor]
# Minimum score of the detections that are compared.
SCORE_THR = 0.3
FAINTEST = 1e-6


class ExportableDetector(Exportable):
    """The predictions of mmdet's Mask R-CNN, Faster R-CNN, Cascade (Mask) R-CNN or RetinaNet, with static shapes.

    forward takes an image (1, 3, H, W), normalized and padded as by the model's data_preprocessor, and returns K
    detections, highest score first, where K is max_per_img of the model's test_cfg:

    - boxes (K, 4): x1, y1, x2, y2 in pixels of that image, clipped to its padded size;
    - labels (K,), int64;
    - scores (K,): 0 in rows without a detection, if fewer than K were found;
    - masks (K, h, w), for models with a mask head: probabilities inside the box, usually h = w = 28.

    Args:
        model: built by mmdet, in eval mode; it is used without copying.
        shape: (H, W), multiples of the data_preprocessor's pad_size_divisor.

    Raises:
        ValueError: the model has a part or a setting that is not supported, it is in training mode, or the shape is
            invalid; in forward, the image is not (1, 3, H, W).
    """

    model: BaseDetector
    any_size = False
    has_operators = True
    may_differ = 0.25  # rounding decides which proposals win

    def __init__(self, model: BaseDetector, shape: tuple[int, int]) -> None:
        super().__init__()
        check_supported(model)
        if model.training:
            raise ValueError('the model must be in eval mode: call model.eval() first')
        divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
        if any(side < 1 or side % divisor for side in shape):
            raise ValueError(f'shape (H, W) must be multiples of the pad_size_divisor {divisor}, got {shape=}')
        self.model = model
        self.shape = shape
        self.output_names = ['boxes', 'labels', 'scores', *(['masks'] if model.with_mask else [])]
        self.eval()

    def forward(self, image: Tensor) -> Detections:
        if image.shape != (1, 3, *self.shape):
            raise ValueError(f'the image must be {(1, 3, *self.shape)}, got {tuple(image.shape)}')
        features = self.model.extract_feat(image)
        if isinstance(self.model, RetinaNet):
            boxes, labels, scores, _ = dense_detections(self.model.bbox_head, features, self.shape)
            return boxes, labels, scores
        proposals, _, _, found = dense_detections(self.model.rpn_head, features, self.shape)
        boxes, labels, scores = roi_detections(self.model.roi_head, features, proposals, found, self.shape)
        if not self.model.roi_head.with_mask:
            return boxes, labels, scores
        return boxes, labels, scores, roi_masks(self.model.roi_head, features, boxes, labels)

    def agreement(self, outputs: Detections, wanted: Detections, tolerance: float) -> tuple[bool, str]:
        """Whether both have found the same objects, see `unmatched`, and a description with the number of detections.

        With a tolerance for precisions below float32, scores may differ by it (at least by 0.1), IoUs may be 0.75, and
        one detection in five may have no match. In an image without such detections, the ten highest-scoring ones are
        compared, and one in five may have no match: in noise, rounding decides between equal scores.
        """
        if problem := self.malformed(outputs, wanted):
            return False, problem
        score_thr = SCORE_THR
        if faint := not bool((wanted[2] >= SCORE_THR).any()):
            score_thr = max(float(wanted[2].topk(min(10, len(wanted[2]))).values[-1]), FAINTEST)
        count, found = (int((x[2] >= score_thr).sum()) for x in (wanted, outputs))
        what = f'{count} found with a score of {score_thr:.2g} or more'
        if tolerance <= EXACT:
            problems = unmatched(wanted, outputs, score_thr)
        else:
            problems = unmatched(wanted, outputs, score_thr, min_iou=0.75, score_atol=max(0.1, tolerance))
        if len(problems) > (0 if tolerance <= EXACT and not faint else (count + found) // 5):
            return False, '\n'.join([f'{what}, but PyTorch (first) and the exported model (second) differ:', *problems])
        if not count:
            return True, 'nothing found, as PyTorch, so there was nothing to compare'
        return True, f'{what}, {f"all but {len(problems)}" if problems else "the same"} as PyTorch'


def dense_detections(
    head: RPNHead | RetinaHead, features: Sequence[Tensor], shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What RPNHead and RetinaHead predict, `_predict_by_feat_single` and `_bbox_post_process` in mmdet.

    Returns:
        boxes (K, 4), labels (K,), scores (K,) and whether there is a detection in this row (K,).
    """
    cfg = head.test_cfg
    is_rpn = isinstance(head, RPNHead)
    maps = head(features)
    priors = head.prior_generator.grid_priors([x.shape[-2:] for x in maps[0]], device=features[0].device)
    levels = []
    for level, (logits, deltas, anchors) in enumerate(zip(*maps, priors, strict=True)):
        logits = logits[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
        deltas = deltas[0].permute(1, 2, 0).reshape(-1, 4)
        scores = logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(-1)[:, :-1]
        classes = scores.shape[1]
        scores, index = scores.flatten().topk(min(cfg.nms_pre, scores.numel()))
        anchor, labels = index // classes, index % classes
        boxes = decode(head.bbox_coder, anchors[anchor], deltas[anchor], shape)[:, 0]
        levels.append((boxes, labels, scores, torch.full_like(labels, level)))
    boxes, labels, scores, level_ids = (torch.cat(parts) for parts in zip(*levels, strict=True))

    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    min_size = cfg.get('min_bbox_size', -1)
    valid = (width > min_size) & (height > min_size)
    if not is_rpn:
        valid &= scores > cfg.get('score_thr', 0)
    # Proposals are suppressed within their level, detections within their class.
    max_num = min(cfg.max_per_img, len(boxes)) if is_rpn else cfg.max_per_img
    return suppress(boxes, labels, scores, valid, level_ids if is_rpn else labels, cfg.nms.iou_threshold, max_num)


def roi_detections(
    roi_head: StandardRoIHead | CascadeRoIHead,
    features: Sequence[Tensor],
    rois: Tensor,
    found: Tensor,
    shape: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (K, 4), labels (K,), scores (K,) from proposals (N, 4), of which those marked in found (N,) are valid.

    A StandardRoIHead is a CascadeRoIHead with one stage: `_refine_roi` and BBoxHead's `predict_by_feat` in mmdet.
    """
    stage_logits = []
    for extractor, head in zip(as_list(roi_head.bbox_roi_extractor), as_list(roi_head.bbox_head), strict=True):
        logits, deltas = head(roi_features(extractor, features, rois))
        stage_logits.append(logits)
        boxes = decode(head.bbox_coder, rois, deltas, shape)  # (N, classes, 4), or (N, 1, 4) for all classes
        # The next stage uses the box of this stage's best class.
        rois = boxes[:, 0] if head.reg_class_agnostic else take_class(boxes, logits[:, :-1].argmax(1))

    cfg = roi_head.test_cfg
    scores = torch.stack(stage_logits).mean(0).softmax(-1)[:, :-1]
    count, classes = scores.shape
    labels = torch.arange(classes, device=scores.device).expand(count, classes)
    valid = (scores > cfg.score_thr) & found[:, None]
    boxes = boxes.expand(count, classes, 4).reshape(-1, 4)
    labels, scores, valid = labels.flatten(), scores.flatten(), valid.flatten()
    boxes, labels, scores, _ = suppress(boxes, labels, scores, valid, labels, cfg.nms.iou_threshold, cfg.max_per_img)
    return boxes, labels, scores


def roi_masks(
    roi_head: StandardRoIHead | CascadeRoIHead, features: Sequence[Tensor], boxes: Tensor, labels: Tensor
) -> Tensor:
    """Probabilities (K, h, w) inside the boxes (K, 4), averaged over the stages: `predict_mask` in mmdet."""
    masks = []
    for extractor, head in zip(as_list(roi_head.mask_roi_extractor), as_list(roi_head.mask_head), strict=True):
        logits = head(roi_features(extractor, features, boxes))
        masks.append((logits[:, 0] if head.class_agnostic else take_class(logits, labels)).sigmoid())
    return torch.stack(masks).mean(0)


def roi_features(extractor: SingleRoIExtractor, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """SingleRoIExtractor: (K, C, h, w), for each of the boxes (K, 4) from the map for its size."""
    features = features[: extractor.num_inputs]
    levels = extractor.map_roi_levels(F.pad(boxes, (1, 0)), len(features))
    out = features[0].new_zeros(())
    for level, (feature, layer) in enumerate(zip(features, extractor.roi_layers, strict=True)):
        here = levels == level
        # Every map is used for every box, but boxes of other maps are shrunk to a point: with sampling_ratio=0 this
        # takes no samples, where a whole image at stride 4 would take thousands.
        at = boxes.where(here[:, None], 0.0)
        out = torch.where(here[:, None, None, None], align(layer, feature, at), out)
    return out


def align(layer: mmcv.ops.RoIAlign | mmcv.ops.SimpleRoIAlign, feature: Tensor, boxes: Tensor) -> Tensor:
    """The layer's result for a map (1, C, H, W) and boxes (K, 4) of the image: (K, C, h, w)."""
    if isinstance(layer, mmcv.ops.RoIAlign):
        return roi_align(feature, boxes, layer.output_size, layer.spatial_scale, layer.sampling_ratio)
    # One sample per bin, with plain operations; the layer itself would first assign boxes to images.
    points = generate_grid(len(boxes), layer.output_size, device=boxes.device)
    points = rel_roi_point_to_rel_img_point(boxes, points, feature, layer.spatial_scale)
    samples = point_sample(feature, points[None], align_corners=not layer.aligned)  # (1, C, K, h * w)
    return samples[0].transpose(0, 1).unflatten(2, layer.output_size)


def decode(coder: DeltaXYWHBBoxCoder, boxes: Tensor, deltas: Tensor, shape: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) refined by deltas (N, classes * 4), as in the coder: (N, classes, 4)."""
    moved = delta2bbox(
        boxes, deltas, coder.means, coder.stds, add_ctr_clamp=coder.add_ctr_clamp, ctr_clamp=coder.ctr_clamp
    ).view(len(boxes), -1, 4)
    if not coder.clip_border:
        return moved
    # mmdet clips in place, which would become a ScatterND in ONNX.
    height, width = shape
    return torch.stack([moved[..., 0::2].clamp(0, width), moved[..., 1::2].clamp(0, height)], -1).flatten(-2)


def suppress(
    boxes: Tensor, labels: Tensor, scores: Tensor, valid: Tensor, groups: Tensor, iou_threshold: float, max_num: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """NMS within groups (N,) among the valid (N,): the top max_num boxes, labels, scores, and whether found.

    Empty rows are zeros.
    """
    # Groups are offset as in mmcv's batched_nms, by the same distance: at large coordinates it affects rounding.
    step = boxes.where(valid[:, None], 0.0).max() + 1
    index = nms(boxes + (groups * step)[:, None], scores.where(valid, -1.0), iou_threshold, max_num)
    found = index >= 0
    index = index.clamp(min=0)
    return (
        boxes[index].where(found[:, None], 0.0),
        labels[index].where(found, 0),
        scores[index].where(found, 0.0),
        found,
    )


def take_class(x: Tensor, labels: Tensor) -> Tensor:
    """x (K, classes, ...) at each row's label (K,): (K, ...)."""
    return x[torch.arange(len(x), device=x.device), labels]


def as_list(module: Any) -> list[Any]:
    """The stages of a cascade; a single module is the only stage."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def check_supported(model: BaseDetector) -> None:
    """Checks that every part of the model is supported; subclasses may have custom prediction code.

    Raises:
        ValueError: naming the part or the setting, and what is supported.
    """
    _require_type('model', model, MaskRCNN, FasterRCNN, CascadeRCNN, RetinaNet)
    if isinstance(model, RetinaNet):
        _check_dense_head('bbox_head', model.bbox_head, RetinaHead)
        return
    _check_dense_head('rpn_head', model.rpn_head, RPNHead)
    roi_head = model.roi_head
    _require_type('roi_head', roi_head, StandardRoIHead, CascadeRoIHead)
    _require('roi_head.shared_head', roi_head.with_shared_head, not roi_head.with_shared_head, 'none')
    _check_test_cfg('roi_head', roi_head.test_cfg)
    for head in as_list(roi_head.bbox_head):
        _require_type('roi_head.bbox_head', head, ConvFCBBoxHead, Shared2FCBBoxHead, Shared4Conv1FCBBoxHead)
        _check_box_head('roi_head.bbox_head', head)
    _check_extractors('roi_head.bbox_roi_extractor', roi_head.bbox_roi_extractor)
    if roi_head.with_mask:
        for head in as_list(roi_head.mask_head):
            _require_type('roi_head.mask_head', head, FCNMaskHead)
        _check_extractors('roi_head.mask_roi_extractor', roi_head.mask_roi_extractor)


def _check_dense_head(name: str, head: Any, kind: type) -> None:
    _require_type(name, head, kind)
    _check_box_head(name, head)
    _require_type(f'{name}.prior_generator', head.prior_generator, AnchorGenerator)
    nms_pre = head.test_cfg.get('nms_pre', -1)
    _require(f'{name}.test_cfg.nms_pre', nms_pre, nms_pre > 0, 'a positive number')
    _check_test_cfg(name, head.test_cfg)


def _check_box_head(name: str, head: Any) -> None:
    _require_type(f'{name}.bbox_coder', head.bbox_coder, DeltaXYWHBBoxCoder)
    loss = head.loss_cls
    custom = getattr(loss, 'custom_cls_channels', False) or getattr(loss, 'custom_activation', False)
    _require(f'{name}.loss_cls', loss, not custom, 'a loss after sigmoid or softmax')


def _check_test_cfg(name: str, cfg: Any) -> None:
    settings = cfg.get('nms')
    plain = bool(settings) and settings.get('type') == 'nms' and set(settings) == {'type', 'iou_threshold'}
    _require(f'{name}.test_cfg.nms', settings, plain, "dict(type='nms', iou_threshold=...)")
    max_per_img = cfg.get('max_per_img', -1)
    _require(f'{name}.test_cfg.max_per_img', max_per_img, max_per_img > 0, 'a positive number')


def _check_extractors(name: str, extractors: nn.Module) -> None:
    for extractor in as_list(extractors):
        _require_type(name, extractor, SingleRoIExtractor)
        for layer in extractor.roi_layers:
            ok = type(layer) is mmcv.ops.SimpleRoIAlign or (
                type(layer) is mmcv.ops.RoIAlign and layer.aligned and layer.pool_mode == 'avg'
            )
            supported = "SimpleRoIAlign, or RoIAlign with aligned=True and pool_mode='avg'"
            _require(f'{name}.roi_layer', layer, ok, supported)


def _require_type(name: str, part: Any, *types: type) -> None:
    _require(name, type(part).__name__, type(part) in types, ' or '.join(x.__name__ for x in types))


def _require(name: str, value: Any, ok: bool, supported: str) -> None:
    if not ok:
        raise ValueError(f'{name} cannot be exported: it must be {supported}, got {value}')


def unmatched(
    a: Detections, b: Detections, score_thr: float = SCORE_THR, min_iou: float = 0.95, score_atol: float = 1e-3
) -> list[str]:
    """The detections of either model that have no match in the other.

    Each detection with a score of score_thr or more needs its own match among the other's: the same label, an IoU of
    min_iou or more, a score within score_atol, and an IoU of min_iou or more between the masks, thresholded at 0.5.

    Args:
        a, b: boxes (K, 4), labels (K,), scores (K,) and, in both or in neither, masks (K, h, w).

    Returns:
        A line for each detection without a match: none if the two agree.

    Raises:
        ValueError: only one of the two has masks.
    """
    if len(a) != len(b):
        raise ValueError(f'detections with and without masks cannot be compared, got {len(a)} and {len(b)} tensors')
    limits = score_thr, min_iou, score_atol
    return [*_without_partner('first', a, b, *limits), *_without_partner('second', b, a, *limits)]


def _without_partner(
    name: str, a: Detections, b: Detections, score_thr: float, min_iou: float, score_atol: float
) -> list[str]:
    boxes, labels, scores = a[:3]
    overlap = bbox_overlaps(boxes, b[0])
    # Boxes clipped to a line have no area.
    overlap = overlap.where((boxes[:, None] - b[0]).abs().amax(-1) > 1e-2, 1.0)
    agree = (overlap >= min_iou) & (labels[:, None] == b[1]) & ((scores[:, None] - b[2]).abs() <= score_atol)
    if len(a) > 3:
        ours, theirs = ((x[3] > 0.5).flatten(1).float() for x in (a, b))
        both = ours @ theirs.T
        either = ours.sum(1)[:, None] + theirs.sum(1) - both
        agree &= both >= min_iou * either
    lines = []
    for row in (scores >= score_thr).nonzero().flatten().tolist():
        partners = agree[row].nonzero().flatten()
        if len(partners):
            agree[:, partners[overlap[row, partners].argmax()]] = False
        else:
            box = ', '.join(f'{x:.1f}' for x in boxes[row].tolist())
            lines.append(f'only the {name} has label {labels[row]}, score {scores[row]:.4f}, box ({box})')
    return lines
