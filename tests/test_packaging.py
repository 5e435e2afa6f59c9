"""A wheel and an editable install, each in a fresh environment that shares the heavy packages, used through mim."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from mmengine.config import Config

from mmslide.version import __version__

REPOSITORY = Path(__file__).parent.parent
CONFIG = 'cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py'
# Prints the backend that Slide Attention takes.
CHOICE = """
import torch
from mmslide.ops.backends import choose_backend
print('backend:', choose_backend(torch.empty(1, 4, 4, 2, 32), torch.empty(32, 9, 3, 3)))
"""
ZOO_CONFIG = 'slide-pvt-t_fpn_8xb4-40k_ade20k-512x512.py'

# What mmengine's hub makes of the installed package.
HUB = f"""
import mmslide
from mmengine.hub import get_config, get_model
config = get_config('mmslide::slide_pvt/{ZOO_CONFIG}')
print(config.filename, type(get_model('mmslide::mini/{CONFIG}').backbone).__name__)
"""

BASE = """
from mmengine.hub import get_config
print('epochs:', get_config('mmslide::_base_/schedules/pvt_1x.py').train_cfg.max_epochs)
"""

ONEDL_MIM = any(x.name == 'onedl-mim' for x in distributions())

pytestmark = pytest.mark.slow


def run(*command, cwd, env=None):
    result = subprocess.run([str(x) for x in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return result.stdout + result.stderr


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    script = REPOSITORY / 'tools/make_mini_dataset.py'
    run(sys.executable, script, 'mini', '--num-train', 4, '--num-val', 2, '--size', 64, cwd=folder)
    return folder / 'mini/coco'


@pytest.fixture
def checkout(tmp_path):
    """What a user has after cloning."""
    folder = tmp_path / 'checkout'
    left_out = shutil.ignore_patterns('.*', '*.so', '__pycache__', 'build', 'data', 'work_dirs', '*.egg-info', 'dist')
    shutil.copytree(REPOSITORY, folder, ignore=left_out)
    return folder


@pytest.fixture
def python(tmp_path):
    """The interpreter of a new environment that sees this one's packages, but not its own mmslide first."""
    folder = tmp_path / 'environment'
    venv.create(folder, with_pip=False, symlinks=True)
    paths = sysconfig.get_paths(vars=dict(base=str(folder), platbase=str(folder)))
    Path(paths['purelib'], 'shared.pth').write_text(sysconfig.get_paths()['purelib'] + '\n')
    return folder / 'bin/python'


def install(python, *what, cwd, env=None):
    run(python, '-m', 'pip', 'install', '--no-build-isolation', '--no-deps', '--no-index', *what, cwd=cwd, env=env)


def train(python, data, folder, config):
    """Trains through mim, from a folder that knows nothing of the checkout; the command, and the data's options."""
    folder.mkdir()
    options = ['--cfg-options', f'data_root={data}', 'train_cfg.max_epochs=1', 'train_dataloader.batch_size=2']
    mim = [python, '-m', 'mim']
    output = run(*mim, 'train', 'mmslide', config, '--work-dir', 'work', *options, cwd=folder)
    assert 'Training finished successfully' in output
    return mim, options[:2]


