"""What `python -m mmslide.doctor` reports for this machine and for broken installations."""

import json
import os
import sys

import mmcv
import pytest
import torch
from helpers import TOOLS, run

from mmslide import doctor
from mmslide.ops import backends

WAYS = {'module': [sys.executable, '-m', 'mmslide.doctor'], 'tool': [sys.executable, TOOLS / 'doctor.py']}


def rows():
    return {row.name: row for row in doctor.examine()}


@pytest.fixture
def fail(monkeypatch):
    """Makes the import of a module raise."""
    imported = doctor.importlib.import_module
    errors = {}

    def import_module(name):
        if name in errors:
            raise errors[name]
        return imported(name)

    monkeypatch.setattr(doctor.importlib, 'import_module', import_module)
    return errors.__setitem__


def doctor_with(packages, *arguments, way='module'):
    """Exit status and output where other packages come first in the path: names and sources."""
    folder, sources = packages
    for name, source in sources.items():
        (folder / name).mkdir()
        (folder / name / '__init__.py').write_text(source)
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')])}
    env.pop('PYTHONUNBUFFERED', None)
    return run(*WAYS[way], *arguments, check=False, env=env)


def test_this_machine():
    found = rows()
    assert [row for row in found.values() if row.state == 'wrong'] == []
    assert list(found)[:4] == ['Python', 'torch', 'mmengine', 'mmcv']
    assert found['mmcv'].found == f'{mmcv.__version__} (>=2.0.0,<3)'
    assert 'the default' in found['native on cpu'].found
    assert found['Slide Attention on cpu'].found.startswith('differs from the reference by')


@pytest.mark.parametrize('way', WAYS)
def test_runs_if_mmslide_cannot_be_imported(way, tmp_path):
    status, text = doctor_with((tmp_path, {'mmcv': "__version__ = '1.7.0'\n"}), '--json', way=way)
    assert status == 1
    found = {row['name']: row for row in json.loads(text[text.index('[\n') :])}
    assert found['mmcv']['state'] == 'wrong'
    assert found['mmcv']['advice'] == 'mim install --no-build-isolation "mmcv>=2.0.0,<2.2.0"'
    assert found['torch']['state'] == 'ok'
    assert not {'mmdet', 'mmslide'} & set(found)  # they need it


def test_json_is_valid_if_a_package_prints_and_exits(tmp_path):
    status, text = doctor_with((tmp_path, {'mmengine': "print('[hello]')\nraise SystemExit(3)\n"}), '--json')
    assert status == 1
    found = {row['name']: row for row in json.loads(text[text.index('[\n') : text.index('\n]') + 2])}
    assert found['mmengine']['found'] == 'cannot be imported: 3'
    assert found['mmengine']['advice'].startswith('mim install --force-reinstall')


@pytest.mark.parametrize('command', [['other/__init__.py'], ['-m', 'other.main']])
def test_other_programs_are_not_the_doctor(command, tmp_path):
    """Whatever their arguments: mmengine then reads checkpoints through mmslide."""
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/main.py').touch()
    (tmp_path / 'other/__init__.py').write_text(
        'import mmslide\n'
        'from mmengine.runner.checkpoint import CheckpointLoader\n'
        "print(CheckpointLoader._schemes[''].__module__)\n"
    )
    assert 'mmslide.checkpoints' in run(sys.executable, *command, 'mmslide.doctor', cwd=tmp_path)


def test_rows_survive_a_crash(tmp_path):
    """Compiled code that does not fit can end the process."""
    status, text = doctor_with((tmp_path, {'mmcv': 'import os\nos._exit(139)\n'}))
    assert status == 139
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ['Python', 'torch', 'mmengine']


def test_a_check_that_fails_is_a_row(monkeypatch):
    monkeypatch.setattr(doctor, '_nvcc', lambda: 1 / 0)
    found = list(doctor.examine())
    assert found[-1] == doctor.Row(
        'doctor', 'failed with ZeroDivisionError: division by zero', 'wrong', 'please report this'
    )
    assert found[-2].name == 'torchvision'


def test_missing_packages(monkeypatch):
    real = doctor.find_spec
    monkeypatch.setattr(doctor, 'find_spec', lambda name: None if name == 'mmpretrain' else real(name))
    assert rows()['mmpretrain'].state == 'missing'
    monkeypatch.setattr(doctor, 'find_spec', lambda name: None if name == 'mmengine' else real(name))
    assert rows()['mmengine'].state == 'wrong'


