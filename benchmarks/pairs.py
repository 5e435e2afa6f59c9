"""The pairs that are compared: the op, backbones, whole models."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmcv.cnn.bricks import DropPath
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from mmslide.flops import HEADS, count_macs
from mmslide.models import SlideCSWin, SlideNAT, SlidePVT, SlidePVTv2, SlideSwin, TwinsPCPVT, TwinsSVT
from mmslide.models.attention import SlideAttention
from mmslide.ops import fixed_shift, merge_paths, neighborhood_attention, slide_attention
from mmslide.ops.reference import neighborhood_reference
from mmslide.weights import load_pretrained

from .baselines import flex, im2col, natten, two_path
from .measure import Side, check

# Rounding of the result and of its inputs.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Small, for comparisons with the reference, which is slow.
SMALL_SHAPE = (256, 256)


@dataclass(frozen=True)
class Pair:
    """Two implementations of the same work.

    Args:
        tolerance: of their results; None for different functions, which were checked separately when the pair was
            created.
        moved_bytes: minimum number of bytes that a step of ours has to read and write.
        operations: of a step of ours, two per multiply-add.
        images: number of images per step.
        model: ours as a module, if it is one.
    """

    name: str
    ours: Side
    baseline: Side
    tolerance: float | None
    moved_bytes: int
    operations: int
    images: int
    model: nn.Module | None = None


def op_pair(
    height: int,
    width: int,
    embed_dims: int,
    num_heads: int,
    *,
    batch: int = 1,
    kernel_size: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = 'cpu',
    backend: str | None = None,
    training: bool = False,
    baseline: str = 'two-path',
) -> Pair:
    """Slide Attention on a map (batch, height, width, embed_dims), with random parameters in both paths.

    Both sides get q, k and v (views of one projection in inference, separate in training) and the kernels of both
    paths, as in the module: merging them is part of our time.

    Args:
        backend: of `mmslide.ops.slide_attention`.
        baseline: 'two-path' (training form of the paper), 'im2col', 'flex' (FlexAttention in the same window, with all
            learned parameters zero), 'natten' (likewise; compared only at pixels whose window lies inside the map), or
            a backend: 'conv' is the inference form of the paper.
    """
    head_dims, slots = embed_dims // num_heads, kernel_size**2
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    undeformed = {'flex': flex, 'natten': natten}.get(baseline)
    strength = 0.0 if undeformed else 1.0
    qkv = draw(batch, height, width, 3, num_heads, head_dims).to(dtype).unbind(3)
    if training:
        qkv = tuple(x.contiguous().requires_grad_() for x in qkv)
    shift = fixed_shift(kernel_size).to(device)
    deform, shift_bias, deform_bias, rpb = (
        x.requires_grad_()
        for x in (
            strength * draw(head_dims, slots, kernel_size, kernel_size) / kernel_size,
            0.1 * strength * draw(head_dims, slots),
            0.1 * strength * draw(head_dims, slots),
            0.1 * strength * draw(num_heads, slots),
        )
    )

    def merged(attend: Callable[..., Tensor]) -> list[Tensor]:
        return [attend(*qkv, *merge_paths(shift, shift_bias, deform, deform_bias), rpb)]

    def both_paths() -> list[Tensor]:
        parameters = (x.to(dtype) for x in (shift, shift_bias, deform, deform_bias, rpb))
        return [two_path(*qkv, *parameters)]

    def unfolded() -> list[Tensor]:
        return merged(lambda q, k, v, *parameters: im2col(q, k, v, *(x.to(dtype) for x in parameters)))

    ours: Callable[[], list[Tensor]] = partial(merged, partial(slide_attention, backend=backend))
    if baseline == 'two-path':
        theirs: Callable[[], list[Tensor]] = both_paths
    elif baseline == 'im2col':
        theirs = unfolded
    elif undeformed:
        theirs = lambda: [undeformed(kernel_size, *qkv)]  # noqa: E731
    else:
        theirs = partial(merged, partial(slide_attention, backend=baseline))
    if baseline == 'natten':
        ours, theirs = (partial(_inside, run, kernel_size // 2) for run in (ours, theirs))
    inputs = dict(zip('qkv', qkv, strict=True))
    learned = dict(deform=deform, shift_bias=shift_bias, deform_bias=deform_bias, rpb=rpb)
    if not undeformed:
        inputs, learned = inputs | learned, {}
    return Pair(
        name=f'{height}×{width}×{embed_dims}, {num_heads} heads, k={kernel_size}',
        ours=Side(backend or 'ours', ours, inputs, list(learned.values())),
        baseline=Side(baseline, theirs, inputs),
        tolerance=TOLERANCE[dtype],
        # Forward reads q, k, v and writes the output; backward reads these and a gradient and writes three gradients.
        moved_bytes=qkv[0].nbytes * (4 + 7 * training),
        operations=2 * 2 * (slots * slots + slots) * qkv[0].numel() * (1 + 2 * training),
        images=batch,
    )


def _inside(run: Callable[[], list[Tensor]], reach: int) -> list[Tensor]:
    """The maps (B, H, W, ...) without their border."""
    return [out[:, reach:-reach, reach:-reach] for out in run()]


def neighborhood_pair(
    height: int,
    width: int,
    embed_dims: int,
    num_heads: int,
    *,
    batch: int = 1,
    kernel_size: int = 7,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = 'cpu',
    training: bool = False,
) -> Pair:
    """Neighborhood attention on a map (batch, height, width, embed_dims), compared with gathering all windows."""
    generator = torch.Generator().manual_seed(0)
    shape = batch, height, width, 3, num_heads, embed_dims // num_heads
    qkv = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    rpb = torch.randn(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1, generator=generator)
    rpb = rpb.to(device, dtype).requires_grad_()
    inputs = dict(qkv=qkv, rpb=rpb)

    def run(attend: Callable[..., Tensor]) -> list[Tensor]:
        return [attend(*qkv.unbind(3), rpb, scale=shape[-1] ** -0.5)]

    return Pair(
        name=f'{height}×{width}×{embed_dims}, {num_heads} heads, k={kernel_size}',
        ours=Side('ours', partial(run, neighborhood_attention), inputs),
        baseline=Side('gather', partial(run, neighborhood_reference), inputs),
        tolerance=TOLERANCE[dtype],
        # As for `op_pair`.
        moved_bytes=qkv.nbytes // 3 * (4 + 7 * training),
        operations=2 * 2 * kernel_size**2 * qkv.numel() // 3 * (1 + 2 * training),
        images=batch,
    )


# The modules of the baselines, imported when one is measured.
MODULES = {
    'mmdet': 'mmdet.models.backbones',
    'mmseg': 'mmseg.models.backbones',
    'mmslide': 'mmslide.models',
    'plain': 'benchmarks.baselines',
}


@dataclass(frozen=True)
class Backbones:
    """Ours and its baseline.

    Args:
        host: our equivalent of the baseline, which loads the baseline's weights; None if there is none.
    """

    ours: Callable[..., nn.Module]
    framework: str
    baseline: str
    baseline_kwargs: dict[str, Any]
    host: Callable[..., nn.Module] | None

    def build_baseline(self, with_cp: bool) -> nn.Module:
        if self.framework == 'timm':
            # Returns maps of all stages, with the parameter names of the published weights.
            return import_module('timm').create_model(self.baseline, features_only=True, **self.baseline_kwargs)
        own = dict(with_cp=with_cp) if self.framework == 'mmslide' else {}
        return getattr(import_module(MODULES[self.framework]), self.baseline)(**self.baseline_kwargs, **own)


_PVT_SMALL = dict(num_layers=[3, 4, 6, 3])
_PVT = partial(SlidePVT, 'small')
_LN = dict(type='LN')  # mmseg's eps
_PCPVT_SMALL = dict(
    embed_dims=[64, 128, 320, 512], num_heads=[1, 2, 5, 8], mlp_ratios=[8, 8, 4, 4], depths=[3, 4, 6, 3], qkv_bias=True
)
_SVT_SMALL = dict(
    embed_dims=[64, 128, 256, 512],
    num_heads=[2, 4, 8, 16],
    mlp_ratios=[4, 4, 4, 4],
    depths=[2, 2, 10, 4],
    sr_ratios=[8, 4, 2, 1],
    windiow_sizes=[7, 7, 7, 7],  # mmseg's spelling
    qkv_bias=True,
)
_PVT_HOST = partial(_PVT, slide_stages=())
_PVTV2 = partial(SlidePVTv2, 'b2')
_PVTV2_HOST = partial(_PVTV2, slide_stages=())
_PVTV2_B2 = dict(_PVT_SMALL, embed_dims=64)
_SWIN, _CSWIN, _NAT = (partial(cls, 'tiny') for cls in (SlideSwin, SlideCSWin, SlideNAT))
_SWIN_HOST, _CSWIN_HOST, _NAT_HOST = (partial(ours, slide_stages=()) for ours in (_SWIN, _CSWIN, _NAT))
_TINY_HOST = dict(arch='tiny', slide_stages=())
_PCPVT = partial(TwinsPCPVT, 'small', norm_cfg=_LN)
_SVT = partial(TwinsSVT, 'small', norm_cfg=_LN)
BACKBONES = {
    'slide-pvt-s': Backbones(_PVT, 'mmdet', 'PyramidVisionTransformer', _PVT_SMALL, _PVT_HOST),
    'slide-pvt-s/pvtv2-b2': Backbones(_PVT, 'mmdet', 'PyramidVisionTransformerV2', _PVTV2_B2, None),
    'slide-pvtv2-b2': Backbones(_PVTV2, 'mmdet', 'PyramidVisionTransformerV2', _PVTV2_B2, _PVTV2_HOST),
    'slide-swin-t': Backbones(_SWIN, 'mmdet', 'SwinTransformer', {}, _SWIN_HOST),
    'pvt-s': Backbones(_PVT_HOST, 'mmdet', 'PyramidVisionTransformer', _PVT_SMALL, _PVT_HOST),
    'pvtv2-b2': Backbones(_PVTV2_HOST, 'mmdet', 'PyramidVisionTransformerV2', _PVTV2_B2, _PVTV2_HOST),
    'swin-t': Backbones(_SWIN_HOST, 'mmdet', 'SwinTransformer', {}, _SWIN_HOST),
    'slide-cswin-t': Backbones(_CSWIN, 'plain', 'PlainCSWin', _TINY_HOST, _CSWIN_HOST),
    'cswin-t': Backbones(_CSWIN_HOST, 'plain', 'PlainCSWin', _TINY_HOST, _CSWIN_HOST),
    'nat-t': Backbones(_NAT_HOST, 'plain', 'PlainNAT', _TINY_HOST, _NAT_HOST),
    'twins-pcpvt-s': Backbones(_PCPVT, 'mmseg', 'PCPVT', _PCPVT_SMALL, _PCPVT),
    'twins-svt-s': Backbones(_SVT, 'mmseg', 'SVT', _SVT_SMALL, _SVT),
    'slide-pvt-s/host': Backbones(_PVT, 'mmslide', 'SlidePVT', dict(arch='small', slide_stages=()), _PVT_HOST),
    'slide-pvtv2-b2/host': Backbones(_PVTV2, 'mmslide', 'SlidePVTv2', dict(arch='b2', slide_stages=()), _PVTV2_HOST),
    'slide-swin-t/host': Backbones(_SWIN, 'mmslide', 'SlideSwin', _TINY_HOST, _SWIN_HOST),
    'slide-cswin-t/host': Backbones(_CSWIN, 'mmslide', 'SlideCSWin', _TINY_HOST, _CSWIN_HOST),
    'slide-nat-t/host': Backbones(_NAT, 'mmslide', 'SlideNAT', _TINY_HOST, _NAT_HOST),
}
if find_spec('timm'):
    _TIMM_PCPVT = partial(TwinsPCPVT, 'small')
    _TIMM_SVT = partial(TwinsSVT, 'small', stage_norm=None, mask_padding=False)
    BACKBONES |= {
        'twins-pcpvt-s/timm': Backbones(_TIMM_PCPVT, 'timm', 'twins_pcpvt_small', {}, _TIMM_PCPVT),
        'twins-svt-s/timm': Backbones(_TIMM_SVT, 'timm', 'twins_svt_small', {}, _TIMM_SVT),
    }


def backbone_pair(
    name: str,
    height: int,
    width: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = 'cpu',
    backend: str | None = None,
    training: bool = False,
    with_cp: bool = False,
) -> Pair:
    """A backbone of ours compared with another one of the same size, on images (batch, 3, height, width).

    If both are the same function, ours has the baseline's weights and the results are compared. A Slide backbone is a
    different function: its host is checked against the baseline, on one image of this size, and its op against the
    reference.

    Args:
        name: a key of `BACKBONES`.
        with_cp: recompute activations in backward, in backbones of mmslide.

    Raises:
        RuntimeError: the host or the op differs.
    """
    row = BACKBONES[name]
    baseline = _prepare(row.build_baseline(with_cp), dtype, device, training)
    if row.baseline == 'SwinTransformer':
        _unshift_single_windows(baseline, height, width)
    ours = row.ours(drop_path_rate=0.0, attn_backend=backend, with_cp=with_cp)
    same = row.ours is row.host
    if row.host is not None:
        host = ours if same else row.host(drop_path_rate=0.0)
        _copy_weights(baseline, host)
        if not same:
            host = _prepare(host, dtype, device, training)
            _agree(f'the host of {name}', host, row.baseline, baseline, (height, width), dtype, device)
    ours = _prepare(ours, dtype, device, training)
    if not same:
        _check_op(name, ours, dtype, device)
    return _model_pair(name, ours, name, baseline, row.baseline, (batch, 3, height, width), same, dtype, device)


def model_pair(
    config: Config,
    baseline: Config,
    height: int,
    width: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = 'cpu',
    training: bool = False,
) -> Pair:
    """Whole detectors or segmentors from images (batch, 3, height, width) to the tensors of their heads.

    Random weights; Slide Attention is checked against the reference. Postprocessing (NMS, mask pasting, losses) is not
    included, since it depends on the weights.
    """

    def build(cfg: Config) -> nn.Module:
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            model: Any = _prepare(MODELS.build(cfg.model), dtype, device, training)
        _check_op(cfg.model.backbone.type, model.backbone, dtype, device)
        return _Tensors(model)

    names = [Path(cfg.filename or 'config').stem for cfg in (config, baseline)]
    ours, theirs = build(config), build(baseline)
    return _model_pair(names[0], ours, names[0], theirs, names[1], (batch, 3, height, width), False, dtype, device)


class _Tensors(nn.Module):
    """Backbone, neck and dense heads: everything that runs on an image tensor alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = revert_sync_batchnorm(model)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self.model.extract_feat(image)
        heads = [getattr(self.model, name) for name in HEADS if hasattr(self.model, name)]
        return [x for head in heads for x in _flatten(head(maps))]


