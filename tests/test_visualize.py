"""What is drawn, on numbers, and tools/visualize.py on a detector, a segmentor and a classifier."""

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from helpers import BACKBONES, TOOLS, randomize, relative_error, tool_error
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from mmslide import figures, visualize
from mmslide.build import build_model
from mmslide.checkpoints import read_checkpoint
from mmslide.deploy import fuse, fuse_checkpoint, load_model
from mmslide.models import SlidePVT
from mmslide.models.attention import SlideAttention
from mmslide.ops import fixed_shift

sys.path.insert(0, str(TOOLS))
import visualize as tool

CONFIGS = TOOLS.parent / 'configs/mini'
DETECTOR = CONFIGS / 'cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py'
SEGMENTOR = CONFIGS / 'slide-swin-mini_upernet_mini-ade20k-64x64.py'
CLASSIFIER = CONFIGS / 'slide-pvt-mini_mini-imagenet-64x64.py'
SMALL = ['--channels', 1, '--targets', 1]  # options of the tool, since drawing takes time
ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), mlp_ratios=2, sr_ratios=(8, 4, 2, 1))


def kernels(channels=4, kernel_size=3):
    """The fixed shift in every channel."""
    return fixed_shift(kernel_size).repeat(channels, 1, 1, 1)


@pytest.mark.parametrize('kernel_size', [1, 3, 5])
def test_kernels_of_a_pure_shift(kernel_size):
    weight = kernels(kernel_size=kernel_size)
    radius = kernel_size // 2
    taps = [(x, y) for y in range(-radius, radius + 1) for x in range(-radius, radius + 1)]
    assert visualize.slot_offsets(weight).tolist() == [list(tap) for tap in taps]
    assert not visualize.deformed_part(weight).any()
    assert visualize.shift_distance(weight) == 0
    tiles = visualize.tiled(weight[0])
    expected = np.zeros((kernel_size**2, kernel_size**2))
    for i, j in itertools.product(range(kernel_size), repeat=2):
        expected[kernel_size * i + i, kernel_size * j + j] = 1  # tile (i, j) picks tap (i, j)
    assert np.array_equal(tiles, expected)
    (row,) = panels(figures.kernel_figure(dict(block=weight)), 5)
    assert np.array_equal(drawn(row[0]), expected)
    assert not drawn(row[1]).any()
    assert not drawn(row[2]).any()
    assert np.array_equal(drawn(row[3]), expected)
    *moves, shifted, places = row[4].lines
    assert all(np.array_equal(line.get_xydata()[0], line.get_xydata()[1]) for line in moves)
    assert np.array_equal(shifted.get_xydata(), taps)
    assert np.array_equal(places.get_xydata(), taps)
    assert 'distance 0.000' in row[3].get_title()


def panels(figure, columns):
    """The axes of a figure, row by row, without its colour scales."""
    axes = [ax for ax in figure.axes if ax.get_label() != '<colorbar>']
    return [axes[start : start + columns] for start in range(0, len(axes), columns)]


def drawn(ax):
    return ax.images[0].get_array()


def test_kernels_that_interpolate():
    """The slots of bilinear sampling at fractional offsets, which differ from channel to channel."""
    weight = torch.zeros(2, 9, 3, 3)
    offsets = torch.tensor([[[0.25, -0.5], [-1.0, 0.75]]]).expand(9, -1, -1)  # (slot, channel, [x, y])
    for slot, channel in itertools.product(range(9), range(2)):
        x, y = (nn.functional.relu(1 - (torch.arange(-1, 2) - o).abs()) for o in offsets[slot, channel])
        weight[channel, slot] = y[:, None] * x
    assert torch.allclose(visualize.slot_offsets(weight), offsets.mean(1), atol=1e-6)


