import copy
import inspect
import re
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

from mmslide.models import slide_pvt, slide_swin, twins

ROOT = Path(__file__).parents[1]
BASES = sorted((ROOT / 'configs/_base_').rglob('*.py'))
CONFIGS = sorted(set((ROOT / 'configs').rglob('*.py')) - set(BASES))
ZOO = [path for path in CONFIGS if path.parent.name != 'mini']
METAFILES = sorted((ROOT / 'configs').rglob('metafile.yml'))

VARIABLES = {
    *('dataset_type', 'data_root', 'image_scale', 'crop_size', 'meta_keys'),
    *('train_pipeline', 'test_pipeline', 'tta_pipeline', 'short_sides', 'multi_scale_crop'),
    *('max_epochs', 'max_iters', 'warmup_iters', 'pretrained'),
    *('num_classes', 'rpn_nms', 'boxes', 'norm_cfg', 'iou_thresholds', 'target_stds'),
}
KNOWN_KEYS = set(inspect.signature(Runner.__init__).parameters) | {'custom_imports', 'tta_model'} | VARIABLES

# How the files of the hosts' ImageNet weights begin.
PRETRAINED = {
    'mmslide.SlidePVT': 'pvt',
    'mmslide.SlideSwin': 'swin',
    'mmslide.TwinsPCPVT': 'pcpvt',
    'mmslide.TwinsSVT': 'alt_gvt',
}

VARIANTS = {
    'mmslide.SlidePVT': slide_pvt.VARIANTS,
    'mmslide.SlideSwin': slide_swin.VARIANTS,
    'mmslide.TwinsPCPVT': twins.PCPVT_VARIANTS,
    'mmslide.TwinsSVT': twins.SVT_VARIANTS,
}

every_config = pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
zoo_config = pytest.mark.parametrize('path', ZOO, ids=lambda path: path.stem)


@cache
def load(path: Path) -> Config:
    return Config.fromfile(path)


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
    names = [path.name for path in CONFIGS + BASES]
    assert len(set(names)) == len(names)


@every_config
def test_keys(path):
    cfg = load(path)
    unknown = set(cfg.keys()) - KNOWN_KEYS
    if path not in ZOO:
        unknown = {key for key in unknown if 'dict(' in repr(cfg[key]) or '{' in repr(cfg[key])} - {'vis_backends'}
    assert not unknown
    # A `_delete=True` typed for `_delete_=True` would be merged without a word.
    assert not [key for key in inner_keys(cfg.to_dict()) if isinstance(key, str) and key.startswith('_')]
    assert cfg.data_root.endswith('/')


@every_config
def test_everything_builds(path):
    cfg = load(path)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        if 'tta_model' in cfg:
            MODELS.build(dict(cfg.tta_model, module=model))
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
    row = VARIANTS[model.backbone.type][arch] if isinstance(arch, str) else arch
    channels = [row['embed_dims'][index] for index in model.backbone.get('out_indices', range(4))]
    neck = model.get('neck')
    if neck:
        assert neck.in_channels == channels
        assert not {'start_level', 'end_level'} & set(neck)
    else:
        decode, auxiliary = model.decode_head, model.auxiliary_head
        assert dict(zip(decode.in_index, decode.in_channels, strict=True)) == dict(enumerate(channels))
        assert auxiliary.in_channels == channels[auxiliary.in_index]


def kind_of(path):
    model = load(path).model
    return model.type, 'neck' in model, model.backbone.type


@pytest.mark.parametrize(
    'kind',
    # No config here is RetinaNet on Slide-Swin, the one backbone that norms its outputs alone.
    [*sorted({kind_of(path) for path in CONFIGS}), ('RetinaNet', True, 'mmslide.SlideSwin')],
    ids=lambda kind: f'{kind[0]}-{"neck" if kind[1] else "no neck"}-{kind[2]}',
)
def test_every_parameter_gets_a_gradient(kind):
    path = next(path for path in CONFIGS if kind_of(path)[:2] == kind[:2])
    model = copy.deepcopy(load(path).model)
    dims = [16, 32, 64, 128]
    arch = dict(embed_dims=dims, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], mlp_ratios=2)
    if kind[2] != 'mmslide.SlideSwin':
        arch['sr_ratios'] = [8, 4, 2, 1]
    model.backbone = dict(type=kind[2], arch=arch, out_indices=model.backbone.get('out_indices', range(4)))
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
    assert re.search(rf'/{PRETRAINED[backbone.type]}_{backbone.arch}[_.]', backbone.init_cfg.checkpoint)
    host, size = re.search(r'([a-z]+)-(\w)_', path.name).groups()
    assert host in backbone.type.lower()
    assert size == backbone.arch[0]


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


