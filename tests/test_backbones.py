import inspect

import numpy as np
import pytest
import torch
from helpers import (
    assert_golden,
    assert_golden_logits,
    golden_image,
    golden_state,
    load_host,
    randomize,
    relative_error,
)
from mmengine.model import BaseModule
from torch import nn

from mmslide.models import SlidePVT, SlideSwin, TwinsPCPVT, TwinsSVT
from mmslide.models.attention import SlideAttention
from mmslide.weights.layouts import to_mmslide

SMALL = dict(embed_dims=(16, 32, 48, 64), depths=(1, 2, 2, 2), num_heads=(1, 2, 3, 4), mlp_ratios=(2, 2, 2, 2))
SMALL_PVT = dict(SMALL, sr_ratios=(8, 4, 2, 1))


def small(cls, **kwargs):
    return cls(arch=SMALL_PVT if cls is SlidePVT else SMALL, **kwargs)


CLASSES = [SlidePVT, SlideSwin, TwinsPCPVT, TwinsSVT]
BOTH = pytest.mark.parametrize('cls', [SlidePVT, SlideSwin])


def test_slide_swin_gives_the_authors_numbers():
    name = 'slide_swin_tiny_224'
    model = SlideSwin(window_size=(7, 7, 14, 7), stage_norm=None).eval()
    _, ours = to_mmslide(golden_state(name))
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert not missing
    assert sorted(unexpected) == ['head.bias', 'head.weight', 'norm.bias', 'norm.weight']
    with torch.no_grad():
        outs = model(golden_image(name))
    assert_golden(name, outs)
    assert_golden_logits(name, outs[-1], eps=1e-5)


@pytest.mark.parametrize('size', [(224, 224), (200, 333)])
@pytest.mark.parametrize('norm_after_stage', [True, False])
def test_host_equals_mmdet_pvt(size, norm_after_stage, tmp_path):
    backbones = pytest.importorskip('mmdet.models.backbones')
    host = backbones.PyramidVisionTransformer(num_layers=[2, 2, 2, 2], norm_after_stage=norm_after_stage)
    model = SlidePVT('tiny', slide_stages=(), stage_norm='next' if norm_after_stage else None)
    ours = load_host(model, host, tmp_path)
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        for out, wanted in zip(ours(image), host(image), strict=True):
            assert relative_error(out, wanted) < 1e-4


@pytest.mark.parametrize('size', [(256, 256), (200, 333), (224, 224)])
def test_host_equals_mmdet_swin(size, tmp_path):
    backbones = pytest.importorskip('mmdet.models.backbones')
    host = backbones.SwinTransformer(depths=(2, 2, 2, 2))
    arch = dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 2, 2), num_heads=(3, 6, 12, 24), mlp_ratios=(4, 4, 4, 4))
    ours = load_host(SlideSwin(arch, slide_stages=()), host, tmp_path)
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        if size == (224, 224):  # one window covers the last map, which mmdet shifts all the same
            assert relative_error(ours(image)[-1], host(image)[-1]) > 1e-3
            for block in host.stages[-1].blocks:
                block.attn.shift_size = 0
        for out, wanted in zip(ours(image), host(image), strict=True):
            assert relative_error(out, wanted) < 1e-4