def test_kernels_that_have_moved():
    weight = kernels(channels=2)
    weight[0, 0, 0, 1] = -1.0  # of slot 0 in one of two channels, as much as the shift, one pixel to the right
    weight[:, 5] = 0
    weight[1, 8, 2, 2] = 4.0
    offsets = visualize.slot_offsets(weight)
    assert torch.allclose(offsets[0], torch.tensor([-1 + 1 / 3, -1.0]))
    assert offsets[5].isnan().all()
    assert offsets[8].tolist() == [1, 1]
    deformed = visualize.deformed_part(weight)
    assert deformed[0, 0, 0, 1] == -1
    assert deformed[1, 8, 2, 2] == 3
    # 1 + 2 · 1 + 9 over 2 · 9 ones.
    assert visualize.shift_distance(weight) == pytest.approx((12 / 18) ** 0.5)
    assert visualize.shift_distance(torch.zeros(2, 9, 3, 3)) == 1
    figures.to_pixels(figures.kernel_figure(dict(block=weight)))


def test_trained_and_fused_models_have_the_same_kernels():
    model = randomize(SlidePVT(ARCH, slide_stages=(0, 2)))
    ours, fused = visualize.merged_kernels(model), visualize.merged_kernels(fuse(model))
    assert list(ours) == list(fused) == ['stages.0.blocks.0.attn', 'stages.2.blocks.0.attn']
    for name, weight in ours.items():
        deformed = model.get_submodule(name).deform_weight.detach()
        assert torch.equal(weight, fixed_shift(3) + deformed)
        assert torch.equal(weight, fused[name])
        distance = deformed.norm() / (9 * len(deformed)) ** 0.5
        assert visualize.shift_distances(model)[name] == pytest.approx(float(distance), rel=1e-5)
    with pytest.raises(ValueError, match='this SlidePVT has no Slide Attention: slide_stages of its backbone is empty'):
        visualize.merged_kernels(SlidePVT(ARCH, slide_stages=()))


@pytest.mark.parametrize('backend', ['reference', 'tapwise', None])
@pytest.mark.parametrize('fused', [False, True])
def test_attention_weights_give_the_output_of_the_module(fused, backend):
    attention = randomize(SlideAttention(12, 3, backend=backend, attn_drop_rate=0.5)).eval()
    weight, bias = attention.kernels()
    if fused:
        attention.switch_to_deploy()
    x = torch.randn(2, 5, 4, 12)
    with torch.no_grad():
        weights = attention.attention_weights(x)
        assert weights.shape == (2, 5, 4, 3, 9)
        assert relative_error(weights.sum(-1), torch.ones(2, 5, 4, 3)) < 1e-6
        _, _, v = attention.qkv(x).chunk(3, dim=-1)
        # The values of the 9 slots, by a convolution.
        maps = v.unflatten(-1, (3, 4)).permute(0, 3, 4, 1, 2).flatten(0, 1)
        slots = nn.functional.conv2d(maps, weight.flatten(0, 1)[:, None], bias.flatten(), padding=1, groups=4)
        values = slots.view(2, 3, 4, 9, 5, 4).permute(0, 4, 5, 1, 2, 3)  # B, H, W, heads, d, slots
        out = attention.proj((values @ weights[..., None])[..., 0].flatten(3))
        assert relative_error(out, attention(x)) < 1e-5