def test_settings():
    """The Slide-Transformer paper gives none: the hosts' settings."""

    def settings(name):
        cfg = load(next(path for path in ZOO if path.stem == name))
        optimizer = cfg.optim_wrapper.optimizer
        return optimizer.lr, optimizer.weight_decay, cfg.model.backbone.drop_path_rate, cfg.optim_wrapper.type

    amp, full = 'AmpOptimWrapper', 'OptimWrapper'
    assert settings('mask-rcnn_slide-pvt-t_fpn_1x_coco') == (2e-4, 1e-4, 0.1, full)
    assert settings('mask-rcnn_slide-pvt-s_fpn_1x_coco') == (2e-4, 1e-4, 0.2, full)
    assert settings('mask-rcnn_slide-pvt-m_fpn_1x_coco') == (2e-4, 1e-4, 0.2, full)
    assert settings('mask-rcnn_slide-swin-t_fpn_ms-crop-3x_coco') == (1e-4, 0.05, 0.2, amp)
    for size, drop_path in dict(t=0.2, s=0.2, b=0.4).items():
        assert settings(f'cascade-mask-rcnn_slide-swin-{size}_fpn_ms-crop-3x_coco') == (1e-4, 0.05, drop_path, amp)
    for size, drop_path in dict(t=0.1, s=0.2, m=0.2).items():
        assert settings(f'retinanet_slide-pvt-{size}_fpn_1x_coco') == (1e-4, 1e-4, drop_path, full)
    for size in 'ts':
        assert settings(f'slide-pvt-{size}_fpn_8xb4-80k_ade20k-512x512') == (1e-4, 1e-4, 0.2, full)
        assert settings(f'slide-swin-{size}_upernet_8xb2-160k_ade20k-512x512') == (6e-5, 0.01, 0.3, full)
    assert settings('slide-swin-t_upernet_8xb2-layer-decay-160k_ade20k-512x512') == (6e-5, 0.01, 0.3, full)
    for model in ('pcpvt-s', 'pcpvt-b', 'pcpvt-l', 'svt-s', 'svt-b', 'svt-l'):
        assert settings(f'mask-rcnn_twins-{model}_fpn_1x_coco') == (2e-4, 1e-4, 0.2, full)
        assert settings(f'mask-rcnn_twins-{model}_fpn_ms-crop-3x_coco') == (1e-4, 0.05, 0.2, amp)
        assert settings(f'retinanet_twins-{model}_fpn_1x_coco') == (1e-4, 1e-4, 0.2, full)
        assert settings(f'retinanet_twins-{model}_fpn_ms-crop-3x_coco') == (1e-4, 0.05, 0.2, amp)
        drop_path = 0.3 if model == 'svt-l' else 0.2
        assert settings(f'twins-{model}_fpn_8xb4-80k_ade20k-512x512') == (1e-4, 1e-4, drop_path, full)
        assert settings(f'twins-{model}_upernet_8xb2-160k_ade20k-512x512') == (6e-5, 0.01, drop_path, full)


@pytest.mark.parametrize('path', [path for path in ZOO if path.name.find('slide-') >= 0], ids=lambda path: path.stem)
def test_host_differs_in_its_attention_alone(path):
    host = load(host_of(path)).to_dict()
    assert host['model']['backbone'].pop('slide_stages') == ()
    assert host == load(path).to_dict()


@pytest.mark.parametrize(
    'path', [path for path in ZOO if 'paramwise_cfg' in load(path).optim_wrapper], ids=lambda path: path.stem
)
def test_weight_decay(path):
    cfg = load(path)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
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
    depths = [len(stage.blocks) for stage in model.backbone.stages]
    host = cfg.model.backbone.type
    layers = {
        'mmslide.SlideSwin': 2 * sum(depths) + 1 + 3 + 4,  # blocks, patch embedding, mergings, outputs
        'mmslide.TwinsPCPVT': 2 * sum(depths) + 4 + sum(depths[:3]),  # blocks, patch embeddings, subsampled keys
        'mmslide.TwinsSVT': 2 * sum(depths) + 4 + sum(depth // 2 for depth in depths[:3]) + 4,  # and stages
    }
    assert len(norms) == 2 * layers[host]
    peg = {name for name in names.values() if '.peg.' in name}
    assert len(peg) == (0 if host == 'mmslide.SlideSwin' else 2 * 4)
    table = {name for name in names.values() if name.endswith('.relative_position_bias_table')}
    slide = {name for name in names.values() if name.endswith('.relative_position_bias')}
    slides = 'slide-' in path.name
    assert len(slide) == (depths[0] + depths[1] if slides else 0)
    assert len(table) == (sum(depths) - len(slide) if host == 'mmslide.SlideSwin' else 0)
    assert {name for name, value in decay.items() if value == 0} == norms | table | slide | peg


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
    assert set(listed) == set(ZOO)


@pytest.mark.filterwarnings('ignore')
def test_mim_reads_the_model_index(capsys):
    search = pytest.importorskip('mim.commands.search')
    frame = search.convert2df(search.load(str(ROOT / 'model-index.yml')))
    assert set(frame.index) == {path.stem for path in ZOO}
    assert frame.loc['mask-rcnn_slide-pvt-t_fpn_1x_coco', 'parameters(M)'] == pytest.approx(32, abs=0.6)
    assert not [column for column in frame.columns if 'coco/' in column or 'ade20k/' in column]
    (weight,) = set(frame['weight'])
    assert weight.startswith('none yet')
    assert weight.endswith('/')  # which mim download fetches nothing for
    assert ',' not in weight  # where it would split
    search.print_df(frame, 80)
    assert 'config' in capsys.readouterr().out


@pytest.mark.parametrize('metafile', METAFILES, ids=lambda path: path.parent.name)
def test_readme_links_to_every_config(metafile):
    links = re.findall(r'\]\(([^)]+\.py)\)', (metafile.parent / 'README.md').read_text())
    assert sorted(links) == sorted(path.name for path in ZOO if path.parent == metafile.parent)