def test_mmdet_that_refuses_mmcv(fail):
    fail('mmdet', AssertionError('MMCV==9 is used but incompatible.\nmore'))
    row = rows()['mmdet']
    assert row.state == 'wrong'
    assert row.found == 'cannot be imported: MMCV==9 is used but incompatible.'
    assert row.advice == 'mim install --no-build-isolation "mmdet>=3.1,<4" "mmcv>=2.0.0,<2.2.0"'


def test_packages_that_need_a_broken_torch_are_not_tried(fail):
    fail('torch', OSError('libtorch_cpu.so: cannot open shared object file'))
    version = torch.__version__.split('+')[0]
    found = rows()
    assert found['torch'].advice == f'pip install --force-reinstall "torch=={version}"'
    assert [row.name for row in found.values() if row.state != 'missing'] == ['Python', 'torch']


def test_missing_dependency(fail):
    """A reinstallation without dependencies would not bring it."""
    fail('mmengine', ModuleNotFoundError("No module named 'addict'", name='addict'))
    assert 'force' not in rows()['mmengine'].advice


def test_package_without_version(monkeypatch):
    monkeypatch.delattr(mmcv, '__version__')
    row = rows()['mmcv']
    assert row.state == 'wrong'
    assert 'has no version' in row.found


def test_mmcv_for_another_torch(fail):
    """Its operators are there, but do not load."""
    fail('mmcv.ops', ImportError('mmcv/_ext.so: undefined symbol: _ZN3c10'))
    found = rows()
    row = found['mmcv.ops']
    assert row.state == 'wrong'
    assert 'undefined symbol' in row.found
    assert '--force-reinstall --no-deps --no-cache-dir --no-build-isolation "' in row.advice
    assert f'mmcv=={mmcv.__version__}"' in row.advice
    assert 'Slide Attention on cpu' in found


def test_mmcv_without_operators(monkeypatch):
    real = doctor.find_spec
    monkeypatch.setattr(doctor, 'find_spec', lambda name: None if name == 'mmcv._ext' else real(name))
    row = rows()['mmcv.ops']
    assert row.state == 'missing'
    assert '--force-reinstall' in row.advice
    monkeypatch.setattr('importlib.metadata.packages_distributions', lambda: {'mmcv': ['mmcv-lite']})
    assert rows()['mmcv.ops'].advice.startswith('pip uninstall -y mmcv-lite && mim install')


@pytest.mark.parametrize(
    ('wanted', 'message'),
    [('fast', 'MMSLIDE_BACKEND must be one of'), ('native', "MMSLIDE_BACKEND: backend 'native' needs luck")],
)
def test_unusable_backend_in_the_environment(wanted, message, monkeypatch):
    monkeypatch.setattr(backends, 'WANTED', wanted)
    refusing = backends.Backend(backends.reference, lambda q, weight: 'needs luck')
    monkeypatch.setitem(backends.BACKENDS, 'native', refusing)
    row = rows()['Slide Attention on cpu']
    assert row.state == 'wrong'
    assert row.found.startswith(message)


def test_nvcc_is_that_of_torch(monkeypatch, tmp_path):
    cpp_extension = pytest.importorskip('torch.utils.cpp_extension')
    monkeypatch.setattr(cpp_extension, 'CUDA_HOME', str(tmp_path))
    assert f'not found in {tmp_path}' in rows()['nvcc'].found
    (tmp_path / 'bin').mkdir()
    nvcc = tmp_path / 'bin/nvcc'
    nvcc.touch(mode=0o755)
    assert rows()['nvcc'] == doctor.Row('nvcc', str(nvcc))


def test_old_python(monkeypatch):
    monkeypatch.setattr(sys, 'version_info', (3, 9, 18))
    assert [row.state for row in doctor.examine()] == ['wrong']


def test_wrong_numbers_are_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor, 'TOLERANCE', 0.0)
    monkeypatch.setattr(sys, 'argv', ['doctor'])
    with pytest.raises(SystemExit) as end:
        doctor.main()
    assert end.value.code == 1
    assert 'wrong' in capsys.readouterr().out


def test_commands_are_whole_lines(monkeypatch, capsys):
    """For copying, in a terminal of any width."""
    monkeypatch.setattr(sys, 'argv', ['doctor'])
    monkeypatch.setattr(doctor, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit):
        doctor.main()
    assert '    mim install --no-build-isolation "mmcv>=2.0.0,<2.2.0"' in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(('version', 'state'), [('2.10.0rc1', 'ok'), ('2.0.0rc4', 'wrong'), ('2.0', 'ok')])
def test_versions_are_compared_as_versions(version, state, monkeypatch):
    monkeypatch.setattr(mmcv, '__version__', version)
    assert rows()['mmcv'].state == state