@pytest.mark.parametrize(
    'point', [(0, 0), (40, 30), (70, 63.9), (12.1, 45)], ids=['corner', 'inside', 'beyond', 'between']
)
def test_attended_slots(point):
    """At the places and with the weights that the whole map has there."""
    model = randomize(SlidePVT(ARCH, slide_stages=(0, 1, 2))).eval()
    image = torch.randn(1, 3, 64, 71)  # PVT crops it to 17 × 16 pixels of the first map
    inputs = {}
    for stage in (0, 2):
        attention = model.stages[stage].blocks[0].attn
        attention.register_forward_pre_hook(lambda module, args, stage=stage: inputs.update({stage: args[0]}))
    first, second = visualize.attended_slots(model, image, point, (0, 2))
    for stage, stride, found in ((0, 4, first), (2, 16, second)):
        attention = model.stages[stage].blocks[0].attn
        height, width = inputs[stage].shape[1:3]
        column, row = min(int(point[0] // stride), width - 1), min(int(point[1] // stride), height - 1)
        with torch.no_grad():
            wanted = attention.attention_weights(inputs[stage])[0, row, column]
        assert relative_error(found.weights, wanted) < 1e-6
        assert (found.name, found.stride) == (f'stages.{stage}.blocks.0.attn', stride)
        centre = torch.tensor([column + 0.5, row + 0.5]) * stride
        assert found.shifted.tolist() == [
            [centre[0] + dx * stride, centre[1] + dy * stride] for dy in (-1, 0, 1) for dx in (-1, 0, 1)
        ]
        moved = visualize.slot_offsets(attention.kernels()[0].detach())
        assert relative_error(found.places, centre + stride * moved) < 1e-6
        assert (found.places - found.shifted).abs().max() > stride / 10
    sample = visualize.Sample(np.zeros((64, 71, 3), np.uint8), image, None)
    rows = panels(figures.attention_figure(sample, point, [first, second]), 3)
    for row, found in zip(rows, (first, second), strict=True):
        for ax, weights in zip(row[1:], found.weights, strict=False):
            (dots,) = ax.collections
            assert np.allclose(dots.get_offsets(), found.places)
            assert np.allclose(dots.get_array(), weights)
            (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
            assert left < found.shifted[:, 0].min() < found.shifted[:, 0].max() < right
            assert top < found.shifted[:, 1].min() < found.shifted[:, 1].max() < bottom


@pytest.mark.parametrize('stage_norm', ['next', 'output', None])
def test_feature_maps(stage_norm):
    """Those that the backbone puts out, drawn where their pixels are in the image."""
    model = randomize(SlidePVT(ARCH, stage_norm=stage_norm)).eval()
    image = torch.randn(1, 3, 64, 96)
    maps = visualize.feature_maps(model, image)
    with torch.no_grad():
        outs = model(image)
    assert all(torch.equal(x, out[0]) for x, out in zip(maps, outs, strict=True))
    assert model.strides == (4, 8, 16, 32)
    sample = visualize.Sample(np.zeros((60, 90, 3), np.uint8), image, None)  # the rest is padding
    rows = panels(figures.feature_figure(sample, {1: maps[1], 3: maps[3]}, model.strides, channels=2), 4)
    for row, stage in zip(rows, (1, 3), strict=True):
        component, share = visualize.principal_component(maps[stage])
        chosen = visualize.strongest_channels(maps[stage], 2)
        assert np.allclose(drawn(row[1]), component)
        assert f'{share:.0%}' in row[1].get_title()
        for ax, channel in zip(row[2:], chosen, strict=True):
            assert np.array_equal(drawn(ax), maps[stage][channel])
            assert f'channel {channel} of' in ax.get_title()
        for ax in row[1:]:
            assert ax.images[0].get_extent() == [0, 96, 64, 0]
            assert (*ax.get_xlim(), *ax.get_ylim()) == (0, 90, 60, 0)


@pytest.mark.parametrize('name', BACKBONES)
def test_every_backbone(name):
    model = randomize(MODELS.build(BACKBONES[name])).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        outs = model(image)
    for feature, out, stride in zip(visualize.feature_maps(model, image), outs, model.strides, strict=True):
        assert torch.equal(feature, out[0])
        assert feature.shape[1:] == (64 // stride, 96 // stride)
    slots = visualize.attended_slots(model, image, (10, 50), range(4))
    assert [x.name for x in slots] == list(visualize.slide_attentions(model))
    fields = visualize.receptive_fields(partial(visualize.stage_maps, model), [image])
    assert all(field.isfinite().all() and field.max() > 0 for field in fields)


def test_principal_component_and_strongest_channels():
    pattern = torch.randn(5, 7)
    pattern -= pattern.mean()
    feature = torch.tensor([0.5, 0.0, -2.0])[:, None, None] * pattern + torch.tensor([3.0, 100.0, 7.0])[:, None, None]
    component, share = visualize.principal_component(feature)
    assert share == pytest.approx(1)
    assert relative_error(component.abs(), 4.25**0.5 * pattern.abs()) < 1e-5
    assert component.max() == component.abs().max()
    assert visualize.strongest_channels(feature, 2) == [2, 0]
    assert visualize.strongest_channels(feature, 10) == [2, 0, 1]
    component, share = visualize.principal_component(torch.ones(4, 1, 1))  # a map of one pixel
    assert component.tolist() == [[0]]
    assert share == 0


def test_receptive_fields_of_convolutions():
    first, second = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))
    last = nn.Conv2d(2, 1, 1, stride=3)
    for layer in (first, second, last):
        nn.init.constant_(layer.weight, -0.5)
    images = [torch.randn(1, 2, 12, 15), torch.randn(1, 2, 12, 15)]

    def maps_of(image):
        once = first(image)
        return [once, last(second(once))]

    fields = visualize.receptive_fields(maps_of, images)
    once, twice = torch.zeros(12, 15), torch.zeros(12, 15)
    once[5:8, 6:9] = 2.0  # of two channels in, two out
    line = torch.tensor([1.0, 2, 3, 2, 1])
    twice[4:9, 4:9] = line[:, None] * line  # centre at (2, 2) of (4, 5), (6, 6) of the image
    assert torch.allclose(fields[0], once)
    assert torch.allclose(fields[1], twice)
    assert visualize.contribution_side(once, (7.5, 6.5), 0.1) == 1
    assert visualize.contribution_side(once, (7.5, 6.5), 0.12) == 3
    assert visualize.contribution_side(once, (7.5, 6.5), 1) == 3
    assert visualize.contribution_side(once, (7, 6), 0.4) == 2
    assert visualize.contribution_side(twice, (6.5, 6.5), 1) == 5
    # Averaged, not added, and of the absolute values.
    scaled = visualize.receptive_fields(lambda image: [image * image.detach().mean()], images)
    means = sum(abs(float(image.mean())) for image in images) / 2
    assert float(scaled[0][6, 7]) == pytest.approx(2 * means, rel=1e-5)


def test_receptive_fields_of_a_backbone_and_its_host(tmp_path):
    config = Config(dict(model=dict(backbone=dict(type='mmslide.SlidePVT', arch=ARCH, stage_norm='next', deploy=True))))
    model = randomize(fuse(SlidePVT(ARCH, stage_norm='next')))
    images = [torch.randn(1, 3, 64, 96)]
    fields = visualize.receptive_fields(partial(visualize.stage_maps, model), images)
    assert [x.shape for x in fields] == [(64, 96)] * 4
    # One block of k = 3 sees three patches.
    seen = fields[0].nonzero()
    assert seen.amin(0).tolist() == [28, 44]
    assert seen.amax(0).tolist() == [39, 55]
    host = visualize.build_host(config, model)
    assert not visualize.slide_attentions(host)
    shared = {key: x for key, x in host.state_dict().items() if '.attn.' not in key}
    assert shared.keys() == {key for key in model.state_dict() if '.attn.' not in key}
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in shared.items())
    again = visualize.build_host(config, model)
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in host.state_dict().items())
    assert (visualize.receptive_fields(partial(visualize.stage_maps, host), images)[0] > 0).all()  # global attention
    trained = randomize(SlidePVT(ARCH, stage_norm='next', slide_stages=()))
    torch.save(trained.state_dict(), tmp_path / 'host.pth')
    host = visualize.build_host(config, model, tmp_path / 'host.pth')
    assert all(torch.equal(x, trained.state_dict()[key]) for key, x in host.state_dict().items())
    rows = panels(figures.receptive_field_figure(dict(ours=fields), (0, 3), model.strides, 1), 2)
    for ax, stage, centre in zip(rows[0], (0, 3), ((50, 34), (48, 48)), strict=True):
        relative = fields[stage] / fields[stage].max()
        assert np.allclose(drawn(ax), relative.clamp(min=1e-4))
        for square in ax.patches:
            assert square.get_center() == pytest.approx(centre)