@BOTH
@pytest.mark.parametrize('size', [(32, 32), (33, 63), (65, 97), (40, 129)])
@pytest.mark.parametrize('slide_stages', [(), (0, 1), (0, 1, 2, 3)])
def test_any_size_and_any_slide_stages_train(cls, size, slide_stages):
    model = randomize(small(cls, slide_stages=slide_stages, in_channels=4))
    outs = model(torch.randn(2, 4, *size))
    for stage, out in enumerate(outs):
        side = [x // 2 ** (stage + 2) if cls is SlidePVT else -(-x // 2 ** (stage + 2)) for x in size]
        assert out.shape == (2, SMALL['embed_dims'][stage], *side)
        assert out.is_contiguous()
    sum(out.square().mean() for out in outs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    slides = [sum(isinstance(m, SlideAttention) for m in stage.modules()) for stage in model.stages]
    assert slides == [depth if i in slide_stages else 0 for i, depth in enumerate(SMALL['depths'])]


@BOTH
def test_images_below_the_coarsest_stride_are_refused(cls):
    with pytest.raises(ValueError, match=r'at least 32 pixels a side, got \(31, 64\)'):
        small(cls)(torch.randn(1, 3, 31, 64))


@BOTH
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_other_dtypes(cls, dtype):
    model = randomize(small(cls)).eval()
    image = torch.randn(1, 3, 64, 96)
    wanted = model.double()(image.double())
    for out, reference in zip(model.to(dtype)(image.to(dtype)), wanted, strict=True):
        assert out.dtype == dtype
        assert relative_error(out, reference) < (1e-12 if dtype == torch.float64 else 0.1)


@BOTH
def test_autocast(cls):
    model = randomize(small(cls)).eval()
    image = torch.randn(1, 3, 64, 64)
    wanted = model(image)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outs = model(image)
    for out, reference in zip(outs, wanted, strict=True):
        assert relative_error(out, reference) < 0.1


@BOTH
def test_checkpointing_changes_nothing_but_memory(cls):
    torch.manual_seed(0)
    plain = randomize(small(cls, drop_path_rate=0.0))
    checkpointed = randomize(small(cls, drop_path_rate=0.0, with_cp=True))
    image = torch.randn(1, 3, 64, 64)
    grads, saved = [], []
    for model in (plain, checkpointed):
        count = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, count=count: count.append(x.nbytes) or x, lambda x: x):
            outs = model(image)
        saved.append(sum(count))
        sum(x.sum() for x in outs).backward()
        grads.append([p.grad for p in model.parameters()])
    for value, wanted in zip(grads[1], grads[0], strict=True):
        assert relative_error(value, wanted) < 1e-6
    assert saved[1] < 0.7 * saved[0]


@BOTH
@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 4])
def test_frozen_stages_stay_as_they_are(cls, frozen_stages):
    model = small(cls, frozen_stages=frozen_stages, drop_rate=0.5)
    model.train()
    for index, stage in enumerate(model.stages):
        frozen = index < frozen_stages
        embed_frozen = frozen or (index == 0 and frozen_stages == 0)
        assert all(p.requires_grad != frozen for p in (*stage.blocks.parameters(), *stage.norm.parameters()))
        assert all(p.requires_grad != embed_frozen for p in stage.embed.parameters())
        assert all(m.training != frozen for m in stage.blocks.modules())
        assert all(m.training != embed_frozen for m in stage.embed.modules())


@BOTH
def test_out_indices_pick_maps(cls):
    model = randomize(small(cls)).eval()
    image = torch.randn(1, 3, 64, 64)
    wanted = model(image)
    fewer = small(cls, out_indices=(0, 2)).eval()
    fewer.load_state_dict(model.state_dict(), strict=False)
    for out, reference in zip(fewer(image), (wanted[0], wanted[2]), strict=True):
        assert torch.equal(out, reference)


@pytest.mark.parametrize('cls', CLASSES)
@pytest.mark.parametrize('stage_norm', [None, 'next', 'output'])
@pytest.mark.parametrize('out_indices', [(0,), (2,), (0, 1), (1, 3)])
def test_only_what_is_put_out_is_built(cls, stage_norm, out_indices):
    arch = SMALL if cls is SlideSwin else SMALL_PVT
    whole = cls(arch, slide_stages=(0, 3), drop_path_rate=0.3)
    # All stages of the arch may be named, built or not.
    model = cls(arch, slide_stages=(0, 3), drop_path_rate=0.3, out_indices=out_indices, stage_norm=stage_norm)
    cls(arch, out_indices=out_indices, frozen_stages=4)
    assert len(model.stages) == out_indices[-1] + 1
    rates = [
        [block.drop_path.drop_prob for stage in x.stages[: out_indices[-1] + 1] for block in stage.blocks]
        for x in (model, whole)
    ]
    assert rates[0] == rates[1]
    randomize(model).eval()
    outs = model(torch.randn(1, 3, 96, 96))
    assert [out.shape[1] for out in outs] == [SMALL['embed_dims'][i] for i in out_indices]
    sum(out.square().mean() for out in outs).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())  # else DDP stops


