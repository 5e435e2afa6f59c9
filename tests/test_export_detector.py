"""Whole detectors as one graph: against mmdet's own predict in PyTorch, and in onnxruntime against PyTorch."""

import copy
import functools
import math
import re
from pathlib import Path

import cv2
import onnx
import onnxruntime
import pytest
import torch
from helpers import assert_gpu_operators, randomize, relative_error, tool
from mmcv.ops import SimpleRoIAlign
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmslide.deploy.export import export as export_file
from mmslide.deploy.graphs import EXACT
from mmslide.deploy.graphs.detector import (
    Detections,
    ExportableDetector,
    align,
    as_list,
    dense_detections,
    nms,
    roi_align,
    unmatched,
)
from mmslide.deploy.targets.onnx import translations

CONFIGS = Path(__file__).parents[1] / 'configs'
MINI = CONFIGS / 'mini/cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py'
SHAPE = (96, 128)
NAMES = ['a', 'b', 'c', 'd', 'two words']
CLASSES = len(NAMES)
STAGE_STDS = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.03, 0.03, 0.07, 0.07])


def config(kind: str) -> ConfigDict:
    """A small model; together they have every setting that the rewritten heads read."""
    model = Config.fromfile(MINI).model
    model.backbone.update(attn_backend='conv')
    model.backbone.arch.depths = [1, 1, 1, 1]
    model.train_cfg = None
    if kind == 'retinanet':
        retinanet = Config.fromfile(CONFIGS / '_base_/models/retinanet.py').model
        retinanet.backbone.update(model.backbone)
        retinanet.neck.update(in_channels=model.neck.in_channels[1:], out_channels=64)
        retinanet.bbox_head.update(num_classes=CLASSES, in_channels=64, feat_channels=64, stacked_convs=2)
        retinanet.bbox_head.bbox_coder.update(
            target_stds=[0.1, 0.1, 0.2, 0.2], clip_border=False, add_ctr_clamp=True, ctr_clamp=1
        )
        retinanet.train_cfg = None
        retinanet.test_cfg.update(nms_pre=300, min_bbox_size=8, score_thr=0.95)
        return retinanet
    if kind == 'mini cascade':
        for head in (*model.roi_head.bbox_head, model.roi_head.mask_head):
            head.num_classes = CLASSES
        return model
    model.type = 'MaskRCNN'
    model.roi_head = Config.fromfile(CONFIGS / '_base_/models/mask-rcnn.py').model.roi_head
    for part in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
        part.update(out_channels=64, finest_scale=28)
    model.roi_head.bbox_head.update(num_classes=CLASSES, in_channels=64, fc_out_channels=256)
    model.roi_head.mask_head.update(num_classes=CLASSES, in_channels=64, conv_out_channels=32, num_convs=2)
    # A map that no RoI is taken from, fewer proposals than max_per_img.
    model.neck.num_outs = 5
    model.rpn_head.anchor_generator.strides = [4, 8, 16, 32, 64]
    model.rpn_head.loss_cls.use_sigmoid = False
    model.rpn_head.bbox_coder.update(target_means=[0.1, -0.2, 0.1, 0.3], target_stds=[0.5, 0.5, 0.25, 0.25])
    model.test_cfg.rpn.update(nms=dict(type='nms', iou_threshold=0.3), min_bbox_size=4)
    model.test_cfg.rcnn.update(score_thr=0.1)
    if kind == 'faster-rcnn':
        model.type = 'FasterRCNN'
        model.test_cfg.rcnn.score_thr = 0.65  # no detection at all on a blank image
        model.roi_head.mask_head = model.roi_head.mask_roi_extractor = None
    if kind == 'cascade':
        model.type = 'CascadeRCNN'
        model.roi_head.update(type='CascadeRoIHead', num_stages=3, stage_loss_weights=[1, 0.5, 0.25])
        model.roi_head.bbox_head = [
            dict(
                model.roi_head.bbox_head,
                type='ConvFCBBoxHead',
                num_shared_convs=2,
                num_shared_fcs=1,
                conv_out_channels=64,
                norm_cfg=dict(type='BN'),
                reg_class_agnostic=agnostic,
                reg_decoded_bbox=True,
                loss_bbox=dict(type='GIoULoss'),
                bbox_coder=dict(model.roi_head.bbox_head.bbox_coder, target_stds=stds),
            )
            for agnostic, stds in zip((False, True, False), STAGE_STDS, strict=True)
        ]
    return model


