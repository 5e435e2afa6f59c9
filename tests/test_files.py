import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmslide import files
from mmslide.files import atomic_write, find_config


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path):
    out = tmp_path / 'out.txt'
    with atomic_write(out) as (path,):
        path.write_text('new')
        assert path.name == 'out.txt'
        assert not out.exists()
    assert out.read_text() == 'new'
    assert names(tmp_path) == ['out.txt']


def test_an_error_leaves_everything_as_it_was(tmp_path):
    out = tmp_path / 'out.txt'
    out.write_text('old')

    def fail():
        with atomic_write(out, tmp_path / 'other') as (first, second):
            first.write_text('new')
            second.write_text('new')
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert out.read_text() == 'old'
    assert names(tmp_path) == ['out.txt']


@pytest.mark.parametrize('existing', [True, False])
def test_all_outputs_appear_or_none(existing, tmp_path, monkeypatch):
    outs = [tmp_path / 'a', tmp_path / 'b', tmp_path / 'c']
    if existing:
        for out in outs:
            out.write_text('old')
    replace = os.replace

    def fail_at_the_last(source, target):
        if Path(target).name == 'c' and Path(source).name == 'c':
            raise OSError('No space left on device')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', fail_at_the_last)

    def write():
        with atomic_write(*outs) as paths:
            for path in paths:
                path.write_text('new')

    with pytest.raises(OSError, match='No space left'):
        write()
    assert [out.read_text() for out in outs if out.exists()] == ['old'] * 3 * existing
    assert names(tmp_path) == ['a', 'b', 'c'] * existing


@pytest.mark.parametrize('fails', [False, True])
def test_folders(fails, tmp_path, monkeypatch):
    outs = [tmp_path / 'model.mlpackage', tmp_path / 'other']
    outs[0].mkdir()
    (outs[0] / 'old').write_text('old')
    replace = os.replace

    def fail_at_the_other(source, target):
        if fails and Path(target).name == 'other':
            raise OSError('No space left on device')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', fail_at_the_other)
    try:
        with atomic_write(*outs, folders=True) as paths:
            for path in paths:
                path.mkdir()
                (path / 'new').write_text('new')
    except OSError:
        assert fails
    assert names(outs[0]) == (['old'] if fails else ['new'])
    assert names(tmp_path) == (['model.mlpackage'] if fails else ['model.mlpackage', 'other'])


@pytest.mark.parametrize('how', ['same', 'relative', 'symlink', 'hard link', 'symlink to input', 'inside'])
def test_an_output_never_replaces_an_input(how, tmp_path, monkeypatch):
    given = out = tmp_path / 'in.pth'
    given.write_text('input')
    monkeypatch.chdir(tmp_path)
    if how == 'relative':
        out = Path('./in.pth')
    elif how == 'symlink':
        out = tmp_path / 'link'
        out.symlink_to(given)
    elif how == 'hard link':
        out = tmp_path / 'link'
        os.link(given, out)
    elif how == 'symlink to input':
        given = tmp_path / 'link'
        given.symlink_to(out)
    elif how == 'inside':
        out = tmp_path
    with (
        pytest.raises(ValueError, match='would overwrite the input'),
        atomic_write(out, inputs=['https://host/in.pth', given], folders=how == 'inside'),
    ):
        pytest.fail('the block ran')
    assert (tmp_path / 'in.pth').read_text() == 'input'


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'x').write_text('input')
    for out, given in (('~/x', tmp_path / 'x'), (tmp_path / 'x', '~/x')):
        with pytest.raises(ValueError, match='would overwrite the input'), atomic_write(out, inputs=[given]):
            pytest.fail('the block ran')
    with atomic_write('~/y') as (path,):
        path.write_text('new')
    assert names(tmp_path) == ['x', 'y']