def _flatten(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [y for part in x for y in _flatten(part)]


def _prepare(model: nn.Module, dtype: torch.dtype, device: str | torch.device, training: bool) -> nn.Module:
    """Sets training mode without dropout and stochastic depth, so that results can be compared."""
    model.to(device, dtype).train(training)
    for module in model.modules():
        if isinstance(module, DropPath | nn.Dropout):
            module.eval()
    return model


def _copy_weights(baseline: nn.Module, host: nn.Module) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / 'baseline.pth'
        torch.save(getattr(baseline, 'model', baseline).state_dict(), file)  # timm wraps models that return maps
        load_pretrained(host, str(file))


def _outputs(model: nn.Module, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return _flatten(model(image))


def _unshift_single_windows(swin: Any, height: int, width: int) -> None:
    """mmdet's Swin also shifts a window that covers its whole map, which Swin's authors and mmslide do not."""
    side = max(height, width)
    for index, stage in enumerate(swin.stages):
        for block in stage.blocks:
            if side <= block.attn.window_size * 4 * 2**index:
                block.attn.shift_size = 0


def _agree(
    name: str,
    model: nn.Module,
    other_name: str,
    other: nn.Module,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str | torch.device,
) -> None:
    image = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    result, reference = ({f'output {i}': x for i, x in enumerate(_outputs(m, image))} for m in (model, other))
    check(name, result, other_name, reference, TOLERANCE[dtype])


def _check_op(name: str, backbone: nn.Module, dtype: torch.dtype, device: str | torch.device) -> None:
    """Checks Slide Attention's backend against the reference, inside the backbone, with random learned parts."""
    reference = copy.deepcopy(backbone)
    for model in (backbone, reference):
        generator = torch.Generator(device).manual_seed(0)
        for module in model.modules():
            if isinstance(module, SlideAttention):
                for parameter in (module.deform_weight, module.relative_position_bias):
                    nn.init.normal_(parameter, std=0.3, generator=generator)
    for module in reference.modules():
        if isinstance(module, SlideAttention):
            module.backend = 'reference'
    _agree(name, backbone, 'the reference', reference, SMALL_SHAPE, dtype, device)


def _model_pair(
    name: str,
    ours: nn.Module,
    our_name: str,
    baseline: nn.Module,
    baseline_name: str,
    shape: tuple[int, int, int, int],
    same: bool,
    dtype: torch.dtype,
    device: str | torch.device,
) -> Pair:
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    on_meta = copy.deepcopy(ours).to('meta')
    for module in on_meta.modules():
        if isinstance(module, SlideAttention):
            module.backend = None
    macs = count_macs(on_meta, torch.empty(shape, dtype=dtype, device='meta'))[1]

    def side(side_name: str, model: nn.Module) -> Side:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Side(side_name, lambda: _flatten(model(image)), dict(image=image), parameters)

    return Pair(
        name=f'{name}, {shape[2]}×{shape[3]}',
        ours=side(our_name, ours),
        baseline=side(baseline_name, baseline),
        tolerance=TOLERANCE[dtype] if same else None,
        moved_bytes=image.nbytes + sum(parameter.nbytes for parameter in ours.parameters()),
        operations=2 * macs * (1 + 2 * ours.training),
        images=shape[0],
        model=ours,
    )
