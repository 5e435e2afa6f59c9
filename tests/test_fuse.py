import copy
from unittest import mock

import pytest
import torch
from helpers import NEEDS_MODERN, randomize, relative_error
from mmcv.cnn.bricks import DropPath
from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint
from test_slide_attention import two_paths
from torch import nn

from mmslide.build import build_model
from mmslide.checkpoints import read_checkpoint
from mmslide.deploy import fuse, fuse_checkpoint, load_model
from mmslide.models import SlidePVT, SlideSwin, TwinsPCPVT, TwinsSVT, slide_pvt, slide_swin, twins
from mmslide.models.attention import SlideAttention
from mmslide.weights import load_pretrained
from mmslide.weights.layouts import from_mmslide

SMALL = dict(embed_dims=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4), mlp_ratios=2)
SMALL_PVT = dict(SMALL, sr_ratios=(8, 4, 2, 1))
ARCHS = [(cls, name) for cls, table in ((SlidePVT, slide_pvt), (SlideSwin, slide_swin)) for name in table.VARIANTS]
ARCHS += [(TwinsSVT, name) for name in twins.SVT_VARIANTS]
TABLES = {SlidePVT: slide_pvt.VARIANTS, SlideSwin: slide_swin.VARIANTS, TwinsSVT: twins.SVT_VARIANTS}

EVERY = pytest.mark.parametrize('cls', [SlidePVT, SlideSwin, TwinsSVT])


def small(cls, **kwargs):
    if cls is TwinsSVT:
        kwargs.setdefault('slide_stages', (0, 1))
    return cls(arch=SMALL if cls is SlideSwin else SMALL_PVT, **kwargs)


def outputs(model, image):
    with torch.no_grad():
        return model.eval()(image)


def reference(model, image):
    """The output in float64, the paths of every Slide Attention taken one by one."""
    with mock.patch.object(SlideAttention, 'forward', two_paths):
        return outputs(copy.deepcopy(model).double(), image.double())


def error(model, image, wanted):
    outs = outputs(model, image)
    return max(relative_error(out, reference) for out, reference in zip(outs, wanted, strict=True))


def slides(model):
    return [module for module in model.modules() if isinstance(module, SlideAttention)]


