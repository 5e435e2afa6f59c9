import copy
import inspect
import re
import runpy
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, TRANSFORMS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

from mmslide.build import build_model, load_what_fits

ROOT = Path(__file__).parents[1]
BASES = sorted((ROOT / 'configs/_base_').rglob('*.py'))
ALL = sorted(set((ROOT / 'configs').rglob('*.py')) - set(BASES))
# Classifiers have tests of their own, in test_classification.py.
IN1K = [path for path in ALL if path.stem.endswith('_in1k')]
CONFIGS = [path for path in ALL if path not in IN1K and 'imagenet' not in path.stem]
MINI = [path for path in CONFIGS if path.parent.name == 'mini']
FINETUNE = [path for path in CONFIGS if path.parent.name == 'finetune']
ZOO = [path for path in CONFIGS if path not in (*MINI, *FINETUNE)]
METAFILES = sorted((ROOT / 'configs').rglob('metafile.yml'))

VARIABLES = {
    *('dataset_type', 'data_root', 'image_scale', 'crop_size', 'meta_keys', 'metainfo'),
    *('train_pipeline', 'test_pipeline', 'tta_pipeline', 'short_sides', 'multi_scale_crop'),
    *('max_epochs', 'max_iters', 'warmup_iters', 'pretrained'),
    *('num_classes', 'rpn_nms', 'boxes', 'norm_cfg', 'iou_thresholds', 'target_stds'),
}
KNOWN_KEYS = set(inspect.signature(Runner.__init__).parameters) | {'custom_imports', 'tta_model'} | VARIABLES

# How the files of the hosts' ImageNet weights begin.
PRETRAINED = {
    'mmslide.SlidePVT': 'pvt',
    'mmslide.SlidePVTv2': 'pvt_v2',
    'mmslide.SlideSwin': 'swin',
    'mmslide.SlideCSWin': 'cswin',
    'mmslide.SlideNAT': 'nat',
    'mmslide.TwinsPCPVT': 'pcpvt',
    'mmslide.TwinsSVT': 'alt_gvt',
}

every_config = pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
zoo_config = pytest.mark.parametrize('path', ZOO, ids=lambda path: path.stem)


@cache
def load(path: Path) -> Config:
    return Config.fromfile(path)


@cache
def build(path: Path) -> nn.Module:
    return build_model(load(path), 'meta')


def host_of(path: Path) -> Path:
    return path.with_name(path.name.replace('slide-', ''))


def inner_keys(value):
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for x in value:
            yield from inner_keys(x)


def test_names_are_unique():
    names = [path.name for path in ALL + BASES]
    assert len(set(names)) == len(names)


@every_config
def test_keys(path):
    cfg = load(path)
    unknown = set(cfg.keys()) - KNOWN_KEYS
    if path not in ZOO:
        unknown = {key for key in unknown if 'dict(' in repr(cfg[key]) or '{' in repr(cfg[key])} - {'vis_backends'}
    assert not unknown
    # A `_delete=True` typed for `_delete_=True` would be merged without a word.
    assert {key for key in inner_keys(cfg.to_dict()) if isinstance(key, str) and key.startswith('_')} <= {'_scope_'}
    assert cfg.data_root.endswith('/')


@every_config
def test_everything_builds(path):
    cfg = load(path)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        MODELS.build(dict(cfg.tta_model, module=build(path)))
        for pipeline in ('train_pipeline', 'test_pipeline', 'tta_pipeline'):
            for transform in cfg.get(pipeline, []):
                TRANSFORMS.build(transform)
        for name, hook in cfg.default_hooks.items():
            if name != 'visualization':  # wants a running visualizer
                HOOKS.build(hook)


@every_config
def test_puts_out_what_is_used(path):
    """The norm of an unused output would get no gradient, which distributed training refuses."""
    model = load(path).model
    arch = model.backbone.arch
    row = MODELS.get(model.backbone.type).variants[arch] if isinstance(arch, str) else arch
    channels = [row['embed_dims'][index] for index in model.backbone.get('out_indices', range(4))]
    neck = model.get('neck')
    if neck:
        assert neck.in_channels == channels
        assert not {'start_level', 'end_level'} & set(neck)
    else:
        decode, auxiliary = model.decode_head, model.auxiliary_head
        assert dict(zip(decode.in_index, decode.in_channels, strict=True)) == dict(enumerate(channels))
        assert auxiliary.in_channels == channels[auxiliary.in_index]


