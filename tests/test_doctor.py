"""What `python -m mmslide.doctor` says about this machine and about broken ones."""

import json
import os
import sys

import mmcv
import pytest
from helpers import TOOLS, run

from mmslide import doctor

WAYS = {'module': [sys.executable, '-m', 'mmslide.doctor'], 'tool': [sys.executable, TOOLS / 'doctor.py']}


def rows():
    return {row.name: row for row in doctor.examine()}


def test_this_machine():
    found = rows()
    assert [row for row in found.values() if row.state == 'wrong'] == []
    assert list(found)[:4] == ['Python', 'torch', 'mmengine', 'mmcv']
    assert 'the default' in found['native on cpu'].found
    assert found['Slide Attention on cpu'].found.startswith('differs from the reference by')


@pytest.mark.parametrize('way', WAYS)
def test_it_runs_where_mmslide_cannot_be_imported(way, tmp_path):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').write_text("__version__ = '1.7.0'\n")
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])}
    status, text = run(sys.executable, '-c', 'import mmslide', check=False, env=env)
    assert status == 1
    assert 'mmcv 1.7.0 is installed' in text
    status, text = run(*WAYS[way], '--json', check=False, env=env)
    assert status == 1
    found = {row['name']: row for row in json.loads(text[text.index('[\n') :])}
    assert found['mmcv']['state'] == 'wrong'
    assert found['mmcv']['advice'] == 'mim install "mmcv>=2.0.0,<3"'
    assert found['torch']['state'] == 'ok'
    assert 'mmslide' not in found  # what needs them is not tried


def test_packages_that_are_missing_or_broken(monkeypatch):
    real = doctor.find_spec
    monkeypatch.setattr(doctor, 'find_spec', lambda name: None if name == 'mmpretrain' else real(name))
    assert rows()['mmpretrain'].state == 'missing'
    monkeypatch.setattr(doctor, 'find_spec', lambda name: None if name == 'mmengine' else real(name))
    assert rows()['mmengine'].state == 'wrong'
    monkeypatch.undo()

    def refuse(name):
        if name == 'mmdet':
            raise AssertionError('MMCV==9 is used but incompatible.\nmore')
        return imported(name)

    imported = doctor.importlib.import_module
    monkeypatch.setattr(doctor.importlib, 'import_module', refuse)
    row = rows()['mmdet']
    assert row.state == 'wrong'
    assert row.found == 'cannot be imported: MMCV==9 is used but incompatible.'
    assert row.advice == 'mim install "mmdet>=3.1,<4" "mmcv>=2.0.0,<2.2.0"'


def test_wrong_numbers_are_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor, 'TOLERANCE', 0.0)
    monkeypatch.setattr(sys, 'argv', ['doctor'])
    with pytest.raises(SystemExit) as end:
        doctor.main()
    assert end.value.code == 1
    assert 'wrong' in capsys.readouterr().out


def test_versions_are_compared_as_numbers(monkeypatch):
    monkeypatch.setattr(mmcv, '__version__', '2.10.0rc1')
    assert rows()['mmcv'].state == 'ok'
