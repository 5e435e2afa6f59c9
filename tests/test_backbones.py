import pytest
import torch
from helpers import (
    NEEDS_MODERN,
    assert_golden,
    assert_golden_logits,
    golden_image,
    golden_state,
    load_host,
    randomize,
    relative_error,
)
from mmengine.model import BaseModule

from mmslide.models import SlidePVT, SlideSwin, TwinsPCPVT, TwinsSVT
from mmslide.models.attention import WindowAttention
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
    with pytest.raises(ValueError, match=rf'at least {least} pixels per side, got \({least - 1}, {least}\)'):
        model(torch.randn(1, 3, least - 1, least))


def test_norms_of_stages_are_by_default_those_of_the_published_weights():
    """PVT and PCPVT have none; Swin's detectors norm the outputs, SVT's norm each stage."""
    assert {cls: cls.stage_norm for cls in CLASSES} == {
        SlidePVT: None,
        TwinsPCPVT: None,
        SlideSwin: 'output',
        TwinsSVT: 'next',
    }


def test_pretrain_img_size_sets_the_position_embeddings():
    model = small(SlidePVT, pretrain_img_size=(64, 96))
    assert [tuple(s.embed.position_embedding.shape[1:3]) for s in model.stages] == [(16, 24), (8, 12), (4, 6), (2, 3)]


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


def test_sr_ratios_of_zero_are_refused():
    with pytest.raises(ValueError, match=r'only positive integers, got sr_ratios=\(8, 4, 2, 0\)'):
        SlidePVT(dict(SMALL_PVT, sr_ratios=(8, 4, 2, 0)))


def test_one_number_in_an_arch_row_stands_for_all_stages():
    row = dict(embed_dims=32, depths=(1, 1), num_heads=(1, 2), mlp_ratios=4)
    assert [x.shape[1] for x in SlideSwin(row, out_indices=(0, 1))(torch.randn(1, 3, 32, 32))] == [32, 64]


def test_position_embeddings_of_the_maps_size_are_taken_as_they_are():
    model = randomize(small(SlidePVT, pretrain_img_size=(64, 96))).eval()
    embed = model.stages[0].embed
    image = torch.randn(1, 64, 96, 3)
    assert torch.equal(embed(image), embed.embed(image) + embed.position_embedding)


@pytest.mark.parametrize('slide_stages', [(), (0, 1)])
def test_weights_load_into_a_model_from_the_meta_device(slide_stages):
    """What is in no state dict has to be there too."""
    model = randomize(small(SlideSwin, slide_stages=slide_stages))
    with torch.device('meta'):
        empty = small(SlideSwin, slide_stages=slide_stages)
    empty.to_empty(device='cpu').load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 64, 64)
    for out, wanted in zip(empty.eval()(image), model.eval()(image), strict=True):
        assert torch.equal(out, wanted)


@NEEDS_MODERN
@pytest.mark.parametrize('shift_size', [0, 3])
def test_window_attention_takes_the_fused_kernel(shift_size):
    attention = WindowAttention(16, num_heads=2, window_size=7, shift_size=shift_size).eval()
    with torch.no_grad(), torch.profiler.profile() as profiler:
        attention(torch.randn(1, 14, 21, 16))
    assert '_scaled_dot_product_flash_attention' in ' '.join(event.key for event in profiler.key_averages())