def test_images_of_several_sizes_are_cropped_around_their_middle():
    small, large = torch.randn(1, 3, 4, 9), torch.randn(1, 3, 6, 5)
    first, second = visualize.centre_crops([small, large])
    assert torch.equal(first, small[..., 2:7])
    assert torch.equal(second, large[:, :, 1:5])
    assert torch.equal(visualize.centre_crops([small], 4)[0], small[..., :8])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Config, checkpoint and image of a random detector, segmentor or classifier, by its config."""
    folder = tmp_path_factory.mktemp('trained')
    made = {}

    def trained(path, **backbone):
        key = path, *backbone.items()
        if key not in made:
            names = [folder / f'{len(made)}{suffix}' for suffix in ('.py', '.pth', '.png')]
            config = Config.fromfile(path)
            depths = dict(arch=dict(depths=[1, 1, 1, 1]))
            names[0].write_text(f'_base_ = {str(path)!r}\nmodel = dict(backbone={dict(**depths, **backbone)!r})\n')
            config = Config.fromfile(names[0])
            model = randomize(build_model(config))
            for name, parameter in model.named_parameters():
                if name.endswith('fc_cls.bias'):
                    parameter.data[:2] = 4  # of the first two of 80 classes, so that something is found
            meta = dict(iter=7, dataset_meta=dict(classes=('disk', 'rectangle')))
            torch.save(dict(state_dict=model.state_dict(), meta=meta), names[1])
            rng = np.random.default_rng(0)
            cv2.imwrite(str(names[2]), rng.integers(256, size=(60, 80, 3), dtype=np.uint8))
            made[key] = names
        return made[key]

    return trained


def load(config, checkpoint, image):
    cfg, model, _ = load_model(config, checkpoint)
    return cfg, model, visualize.load_sample(cfg, model, image)


def test_sample_of_a_detector(trained):
    config, checkpoint, image = trained(DETECTOR)
    cfg, _, sample = load(config, checkpoint, image)
    pixels = cv2.imread(str(image))
    assert sample.pixels.shape == (96, 128, 3)  # to 128 × 128, its proportions kept
    assert np.array_equal(sample.pixels, cv2.resize(pixels, (128, 96))[..., ::-1])
    preprocessing = cfg.model.data_preprocessor
    normal = (sample.pixels - np.array(preprocessing.mean)) / preprocessing.std
    assert sample.inputs.shape == (1, 3, 96, 128)
    assert np.allclose(sample.inputs[0].permute(1, 2, 0), normal, atol=1e-5)
    assert sample.data_sample.img_shape == (96, 128)


def test_class_activation_of_detections(trained):
    config, checkpoint, image = trained(DETECTOR)
    _, model, sample = load(config, checkpoint, image)
    found = visualize.class_activations(model, sample, ['disk'], limit=2, score_thr=0.0)
    with torch.no_grad():
        wanted = model.predict(sample.inputs, [sample.data_sample], rescale=False)[0].pred_instances
    best = wanted[wanted.scores.argsort(descending=True)[:2]]
    assert len(found) == 2
    for row, (target, activations) in enumerate(found):
        label = int(best.labels[row])
        assert target.name == f'{"disk" if label == 0 else f"class {label}"} {best.scores[row]:.2f}'
        assert relative_error(target.box, best.bboxes[row]) < 1e-4
        assert [x.shape for x in activations] == [(24, 32), (12, 16), (6, 8), (3, 4)]
        assert all(x.min() >= 0 for x in activations)
        assert all(x.max() > 0 for x in activations[:3])
    assert visualize.class_activations(model, sample, [], score_thr=1.1) == []
    rows = panels(figures.activation_figure(sample, found, (0, 2), (4, 8, 16, 32)), 3)
    for row, (target, activations) in zip(rows, found, strict=True):
        left, top, right, bottom = target.box.tolist()
        for ax in row:
            (box,) = ax.patches
            assert box.get_bbox().extents == pytest.approx((left, top, right, bottom))
        for ax, stage in zip(row[1:], (0, 2), strict=True):
            overlay = ax.images[1]
            assert np.allclose(overlay.get_array(), activations[stage] / activations[stage].max())
            assert overlay.get_extent() == [0, 128, 96, 0]


def test_class_activation_of_a_linear_classifier_on_the_mean(trained):
    """There HiResCAM is CAM: the class's weights over the map, divided by its number of pixels."""
    pytest.importorskip('mmpretrain', reason="needs pip install 'mmslide[classification]'")
    config, checkpoint, image = trained(CLASSIFIER, stage_norm=None)
    _, model, sample = load(config, checkpoint, image)
    found = visualize.class_activations(model, sample, ['disk', 'rectangle'], limit=5)
    with torch.no_grad():
        scores = model.predict(sample.inputs)[0].pred_score
        feature = visualize.feature_maps(model.backbone, sample.inputs)[3]
    order = scores.argsort(descending=True).tolist()
    names = ['disk', 'rectangle', 'class 2']
    assert [target.name for target, _ in found] == [f'{names[label]} {scores[label]:.2f}' for label in order]
    for label, (target, activations) in zip(order, found, strict=True):
        cam = (model.head.fc.weight[label, :, None, None] * feature).sum(0) / feature[0].numel()
        assert relative_error(activations[3], cam.clamp(min=0)) < 1e-4
        assert target.box is None


