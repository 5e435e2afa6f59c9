"""The documentation: its code runs or says why not, every link leads somewhere, public arguments are documented."""

import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import NEEDS_EXPORT, TOOLS
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from mmslide.build import build_model
from mmslide.data import check_datasets

sys.path.insert(0, str(TOOLS))
import make_mini_dataset as mini

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
    *sorted((ROOT / 'docs').rglob('*.md')),
    *sorted((ROOT / 'configs').rglob('*.md')),
]
# A block of code, with the comment above it. `<!-- not run: REASON -->` leaves it out, `<!-- slow -->` leaves it to
# `make test-all`, `<!-- needs PACKAGE -->` runs it where that is installed.
BLOCK = re.compile(r'(?:^<!-- (?P<marker>[^\n]+) -->\n)?^```(?P<info>[^\n]*)\n(?P<code>.*?)^```$', re.M | re.S)
MARKER = re.compile(r'not run: \S.*|slow|needs \w+')
LANGUAGES = {'python', 'shell'}
OTHERS = {'text', 'kotlin', 'swift'}  # not run
# What is appended to the configs in `make test-all`, so that each takes a minute.
NO_DOWNLOAD = "model.setdefault('backbone', {}).update(init_cfg=None)\n"
SHORT_EPOCH = """
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=1)
train_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
train_dataloader['dataset']['indices'] = 4
val_dataloader.update(num_workers=0, persistent_workers=False)
val_dataloader['dataset']['indices'] = 2
"""
SHORT_ITERATIONS = """
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2))
train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
train_dataloader['dataset']['indices'] = 4
val_dataloader.update(num_workers=0, persistent_workers=False)
val_dataloader['dataset']['indices'] = 2
"""
SHORTENED = {
    'configs/my-detector.py': NO_DOWNLOAD + SHORT_EPOCH,
    'configs/my-finetuning.py': "load_from = 'work_dirs/my-detector/epoch_1.pth'\n",
    'configs/my-box-detector.py': NO_DOWNLOAD + SHORT_EPOCH,
    'configs/my-segmentor.py': NO_DOWNLOAD + SHORT_ITERATIONS,
    'configs/mini/cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py': SHORT_EPOCH,
    'configs/mini/slide-swin-mini_upernet_mini-ade20k-64x64.py': SHORT_ITERATIONS,
}
MINI = dict(num_train=4, num_val=2, size=64)


@dataclass(frozen=True)
class Block:
    line: int  # of its code in the page
    marker: str
    language: str
    title: str  # of the file that it is
    code: str


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        language, _, rest = match['info'].partition(' ')
        title = re.fullmatch(r'title="([^"]+)"', rest)
        line = text.count('\n', 0, match.start('code'))
        found.append(Block(line, match['marker'] or '', language, title[1] if title else '', match['code']))
    return found


def runs(block: Block, slow: bool) -> bool:
    if block.language not in LANGUAGES or block.marker.startswith('not run'):
        return False
    package = block.marker.removeprefix('needs ') if block.marker.startswith('needs ') else ''
    return (slow or block.marker != 'slow') and (not package or find_spec(package) is not None)


def with_blocks(slow: bool) -> list[Path]:
    """The pages with something to run; of the slow ones, those with something slow."""
    return [
        page
        for page in PAGES
        if any(runs(block, slow) and (not slow or block.marker == 'slow') for block in blocks_of(page))
    ]


@pytest.mark.parametrize('page', PAGES, ids=page_id)
def test_each_block_is_run_or_says_why_not(page):
    text = page.read_text()
    blocks = blocks_of(page)
    assert len(re.findall(r'^\s*```', text, re.M)) == 2 * len(blocks)
    for block in blocks:
        assert block.language in LANGUAGES | OTHERS, f'{page_id(page)}:{block.line}: a block needs a language'
        # Other comments may stand above a block.
        if re.match(r'(not run|slow|needs)\b', block.marker):
            assert MARKER.fullmatch(block.marker), f'{page_id(page)}:{block.line}: {block.marker}'
            assert block.language in LANGUAGES


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """What the pages are read in: a checkout whose configs may be changed, and the commands of this environment."""
    (tmp_path / 'docs').mkdir()
    for name in ('mmslide', 'tests', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_files(blocks: list[Block]) -> Iterator[Path]:
    for block in blocks:
        if block.title:
            path = Path(block.title)
            path.write_text(block.code)
            yield path


def run_python(page: Path, blocks: list[Block]) -> None:
    """The blocks without a title, as one program."""
    namespace = {'__name__': '__main__'}
    for block in blocks:
        if block.language == 'python' and not block.title:
            exec(compile('\n' * block.line + block.code, page, 'exec'), namespace)


def run_shell(blocks: list[Block]) -> str:
    """All blocks as one script; what it prints."""
    script = 'set -euo pipefail\n' + ''.join(block.code for block in blocks if block.language == 'shell')
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    env = {**os.environ, 'PATH': path}
    result = subprocess.run(['bash', '-xc', script], env=env, capture_output=True, text=True, timeout=1800)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]
    return output


