"""Checkpoints from strangers: nothing in them is run, damage is found, and every way in leads through one reader."""

import argparse
import builtins
import http.server
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import OrderedDict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NEEDS_EXPORT, NEEDS_MODERN, tool, tool_error
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

import mmslide
from mmslide.checkpoints import check_finite, read_checkpoint, read_state_dict
from mmslide.compat import CAN_EXPORT, MODERN, safe_load
from mmslide.deploy import fuse_checkpoint
from mmslide.deploy.export import export
from mmslide.models import SlidePVT
from mmslide.weights import convert_checkpoint, load_pretrained

ARCH = dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1))
CONFIG = 'mask-rcnn_slide-pvt-t_fpn_1x_coco.py'


class Call:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def evil(tmp_path):
    """A crafted checkpoint, and the file that its code would write."""
    target = tmp_path / 'written'
    path = tmp_path / 'evil.pth'
    torch.save({'state_dict': OrderedDict(x=torch.zeros(1)), 'evil': Call(os.system, f'touch {target}')}, path)
    yield path, target
    assert not target.exists()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of an HTTP server for the files in tmp_path, and a cache folder of its own for downloads."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
        yield f'http://127.0.0.1:{served.server_port}'
        served.shutdown()


def backbone(**options):
    return SlidePVT(ARCH, out_indices=(0, 1), **options)


@pytest.fixture(scope='module')
def mini_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    tool('make_mini_dataset', folder / 'mini', '--num-train', 2, '--num-val', 2, '--size', 64)
    return folder / 'mini'