def framework(path):
    model = load(path).model
    return model.type, 'neck' in model


@pytest.mark.parametrize('backbone', ['SlidePVT', 'SlidePVTv2', 'SlideSwin'])  # one for each way to norm the stages
@pytest.mark.parametrize('kind', sorted({framework(path) for path in ZOO}), ids=str)
def test_every_parameter_gets_a_gradient(kind, backbone):
    path = next(path for path in (*MINI, *ZOO) if framework(path) == kind)
    model = copy.deepcopy(load(path).model)
    dims = [16, 32, 64, 128]
    row = next(iter(MODELS.get(f'mmslide.{backbone}').variants.values()))
    arch = dict(row, embed_dims=dims, depths=[2, 2, 2, 2], num_heads=[2, 2, 4, 8], mlp_ratios=2)
    model.backbone = dict(
        type=f'mmslide.{backbone}', arch=arch, out_indices=model.backbone.get('out_indices', range(4))
    )
    channels = [dims[index] for index in model.backbone.out_indices]
    if 'neck' in model:
        model.neck.in_channels = channels
    else:
        model.decode_head.update(in_channels=channels, channels=32)
        model.auxiliary_head.in_channels = channels[model.auxiliary_head.in_index]
    if model.type == 'EncoderDecoder':
        scope, size = 'mmseg', (64, 64)
        model.data_preprocessor.size = size
        labels = torch.randint(10, (1, *size))
        samples = [SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=dict(img_shape=size)) for _ in range(2)]
        data = dict(inputs=[torch.randint(256, (3, *size), dtype=torch.uint8) for _ in samples], data_samples=samples)
    else:
        if model.type == 'MaskRCNN':
            model.train_cfg.rcnn.sampler.num = 16
        scope, data = 'mmdet', demo_mm_inputs(2, (3, 128, 128), num_items=[3, 3], with_mask=True)
    with DefaultScope.overwrite_default_scope(scope):
        built = revert_sync_batchnorm(MODELS.build(model)).train()
    loss, _ = built.parse_losses(built(**built.data_preprocessor(data, True), mode='loss'))
    loss.backward()
    assert not [name for name, parameter in built.named_parameters() if parameter.grad is None]


@zoo_config
def test_starts_from_weights_of_the_host(path):
    cfg = load(path)
    backbone = cfg.model.backbone
    assert backbone.init_cfg.type == 'Pretrained'
    weights = f'{PRETRAINED[backbone.type]}_{backbone.arch}'.replace('-', '_')
    assert re.search(rf'/{weights}(_2|_patch|\.)', backbone.init_cfg.checkpoint)
    host, size = re.search(r'([a-z]+(?:v2)?)-(mini|b\d(?:-li)?|\w)_', path.name).groups()
    assert backbone.type.lower().endswith(host)
    assert backbone.arch.startswith(size)


@every_config
def test_schedule_decays(path):
    cfg = load(path)
    rate = cfg.optim_wrapper.optimizer.lr
    end = cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters
    assert cfg.train_cfg.val_interval <= end
    *warmup, decay = cfg.param_scheduler
    for scheduler in warmup:
        assert scheduler.type == 'LinearLR'
        assert not scheduler.by_epoch
    assert decay.end == end
    if decay.type == 'MultiStepLR':
        assert decay.gamma < 1
        assert max(decay.milestones) < end
    else:
        assert decay.eta_min < rate


@every_config
def test_keeps_the_old_checkpoint_until_the_new_one_is_written(path):
    assert load(path).default_hooks.checkpoint.max_keep_ckpts >= 2


@zoo_config
def test_runtime(path):
    cfg = load(path)
    assert cfg.custom_imports.imports == ['mmslide']
    assert {'tta_model', 'tta_pipeline'} <= set(cfg.keys())
    layout = re.search(r'_(\d+)xb(\d+)-', path.name)
    gpus, images = map(int, layout.groups()) if layout else (8, 2)
    assert cfg.train_dataloader.batch_size == images
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=gpus * images)