# And how many detections there are at least.
KINDS = {'mask-rcnn': 10, 'mini cascade': 10, 'faster-rcnn': 5, 'retinanet': 10, 'cascade': 10}
# Of the random classifier, so that scores are spread over (0, 1).
SPREAD = {'retinanet': 1.5, 'cascade': 8.0}


@functools.cache
def build(kind: str) -> nn.Module:
    """Everything random, the statistics of batch norms too."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = randomize(MODELS.build(config(kind)))
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        elif name.endswith(('fc_cls', 'retina_cls')):
            module.weight.data *= SPREAD.get(kind, 4.0)
    return model.eval()


def picture(seed: int = 0) -> Tensor:
    """Noise at several scales, (1, 3, H, W): features differ from place to place."""
    generator = torch.Generator().manual_seed(seed)
    sides = [[side // scale for side in SHAPE] for scale in (4, 8, 16, 32)]
    return sum(nn.functional.interpolate(torch.randn(1, 3, *side, generator=generator), SHAPE) for side in sides)


BLANK = torch.zeros(1, 3, *SHAPE)


@torch.no_grad()
def mmdet_detections(model: nn.Module, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> Detections:
    """mmdet's own predict; the masks as its mask head gets them before they are pasted into the image."""
    masks = []
    if has_masks(model):
        head = as_list(model.roi_head.mask_head)[-1]
        paste = head.predict_by_feat

        def record(mask_preds, results_list, *args, activate_map=False, **kwargs):
            (x,), labels = mask_preds, results_list[0].labels
            x = x[:, 0] if head.class_agnostic else x[range(len(x)), labels]
            masks.append(x if activate_map else x.sigmoid())
            return paste(mask_preds, results_list, *args, activate_map=activate_map, **kwargs)

        monkeypatch.setattr(head, 'predict_by_feat', record)
    sample = DetDataSample(metainfo=dict(img_shape=SHAPE, ori_shape=SHAPE, scale_factor=(1.0, 1.0)))
    found = model.predict(image, [sample], rescale=False)[0].pred_instances
    return found.bboxes, found.labels, found.scores, *masks


def has_masks(model: nn.Module) -> bool:
    return getattr(model, 'roi_head', None) is not None and model.roi_head.with_mask


