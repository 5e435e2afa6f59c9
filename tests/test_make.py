"""The Makefile's stacks, the errors of tools/setup_env.sh, and the lists of requirements."""

import os
import shutil
from pathlib import Path

import pytest
from helpers import TOOLS, run
from packaging.requirements import Requirement

from mmslide.version import PYTHON

REPOSITORY = Path(__file__).parents[1]
# On one side only: what has to be there first, and pins of what others depend on.
ELSEWHERE = {'torch', 'torchvision', 'numpy', 'setuptools', 'wheel', 'ninja'}
ELSEWHERE |= {'openxlab', 'opencv-python', 'pycocotools', 'pillow', 'mkdocstrings-python'}

# The virtual environment's Python where torch sees a GPU, but no nvcc, and nothing can be downloaded.
PYTHON_WITHOUT_NVCC = """#!/bin/sh
case $* in
    *download*) exit 1 ;;
    -) printf 'torch2.1.2-cu12.1-cp311-linux_x86_64\\ncu121/torch2.1.0\\n12.1\\n' ;;
esac
"""


@pytest.mark.parametrize(
    ('stack', 'message'),
    [
        ('official', 'make ... STACK=classic (torch 2.1.2+cu121, '),
        (
            'classic',
            'could not be downloaded from https://download.openmmlab.com/mmcv/dist/cu121/torch2.1.0/index.html',
        ),
    ],
)
def test_gpu_without_nvcc(stack, message, tmp_path):
    python = tmp_path / 'venv/bin/python'
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON_WITHOUT_NVCC)
    python.chmod(0o755)
    env = {**os.environ, 'PYTHON': str(python), 'XDG_CACHE_HOME': str(tmp_path / 'cache')}
    status, text = run('bash', TOOLS / 'setup_env.sh', tmp_path / 'venv', stack, check=False, env=env)
    assert status == 1
    assert message in text
    assert ('STACK=classic' in text) == (stack != 'classic')


@pytest.mark.skipif(shutil.which('make') is None, reason='needs make')
def test_stacks():
    def make(*arguments, check=True):
        env = {**os.environ, 'MAKEFLAGS': ''}  # of the `make test` that runs this
        return run('make', '--dry-run', *arguments, check=check, cwd=REPOSITORY, env=env)

    status, text = make('setup', 'STACK=clasic', check=False)
    assert status == 2
    assert 'STACK must be official, classic or onedl, got clasic' in text
    assert '--work-dir work_dirs/demo --resume' in make('demo')
    assert '--work-dir work_dirs/demo-classic --resume' in make('demo', 'STACK=classic')
    assert '--work-dir work_dirs/demo-seg-onedl --resume' in make('demo-seg', 'STACK=onedl')


@pytest.mark.parametrize(('extra', 'files'), [('run', ['official']), ('develop', ['official', 'official-develop'])])
def test_extras_name_what_the_official_stack_installs(extra, files):
    tomllib = pytest.importorskip('tomllib')
    project = tomllib.loads((REPOSITORY / 'pyproject.toml').read_text())['project']
    assert project['requires-python'] == f'>={PYTHON}'

    def expand(name):
        for requirement in map(Requirement, project['optional-dependencies'][name]):
            if requirement.name == 'mmslide':
                for other in requirement.extras:
                    yield from expand(other)
            else:
                yield requirement.name

    lines = [line for file in files for line in (REPOSITORY / f'requirements/{file}.txt').read_text().splitlines()]
    pinned = {Requirement(line).name for line in lines if line and not line.startswith('#')}
    assert (pinned ^ set(expand(extra))) - ELSEWHERE == set()