# What the schedules have, and what the sizes' drop path rates are: learning rate, weight decay, precision.
PVT_1X, RETINANET_1X = (2e-4, 1e-4, 'full'), (1e-4, 1e-4, 'full')
SWIN_3X, SWIN_3X_AMP = (1e-4, 0.05, 'full'), (1e-4, 0.05, 'amp')
FPN_40K, FPN_80K = (2e-4, 1e-4, 'full'), (1e-4, 1e-4, 'full')
UPERNET, UPERNET_AMP = (6e-5, 0.01, 'full'), (6e-5, 0.01, 'amp')
PVTV2, TWINS = ('b0', 'b1', 'b2', 'b2-li', 'b3'), ('pcpvt-s', 'pcpvt-b', 'pcpvt-l', 'svt-s', 'svt-b', 'svt-l')
SETTINGS = {
    'mask-rcnn_pvt-{}_fpn_1x_coco': (PVT_1X, dict(t=0.1, s=0.2, m=0.1, l=0.2)),
    'retinanet_pvt-{}_fpn_1x_coco': (RETINANET_1X, dict(t=0.1, s=0.1, m=0.2, l=0.3)),
    'pvt-{}_fpn_8xb4-40k_ade20k-512x512': (FPN_40K, dict(t=0.1, s=0.1, m=0.2, l=0.1)),
    'mask-rcnn_swin-{}_fpn_ms-crop-3x_coco': (SWIN_3X, dict(t=0.1)),
    'cascade-mask-rcnn_swin-{}_fpn_ms-crop-3x_coco': (SWIN_3X, dict(t=0.1, s=0.1, b=0.4)),
    'swin-{}_upernet_8xb2-160k_ade20k-512x512': (UPERNET, dict(t=0.3, s=0.3, b=0.5)),
    'swin-{}_upernet_8xb2-layer-decay-160k_ade20k-512x512': (UPERNET, dict(t=0.3)),
    'mask-rcnn_pvtv2-{}_fpn_1x_coco': (PVT_1X, dict.fromkeys(PVTV2, 0.1)),
    'mask-rcnn_pvtv2-{}_fpn_8xb1-1x_coco': ((2e-4 / 1.4, 1e-4, 'full'), dict(b4=0.1, b5=0.1)),
    'retinanet_pvtv2-{}_fpn_1x_coco': (RETINANET_1X, dict.fromkeys(PVTV2, 0.1)),
    'retinanet_pvtv2-{}_fpn_8xb1-1x_coco': ((1e-4 / 1.4, 1e-4, 'full'), dict(b4=0.1, b5=0.1)),
    'mask-rcnn_pvtv2-{}_fpn_ms-crop-3x_coco': (SWIN_3X_AMP, dict(b0=0.1, b2=0.1)),
    'cascade-mask-rcnn_pvtv2-{}_fpn_ms-crop-3x_coco': (SWIN_3X_AMP, {'b2': 0.1, 'b2-li': 0.1}),
    'pvtv2-{}_fpn_8xb4-40k_ade20k-512x512': (FPN_40K, dict.fromkeys(('b0', 'b1', 'b2', 'b3', 'b4', 'b5'), 0.1)),
    'mask-rcnn_cswin-{}_fpn_ms-crop-3x_coco': (SWIN_3X, dict(t=0.2, s=0.4, b=0.5)),
    'cascade-mask-rcnn_cswin-{}_fpn_ms-crop-3x_coco': (SWIN_3X, dict(t=0.2, s=0.4, b=0.5)),
    'cswin-{}_upernet_8xb2-160k_ade20k-512x512': (UPERNET, dict(t=0.3, s=0.4, b=0.6)),
    'cswin-{}_fpn_8xb4-80k_ade20k-512x512': (FPN_80K, dict(t=0.3, s=0.4, b=0.6)),
    'mask-rcnn_nat-{}_fpn_ms-crop-3x_coco': (SWIN_3X_AMP, dict(mini=0.2, t=0.2, s=0.35)),
    'cascade-mask-rcnn_nat-{}_fpn_ms-crop-3x_coco': (SWIN_3X_AMP, dict(mini=0.2, t=0.3, s=0.3, b=0.5)),
    'nat-{}_upernet_8xb2-160k_ade20k-512x512': (UPERNET_AMP, dict(mini=0.2, t=0.3, s=0.5, b=0.5)),
    'mask-rcnn_twins-{}_fpn_1x_coco': (PVT_1X, dict.fromkeys(TWINS, 0.2)),
    'retinanet_twins-{}_fpn_1x_coco': (RETINANET_1X, dict.fromkeys(TWINS, 0.2)),
    'mask-rcnn_twins-{}_fpn_ms-crop-3x_coco': (SWIN_3X_AMP, dict.fromkeys(TWINS, 0.2)),
    'retinanet_twins-{}_fpn_ms-crop-3x_coco': (SWIN_3X_AMP, dict.fromkeys(TWINS, 0.2)),
    'twins-{}_fpn_8xb4-80k_ade20k-512x512': (FPN_80K, {**dict.fromkeys(TWINS, 0.2), 'svt-l': 0.3}),
    'twins-{}_upernet_8xb2-160k_ade20k-512x512': (UPERNET, {**dict.fromkeys(TWINS, 0.2), 'svt-l': 0.3}),
}


