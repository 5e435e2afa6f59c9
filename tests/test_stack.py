"""The package among the others: versions, registries, one framework alone."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import mmcv
import pytest
import torch
from helpers import NEEDS_MODERN
from mmengine.config import Config
from mmengine.registry import DefaultScope

import mmslide
from mmslide import stack


@pytest.mark.parametrize(
    ('version', 'message'),
    [
        ('1.7.1', r'mmcv >=2\.0\.0,<3, but mmcv 1\.7\.1 is installed\. Run: mim install .*"mmcv>=2\.0\.0,<2\.2\.0"$'),
        ('2.0.0rc4', r'mmcv 2\.0\.0rc4 is installed'),
        ('3.0.0', r'mmcv 3\.0\.0 is installed'),
    ],
)
def test_incompatible_version(version, message, monkeypatch):
    monkeypatch.setattr(mmcv, '__version__', version)
    with pytest.raises(RuntimeError, match=message):
        stack.check_versions()


def test_missing_package(monkeypatch):
    monkeypatch.setattr(stack, 'find_spec', lambda name: None if name == 'mmcv' else True)
    with pytest.raises(RuntimeError, match='mmslide needs mmcv, which is not installed'):
        stack.check_versions()


def test_package_without_version(monkeypatch):
    monkeypatch.delattr(mmcv, '__version__')
    with pytest.raises(RuntimeError, match='mmcv of unknown version is installed'):
        stack.check_versions()


def test_command_names_the_distribution_instead_of_the_module(monkeypatch):
    mmseg = pytest.importorskip('mmseg')
    monkeypatch.setattr(mmseg, '__version__', '0.30.0')
    with pytest.raises(RuntimeError, match=r'mim install "mmsegmentation>=1\.0,<2"'):
        stack.check_versions()


def test_framework_that_refuses_mmcv(monkeypatch):
    def refuse(name):
        if name == 'mmdet':
            raise AssertionError('MMCV==2.2.0 is used but incompatible.')
        return sys.modules[name]

    monkeypatch.setattr(stack.importlib, 'import_module', refuse)
    with pytest.raises(
        RuntimeError,
        match=r'mmdet is incompatible with other packages: MMCV==2\.2\.0.*mim install .*"mmcv>=2\.0\.0,<2\.2\.0"$',
    ):
        stack.check_versions()


BUILD = """
import sys
sys.path += [{packages!r}, {repository!r}]
from mmengine.registry import DefaultScope
from {framework}.registry import MODELS
if {absent!r} in sys.modules: sys.exit('the other framework was imported')
arch = dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1))
with DefaultScope.overwrite_default_scope({framework!r}):
    assert 'mmslide' not in sys.modules
    backbone = MODELS.build(dict(type='mmslide.SlidePVT', arch=arch, out_indices=(0, 1)))
assert type(backbone).__module__ == 'mmslide.models.slide_pvt'
import torch
assert len(backbone(torch.randn(1, 3, 32, 32))) == 2
"""


@pytest.mark.slow
@pytest.mark.parametrize(('framework', 'absent'), [('mmdet', 'mmseg'), ('mmseg', 'mmdet')])
def test_one_framework_alone(framework, absent, tmp_path):
    pytest.importorskip(framework)
    installed = Path(sysconfig.get_paths()['purelib'])
    packages = tmp_path / 'packages'
    packages.mkdir()
    for path in installed.iterdir():
        # Nor torchvision: PyPI's, beside a CPU build of torch, can be imported after mmslide only.
        if not path.name.startswith((absent, 'mmslide', '__editable__', 'torchvision')) and path.suffix != '.pth':
            (packages / path.name).symlink_to(path)
    repository = str(Path(mmslide.__file__).parent.parent)
    script = BUILD.format(packages=str(packages), repository=repository, framework=framework, absent=absent)
    # -S keeps the interpreter from adding the real site-packages.
    subprocess.run([sys.executable, '-S', '-c', script], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    'custom_imports', ['', "custom_imports = dict(imports=['mmslide'], allow_failed_imports=False)"]
)
def test_backbone_in_a_custom_config(custom_imports, tmp_path):
    pytest.importorskip('mmdet')
    from mmdet.registry import MODELS

    path = tmp_path / 'config.py'
    path.write_text(f"{custom_imports}\nmodel = dict(type='mmslide.SlideSwin', arch='tiny', slide_stages=(0,))\n")
    with DefaultScope.overwrite_default_scope('mmdet'):
        backbone = MODELS.build(Config.fromfile(path).model)
    assert isinstance(backbone, mmslide.models.SlideSwin)


@NEEDS_MODERN
def test_torch_loads_weights_only_by_default():
    """What the loader relies on: without a word, torch.load refuses to run anything."""
    import inspect

    assert inspect.signature(torch.load).parameters['weights_only'].default in (None, True)