@pytest.mark.parametrize(
    ('cls', 'out_indices', 'least'),
    # PVT's subsampling needs 8 pixels of the first map; Swin pads whatever it gets.
    [
        (SlidePVT, (0,), 4),
        (TwinsPCPVT, (0,), 32),
        (TwinsPCPVT, (2,), 32),
        (SlideSwin, (0,), 4),
        (SlideSwin, (1, 2), 16),
    ],
)
def test_the_least_image_follows_from_what_is_built(cls, out_indices, least):
    model = cls(SMALL if cls is SlideSwin else SMALL_PVT, out_indices=out_indices)
    model(torch.randn(1, 3, least, least))
    with pytest.raises(ValueError, match=rf'at least {least} pixels a side, got \({least - 1}, {least}\)'):
        model(torch.randn(1, 3, least - 1, least))


@pytest.mark.parametrize('cls', CLASSES)
@pytest.mark.parametrize('stage_norm', ['next', 'output', None])
def test_what_the_norms_of_stages_are_put_on(cls, stage_norm):
    model = randomize(cls(SMALL if cls is SlideSwin else SMALL_PVT, stage_norm=stage_norm)).eval()
    image = torch.randn(1, 3, 64, 64)
    before = model(image)
    assert [isinstance(stage.norm, nn.LayerNorm) for stage in model.stages] == [stage_norm is not None] * 4
    if stage_norm is not None:
        nn.init.constant_(model.stages[0].norm.weight, 3.0)
        after = model(image)
        assert not torch.equal(after[0], before[0])
        assert torch.equal(after[1], before[1]) == (stage_norm == 'output')


def test_norms_of_stages_are_by_default_those_of_the_published_weights():
    """PVT and PCPVT have none; Swin's detectors norm the outputs, SVT's norm each stage."""
    assert {cls: cls.stage_norm for cls in CLASSES} == {
        SlidePVT: None,
        TwinsPCPVT: None,
        SlideSwin: 'output',
        TwinsSVT: 'next',
    }


@BOTH
def test_drop_path_rises_linearly_to_its_rate_and_acts_once_a_branch(cls):
    model = small(cls, drop_path_rate=0.3)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.3, 7))
    block = randomize(model.stages[-1].blocks[-1]).train()
    x = torch.randn(4000, 1, 1, 64)
    nn.init.zeros_(block.ffn.layers[1].weight), nn.init.zeros_(block.ffn.layers[1].bias)
    dropped = (block(x) == x).flatten(1).all(1).double().mean()
    assert abs(dropped - 0.3) < 0.03


@BOTH
def test_kernel_size_for_each_stage(cls):
    model = small(cls, kernel_size=(3, 7, 3, 3))
    assert model.stages[1].blocks[0].attn.shift.shape == (49, 7, 7)
    assert small(cls, kernel_size=5).stages[0].blocks[0].attn.shift.shape == (25, 5, 5)


@BOTH
@pytest.mark.parametrize('attn_backend', ['reference', 'conv'])
def test_backend_is_the_users_choice(cls, attn_backend):
    model, other = randomize(small(cls)).eval(), randomize(small(cls, attn_backend=attn_backend)).eval()
    image = torch.randn(1, 3, 48, 64)
    for out, wanted in zip(other(image), model(image), strict=True):
        assert relative_error(out, wanted) < 1e-5
    assert other.stages[0].blocks[0].attn.backend == attn_backend