def test_settings():
    """What the hosts' authors and the laboratory of Slide-Transformer have published; Slide as its host."""
    expected = {
        name.format(size): (*settings, drop_path)
        for name, (settings, sizes) in SETTINGS.items()
        for size, drop_path in sizes.items()
    }
    for path in ZOO:
        cfg = load(path)
        optimizer = cfg.optim_wrapper.optimizer
        precision = {'OptimWrapper': 'full', 'AmpOptimWrapper': 'amp'}[cfg.optim_wrapper.type]
        actual = optimizer.lr, optimizer.weight_decay, precision, cfg.model.backbone.drop_path_rate
        assert actual == expected[host_of(path).stem], path.stem
    assert set(expected) == {host_of(path).stem for path in ZOO}


@pytest.mark.parametrize('path', [path for path in ZOO if path.name.find('slide-') >= 0], ids=lambda path: path.stem)
def test_host_differs_in_its_attention_alone(path):
    host = load(host_of(path)).to_dict()
    assert host['model']['backbone'].pop('slide_stages') == ()
    assert host == load(path).to_dict()


@pytest.mark.parametrize(
    'path', [path for path in ZOO if 'paramwise_cfg' in load(path).optim_wrapper], ids=lambda path: path.stem
)
def test_weight_decay(path):
    cfg, model = load(path), build(path)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        # AmpOptimWrapper wants a GPU; the groups are the same.
        optim_wrapper = build_optim_wrapper(model, dict(cfg.optim_wrapper, type='OptimWrapper'))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names[id(p)]: group['weight_decay'] for group in optim_wrapper.optimizer.param_groups for p in group['params']
    }
    assert set(decay) == set(names.values())
    assert set(decay.values()) == {0.0, cfg.optim_wrapper.optimizer.weight_decay}

    # The BatchNorms of UperNet's heads decay, as in Swin's own setting.
    norms = {
        f'{name}.{key}'
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for key, _ in module.named_parameters()
    }
    peg = {name for name in names.values() if '.peg.' in name}
    table = {name for name in names.values() if name.endswith(('.relative_position_bias_table', '.rpb'))}
    slide = {name for name in names.values() if name.endswith('.relative_position_bias')}
    host, depths = cfg.model.backbone.type, [len(stage.blocks) for stage in model.backbone.stages]
    slides = 'slide-' in path.name
    assert len(norms) > 2 * 2 * sum(depths)
    assert len(peg) == (2 * 4 if 'Twins' in host else 0)
    assert len(slide) == (sum(depths[:2]) if slides else 0)
    biased = host in ('mmslide.SlideSwin', 'mmslide.SlideNAT')
    assert len(table) == (sum(depths) - len(slide) if biased else 0)
    assert {name for name, value in decay.items() if value == 0} == norms | table | slide | peg