def assert_equals_mmdet(model: nn.Module, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """One by one, in mmdet's order. Returns how many there are."""
    expected = mmdet_detections(model, image, monkeypatch)
    with torch.no_grad():
        detections = ExportableDetector(model, SHAPE)(image)
    rows, count = 100, len(expected[0])
    assert [x.shape for x in detections[:3]] == [(rows, 4), (rows,), (rows,)]
    assert len(detections) == 3 + has_masks(model)
    assert not any(x[count:].any() for x in detections[:3])
    if count == 0:
        return 0
    assert len(expected) == len(detections)
    for value, reference in zip(detections, expected, strict=True):
        assert relative_error(value[:count], reference) < 1e-5
    return count


@pytest.mark.parametrize(('kind', 'count'), KINDS.items())
def test_equals_mmdet(kind, count, monkeypatch):
    assert assert_equals_mmdet(build(kind), picture(), monkeypatch) >= count


@pytest.mark.parametrize('kind', ['faster-rcnn', 'retinanet'])
def test_without_detection(kind, monkeypatch):
    assert assert_equals_mmdet(build(kind), BLANK, monkeypatch) == 0


@pytest.mark.parametrize('kind', ['mask-rcnn', 'cascade'])
def test_without_proposal(kind, monkeypatch):
    model = build(kind)
    monkeypatch.setitem(model.rpn_head.test_cfg, 'min_bbox_size', max(SHAPE))
    assert assert_equals_mmdet(model, picture(), monkeypatch) == 0


def test_number_of_proposals():
    """The kinds stand for what they say: as many proposals as there is room for, and fewer."""
    for kind, full in [('mask-rcnn', False), ('mini cascade', True)]:
        model = build(kind)
        with torch.no_grad():
            *_, found = dense_detections(model.rpn_head, model.extract_feat(picture()), SHAPE)
        assert len(found) == 100
        assert 50 < found.sum() <= 100
        assert found.all() == full


def run(path: Path, *inputs: Tensor) -> Detections:
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    names = [x.name for x in session.get_inputs()]
    return tuple(map(torch.from_numpy, session.run(None, {k: v.numpy() for k, v in zip(names, inputs, strict=True)})))


@torch.no_grad()
def export(model: nn.Module, path: Path, *inputs: Tensor) -> None:
    torch.onnx.export(
        model, inputs, path, dynamo=True, custom_translation_table=translations(), verbose=False, external_data=False
    )
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert_gpu_operators(graph)


@pytest.mark.slow
@pytest.mark.parametrize(
    'kind',
    [x if x == 'retinanet' else pytest.param(x, marks=pytest.mark.exhaustive) for x in KINDS],
)
def test_onnx(kind, tmp_path):
    """Also on an image that the export has not seen, and without anything to find."""
    detector, path = ExportableDetector(build(kind), SHAPE), tmp_path / 'x.onnx'
    export(detector, path, picture())
    for seed in (0, 1):
        image = picture(seed)
        with torch.no_grad():
            expected = detector(image)
        detections = run(path, image)
        assert [x.shape for x in detections] == [x.shape for x in expected]
        assert (expected[2] >= 0.3).sum() >= KINDS[kind]
        assert expected[1][expected[2] >= 0.3].unique().numel() > 1
        assert unmatched(expected, detections) == []
    if kind in ('faster-rcnn', 'retinanet'):
        assert not any(x.any() for x in run(path, BLANK))


def saved(kind: str, folder: Path) -> tuple[Path, Path]:
    """Files of a config, which can be tested with, and a checkpoint."""
    config_file, checkpoint = folder / 'x.py', folder / 'x.pth'
    cfg = Config.fromfile(MINI)
    cfg.model = config(kind)
    cfg.test_dataloader.dataset.pipeline[1].scale = SHAPE[::-1]
    cfg.dump(config_file)
    meta = dict(dataset_meta=dict(classes=NAMES))
    torch.save(dict(state_dict=build(kind).state_dict(), meta=meta), checkpoint)
    return config_file, checkpoint


def test_dynamic_is_refused(tmp_path):
    files = [str(file) for file in saved('retinanet', tmp_path)]
    with pytest.raises(
        ValueError, match='a whole detector is exported for one size; only its backbone and features can be'
    ):
        export_file(*files, str(tmp_path / 'x.onnx'), 'model', SHAPE, dynamic=True)
    assert not (tmp_path / 'x.onnx').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    'kind', ['mask-rcnn', *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ('cascade', 'retinanet'))]
)
def test_tools_from_a_checkpoint_to_a_picture(kind, tmp_path):
    """From file to file: run_exported prints and draws what mmdet finds."""
    config_file, checkpoint = saved(kind, tmp_path)
    exported, out = tmp_path / 'x.onnx', tmp_path / 'out.png'
    files = [tmp_path / 'same ratio.png', tmp_path / 'wider.png']
    for seed, (file, size) in enumerate(zip(files, [(120, 160), (50, 99)], strict=True)):
        pixels = (60 * picture(seed)[0].permute(1, 2, 0) + 120).clip(0, 255).byte().numpy()
        cv2.imwrite(str(file), cv2.resize(pixels, size[::-1]))

    text = tool('export', config_file, checkpoint, exported, '--shape', *SHAPE, '--images', *files)
    assert len(re.findall(r'png: onnxruntime \d\d found .* the same as PyTorch', text)) == 2
    lines = tool('run_exported', exported, files[0], out).splitlines()
    names, scores, boxes = zip(
        *(re.fullmatch(r'(.+) (0\.\d{3}) at (.+)', line).groups() for line in lines), strict=True
    )
    assert list(scores) == sorted(scores)
    found = (
        torch.tensor([[float(side) for side in box.split()] for box in boxes]),
        torch.tensor([NAMES.index(name) for name in names]),
        torch.tensor([float(score) for score in scores]),
    )
    detector = init_detector(str(config_file), str(checkpoint), device='cpu')
    wanted = inference_detector(detector, str(files[0])).pred_instances
    wanted.bboxes = wanted.bboxes.minimum(torch.tensor([160.0, 120.0] * 2))  # not every coder clips
    assert len(lines) >= 10
    assert unmatched((wanted.bboxes, wanted.labels, wanted.scores), found) == []

    if kind == 'retinanet':
        return

    # The best alone: inside its box, below the text, the mask is drawn and nothing else.
    assert (
        len(tool('run_exported', exported, files[0], out, '--score-thr', float(wanted.scores[0]) - 1e-4).splitlines())
        == 1
    )
    drawn = (cv2.imread(str(out)) != cv2.imread(str(files[0]))).any(-1)
    x1, y1, x2, y2 = wanted.bboxes[0].round().int().tolist()
    inside = slice(y1 + 13, y2), slice(x1 + 1, x2)
    mask = wanted.masks[0].numpy()[inside]
    assert 0.1 < mask.mean() < 0.9
    assert (drawn[inside] == mask).mean() > 0.98
    assert drawn[y1:y2, x1].all()
    assert not drawn[y1 + 13 :, x2 + 2 :].any()