@pytest.mark.skipif(ONEDL_MIM, reason="onedl-mim takes a wheel's .dist-info for the package")
def test_wheel(checkout, python, data, tmp_path):
    """Train, test, draw, count, check, search and download."""
    wheels, folder = tmp_path / 'wheels', tmp_path / 'folder'
    build = ['-m', 'pip', 'wheel', '--no-build-isolation', '--no-deps', '--no-index', '-w', wheels, '.']
    run(sys.executable, *build, cwd=checkout)
    (wheel,) = wheels.iterdir()
    assert '-py3-none-' in wheel.name
    assert not [name for name in ZipFile(wheel).namelist() if 'docs/' in name or name.endswith(('.png', '.ipynb'))]
    install(python, wheel, cwd=tmp_path)
    shutil.rmtree(checkout)
    where = run(python, '-c', 'import mmslide; print(mmslide.__file__)', cwd=tmp_path)
    assert str(tmp_path / 'environment') in where
    output = run(python, '-c', CHOICE + HUB, cwd=tmp_path)
    assert 'backend: native' in output
    installed = Path(where.strip().splitlines()[-1]).parent / '.mim'
    assert not [name for name in ('setup_env.sh', 'benchmark.py') if (installed / 'tools' / name).exists()]
    assert (installed / 'tools/dist_train.sh').exists()
    assert f'{installed}/configs/slide_pvt/{ZOO_CONFIG} SlidePVT' in output
    mine = tmp_path / 'mine.py'
    mine.write_text(f"_base_ = 'mmslide::mini/{CONFIG}'\nrandomness = dict(seed=1)\n")
    mim, options = train(python, data, folder, mine)
    checkpoint = ['--checkpoint', 'work/epoch_1.pth', '--work-dir', 'test']
    test_config = installed / 'configs/mini' / CONFIG
    output = run(*mim, 'test', 'mmslide', test_config, *checkpoint, *options, cwd=folder)
    assert 'Testing finished successfully' in output
    prediction = [mine, 'work/epoch_1.pth', data / 'val2017', '--out', 'found']
    assert 'found is written' in run(*mim, 'run', 'mmslide', 'predict', *prediction, cwd=folder)
    assert len(list((folder / 'found/drawn').iterdir())) == 2
    visualize = [*mim, 'run', 'mmslide', 'visualize', test_config, 'work/epoch_1.pth']
    assert 'drawn/kernels.png' in run(*visualize, '--out', 'drawn', '--stages', 0, cwd=folder)
    zoo_config = installed / 'configs/slide_pvt' / ZOO_CONFIG
    assert 'multiply-adds' in run(*mim, 'run', 'mmslide', 'get_flops', zoo_config, '--shape', 64, 64, cwd=folder)
    assert 'Slide Attention on cpu' in run(*mim, 'run', 'mmslide', 'doctor', '--json', cwd=folder)
    assert 'https://arxiv.org/abs/2304.04237' in run(*mim, 'list', cwd=folder)
    output = run(*mim, 'search', 'mmslide', '--model', 'Slide-PVT', cwd=folder)
    assert ZOO_CONFIG[:-3] in output
    assert 'none: mim download fetches only the config' in output
    run(*mim, 'download', 'mmslide', '--config', ZOO_CONFIG[:-3], '--dest', 'downloaded', cwd=folder)
    (config,) = (folder / 'downloaded').iterdir()
    assert config.name == ZOO_CONFIG
    ours = REPOSITORY / 'configs/slide_pvt' / ZOO_CONFIG
    assert Config.fromfile(config).to_dict() == Config.fromfile(ours).to_dict()


@pytest.mark.exhaustive
def test_release(checkout, tmp_path):
    """What is uploaded: the sdist holds everything, its tests and documentation too, and the wheel is built from it."""
    dist = tmp_path / 'dist'
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', dist, cwd=checkout)
    sdist, wheel = sorted(dist.iterdir(), key=lambda path: path.suffix)
    assert run(sys.executable, '-m', 'twine', 'check', '--strict', sdist, wheel, cwd=tmp_path).count('PASSED') == 2
    shutil.unpack_archive(sdist, tmp_path, filter='data')
    unpacked = tmp_path / f'mmslide-{__version__}'
    given = [path.relative_to(checkout) for path in checkout.rglob('[!.]*') if path.is_file()]
    assert not [path for path in given if not (unpacked / path).exists()]
    fast = ['-q', 'tests/test_files.py', 'tests/test_unpickler.py', 'tests/test_cswin.py']
    assert ' passed' in run(sys.executable, '-m', 'pytest', *fast, cwd=unpacked)


def test_the_citation_names_the_release():
    citation = yaml.safe_load((REPOSITORY / 'CITATION.cff').read_text())
    assert citation['version'] == __version__
    assert f'## {__version__} - {citation["date-released"]}' in (REPOSITORY / 'CHANGELOG.md').read_text()


def test_install_without_a_compiler(checkout, python, tmp_path):
    env = {**os.environ, 'CC': 'false', 'CXX': 'false'}
    install(python, '.', cwd=checkout, env=env)
    assert 'backend: tapwise' in run(python, '-c', CHOICE, cwd=tmp_path)


@pytest.mark.exhaustive
def test_editable_install(checkout, python, data, tmp_path):
    install(python, '-e', checkout, cwd=tmp_path)
    where = run(python, '-c', 'import mmslide; print(mmslide.__file__)', cwd=tmp_path)
    assert str(checkout / 'mmslide') in where
    output = run(python, '-c', CHOICE + BASE, cwd=tmp_path)
    assert 'backend: native' in output
    assert 'epochs: 12' in output
    # An edited config is the one that runs.
    config = checkout / 'configs/mini' / CONFIG
    config.write_text(config.read_text() + "\nexperiment_name = 'edited'\n")
    mim, _ = train(python, data, tmp_path / 'folder', config)
    bare = run(*mim, 'run', 'mmslide', 'get_flops', ZOO_CONFIG, '--shape', 64, 64, cwd=tmp_path / 'folder')
    assert 'multiply-adds' in bare
    assert 'edited' in (tmp_path / 'folder/work' / CONFIG).read_text()
    listed = run(python, '-m', 'pip', 'uninstall', '-y', 'mmslide', cwd=tmp_path)
    assert 'Successfully uninstalled' in listed
    installed = tmp_path / 'environment'
    assert not [
        path for path in installed.rglob('*') if path.is_file() and 'mmslide' in str(path.relative_to(installed))
    ]
