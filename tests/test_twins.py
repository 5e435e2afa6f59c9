import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_golden,
    assert_golden_logits,
    golden_image,
    golden_state,
    load_host,
    randomize,
    relative_error,
)
from torch import nn

from mmslide.flops import count_macs
from mmslide.models import TwinsPCPVT, TwinsSVT
from mmslide.models.attention import LocallyGroupedAttention, SubsampledAttention
from mmslide.models.twins import PCPVT_VARIANTS, SVT_VARIANTS
from mmslide.weights.layouts import to_mmslide

SMALL = dict(
    embed_dims=(16, 32, 48, 64), depths=(1, 2, 3, 2), num_heads=(1, 2, 3, 4), mlp_ratios=2, sr_ratios=(8, 4, 2, 1)
)

BOTH = pytest.mark.parametrize('cls', [TwinsPCPVT, TwinsSVT])


def small(cls, **kwargs):
    return cls(arch=SMALL, **kwargs)


def outputs(model, image):
    with torch.no_grad():
        return model.eval()(image)


@pytest.mark.parametrize(
    ('name', 'cls', 'kwargs'),
    [
        ('pcpvt_small_v0_cls_224', TwinsPCPVT, {}),
        ('alt_gvt_small_cls_224', TwinsSVT, dict(stage_norm=None)),
        ('pcpvt_small_detection_192x256', TwinsPCPVT, {}),
        ('alt_gvt_small_detection_192x256', TwinsSVT, dict(mask_padding=False)),
        ('alt_gvt_small_segmentation_192x256', TwinsSVT, {}),
    ],
)
def test_the_authors_numbers(name, cls, kwargs):
    model = cls('small', **kwargs)
    layout, state = to_mmslide(golden_state(name))
    assert layout == "authors' Twins"
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing
    assert sorted(unexpected) == ['head.bias', 'head.weight', 'norm.bias', 'norm.weight']
    outs = outputs(model, golden_image(name))
    assert_golden(name, outs)
    if 'cls' in name:
        assert_golden_logits(name, outs[-1], eps=1e-6)


@pytest.mark.parametrize(
    ('name', 'mask_padding'), [('alt_gvt_small_detection_192x256', True), ('alt_gvt_small_segmentation_192x256', False)]
)
def test_the_mask_tells_the_authors_copies_apart(name, mask_padding):
    model = TwinsSVT('small', mask_padding=mask_padding)
    model.load_state_dict(to_mmslide(golden_state(name))[1], strict=False)
    with pytest.raises(AssertionError):
        assert_golden(name, outputs(model, golden_image(name)))


@BOTH
def test_mmpretrains_numbers(cls):
    name = f'mmpretrain_{cls.__name__.removeprefix("Twins").lower()}'
    model = small(cls, stage_norm='next', norm_cfg=dict(type='LN'))
    layout, state = to_mmslide(golden_state(name))
    assert layout == 'mmpretrain Twins'
    model.load_state_dict(state)
    assert_golden(name, outputs(model, golden_image(name)))


def mmseg_host(cls, **kwargs):
    backbones = pytest.importorskip('mmseg.models.backbones')
    row = {key: [value] * 4 if isinstance(value, int) else list(value) for key, value in SMALL.items()}
    if cls is TwinsSVT:
        row['windiow_sizes'] = [7] * 4
    return getattr(backbones, cls.__name__.removeprefix('Twins'))(**{'qkv_bias': True, **row, **kwargs})


@BOTH
@pytest.mark.parametrize('size', [(64, 96), (224, 224), (160, 256)])
@pytest.mark.parametrize('norm_after_stage', [True, False])
def test_equals_mmseg(cls, size, norm_after_stage, tmp_path):
    """Where no map has one side alone that divides by the window; there theirs are wrong, see the next test."""
    assert all(any(side % 7 for side in sides) == all(side % 7 for side in sides) for sides in maps(size))
    host = mmseg_host(cls, norm_after_stage=norm_after_stage)
    model = small(cls, stage_norm='next' if norm_after_stage else None, norm_cfg=dict(type='LN'))
    load_host(model, host, tmp_path)
    image = torch.randn(2, 3, *size)
    for out, wanted in zip(outputs(model, image), outputs(host, image), strict=True):
        assert relative_error(out, wanted) < 1e-5