@pytest.mark.parametrize('page', with_blocks(slow=False), ids=page_id)
def test_blocks(page, checkout):
    """Python runs; configs load, build their model and can use the generated data if they name it."""
    mini.make_mini_dataset('data/mini', **MINI)
    blocks = [block for block in blocks_of(page) if runs(block, slow=False)]
    files = list(write_files(blocks))
    run_python(page, blocks)
    if any(block.language == 'shell' for block in blocks):
        run_shell(blocks)
    for path in files:
        if path.parts[0] != 'configs':
            runpy.run_path(str(path))
    for path in files:
        if path.parts[0] == 'configs':
            config = Config.fromfile(path)
            if find_spec(config.default_scope) is None:  # mmpretrain
                continue
            build_model(config, 'meta')
            if 'data/mini' in config.pretty_text:
                checks = check_datasets(config, 'train_dataloader', 'val_dataloader', everything=True)
                assert [check.problems for check in checks] == [[], []]


def test_boxes_without_masks(checkout):
    """The page's config takes annotations that have no `segmentation` at all."""
    mini.make_mini_dataset('data/mini', **MINI)
    for path in Path('data/mini/coco/annotations').glob('*.json'):
        content = json.loads(path.read_text())
        assert all(annotation.pop('segmentation') for annotation in content['annotations'])
        path.write_text(json.dumps(content))
    list(write_files(blocks_of(ROOT / 'docs/your-data.md')))
    config = Config.fromfile('configs/my-box-detector.py')
    checks = check_datasets(config, 'train_dataloader', 'val_dataloader', everything=True)
    assert [check.problems for check in checks] == [[], []]
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(config.train_dataloader.dataset)
    assert len(dataset[0]['data_samples'].gt_instances.bboxes)


@NEEDS_EXPORT
@pytest.mark.exhaustive
@pytest.mark.parametrize('page', with_blocks(slow=True), ids=page_id)
def test_slow_blocks(page, checkout):
    """Every command as it stands on the page, with shortened configs."""
    if page.name == 'README.md':  # reads what `make demo` has drawn
        mini.make_mini_dataset('data/mini', **MINI)
    blocks = [block for block in blocks_of(page) if runs(block, slow=True)]
    list(write_files(blocks))
    for name, text in SHORTENED.items():
        if Path(name).exists():
            Path(name).write_text(Path(name).read_text() + text)
    output = run_shell(blocks)
    if page.name == 'your-data.md':
        assert re.search(r'bbox_mAP: \S+.*segm_mAP: \S+', output)
        assert 'mIoU: ' in output
        assert list(Path('pictures').rglob('*.*'))
        assert list(Path('maps').rglob('*.*'))
    run_python(page, blocks)


@pytest.fixture
def mkdocs():
    pytest.importorskip('material')
    return [sys.executable, '-m', 'mkdocs', 'build']  # --quiet would leave warnings out, and strict with them


@pytest.fixture
def site_copy(tmp_path):
    """A checkout whose pages and docstrings may be changed."""
    left_out = shutil.ignore_patterns('.*', '*.so', 'build', 'data', 'work_dirs', 'site', '*.egg-info')
    return shutil.copytree(ROOT, tmp_path / 'copy', ignore=left_out)