@pytest.mark.parametrize('path', FINETUNE, ids=lambda path: path.stem)
def test_fine_tuning_starts_from_all_but_the_last_layers_of_the_heads(path):
    cfg = load(path)
    folder, checkpoint = Path(cfg.load_from).parts[-2:]
    source = next(x for x in ZOO if x.stem == folder)
    length = load(source).train_cfg
    assert checkpoint in (f'epoch_{length.get("max_epochs")}.pth', f'iter_{length.get("max_iters")}.pth')
    assert cfg.model.backbone.init_cfg is None
    heads = [module for module in build(path).modules() if hasattr(module, 'num_classes')]
    assert {head.num_classes for head in heads} - {1} == {len(cfg.metainfo.classes)}  # 1 is of proposals
    problems = load_what_fits(build(path), build(source).state_dict())
    assert set(problems) == {'of another shape'}
    names = {re.match(r'\S+head\.(\w+)\.(weight|bias) ', problem)[1] for problem in problems['of another shape']}
    assert names <= {'fc_cls', 'fc_reg', 'conv_logits', 'conv_seg'}


def test_metafiles():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert [ROOT / path for path in index['Import']] == METAFILES
    listed = []
    for metafile in METAFILES:
        data = yaml.safe_load(metafile.read_text())
        collections = {x['Name'] for x in data['Collections']}
        assert all((ROOT / x['README']).is_file() for x in data['Collections'])
        for model in data['Models']:
            config = ROOT / model['Config']
            assert config.parent == metafile.parent
            assert config.stem == model['Name']
            assert model['In Collection'] in collections
            assert not {'Results', 'Weights'} & set(model)  # nothing was trained here
            assert 'not reproduced' in model['Paper Results']['Note']
            cfg = load(config)
            epochs = model['Metadata'].get('Epochs'), model['Metadata'].get('Iterations')
            assert epochs == (cfg.train_cfg.get('max_epochs'), cfg.train_cfg.get('max_iters'))
            assert model['Metadata']['Batch Size'] == cfg.auto_scale_lr.base_batch_size
            listed.append(config)
    assert len(set(listed)) == len(listed)
    assert set(listed) == {*ZOO, *IN1K}


@pytest.mark.filterwarnings('ignore')
def test_mim_reads_the_model_index(capsys):
    search = pytest.importorskip('mim.commands.search')
    frame = search.convert2df(search.load(str(ROOT / 'model-index.yml')))
    assert set(frame.index) == {path.stem for path in (*ZOO, *IN1K)}
    assert frame.loc['mask-rcnn_slide-pvt-t_fpn_1x_coco', 'parameters(M)'] == pytest.approx(32, abs=0.6)
    assert not [column for column in frame.columns if 'coco/' in column or 'ade20k/' in column]
    (weight,) = set(frame['weight'])
    assert weight.startswith('none: ')
    assert weight.endswith('/')  # which mim download fetches nothing for
    assert ',' not in weight  # where it would split
    search.print_df(frame, 80)
    assert 'config' in capsys.readouterr().out


@pytest.mark.parametrize('metafile', METAFILES, ids=lambda path: path.parent.name)
def test_readme_links_to_every_config(metafile):
    links = re.findall(r'\]\(([^)]+\.py)\)', (metafile.parent / 'README.md').read_text())
    assert sorted(links) == sorted(path.name for path in (*ZOO, *IN1K) if path.parent == metafile.parent)


def test_the_models_page_has_what_the_metafiles_have(tmp_path):
    script = runpy.run_path(str(ROOT / 'docs/scripts/make_models.py'))
    page = tmp_path / 'models.md'
    page.write_text(script['PAGE'].read_text().replace('82.3', ''))
    script['main'].__globals__.update(PAGE=page, PLOT=tmp_path / 'models.png')
    script['main']()
    assert page.read_text() == script['PAGE'].read_text()
    assert (tmp_path / 'models.png').stat().st_size > 10_000


@pytest.mark.parametrize('metafile', METAFILES, ids=lambda path: path.parent.name)
def test_readme_says_where_each_setting_comes_from(metafile):
    lines = (metafile.parent / 'README.md').read_text().splitlines()
    sources = [line.split(' | ')[-1].removesuffix(' |') for line in lines if line.startswith('| [')]
    assert sources
    assert set(sources) <= {'paper', "authors' files", "laboratory's files", "host's authors", 'inferred'}
    assert all(line.endswith('| setting |') for line in lines if line.startswith('| config |'))
