"""A wheel and an editable install, each in a fresh environment that shares the heavy packages, used through mim."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
from mmengine.config import Config

REPOSITORY = Path(__file__).parent.parent
CONFIG = 'cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py'
# Prints the backend that Slide Attention takes.
CHOICE = """
import torch
from mmslide.ops.backends import choose_backend
print('backend:', choose_backend(torch.empty(1, 4, 4, 2, 32), torch.empty(32, 9, 3, 3)))
"""
ZOO_CONFIG = 'slide-pvt-t_fpn_8xb4-40k_ade20k-512x512.py'

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
    left_out = shutil.ignore_patterns('.*', '*.so', '__pycache__', 'build', 'data', 'work_dirs', '*.egg-info')
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


def test_wheel(checkout, python, data, tmp_path):
    """Train, test, count, check, search and download."""
    wheels, folder = tmp_path / 'wheels', tmp_path / 'folder'
    build = ['-m', 'pip', 'wheel', '--no-build-isolation', '--no-deps', '--no-index', '-w', wheels, '.']
    run(sys.executable, *build, cwd=checkout)
    (wheel,) = wheels.iterdir()
    assert not [name for name in ZipFile(wheel).namelist() if 'docs/' in name or name.endswith(('.png', '.ipynb'))]
    install(python, wheel, cwd=tmp_path)
    shutil.rmtree(checkout)
    where = run(python, '-c', 'import mmslide; print(mmslide.__file__)', cwd=tmp_path)
    assert str(tmp_path / 'environment') in where
    assert 'backend: native' in run(python, '-c', CHOICE, cwd=tmp_path)
    installed = Path(where.strip().splitlines()[-1]).parent / '.mim'
    assert not (installed / 'tools/setup_env.sh').exists()
    assert (installed / 'tools/dist_train.sh').exists()
    mim, options = train(python, data, folder, CONFIG)
    checkpoint = ['--checkpoint', 'work/epoch_1.pth', '--work-dir', 'test']
    test_config = installed / 'configs/mini' / CONFIG
    output = run(*mim, 'test', 'mmslide', test_config, *checkpoint, *options, cwd=folder)
    assert 'Testing finished successfully' in output
    zoo_config = installed / 'configs/slide_pvt' / ZOO_CONFIG
    assert 'multiply-adds' in run(*mim, 'run', 'mmslide', 'get_flops', zoo_config, '--shape', 64, 64, cwd=folder)
    assert 'Slide Attention on cpu' in run(*mim, 'run', 'mmslide', 'doctor', '--json', cwd=folder)
    output = run(*mim, 'search', 'mmslide', '--model', 'Slide-PVT', cwd=folder)
    assert ZOO_CONFIG[:-3] in output
    assert 'none yet; mim download delivers the config alone' in output
    run(*mim, 'download', 'mmslide', '--config', ZOO_CONFIG[:-3], '--dest', 'downloaded', cwd=folder)
    (config,) = (folder / 'downloaded').iterdir()
    assert config.name == ZOO_CONFIG
    ours = REPOSITORY / 'configs/slide_pvt' / ZOO_CONFIG
    assert Config.fromfile(config).to_dict() == Config.fromfile(ours).to_dict()


def test_install_without_a_compiler(checkout, python, tmp_path):
    env = {**os.environ, 'CC': 'false', 'CXX': 'false'}
    install(python, '.', cwd=checkout, env=env)
    assert 'backend: tapwise' in run(python, '-c', CHOICE, cwd=tmp_path)


@pytest.mark.exhaustive
def test_editable_install(checkout, python, data, tmp_path):
    install(python, '-e', checkout, cwd=tmp_path)
    where = run(python, '-c', 'import mmslide; print(mmslide.__file__)', cwd=tmp_path)
    assert str(checkout / 'mmslide') in where
    assert 'backend: native' in run(python, '-c', CHOICE, cwd=tmp_path)
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