def test_class_activation_of_a_segmentor(trained):
    config, checkpoint, image = trained(SEGMENTOR)
    _, model, sample = load(config, checkpoint, image)
    found = visualize.class_activations(model, sample, [], limit=2)
    with torch.no_grad():
        labels = model(sample.inputs, [sample.data_sample], mode='tensor').argmax(1)
    counts, order = labels.flatten().bincount().sort(descending=True)
    assert [target.name for target, _ in found] == [
        f'class {label} {count / labels.numel():.0%}' for label, count in zip(order[:2], counts[:2], strict=True)
    ]
    assert all(x.max() > 0 for _, activations in found for x in activations)


def test_class_activation_of_other_heads(trained):
    _, model, sample = load(*trained(SEGMENTOR))
    with torch.no_grad():
        logits = model.extract_feat(sample.inputs)[1][:, :1]
    model.decode_head.forward = lambda maps: maps[1][:, :1]  # one channel for two classes
    shares = {label: float(((logits > 0) == label).float().mean()) for label in (0, 1)}
    found = visualize.class_activations(model, sample, ['ground', 'figure'])
    assert sorted(target.name for target, _ in found) == [f'figure {shares[1]:.0%}', f'ground {shares[0]:.0%}']
    scores = {target.name.split()[0]: target.score.item() for target, _ in found}
    assert scores['figure'] == pytest.approx(logits[logits > 0].sum().item(), rel=1e-4)
    assert scores['ground'] == pytest.approx(-logits[logits <= 0].sum().item(), rel=1e-4)
    for forward, message in (
        (lambda maps: (maps,), 'the head of this EncoderDecoder returns tuple, not logits'),
        (lambda maps, samples: maps, 'the head of this EncoderDecoder does not run on feature maps only'),
    ):
        model.decode_head.forward = forward
        with pytest.raises(ValueError, match=message):
            visualize.class_activations(model, sample, [])