WAYS_IN = {
    'load_pretrained': lambda path, out: load_pretrained(backbone(), path),
    'init_cfg': lambda path, out: backbone(init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights(),
    'convert': lambda path, out: convert_checkpoint(path, out, 'mmslide'),
    'fuse': lambda path, out: fuse_checkpoint(CONFIG, path, out),
    **({'export': lambda path, out: export(CONFIG, path, f'{out}.onnx', 'backbone', (64, 64))} if CAN_EXPORT else {}),
    'mmengine': lambda path, out: CheckpointLoader.load_checkpoint(path),
}


@pytest.mark.parametrize('source', ['file', 'url'])
@pytest.mark.parametrize('way', WAYS_IN)
def test_a_crafted_checkpoint_runs_nothing(way, source, evil, server, tmp_path, monkeypatch):
    # A loader that falls back to the whole of pickle, as some forks of mmengine have it, is not asked.
    load = torch.load
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', lambda url, *_, **__: pytest.fail('not our reader'))
    monkeypatch.setattr(
        'mmengine.runner.checkpoint.load_from_local', lambda path, *_, **__: load(path, weights_only=False)
    )
    path = str(evil[0]) if source == 'file' else f'{server}/evil.pth'
    with pytest.raises(ValueError, match=r'evil\.pth is not a readable checkpoint: .*(posix|nt)\.system'):
        WAYS_IN[way](path, str(tmp_path / 'out.pth'))
    assert not (tmp_path / 'out.pth').exists()


@pytest.mark.slow
@pytest.mark.parametrize('source', ['file', pytest.param('url', marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    'command', ['test', 'resume', 'load_from', 'convert', 'fuse', pytest.param('export', marks=NEEDS_EXPORT)]
)
def test_no_tool_runs_a_crafted_checkpoint(command, source, evil, server, mini_data, tmp_path, monkeypatch):
    """Not even where mmengine's loader was replaced by one that falls back, by an import of the config."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    (tmp_path / 'fallback.py').write_text(
        'import torch\nfrom mmengine.runner.checkpoint import CheckpointLoader\n'
        'def load_from_fallback(path, map_location=None): return torch.load(path, map_location, weights_only=False)\n'
        "CheckpointLoader.register_scheme('', load_from_fallback, force=True)\n"
    )
    config = tmp_path / 'config.py'
    mini = Path(mmslide.__file__).parents[1] / 'configs/mini/cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py'
    config.write_text(
        f"_base_ = {str(mini)!r}\ncustom_imports = dict(imports=['mmslide', 'fallback'], allow_failed_imports=False)\n"
    )
    path = str(evil[0]) if source == 'file' else f'{server}/evil.pth'
    options = ['--work-dir', tmp_path / 'work', '--cfg-options', f'data_root={mini_data}/coco']
    monkeypatch.syspath_prepend(tmp_path)
    error = tool_error(
        *{
            'test': ['test', config, path, *options],
            'resume': ['train', config, '--resume', path, *options],
            'load_from': ['train', config, *options, f'load_from={path}'],
            'convert': ['convert_checkpoint', path, tmp_path / 'out.pth'],
            'fuse': ['fuse_checkpoint', config, path, tmp_path / 'out.pth'],
            'export': ['export', config, path, tmp_path / 'out.onnx', '--shape', 64, 64],
        }[command]
    )
    assert error.startswith(f'{path} is not a readable checkpoint')
    assert not (tmp_path / 'work').exists()


def test_a_url_is_downloaded_once(server, tmp_path):
    torch.save(dict(x=torch.ones(2)), tmp_path / 'good.pth')
    for _ in range(2):
        assert read_state_dict(f'{server}/good.pth')['x'].tolist() == [1, 1]
        (tmp_path / 'good.pth').unlink(missing_ok=True)
    with pytest.raises(OSError, match=f'cannot download {server}/none.pth'):
        read_checkpoint(f'{server}/none.pth')
    with pytest.raises(OSError, match=r'cannot download http://127\.0\.0\.1:9/x\.pth'):
        read_checkpoint('http://127.0.0.1:9/x.pth')


def test_a_damaged_download_says_how_to_try_again(server, tmp_path):
    torch.save(dict(x=torch.randn(1000)), tmp_path / 'cut.pth')
    (tmp_path / 'cut.pth').write_bytes((tmp_path / 'cut.pth').read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r'damaged or incomplete.*; delete .*cache.*cut\.pth to download it again'):
        read_checkpoint(f'{server}/cut.pth')


def test_processes_of_one_machine_download_once(tmp_path, monkeypatch):
    """As the ranks of a distributed training do."""
    torch.save(dict(x=torch.ones(2)), tmp_path / 'x.pth')
    content, requests = (tmp_path / 'x.pth').read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            for part in (content[:100], content[100:]):
                time.sleep(0.3)
                self.wfile.write(part)

        def log_message(self, *_):
            pass

    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        arguments = (f'http://127.0.0.1:{served.server_port}/x.pth',)
        ranks = [get_context('fork').Process(target=read_checkpoint, args=arguments) for _ in range(3)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
        served.shutdown()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert requests == ['/x.pth']


@pytest.mark.parametrize('scheme', ['openmmlab', 'open-mmlab', 'mmcls', 'torchvision', 'modelzoo'])
def test_an_alias_starts_a_backbone(scheme, server, tmp_path, monkeypatch):
    wanted = backbone()
    state = {f'backbone.{key}': value for key, value in wanted.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'alias.pth')
    if 'mmlab' in scheme:  # with the user's own table
        monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
        (tmp_path / 'open_mmlab.json').write_text(json.dumps({'net': f'{server}/alias.pth', 'file': 'alias.pth'}))
    else:
        monkeypatch.setitem(mmslide.checkpoints.ALIASES, scheme, lambda: {'net': f'{server}/alias.pth'})
    for name in ('net', 'file') if 'mmlab' in scheme else ('net',):
        model = backbone(init_cfg=dict(type='Pretrained', checkpoint=f'{scheme}://{name}'))
        model.init_weights()
        assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in model.state_dict().items())
        found = CheckpointLoader.load_checkpoint(f'{scheme}://{name}')['state_dict']
        assert found.keys() == (wanted.state_dict() if scheme == 'mmcls' else state).keys()


def test_aliases_of_mmengine():
    """Its own tables, where a name may be an old one."""
    resolve = mmslide.checkpoints._resolve_alias
    assert resolve('open-mmlab://resnet50_caffe') == resolve('openmmlab://detectron/resnet50_caffe')
    # From OpenMMLab's host or that of the forks.
    hosts = r'https://(download\.openmmlab\.com|mmassets\.onedl\.ai)/'
    assert re.match(hosts + 'mmclassification/v0/resnet/resnet50_', resolve('mmcls://resnet50'))
    assert re.match(hosts + r'\S+/resnet50_v1c', resolve('openmmlab://resnet50_v1c'))
    with pytest.raises(ValueError, match=r'knows no checkpoint mmcls://resnet5; did you mean resnet50\?'):
        resolve('mmcls://resnet5')


def test_an_alias_of_torchvision_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    with pytest.raises(ImportError, match='checkpoint torchvision://resnet50 needs torchvision, which cannot be impor'):
        read_checkpoint('torchvision://resnet50')


def test_aliases_and_unknown_schemes(server, tmp_path, monkeypatch):
    torch.save(dict(x=torch.ones(2)), tmp_path / 'alias.pth')
    monkeypatch.setitem(mmslide.checkpoints.ALIASES, 'torchvision', lambda: {'some_net': f'{server}/alias.pth'})
    assert CheckpointLoader.load_checkpoint('torchvision://some_net')['x'].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r'mmengine knows no checkpoint torchvision://other'):
        read_checkpoint('torchvision://other')
    with pytest.raises(ValueError, match=r'ftp://host/x\.pth: checkpoints are read from files, http://'):
        read_checkpoint('ftp://host/x.pth')


def test_code_that_mmengine_would_run_on_resume_is_left_out(tmp_path):
    torch.save(dict(meta=dict(config='import os', epoch=1), state_dict={}), tmp_path / 'x.pth')
    assert CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'))['meta'] == dict(epoch=1)


def flipped(content, position):
    changed = bytearray(content)
    changed[position] ^= 16
    return bytes(changed)


@pytest.mark.parametrize('way', ['load_pretrained', 'convert', 'mmengine'])
def test_flipped_bits_are_found(way, tmp_path):
    path = tmp_path / 'flipped.pth'
    torch.save(backbone().state_dict(), path)
    content = path.read_bytes()
    for position in (len(content) // 3, len(content) // 2, 2 * len(content) // 3):
        path.write_bytes(flipped(content, position))
        with pytest.raises(ValueError, match='not a readable checkpoint: it is damaged or incomplete'):
            WAYS_IN[way](str(path), str(tmp_path / 'out.pth'))
    assert not (tmp_path / 'out.pth').exists()


def test_a_tensor_marked_as_a_folder_is_damage(tmp_path):
    """One bit, outside what checksums cover, with which torch would read nothing and give unwritten memory."""
    path = tmp_path / 'x.pth'
    torch.save(dict(x=torch.randn(100)), path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / 'y.pth', 'w') as marked:
        for entry in source.infolist():
            content = source.read(entry)
            entry.external_attr |= 0x10 if entry.filename.endswith('data/0') else 0
            marked.writestr(entry, content)
    with pytest.raises(ValueError, match='damaged or incomplete'):
        read_checkpoint(tmp_path / 'y.pth')


def test_an_archive_that_zipfile_gives_up_on_is_damage(tmp_path, monkeypatch):
    path = tmp_path / 'x.pth'
    torch.save(dict(x=torch.randn(100)), path)

    def fail(_):
        raise zipfile.BadZipFile('zipfiles that span multiple disks are not supported')

    monkeypatch.setattr(zipfile, 'is_zipfile', fail)
    with pytest.raises(ValueError, match='damaged or incomplete'):
        read_checkpoint(path)


def test_mmengine_loads_what_was_checked(tmp_path):
    """Weights under 'model', which it would pass over, and test a model with random ones."""
    state = backbone().state_dict()
    torch.save(dict(model=state), tmp_path / 'x.pth')
    assert CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'))['state_dict'].keys() == state.keys()
    torch.save(dict(state_dict=dict(model=state)), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='holds no state dict'):
        read_state_dict(tmp_path / 'x.pth')


@pytest.mark.parametrize('state', [{3: torch.ones(1)}, {'x': torch.ones(1, device='meta')}])
def test_what_is_no_state_dict(state, tmp_path):
    torch.save(state, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=r'names must be strings and the tensors have data|_rebuild_meta_tensor'):
        read_state_dict(tmp_path / 'x.pth')


def test_sparse_weights_are_compared_too():
    sparse = torch.sparse_coo_tensor([[0, 2]], [1.0, float('nan')], (4,))
    with pytest.raises(ValueError, match='x has NaN or infinite values in 1 of 2 tensors: bad'):
        check_finite({'good': torch.ones(4), 'bad': sparse}, 'x')


@pytest.mark.parametrize('content', [None, [1], dict(meta=3), dict(meta=None), dict(meta=['x'])])
def test_odd_meta_data(content):
    assert mmslide.checkpoints.meta_of(content) == {}


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(OSError, match='is not readable: it is not a file'):
        read_checkpoint(tmp_path / 'pipe')


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match='cannot write full'):
        mmslide.checkpoints.save_checkpoint(dict(x=torch.ones(10**6)), Path('/dev/full'))


def test_what_is_wrong_with_a_file_is_said(tmp_path, monkeypatch):
    path = tmp_path / 'x.pth'
    with pytest.raises(FileNotFoundError, match=r'checkpoint .*x\.pth does not exist'):
        read_checkpoint(path)
    torch.save(dict(x=torch.ones(1000)), path)
    for content in (b'', path.read_bytes()[:1000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match='damaged or incomplete'):
            read_checkpoint(path)
    with pytest.raises(OSError, match='is not readable: it is not a file'):
        read_checkpoint(tmp_path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(ValueError, match=r'or holds more than tensors and plain values \(a TorchScript program'):
        read_checkpoint(path)

    def refuse(*_, **__):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(Path, 'open', refuse)
    with pytest.raises(PermissionError, match='is not readable: Permission denied'):
        read_checkpoint(path)


@pytest.mark.parametrize('kind', ['html', 'pickle', 'tar', 'legacy', 'protocol'])
def test_a_file_in_another_format_is_not_called_incomplete(kind, tmp_path):
    path = tmp_path / 'x.pth'
    if kind == 'html':
        path.write_text('<html>404 Not Found</html>')
    elif kind == 'pickle':
        path.write_bytes(pickle.dumps(dict(x=1)))
    elif kind == 'tar':
        with tarfile.open(path, 'w') as archive:
            for name in ('storages', 'tensors', 'pickle'):  # as PyTorch 0.1 wrote them
                archive.addfile(tarfile.TarInfo(name))
    else:
        torch.save(dict(x=np.ones(2)), path, pickle_protocol=4, _use_new_zipfile_serialization=kind == 'protocol')
    with pytest.raises(ValueError, match=r'or not a zip file of torch\.save with its default pickle_protocol; save it'):
        read_checkpoint(path)


def test_an_array_that_no_memory_can_hold(tmp_path):
    """NumPy has a MemoryError for it, which is no damage that users would know of."""
    state = pickle.dumps((1, (2**62, 4), np.dtype('f8'), False, b'x'), 2)[2:-1]
    path = checkpoint_of(
        b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85N\x87R' + state + b'b', tmp_path
    )
    with pytest.raises(ValueError, match='not a readable checkpoint: it is damaged, or'):
        read_checkpoint(path)


def test_the_old_format_with_settings_inside(tmp_path):
    path = tmp_path / 'old.pth'
    content = {'model': dict(x=torch.ones(1)), 'args': argparse.Namespace(lr=1e-4)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    if MODERN:
        assert read_checkpoint(path)['args'].lr == 1e-4
    else:
        with pytest.raises(ValueError, match=r'not a zip file of torch\.save'):
            read_checkpoint(path)


def test_paths_are_accepted_everywhere(tmp_path):
    path = tmp_path / 'x.pth'
    torch.save(backbone().state_dict(), path)
    load_pretrained(backbone(), path)
    convert_checkpoint(path, tmp_path / 'out.pth', 'mmslide')
    assert read_state_dict(tmp_path / 'out.pth').keys() == backbone().state_dict().keys()


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_named(value, tmp_path):
    state = backbone().state_dict()
    state['stages.1.embed.norm.weight'][3] = value
    path, out = tmp_path / 'x.pth', tmp_path / 'out.pth'
    torch.save(state, path)
    with pytest.raises(ValueError, match=r'x\.pth has NaN or infinite values in 1 of \d+ tensors: stages\.1\.embed'):
        convert_checkpoint(path, out, 'mmslide')
    assert not out.exists()
    check_finite({'count': torch.tensor(3), 'empty': torch.empty(0)}, 'x')


def load_safely(path):
    """As a user does it, where that is safe."""
    return torch.load(path, weights_only=True) if MODERN else safe_load(path, 'cpu', {})


# Opcodes of protocol 2, since pickle itself refuses to write what an attacker would.
def reduce_getattr(owner, name):
    """`getattr(owner, name)` for a global `owner`."""
    return b'c__builtin__\ngetattr\n' + b'c' + owner.replace(' ', '\n').encode() + b'\n' + text(name) + b'\x86R'


def text(value):
    return b'X' + len(value).to_bytes(4, 'little') + value.encode()


def checkpoint_of(opcodes, folder):
    """A torch file whose pickle is {'x': what the opcodes leave}."""
    torch.save(dict(x=0), folder / 'plain.pth')
    path = folder / 'crafted.pth'
    with zipfile.ZipFile(folder / 'plain.pth') as source, zipfile.ZipFile(path, 'w') as crafted:
        for name in source.namelist():
            plain = source.read(name)
            crafted.writestr(name, b'\x80\x02}' + text('x') + opcodes + b's.' if name.endswith('data.pkl') else plain)
    return path


HISTORY_BUFFER = 'mmengine.logging.history_buffer HistoryBuffer'


@pytest.mark.parametrize('name', ['min', 'max', 'current', 'mean'])
def test_statistics_of_history_buffers_are_handed_out(name, tmp_path):
    path = checkpoint_of(reduce_getattr(HISTORY_BUFFER, name), tmp_path)
    assert load_safely(path)['x'] is getattr(HistoryBuffer, name)


@pytest.mark.parametrize(
    ('owner', 'name'),
    [
        (HISTORY_BUFFER, '__init__'),
        (HISTORY_BUFFER, '_statistics_methods'),
        (HISTORY_BUFFER, 'register_statistics'),
        (HISTORY_BUFFER, '__dict__'),
        # An owner that is no HistoryBuffer, with names that one has.
        ('numpy ndarray', 'min'),
        ('numpy ndarray', 'mean'),
        ('torch Tensor', 'max'),
        ('collections OrderedDict', 'clear'),
        ('torch.nn.parameter Parameter', 'mean'),
    ],
)
def test_getattr_stays_shut(owner, name, tmp_path):
    path = checkpoint_of(reduce_getattr(owner, name), tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        load_safely(path)
    with pytest.raises(ValueError, match=r'not a readable checkpoint.*\((a checkpoint may only access|\w)'):
        read_checkpoint(path)


def history_buffer(state):
    """A HistoryBuffer made without __init__ and given a state of opcodes."""
    return b'c' + HISTORY_BUFFER.replace(' ', '\n').encode() + b'\n)\x81' + state + b'b'


@pytest.mark.parametrize(
    'attack',
    {
        # The shared dict of all buffers: {'statistics_methods': {'mean': HistoryBuffer.min}}
        'rebind': b'}' + text('statistics_methods') + b'}' + text('mean') + b'%b' + b'ss',
        'shadow': b'}' + text('_statistics_methods') + b'}' + text('mean') + b'%b' + b'ss',
        'nothing': b'}',
    }.items(),
    ids=lambda attack: attack[0],
)
def test_the_statistics_of_the_process_cannot_be_rebound(attack, tmp_path):
    HistoryBuffer()
    before = dict(HistoryBuffer._statistics_methods)
    state = attack[1].replace(b'%b', reduce_getattr(HISTORY_BUFFER, 'min'))
    with pytest.raises(pickle.UnpicklingError, match='a HistoryBuffer must have'):
        load_safely(checkpoint_of(history_buffer(state), tmp_path))
    assert HistoryBuffer._statistics_methods == before
    good = tmp_path / 'good.pth'
    torch.save(dict(buffer=HistoryBuffer([1.0, 2.0, 6.0], [1, 1, 1])), good)
    with zipfile.ZipFile(good) as archive:
        opcodes = next(archive.read(name) for name in archive.namelist() if name.endswith('data.pkl'))
    assert opcodes.count(b'X\x03\x00\x00\x00min') == 2  # the key of the dict, then the method's name
    opcodes = opcodes.replace(b'X\x04\x00\x00\x00mean', b'X\x04\x00\x00\x00best', 1)
    rebound = tmp_path / 'rebound.pth'
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(rebound, 'w') as crafted:
        for name in source.namelist():
            crafted.writestr(name, opcodes if name.endswith('data.pkl') else source.read(name))
    assert load_safely(rebound)['buffer'].mean() == 3.0
    assert HistoryBuffer._statistics_methods == before


def test_a_history_buffer_is_read_and_saved_again(tmp_path):
    path = tmp_path / 'x.pth'
    buffer = HistoryBuffer([1.0, 2.0, 6.0], [1, 1, 1])
    for _ in range(2):
        torch.save(dict(buffer=buffer), path)
        buffer = load_safely(path)['buffer']
        assert type(buffer) is HistoryBuffer
        assert buffer.statistics('mean') == 3.0


@pytest.mark.parametrize('package', ['core', '_core'])
def test_checkpoints_of_numpy_1_and_2(package, tmp_path):
    value = dict(array=np.arange(3.0), scalar=np.float64(2.5))
    opcodes = pickle.dumps(value, protocol=2)[2:-1].replace(b'numpy._core', f'numpy.{package}'.encode())
    opcodes = opcodes.replace(b'numpy.core', f'numpy.{package}'.encode())
    path = checkpoint_of(opcodes, tmp_path)
    for content in (load_safely(path)['x'], read_checkpoint(path)['x']):
        assert content['array'].tolist() == [0, 1, 2]
        assert content['scalar'] == 2.5


@NEEDS_MODERN
def test_an_attack_by_getattr_in_a_process_of_its_own(tmp_path):
    """The whole chain that the bare `getattr` would allow: builtins.exec through a module's attributes."""
    path = checkpoint_of(reduce_getattr('torch _C', 'exec'), tmp_path)
    script = f'import mmslide, torch\ntorch.load({str(path)!r}, weights_only=True)'
    result = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert result.returncode == 1
    assert 'UnpicklingError' in result.stderr
    assert builtins.getattr is getattr
    shutil.rmtree(tmp_path, ignore_errors=True)