@pytest.mark.exhaustive
@pytest.mark.parametrize('suffix', ['.pt2', '.xml'])
def test_detectors_of_other_formats_in_a_process_of_their_own(suffix, tmp_path):
    config_file, checkpoint = saved('retinanet', tmp_path)
    pixels = (60 * picture(0)[0].permute(1, 2, 0) + 120).clip(0, 255).byte().numpy()
    cv2.imwrite(str(tmp_path / 'in.png'), pixels)
    exported = tmp_path / f'x{suffix}'
    reports = export_file(config_file, checkpoint, exported, 'model', SHAPE, images=[tmp_path / 'in.png'])
    (line,) = (x for x in reports if 'in.png' in x and 'bf16' not in x)  # OpenVINO reports bf16 too if the CPU has it
    count = int(re.search(r'(\d+) found .* the same as PyTorch', line)[1])
    lines = tool('run_exported', exported, tmp_path / 'in.png', tmp_path / 'out.png').splitlines()
    assert len([line for line in lines if ' at ' in line]) == count >= 10


class Operators(nn.Module):
    def forward(self, feature: Tensor, rois: Tensor, boxes: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        aligned = [roi_align(feature, rois, (3, 5), 0.25, sampling_ratio) for sampling_ratio in (0, 1, 2)]
        return *aligned, nms(boxes, scores, 0.2, 7)


def test_onnx_operators(tmp_path):
    """Boxes outside the map, as large as it, as small as a point; ties, twins, boxes without area, no candidate."""
    feature = torch.randn(1, 4, 11, 17)
    corners = torch.rand(40, 2, 2) * torch.tensor([80.0, 60.0]) - 6
    rois = torch.cat([corners.amin(1), corners.amax(1)], 1)
    rois[0], rois[1], rois[2] = torch.zeros(4), torch.tensor([3.0, 7, 3, 9]), torch.tensor([0.0, 0, 68, 44])
    boxes, scores = torch.cat([rois, rois[:3], rois[10:20] + 0.5]), torch.rand(53)
    scores[20:30] = scores[20]
    scores[30:40] = -1
    scores[50] = 0
    inputs = (feature, rois, boxes, scores)
    export(Operators().eval(), tmp_path / 'operators.onnx', *inputs)
    few, none = torch.full_like(scores, -1), torch.full_like(scores, -1)
    few[:3], few[41] = torch.tensor([0.0, 0.5, 0.5]), 0.1
    for candidates, count in [(scores, 7), (few, 4), (none, 0)]:
        expected = Operators()(*inputs[:3], candidates)
        *aligned, kept = run(tmp_path / 'operators.onnx', *inputs[:3], candidates)
        assert all(relative_error(x, reference) < 1e-5 for x, reference in zip(aligned, expected, strict=False))
        assert torch.equal(kept, expected[-1])
        assert (kept >= 0).sum() == count


@pytest.mark.parametrize('aligned', [True, False])
def test_simple_roi_align(aligned):
    """Against mmcv's layer: boxes beyond the map, as small as a point; bins that are not square."""
    layer, feature = SimpleRoIAlign((3, 5), 0.25, aligned), torch.randn(1, 4, 11, 17)
    corners = torch.rand(40, 2, 2) * torch.tensor([80.0, 60.0]) - 6
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
    boxes[0] = 0
    assert relative_error(align(layer, feature, boxes), layer(feature, nn.functional.pad(boxes, (1, 0)))) < 1e-5


def detections() -> Detections:
    """Ten on a diagonal, from score 0.95 down to 0.05; one has no area."""
    start = torch.arange(10.0)[:, None] * 20
    boxes = torch.cat([start, start, start + 18, start + 18], 1)
    boxes[3, 2] = boxes[3, 0]
    masks = torch.zeros(10, 28, 28)
    masks[:, 4:24, 4:24] = 0.9
    return boxes, torch.arange(10) % 3, torch.linspace(0.95, 0.05, 10), masks


def changed(index: int, row: int, value: float) -> Detections:
    other = tuple(x.clone() for x in detections())
    other[index][row] += value
    return other


def test_unmatched():
    ours = detections()
    order = torch.randperm(10)
    assert unmatched(ours, ours) == []
    assert unmatched(ours, tuple(x[order] for x in ours)) == []
    assert unmatched(ours[:3], ours[:3]) == []
    for index, row, value in [(0, 2, 0.2), (2, 2, 9e-4), (0, 8, 50.0), (1, 8, 1), (2, 8, 0.1), (3, 8, -0.9)]:
        assert unmatched(ours, changed(index, row, value)) == []
    for index, row, value in [(0, 2, 0.6), (0, 3, 0.6), (1, 2, 1), (2, 2, 2e-3), (3, 2, -0.9)]:
        lines = unmatched(ours, changed(index, row, value))
        assert len(lines) == 2
        assert lines[0].startswith('only the first has label')
        assert lines[1].startswith('only the second has label')
    (line,) = unmatched(ours, changed(2, 2, -0.75))
    assert line == 'only the first has label 2, score 0.7500, box (40.0, 40.0, 58.0, 58.0)'
    # One cannot be the partner of two.
    twin = tuple(torch.cat([x, x[2:3]]) for x in ours)
    assert [line[:17] for line in unmatched(ours, twin)] == ['only the second h']
    with pytest.raises(ValueError, match='got 4 and 3 tensors'):
        unmatched(ours, ours[:3])


def test_agreement():
    detector = ExportableDetector(build('mask-rcnn'), SHAPE)
    agrees, how = detector.agreement(detections(), changed(2, 2, 9e-4), EXACT)
    assert agrees
    assert how == '7 found with a score of 0.3 or more, the same as PyTorch'
    empty = [torch.zeros_like(x) for x in detections()]
    nan = [torch.full_like(x, math.nan) if x.is_floating_point() else x for x in empty]
    malformed = [(nan, 'has NaN or infinite values'), ([x[:3] for x in empty], 'shapes are [(3, 4)')]
    faint = [*detections()]
    faint[2] = faint[2] * 0.1
    agrees, how = detector.agreement(empty, empty, EXACT)
    assert agrees
    assert 'nothing found' in how
    _, how = detector.agreement(faint, faint, EXACT)
    assert how.startswith('10 found with a score of')
    for values, what in malformed:
        agrees, how = detector.agreement(values, empty, EXACT)
        assert not agrees
        assert what in how
    agrees, how = detector.agreement([torch.zeros_like(x) for x in faint], faint, EXACT)
    assert not agrees
    for values in [(changed(3, 2, -0.9), detections()), (detections(), changed(2, 2, -0.75))]:
        agrees, how = detector.agreement(*values, EXACT)
        assert not agrees
        assert 'the second has label 2' in how


def test_agreement_in_less_than_float32():
    """A score may be off by the tolerance, and one detection in five be missing."""
    detector = ExportableDetector(build('mask-rcnn'), SHAPE)
    assert not detector.agreement(detections(), changed(2, 2, 0.12), EXACT)[0]
    assert detector.agreement(detections(), changed(2, 2, 0.12), 0.15)[0]
    agrees, how = detector.agreement(changed(3, 2, -0.9), detections(), 0.15)
    assert agrees
    assert 'all but 2 as PyTorch' in how  # one on each side
    assert not detector.agreement([torch.zeros_like(x) for x in detections()], detections(), 0.15)[0]


GENERIC_EXTRACTOR = dict(
    _delete_=True,
    type='GenericRoIExtractor',
    roi_layer=dict(type='RoIAlign', output_size=14),
    out_channels=64,
    featmap_strides=[4, 8, 16, 32],
)


@pytest.mark.parametrize(
    ('kind', 'change', 'message'),
    [
        ('retinanet', dict(type='PAA'), 'model cannot be exported: it must be MaskRCNN or .*, got PAA'),
        (
            'retinanet',
            dict(bbox_head=dict(type='PISARetinaHead')),
            'bbox_head .* must be RetinaHead, got PISARetinaHead',
        ),
        ('retinanet', dict(test_cfg=dict(nms=dict(type='soft_nms'))), r'bbox_head.test_cfg.nms .*, got .*soft_nms'),
        ('retinanet', dict(test_cfg=dict(nms_pre=-1)), 'bbox_head.test_cfg.nms_pre .* a positive number, got -1'),
        ('mask-rcnn', dict(test_cfg=dict(rpn=dict(max_per_img=-1))), 'rpn_head.test_cfg.max_per_img .*, got -1'),
        ('mask-rcnn', dict(test_cfg=dict(rcnn=dict(nms=dict(class_agnostic=True)))), 'roi_head.test_cfg.nms'),
        (
            'mask-rcnn',
            dict(roi_head=dict(bbox_head=dict(type='SCNetBBoxHead', num_shared_fcs=1))),
            'roi_head.bbox_head .*, got SCNetBBoxHead',
        ),
        ('mask-rcnn', dict(roi_head=dict(type='PISARoIHead')), 'roi_head .* or CascadeRoIHead, got PISARoIHead'),
        (
            'mask-rcnn',
            dict(roi_head=dict(mask_roi_extractor=GENERIC_EXTRACTOR)),
            'roi_head.mask_roi_extractor .* must be SingleRoIExtractor, got GenericRoIExtractor',
        ),
        (
            'mask-rcnn',
            dict(roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(aligned=False)))),
            r'bbox_roi_extractor.roi_layer .* aligned=True .*, got RoIAlign\(.*aligned=False',
        ),
        (
            'mask-rcnn',
            dict(rpn_head=dict(bbox_coder=dict(type='TBLRBBoxCoder', _delete_=True))),
            'rpn_head.bbox_coder .* must be DeltaXYWHBBoxCoder, got TBLRBBoxCoder',
        ),
    ],
)
def test_refused_models(kind, change, message):
    model = Config(dict(model=config(kind)))
    model.merge_from_dict(dict(model=change))
    with DefaultScope.overwrite_default_scope('mmdet'):
        built = MODELS.build(model.model).eval()
    with pytest.raises(ValueError, match=message):
        ExportableDetector(built, SHAPE)


def test_errors():
    model = build('retinanet')
    with pytest.raises(ValueError, match=r'multiples of the pad_size_divisor 32, got shape=\(96, 100\)'):
        ExportableDetector(model, (96, 100))
    detector = ExportableDetector(model, SHAPE)
    for shape in [(2, 3, 96, 128), (1, 3, 128, 96), (3, 96, 128)]:
        with pytest.raises(ValueError, match=r'the image must be \(1, 3, 96, 128\), got'):
            detector(torch.zeros(shape))
    with pytest.raises(ValueError, match='must be in eval mode'):
        ExportableDetector(copy.deepcopy(model).train(), SHAPE)