def test_pretrain_img_size_sets_the_position_embeddings():
    model = small(SlidePVT, pretrain_img_size=(64, 96))
    assert [tuple(s.embed.position_embedding.shape[1:3]) for s in model.stages] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize('cls', CLASSES)
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(arch='huge'), r"arch must be one of \[.*'small'.*\] or a dict, got arch='huge'"),
        (dict(arch=None), r'arch must be one of .* or a dict, got arch=None'),
        (dict(arch=dict(embed_dims=(8,))), r'an arch dict must have the keys'),
        (dict(in_channels=0), r'in_channels must be a positive integer, got in_channels=0'),
        (dict(slide_stages=(0, 4)), r'slide_stages must be a list of different stages from 0 to 3.*\(0, 4\)'),
        (dict(slide_stages=(1, 1)), r'slide_stages must be a list of different stages'),
        (dict(slide_stages=1), r'slide_stages must be a list'),
        (dict(slide_stages=None), r'slide_stages must be a list .*got slide_stages=None'),
        (dict(slide_stages=(True,)), r'slide_stages must be a list'),
        (dict(out_indices=(4,)), r'out_indices must be a list of different stages from 0 to 3'),
        (dict(out_indices=None), r'out_indices must be a list .*got out_indices=None'),
        (dict(out_indices=()), r'out_indices must name at least one stage'),
        (dict(out_indices=(0,), frozen_stages=5), r'frozen_stages must be in -1..4, got frozen_stages=5'),
        (dict(frozen_stages=None), r'frozen_stages must be in -1..4, got frozen_stages=None'),
        (dict(frozen_stages=True), r'frozen_stages must be in -1..4, got frozen_stages=True'),
        (dict(kernel_size=(3, 3)), r'kernel_size must be one number or one for each of the 4 stages'),
        (dict(kernel_size=4), r'kernel_size must be a positive odd integer, got kernel_size=4'),
        (dict(kernel_size=(3, 3, 3, 4)), r'kernel_size must be a positive odd integer, got kernel_size=4'),
        (dict(kernel_size=True), r'kernel_size must be a positive odd integer, got kernel_size=True'),
        (dict(kernel_size=3.0), r'kernel_size must be a positive odd integer, got kernel_size=3\.0'),
        (dict(kernel_size=None), r'kernel_size must be a positive odd integer, got kernel_size=None'),
        (dict(attn_backend='natve'), r"attn_backend must be one of .*'native'.* or None, got attn_backend='natve'"),
        (dict(stage_norm=True), r"stage_norm must be 'next', 'output' or None, got stage_norm=True"),
        (dict(drop_rate=1.0), r'drop_rate must be a number in \[0, 1\), got drop_rate=1\.0'),
        (dict(attn_drop_rate=-0.1), r'attn_drop_rate must be a number in \[0, 1\), got attn_drop_rate=-0\.1'),
        (dict(drop_path_rate=1.5), r'drop_path_rate must be a number in \[0, 1\), got drop_path_rate=1\.5'),
        (dict(drop_path_rate=float('nan')), r'drop_path_rate must be a number in \[0, 1\), got drop_path_rate=nan'),
        (dict(drop_path_rate=None), r'drop_path_rate must be a number in \[0, 1\), got drop_path_rate=None'),
    ],
)
def test_wrong_arguments_are_named(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize('cls', [SlideSwin, TwinsSVT])
@pytest.mark.parametrize(
    ('window_size', 'message'),
    [
        ((7, 7), r'window_size must be one number or one for each of the 4 stages'),
        (0, r'window_size must be a positive integer, got window_size=0'),
        (7.0, r'window_size must be a positive integer, got window_size=7\.0'),
    ],
)
def test_wrong_window_sizes_are_named(cls, window_size, message):
    with pytest.raises(ValueError, match=message):
        cls(window_size=window_size, slide_stages=(0, 1, 2, 3))


@pytest.mark.parametrize('size', [10, 31, (64, 16), (64,), 224.0, None])
def test_position_embeddings_without_a_pixel_are_refused(size):
    with pytest.raises(
        ValueError, match=r'pretrain_img_size must be one side or \(height, width\), at least 32 pixels'
    ):
        SlidePVT(pretrain_img_size=size)


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        (dict(num_heads=(1, 2)), r'one value for each of its 4 stages, got num_heads=\(1, 2\)'),
        (dict(num_heads=(1, 3, 3, 4)), r'embed_dims must be divisible by num_heads, got embed_dims=32, num_heads=3'),
        (dict(num_heads=0), r'positive integers alone, got num_heads=\[0, 0, 0, 0\]'),
        (dict(num_heads=None), r'one value for each of its 4 stages, got num_heads=None'),
        (dict(embed_dims=16.0), r'positive integers alone, got embed_dims=\[16\.0, '),
        (dict(depths=1), r'depths as a list with one number for each stage, got depths=1'),
        (dict(depths=()), r'depths as a list with one number for each stage, got depths=\(\)'),
        (dict(depths=(1, 0, 1, 1)), r'positive integers alone, got depths=\(1, 0, 1, 1\)'),
        (dict(depths=None), r'depths as a list with one number for each stage, got depths=None'),
        (dict(mlp_ratios=0), r'positive numbers alone, got mlp_ratios=\[0, 0, 0, 0\]'),
        (dict(mlp_ratios='4444'), r"positive numbers alone, got mlp_ratios='4444'"),
        (dict(sr_ratios=(8, 4, 2, 0)), r'positive integers alone, got sr_ratios=\(8, 4, 2, 0\)'),
    ],
)
def test_wrong_arch_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        SlidePVT(dict(SMALL_PVT, **row))