@pytest.mark.parametrize(('cls', 'arch'), ARCHS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_every_arch_computes_the_same_with_one_path(cls, arch):
    row = dict(TABLES[cls][arch])
    row['depths'] = [-(-depth // 4) for depth in row['depths']]
    model = randomize(cls(row, **(dict(slide_stages=(0, 1, 2)) if cls is TwinsSVT else {})))
    image = torch.randn(1, 3, 65, 96)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse(model)
    assert error(fused, image, reference(model, image)) < 1e-5

    names = {name.rpartition('.')[2] for name, _ in fused.named_parameters()}
    assert not names & {'shift_bias', 'deform_weight', 'deform_bias'}
    assert not [m for m in fused.modules() if isinstance(m, DropPath | nn.Dropout) or hasattr(m, 'shift')]
    # The original is untouched, in training too.
    assert model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m for m in model.modules() if isinstance(m, DropPath)]


def leave_out(term, fused, source):
    """What a wrong fusion would make of one module."""
    weight, bias, rpb = fused.fused_weight, fused.fused_bias, fused.relative_position_bias
    with torch.no_grad():
        if term == 'shift':
            weight -= source.shift
        elif term == 'deform_weight':
            weight -= source.deform_weight
        elif term in ('shift_bias', 'deform_bias'):
            bias -= getattr(source, term)
        elif term == 'relative_position_bias':
            rpb.zero_()
        else:  # the position bias in the bias that heads, keys and values share
            bias += rpb.mean(0)
            rpb.zero_()


TERMS = ['shift', 'deform_weight', 'shift_bias', 'deform_bias', 'relative_position_bias', 'shared position bias']


@EVERY
@pytest.mark.parametrize('term', TERMS)
def test_leaving_out_any_one_term_shows(cls, term):
    model = randomize(small(cls))
    image = torch.randn(1, 3, 64, 64)
    wanted = reference(model, image)
    fused = fuse(model)
    assert error(fused, image, wanted) < 1e-5
    for module, source in zip(slides(fused), slides(model), strict=True):
        leave_out(term, module, source)
    assert error(fused, image, wanted) > 1e-3


@EVERY
def test_fusing_twice_changes_nothing(cls):
    once = fuse(randomize(small(cls)))
    twice = fuse(once)
    assert twice is not once
    assert str(twice) == str(once)
    assert twice.state_dict().keys() == once.state_dict().keys()
    assert all(torch.equal(value, once.state_dict()[key]) for key, value in twice.state_dict().items())


@pytest.mark.parametrize('dtype', [pytest.param(torch.float16, marks=NEEDS_MODERN), torch.bfloat16])
@pytest.mark.parametrize('order', ['half first', 'fused first'])
def test_merged_kernels_stay_float32_in_a_half_precision_model(dtype, order):
    model = small(SlideSwin)
    for module in slides(model):
        nn.init.constant_(module.deform_weight, 2.0**-12)  # 1 + 2⁻¹² is 1 in half precision
    fused = fuse(copy.deepcopy(model).to(dtype)) if order == 'half first' else fuse(model).to(dtype)
    for module in slides(fused):
        assert module.fused_weight.dtype == module.fused_bias.dtype == torch.float32
        assert torch.equal(module.fused_weight - module.fused_weight.round(), torch.full((16, 9, 3, 3), 2.0**-12))
        assert module.qkv.weight.dtype == module.relative_position_bias.dtype == dtype
    assert outputs(fused, torch.randn(1, 3, 32, 32).to(dtype))[0].dtype == dtype
    assert {module.fused_weight.dtype for module in slides(fused.double())} == {torch.float64}


@pytest.mark.parametrize('dtype', [pytest.param(torch.float16, marks=NEEDS_MODERN), torch.bfloat16])
def test_half_precision_gives_the_numbers_of_the_training_form(dtype):
    model = randomize(small(SlidePVT)).to(dtype)
    image = torch.randn(1, 3, 64, 64).to(dtype)
    for out, wanted in zip(outputs(fuse(model), image), outputs(model, image), strict=True):
        assert torch.equal(out, wanted)


def test_whole_models_and_wrappers():
    mmseg = pytest.importorskip('mmseg.models')
    head = dict(
        type='mmseg.FCNHead', in_channels=128, in_index=3, channels=8, num_convs=1, num_classes=4, concat_input=False
    )
    backbone = dict(type='mmslide.SlideSwin', arch=SMALL)
    model = randomize(mmseg.EncoderDecoder(backbone=backbone, decode_head=head)).eval()
    image = torch.randn(1, 3, 64, 64)
    wrapped = nn.parallel.DataParallel(model)
    for fused in (fuse(model), fuse(wrapped)):
        assert type(fused) is type(model)
        assert [m.deploy for m in slides(fused)] == [True] * 3
        with torch.no_grad():
            assert relative_error(fused(image), model(image)) < 1e-6
        assert fused.decode_head.dropout.p == model.decode_head.dropout.p
    assert not any(m.deploy for m in slides(wrapped))

    with pytest.raises(ValueError, match='only a model with a backbone of mmslide can be fused, got Linear'):
        fuse(nn.Linear(2, 2))


@pytest.mark.parametrize('cls', [SlidePVT, SlideSwin, TwinsSVT, TwinsPCPVT])
def test_deploy_in_a_config_builds_the_fused_form(cls):
    model = randomize(small(cls, drop_path_rate=0.3, drop_rate=0.1))
    fused, built = fuse(model), small(cls, deploy=True, drop_path_rate=0.3, drop_rate=0.1)
    assert str(built) == str(fused)
    built.load_state_dict(fused.state_dict())
    image = torch.randn(1, 3, 64, 96)
    for out, wanted in zip(built.train()(image), outputs(model, image), strict=True):
        assert relative_error(out, wanted) < 1e-5


@pytest.mark.parametrize('cls', [SlidePVT, SlideSwin, TwinsSVT, TwinsPCPVT])
def test_the_fused_form_drops_nothing_in_training_mode(cls):
    model = randomize(small(cls, drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.3))
    image = torch.randn(1, 3, 64, 96)
    for out, wanted in zip(fuse(model).train()(image), outputs(model, image), strict=True):
        assert relative_error(out, wanted) < 1e-5


def test_a_fused_module_drops_no_attention_in_training_mode():
    module, x = randomize(SlideAttention(16, 2, attn_drop_rate=0.5)), torch.randn(1, 5, 6, 16)
    assert relative_error(fuse(module).train()(x), module.eval()(x)) < 1e-5


def load_by_torch(model, path):
    model.load_state_dict(read_checkpoint(path)['state_dict'])


def load_by_mmengine(model, path):
    load_checkpoint(model, path)  # not strict, and logs what does not fit


WAYS = pytest.mark.parametrize('load', [load_by_torch, load_by_mmengine, load_pretrained])


@EVERY
@WAYS
def test_a_training_checkpoint_is_fused_while_it_loads(cls, load, log, tmp_path, capsys):
    model = randomize(small(cls))
    path = str(tmp_path / 'trained.pth')
    torch.save(dict(state_dict=model.state_dict()), path)
    built = small(cls, deploy=True)
    load(built, path)
    image = torch.randn(1, 3, 64, 64)
    assert error(built, image, reference(model, image)) < 1e-5
    told = log.text + capsys.readouterr().out
    assert 'missing' not in told
    assert 'unexpected' not in told


@EVERY
@WAYS
def test_a_fused_checkpoint_is_refused_by_a_model_in_training_form(cls, load, tmp_path):
    path = str(tmp_path / 'fused.pth')
    torch.save(dict(state_dict=fuse(randomize(small(cls))).state_dict()), path)
    model = small(cls)
    with pytest.raises(ValueError, match=r'fused for inference \(there is .*fused_weight\).*build it with deploy=True'):
        load(model, path)


@WAYS
def test_a_fused_checkpoint_loads_into_a_deploy_model(load, tmp_path):
    fused = fuse(randomize(small(SlideSwin)))
    path = str(tmp_path / 'fused.pth')
    torch.save(dict(state_dict=fused.state_dict()), path)
    built = small(SlideSwin, deploy=True)
    load(built, path)
    assert all(torch.equal(value, fused.state_dict()[key]) for key, value in built.state_dict().items())


def test_weights_of_a_host_leave_the_plain_shift(tmp_path):
    """Started from weights without Slide Attention, either form is plain local attention."""
    host = randomize(SlideSwin(SMALL, slide_stages=()))
    path = str(tmp_path / 'host.pth')
    torch.save(host.state_dict(), path)
    models = [SlideSwin(SMALL), SlideSwin(SMALL, deploy=True)]
    for model in models:
        load_pretrained(model, path)
    image = torch.randn(1, 3, 64, 64)
    for out, wanted in zip(*(outputs(model, image) for model in models), strict=True):
        assert torch.equal(out, wanted)


def test_other_layouts_have_no_place_for_fused_weights():
    state = fuse(small(TwinsSVT)).state_dict()
    with pytest.raises(ValueError, match=r'does not support Slide Attention, got .*fused_weight'):
        from_mmslide(state, 'authors')


SEGMENTOR = f"""
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='mmslide.SlidePVT', arch={SMALL_PVT}, init_cfg=dict(type='Pretrained', checkpoint='x.pth')),
    decode_head=dict(type='FCNHead', in_channels=128, in_index=3, channels=8, num_convs=1, num_classes=4),
)
"""


@pytest.fixture
def trained(tmp_path):
    """A config file and a checkpoint of its model."""
    pytest.importorskip('mmseg.models')
    config, checkpoint = tmp_path / 'my.py', tmp_path / 'w.pth'
    config.write_text(SEGMENTOR)
    state = randomize(build_model(Config.fromfile(config))).state_dict()
    torch.save(dict(meta=None, state_dict=state), checkpoint)
    return config, checkpoint


def test_fuse_checkpoint_writes_both_files_again_and_again(trained, tmp_path):
    for _ in range(2):
        assert fuse_checkpoint(*trained, tmp_path / 'fused.pth') == tmp_path / 'fused.py'
    config, model, meta = load_model(tmp_path / 'fused.py', tmp_path / 'fused.pth')
    assert config.model.backbone.init_cfg is None
    assert meta['fused'] is True
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(model(image), load_model(*trained)[1](image)) < 1e-6


@pytest.mark.parametrize(
    ('out', 'message'),
    [
        ('w.pth', 'would overwrite the input'),
        ('my.pth', r'my\.py exists and is not the config of a fused checkpoint'),
        ('my.py', r'my\.py exists and is not the config of a fused checkpoint'),
        ('other.pth', r'other\.py exists and is not the config of a fused checkpoint'),
        ('new.py', 'must have different names'),
        ('none/new.pth', 'the folder of .*new.pth does not exist'),
        ('new.safetensors', r'name it NAME\.pth, not .*new\.safetensors'),
    ],
)
def test_fuse_checkpoint_replaces_neither_inputs_nor_strangers_files(out, message, trained, tmp_path):
    (tmp_path / 'other.py').write_text('my work')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        fuse_checkpoint(*trained, tmp_path / out)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize('what', ['nan', 'flipped', 'mmslide.SlideSwin'])
def test_fuse_checkpoint_refuses_what_is_broken_or_does_not_fit(what, trained, tmp_path):
    config, checkpoint = trained
    message = 'does not fit .*keys missing'
    if what == 'nan':
        content = read_checkpoint(checkpoint)
        content['state_dict']['backbone.stages.0.embed.norm.bias'][0] = float('nan')
        torch.save(content, checkpoint)
        message = r'NaN or infinite values in 1 of \d+ tensors: backbone\.stages\.0\.embed\.norm\.bias'
    elif what == 'flipped':
        content = bytearray(checkpoint.read_bytes())
        content[len(content) // 2] ^= 1
        checkpoint.write_bytes(content)
        message = 'damaged or incomplete'
    else:
        config.write_text(SEGMENTOR.replace('mmslide.SlidePVT', what).replace(str(SMALL_PVT), str(SMALL)))
    with pytest.raises(ValueError, match=message):
        fuse_checkpoint(config, checkpoint, tmp_path / 'fused.pth')
    assert not (tmp_path / 'fused.pth').exists()
    assert not (tmp_path / 'fused.py').exists()