def test_detections_without_gradients_are_refused(trained):
    _, model, sample = load(*trained(DETECTOR))
    predict = model.predict
    with (
        mock.patch.object(model, 'predict', torch.no_grad()(predict)),
        pytest.raises(ValueError, match='the scores of this CascadeRCNN have no gradients'),
    ):
        visualize.class_activations(model, sample, [])


def test_history(trained, tmp_path):
    config, checkpoint, _ = trained(DETECTOR)
    content = read_checkpoint(checkpoint)
    names = [key for key in content['state_dict'] if key.endswith('deform_weight')]
    assert len(names) == 3
    for iteration in (10, 200):
        for name in names:
            content['state_dict'][name].fill_(iteration / 1000)
        content['meta']['iter'] = iteration
        torch.save(content, tmp_path / f'iter_{iteration}.pth')
    labels, iterations, distances = visualize.kernel_history(config, [tmp_path])
    assert (labels, iterations) == (['iter_10', 'iter_200'], [10, 200])
    assert list(distances) == [name.removeprefix('backbone.').removesuffix('.deform_weight') for name in names]
    for values in distances.values():  # nine taps each
        assert values == pytest.approx([0.01 * 3, 0.2 * 3], rel=1e-4)
    (ax,) = figures.history_figure(labels, distances, iterations).axes
    assert np.allclose(ax.lines[2].get_xydata(), [[10, 0.03], [200, 0.6]])
    del content['meta']['iter']
    torch.save(content, tmp_path / 'last.pth')
    labels, iterations, distances = visualize.kernel_history(config, [tmp_path / 'iter_10.pth', tmp_path / 'last.pth'])
    assert (labels, iterations) == (['iter_10', 'last'], None)
    (ax,) = figures.history_figure(labels, distances).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == labels
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match=r'empty has no checkpoint epoch_N\.pth or iter_N\.pth'):
        visualize.kernel_history(config, [tmp_path / 'empty'])