def test_the_longest_names(tmp_path):
    outs = [tmp_path / (letter * 255) for letter in 'ab']
    for text in ('old', 'new'):
        with atomic_write(*outs) as paths:
            for path in paths:
                path.write_text(text)
    assert [out.read_text() for out in outs] == ['new', 'new']


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').touch()
    for out, folders, message in (
        ('/dev/null', False, '/dev/null exists and is not a regular file'),
        (tmp_path / 'pipe', False, 'is not a regular file'),
        (tmp_path / 'folder', False, 'is a folder, not a file to write'),
        (tmp_path / 'file', True, 'is not a regular folder'),
        (tmp_path / 'none' / 'out', False, 'the folder of .*none/out does not exist'),
    ):
        with pytest.raises(ValueError, match=message), atomic_write(out, folders=folders):
            pytest.fail('the block ran')
    with pytest.raises(ValueError, match='different names'), atomic_write(tmp_path / 'a', tmp_path / 'folder/../a'):
        pytest.fail('the block ran')
    assert stat.S_ISCHR(os.stat('/dev/null').st_mode)


def test_mode_and_symlink_are_kept(tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    target, link = tmp_path / 'elsewhere' / 'target', tmp_path / 'link'
    target.write_text('old')
    target.chmod(0o640)
    link.symlink_to(target)
    with atomic_write(link) as (path,):
        path.write_text('new')
    assert link.is_symlink()
    assert target.read_text() == 'new'
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    umask = os.umask(0)
    os.umask(umask)
    with atomic_write(tmp_path / 'fresh') as (path,):
        path.write_text('new')
    assert stat.S_IMODE((tmp_path / 'fresh').stat().st_mode) == 0o666 & ~umask


def test_threads_do_not_collide(tmp_path):
    out, errors = tmp_path / 'out', []
    barrier = threading.Barrier(4)

    def write(number):
        try:
            barrier.wait()
            for _ in range(10):
                with atomic_write(out) as (path,):
                    path.write_text(str(number) * 1000)
                    time.sleep(0.001)
                    assert path.read_text() == str(number) * 1000
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set(out.read_text())) == 1
    assert names(tmp_path) == ['out']


def test_what_a_killed_process_left_is_removed_and_a_running_one_is_not_disturbed(tmp_path):
    script = f"""
import os, signal
from mmslide.files import atomic_write
with atomic_write({str(tmp_path / 'out')!r}) as (path,):
    path.write_text('half')
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, '-c', script]).returncode == -9
    (leftover,) = tmp_path.iterdir()
    assert names(leftover) == [files.LOCK, 'out']
    with atomic_write(tmp_path / 'other') as (path,):
        path.write_text('whole')
        assert not leftover.exists()
        with atomic_write(tmp_path / 'out') as (second,):
            second.write_text('whole')
    assert names(tmp_path) == ['other', 'out']


def test_find_config(tmp_path, monkeypatch):
    own = find_config('mask-rcnn_slide-pvt-t_fpn_1x_coco.py')
    assert own.is_file()
    assert find_config(str(own)) == own
    for name in ('nowhere.py', 'folder/mask-rcnn_slide-pvt-t_fpn_1x_coco.py'):
        with pytest.raises(FileNotFoundError, match=f'{name} is not a file, and mmslide has no config'):
            find_config(name)


def test_a_wheel_finds_its_own_configs_not_a_strangers(tmp_path, monkeypatch):
    """In site-packages, `configs` beside the package is another distribution's."""
    own, stranger = tmp_path / 'mmslide/.mim/configs/x', tmp_path / 'configs'
    for folder in (own, stranger):
        folder.mkdir(parents=True)
        (folder / 'shared.py').touch()
    (stranger / 'only_there.py').touch()
    monkeypatch.setattr(files, 'WHEEL_CONFIGS', own.parent)
    monkeypatch.setattr(files, 'CHECKOUT_CONFIGS', stranger)
    assert find_config('shared.py') == own / 'shared.py'
    with pytest.raises(FileNotFoundError):
        find_config('only_there.py')