@pytest.mark.parametrize('cls', CLASSES)
def test_arguments_have_names_that_tools_see(cls):
    parameters = inspect.signature(cls).parameters
    assert next(iter(parameters)) == 'arch'
    assert {x.kind for name, x in parameters.items() if name != 'arch'} == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError, match='slide_stage'):
        cls(slide_stage=(0,))


@BOTH
def test_zero_sum_patches_see_edges_and_no_colour(cls):
    init_cfg = [dict(type='Xavier', layer='Linear'), dict(type='mmslide.ZeroSumPatches', std=0.3, bias_std=0.2)]
    model = small(cls, init_cfg=init_cfg)
    model.init_weights()

    projection = model.stages[0].embed.projection
    even = torch.tensor([-2.0, 0.5, 3.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    edge = even + torch.tensor([1.0, 1.0, -1.0, -1.0])
    bias = projection.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(projection(even), bias, rtol=0, atol=1e-5)
    assert ((projection(edge) - bias).abs() > 1e-2).float().mean() > 0.8
    assert 0.25 < projection.weight.std() < 0.35
    assert 0.1 < projection.bias.std() < 0.3


def test_zero_sum_patches_are_refused_elsewhere():
    with pytest.raises(TypeError, match='a backbone of mmslide, got BaseModule'):
        BaseModule(init_cfg=dict(type='mmslide.ZeroSumPatches')).init_weights()


def test_one_number_in_an_arch_row_stands_for_all_stages():
    row = dict(embed_dims=32, depths=(1, 1), num_heads=(1, 2), mlp_ratios=4)
    assert [x.shape[1] for x in SlideSwin(row, out_indices=(0, 1))(torch.randn(1, 3, 32, 32))] == [32, 64]


def test_position_embeddings_of_the_maps_size_are_taken_as_they_are():
    model = randomize(small(SlidePVT, pretrain_img_size=(64, 96))).eval()
    embed = model.stages[0].embed
    image = torch.randn(1, 64, 96, 3)
    assert torch.equal(embed(image), embed.embed(image) + embed.position_embedding)