def build_site(mkdocs: list[str], folder: Path, checkout: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([*mkdocs, '--site-dir', str(folder)], cwd=checkout, capture_output=True, text=True)


@pytest.mark.slow
def test_site(mkdocs, tmp_path):
    """Strict: a dead link or anchor, or a page outside the navigation, stops it."""
    result = build_site(mkdocs, tmp_path / 'site')
    assert result.returncode == 0, result.stdout + result.stderr
    site = tmp_path / 'site'
    assert (site / 'index.html').exists()
    assert (site / 'configs/slide_pvt/mask-rcnn_slide-pvt-t_fpn_1x_coco.py').exists()
    assert not (site / 'scripts').exists()


def public_names() -> list[str]:
    return re.findall(r'^::: (\S+)$', (ROOT / 'docs/api.md').read_text(), re.M)


def resolve(name: str):
    module, _, attribute = name.rpartition('.')
    return getattr(import_module(module), attribute)


def test_public_arguments_are_documented(mkdocs):
    """By the site's hook, which stops `make docs` alike."""
    assert runpy.run_path(str(ROOT / 'docs/scripts/site_hook.py'))['docstring_problems']() == []


@NEEDS_EXPORT  # to import the names in mmslide.deploy
@pytest.mark.parametrize('module', ['models', 'models.attention', 'ops', 'deploy', 'weights'])
def test_the_api_page_has_everything_public(module):
    listed = [resolve(name) for name in public_names()]
    public = import_module(f'mmslide.{module}')
    internal = {'check_backend', 'is_pretrained'}  # for other parts of the package
    assert not [name for name in set(public.__all__) - internal if getattr(public, name) not in listed]


@NEEDS_EXPORT
@pytest.mark.parametrize('page', [page for page in PAGES if page.name != 'add-a-backbone.md'], ids=page_id)
def test_the_api_page_has_everything_that_pages_import(page):
    """But for a backbone's author, who works inside the package."""
    listed = [resolve(name) for name in public_names()]
    for block in blocks_of(page):
        for module, names in re.findall(r'^from (mmslide\b\S*) import ([^#\n]+)', block.code, re.M):
            for name in names.strip('() ').split(', '):
                thing = getattr(import_module(module), name)
                assert thing in listed or inspect.ismodule(thing), (
                    f'{page_id(page)}: {module}.{name} is not on the API page'
                )


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ('link', 'message'),
    [
        ('nowhere.md', 'nowhere.md'),
        ('../mmslide/nowhere.py', 'nowhere.py'),
        ('install.md#nowhere', "does not contain an anchor '#nowhere'"),
        ('../configs/twins', 'configs/twins'),
    ],
)
def test_a_dead_link_stops_the_site(link, message, mkdocs, site_copy):
    with (site_copy / 'docs/faq.md').open('a') as page:
        page.write(f'\n[somewhere]({link})\n')
    result = build_site(mkdocs, site_copy / 'site', site_copy)
    assert result.returncode == 1
    assert message in result.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        ('        patience: number', '        number', "CheckNonFiniteHook: undocumented arguments ['patience']"),
        (
            '        patience: number',
            '        size: none.\n        patience: number',
            "documented arguments ['size'] do not exist",
        ),
    ],
)
def test_a_wrong_docstring_stops_the_site(old, new, message, mkdocs, site_copy):
    hooks = site_copy / 'mmslide/hooks.py'
    assert old in hooks.read_text()
    hooks.write_text(hooks.read_text().replace(old, new))
    result = build_site(mkdocs, site_copy / 'site', site_copy)
    assert result.returncode == 1
    assert message in result.stderr


@pytest.fixture
def notebook():
    nbformat = pytest.importorskip('nbformat')
    return nbformat.read(ROOT / 'docs/tutorial.ipynb', as_version=4)


def test_the_notebook_is_committed_without_outputs(notebook):
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            assert not cell.outputs
            assert cell.execution_count is None
            compile(re.sub(r'^[!%].*$', '', cell.source, flags=re.M), cell.id, 'exec')
        for link in re.findall(r'\]\(([^)#]+)', cell.source if cell.cell_type == 'markdown' else ''):
            assert (ROOT / 'docs' / link).is_file(), link


@NEEDS_EXPORT
@pytest.mark.exhaustive
def test_the_notebook_runs(notebook, checkout):
    """As it is committed, but with fewer images."""
    nbclient = pytest.importorskip('nbclient')
    (data,) = (cell for cell in notebook.cells if '--num-train 400' in cell.source)
    data.source = data.source.replace('--num-train 400', '--num-train 40')
    resources = dict(metadata=dict(path=str(checkout / 'docs')))
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name='python3', resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    text = ''.join(output.get('text', '') for output in outputs)
    assert re.search(r'bbox_mAP: \S+.*segm_mAP: \S+', text)
    assert 'work_dirs/tutorial/model.onnx is written' in text
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 4