def maps(size):
    return [[side // 2**stage for side in size] for stage in (2, 3, 4, 5)]


def masked_attention(attention, x):
    """The same attention over all pixels of the map at once, where only those of one window see each other."""
    batch, height, width, channels = x.shape
    q, k, v = attention.qkv(x).view(batch, height * width, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    rows, columns = (torch.arange(side) // attention.window_size for side in (height, width))
    window = (rows[:, None] * width + columns[None, :]).flatten()
    logits = q @ k.mT * q.shape[-1] ** -0.5
    logits = logits.masked_fill(window[:, None] != window[None, :], -torch.inf)
    return attention.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, height, width, channels))


@pytest.mark.parametrize('size', [(14, 15), (15, 14), (13, 17), (14, 21), (7, 7), (6, 8), (3, 5), (1, 1), (7, 1)])
def test_padding_is_masked_in_every_case(size):
    attention = randomize(LocallyGroupedAttention(32, 4, 7))
    x = torch.randn(2, *size, 32)
    assert relative_error(attention(x), masked_attention(attention, x)) < 1e-5
    unmasked = randomize(LocallyGroupedAttention(32, 4, 7, mask_padding=False))
    assert (relative_error(unmasked(x), attention(x)) > 1e-3) == any(side % 7 for side in size)


def test_mmseg_loses_the_mask_where_one_side_divides_and_ours_does_not():
    twins = pytest.importorskip('mmseg.models.backbones.twins')
    theirs = twins.LocallyGroupedSelfAttention(32, 4, qkv_bias=True, window_size=7)
    ours = randomize(LocallyGroupedAttention(32, 4, 7))
    theirs.load_state_dict(ours.state_dict())
    for size, fault in (((14, 15), True), ((15, 14), True), ((15, 16), False), ((14, 21), False)):
        x = torch.randn(2, *size, 32)
        out = theirs(x.flatten(1, 2), size).unflatten(1, size)
        wanted = masked_attention(ours, x)
        assert (relative_error(out, wanted) > 1e-2) == fault
        assert relative_error(ours(x), wanted) < 1e-5


def dropped(block, x, *args):
    """How often the attention branch of a block leaves an image as it was, the MLP branch being zero."""
    block.train()
    nn.init.zeros_(block.ffn.layers[1].weight), nn.init.zeros_(block.ffn.layers[1].bias)
    return (block(x, *args) == x).flatten(1).all(1).double().mean().item()


@BOTH
def test_a_branch_is_dropped_as_often_as_asked(cls, tmp_path):
    host = mmseg_host(cls, drop_path_rate=0.3)
    model = load_host(small(cls, drop_path_rate=0.3, stage_norm='next' if cls is TwinsSVT else None), host, tmp_path)
    x = torch.randn(6000, 1, 1, 64)
    assert dropped(model.stages[-1].blocks[-1], x) == pytest.approx(0.3, abs=0.03)
    # mmseg drops a GSA branch twice, as 1 - 0.7².
    assert dropped(host.layers[-1][-1], x.flatten(1, 2), (1, 1)) == pytest.approx(0.51, abs=0.03)


@BOTH
def test_what_does_not_fill_a_patch_is_cropped(cls):
    model = randomize(small(cls))
    image = torch.randn(1, 3, 67, 97)
    for out, wanted in zip(outputs(model, image), outputs(model, image[:, :, :64, :96]), strict=True):
        assert torch.equal(out, wanted)


def test_what_does_not_fill_a_subsampled_pixel_is_cropped():
    attention = randomize(SubsampledAttention(16, 2, sr_ratio=4))
    x = torch.randn(1, 11, 15, 16)
    kept = attention.norm(attention.sr(x[:, :8, :12].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).flatten(1, 2)
    q = attention.q(x).view(1, -1, 2, 8).transpose(1, 2)
    k, v = attention.kv(kept).view(1, -1, 2, 2, 8).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    assert relative_error(attention(x), attention.proj(out)) < 1e-5


@BOTH
def test_position_encoding_follows_the_first_block(cls):
    model = randomize(small(cls)).eval()
    stage = model.stages[2]
    seen = []
    for module in (*stage.blocks, stage.peg):
        module.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
    model(torch.randn(1, 3, 64, 96))
    first, peg, *_ = seen
    assert [module for module, *_ in seen] == [stage.blocks[0], stage.peg, *stage.blocks[1:]]
    x = peg[1]
    assert torch.equal(x, first[2])
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    kernel = stage.peg.proj.weight  # (C, 1, 3, 3)
    taps = [padded[:, i : i + 4, j : j + 6] * kernel[:, 0, i, j] for i in range(3) for j in range(3)]
    assert relative_error(peg[2], x + sum(taps) + stage.peg.proj.bias) < 1e-5


@BOTH
def test_norms_have_the_authors_eps(cls):
    model = small(cls, stage_norm='next')
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-5 if name.endswith(('embed.norm', 'attn.norm')) else 1e-6), name


@BOTH
def test_dropout_reaches_embeddings(cls):
    model = small(cls, drop_rate=0.25)
    assert [stage.embed.drop.p for stage in model.stages] == [0.25] * 4
    x = torch.ones(1, 64, 64, 3)
    assert (model.stages[0].embed.train()(x) == 0).double().mean() == pytest.approx(0.25, abs=0.05)


def test_slide_attention_as_the_local_half_trains():
    torch.manual_seed(1)
    model = randomize(small(TwinsSVT, slide_stages=(0, 1), kernel_size=(3, 5, 3, 3), drop_path_rate=0.0))
    assert model.stages[1].blocks[0].attn.shift.shape == (25, 5, 5)
    image, target = torch.randn(2, 3, 64, 75), torch.randn(2, 64, 2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        outs = model(image)
        loss = (outs[-1] - target).square().mean() + sum(out.mean().square() for out in outs[:-1])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def local_macs(channels, height, width, slide):
    """One local block's attention by arithmetic."""
    if slide:
        pixels, slots = height * width, 9
        return pixels * (4 * channels**2 + 2 * channels * slots * slots + 2 * channels * slots)
    padded = -(-height // 7) * 7 * (-(-width // 7) * 7)
    return padded * (3 * channels**2 + 2 * channels * 49) + height * width * channels**2


def test_flops_with_slide_attention_as_the_local_half():
    height, width = 96, 160
    image = torch.empty(1, 3, height, width, device='meta')
    count = {}
    for slide_stages in ((), (0, 2)):
        _, count[slide_stages] = count_macs(small(TwinsSVT, slide_stages=slide_stages).to('meta').eval(), image)
    expected = 0
    for stage in (0, 2):
        local = (SMALL['depths'][stage] + 1) // 2
        channels, sides = SMALL['embed_dims'][stage], maps((height, width))[stage]
        expected += local * (local_macs(channels, *sides, slide=True) - local_macs(channels, *sides, slide=False))
    assert count[(0, 2)] - count[()] == expected


@pytest.mark.parametrize(('cls', 'variants'), [(TwinsPCPVT, PCPVT_VARIANTS), (TwinsSVT, SVT_VARIANTS)])
def test_parameters_of_the_variants(cls, variants):
    """Against the paper's, in millions, with the classifier and its norm."""
    assert list(variants) == ['small', 'base', 'large']
    paper = dict(zip(variants, (24.1, 43.8, 60.9) if cls is TwinsPCPVT else (24.0, 56.0, 99.2), strict=True))
    for arch, millions in paper.items():
        dims = variants[arch]['embed_dims'][-1]
        with torch.device('meta'):
            model = cls(arch, stage_norm=None)
        params = sum(p.numel() for p in model.parameters()) + 2 * dims + 1000 * (dims + 1)
        assert params / 1e6 == pytest.approx(millions, abs=0.1)