@pytest.fixture
def draw(monkeypatch, capsys):
    """Runs the tool in this process; its lines of output."""

    def draw(*arguments):
        monkeypatch.setattr(sys, 'argv', ['visualize.py', *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out.splitlines()

    return draw


def test_tool_on_a_detector(trained, draw, tmp_path):
    config, checkpoint, image = trained(DETECTOR)
    out = tmp_path / 'new/drawn'
    options = ['--history', checkpoint, checkpoint, '--score-thr', 0, *SMALL]
    lines = draw(config, checkpoint, image, '--out', out, '--stages', 1, *options)
    names = [f'{kind}_{image.stem}' for kind in ('features', 'attention', 'cam')]
    names[1] += '_0.5-0.5'
    assert [Path(line).name for line in lines] == [f'{name}.png' for name in ('kernels', 'history', *names, 'erf')]
    assert sorted(out.iterdir()) == sorted(map(Path, lines))
    assert all(cv2.imread(line).std() > 0 for line in lines)
    (line,) = draw(config, checkpoint, image, '--out', out, '--kinds', 'cam', '--score-thr', 1)
    assert line == f'{image}: no class activation, since no detection has a score of 1.0 or more'


def test_receptive_fields_name_the_host(trained):
    config, checkpoint, image = trained(DETECTOR)
    ((name, figure),) = figures.draw(config, checkpoint, [image], kinds=['erf'], stages=[0])
    assert name == 'erf'
    assert [ax.get_ylabel() for ax in figure.axes[:2]] == ['SlidePVT', 'PVT (host)\nattention untrained']


def test_tool_on_several_images_and_points(trained, draw, tmp_path):
    config, checkpoint, image = trained(DETECTOR)
    options = ['--kinds', 'attention', '--points', '0.25,0.5', '0,1', '--stages', 0]
    lines = draw(config, checkpoint, image, image, '--out', tmp_path, *options)
    names = [f'attention_{index}_{image.stem}_{point}.png' for index in (0, 1) for point in ('0.25-0.5', '0-1')]
    assert [Path(line).name for line in lines] == names
    first, _, again, last = (Path(line).read_bytes() for line in lines)
    assert first == again != last
    (line,) = draw(config, checkpoint, '--out', tmp_path)  # no image
    assert line.endswith('kernels.png')


@pytest.mark.parametrize('path', [SEGMENTOR, CLASSIFIER], ids=['segmentor', 'classifier'])
def test_tool_on_other_tasks_and_hosts(path, trained, draw, tmp_path):
    if path == CLASSIFIER:
        pytest.importorskip('mmpretrain', reason="needs pip install 'mmslide[classification]'")
    config, checkpoint, image = trained(path, slide_stages=())
    lines = draw(config, checkpoint, image, '--out', tmp_path, '--stages', 3, *SMALL)
    assert sorted(Path(line).name for line in lines) == [
        f'cam_{image.stem}.png',
        'erf.png',
        f'features_{image.stem}.png',
    ]


@pytest.mark.exhaustive
def test_tool_on_a_fused_model(trained, draw, tmp_path):
    config, checkpoint, image = trained(SEGMENTOR)
    fuse_checkpoint(config, checkpoint, tmp_path / 'fused.pth')
    drawn = []
    for number, arguments in enumerate(((config, checkpoint), (tmp_path / 'fused.py', tmp_path / 'fused.pth'))):
        out = tmp_path / str(number)
        lines = draw(*arguments, image, '--out', out, '--kinds', 'kernels', 'cam', '--stages', 1, *SMALL)
        assert len(lines) == 2
        drawn.append(cv2.imread(str(out / 'kernels.png')))
    assert np.array_equal(*drawn)


def test_tool_refuses(trained, tmp_path):
    config, checkpoint, image = trained(DETECTOR)
    host = trained(DETECTOR, slide_stages=())

    out = tmp_path / 'drawn'

    def error(*arguments):
        return tool_error('visualize', *arguments, '--out', out)

    for kind in ('attention', 'kernels'):
        message = f'cannot draw {kind}: the model has no Slide Attention in these stages'
        assert error(*host, '--kinds', kind) == message
        assert error(config, checkpoint, image, '--stages', 3, '--kinds', kind) == message
    assert (
        error(*host[:2]) == 'nothing to draw: no image is given, and the model has no Slide Attention in these stages'
    )
    assert error(*host, '--history', host[1]) == 'cannot draw kernels: the model has no Slide Attention in these stages'
    assert error(config, checkpoint, '--kinds', 'cam') == 'cannot draw cam: no image is given'
    for arguments in (host, (config, checkpoint, image, '--kinds', 'cam')):
        message = 'host_checkpoint needs the kind erf and a model with Slide Attention'
        assert error(*arguments, '--host-checkpoint', host[1]) == message
    assert error(config, checkpoint, '--stages', 4) == (
        'stages must be a list of different stages from 0 to 3, got stages=[4]'
    )
    for option in ('channels', 'targets'):
        message = f'{option} must be a positive integer, got {option}=0'
        assert error(config, checkpoint, f'--{option}', 0) == message
    assert error(config, checkpoint, tmp_path / 'none.png') == f'{tmp_path}/none.png does not exist'
    assert error(config, checkpoint, config) == f'{config} is not a readable image'
    assert not out.exists()
    out.mkdir()
    (out / 'kernels.png').write_bytes(image.read_bytes())
    message = f'{out}/kernels.png would overwrite the input {out}/kernels.png: choose another name'
    assert error(config, checkpoint, out / 'kernels.png') == message
    with pytest.raises(ValueError, match=r"kinds must be some of \('features', .*\), got \['masks'\]"):
        next(figures.draw(config, checkpoint, kinds=['masks']))
    for point in ('0.5,2', '0.5', 'a,b', 'nan,0'):
        with pytest.raises(argparse.ArgumentTypeError, match=f"from 0 to 1, got '{point}'"):
            tool.parse_point(point)


def test_backbones_of_others_are_refused():
    model = nn.Module()
    for backbone in (nn.Conv2d(3, 1, 1), None):
        model.backbone = backbone
        with pytest.raises(ValueError, match=f'the backbone must be from mmslide, got {type(backbone).__name__}'):
            visualize.find_backbone(model)
