"""Packaging; the metadata is in pyproject.toml.

openmim looks for configs, tools and model-index.yml in site-packages/mmslide/.mim. A wheel has copies there. An
editable install has one-line files that refer to the checkout, so that edited configs and tools are used.
"""

import platform
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent


class BuildWithMim(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        mim = Path(self.build_lib, 'mmslide', '.mim')
        shutil.rmtree(mim, ignore_errors=True)
        # Tools that only work in a checkout.
        left_out = shutil.ignore_patterns('__pycache__', 'setup_env.sh', 'benchmark.py')
        for name in ('configs', 'tools'):
            shutil.copytree(ROOT / name, mim / name, ignore=left_out)
        shutil.copy(ROOT / 'model-index.yml', mim)


class BuildLibrary(build_ext):
    """The kernels are a library of C functions loaded with ctypes: its name has no Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split('.')).with_suffix('.so'))


class AnyPythonWheel(bdist_wheel):
    """One wheel per platform for all Python versions."""

    def get_tag(self) -> tuple[str, str, str]:
        return 'py3', 'none', super().get_tag()[2]


class EditableWithMim(editable_wheel):
    def _run_build_commands(self, dist_name, unpacked_wheel, build_lib, tmp_dir):  # type: ignore[no-untyped-def]
        result = super()._run_build_commands(dist_name, unpacked_wheel, build_lib, tmp_dir)
        mim = Path(unpacked_wheel, 'mmslide', '.mim')
        for path in (ROOT / 'configs').rglob('*.py'):
            write(mim / path.relative_to(ROOT), f'_base_ = {str(path)!r}\n')
        for path in (ROOT / 'tools').glob('*.py'):
            lead = f'import runpy\n\nrunpy.run_path({str(path)!r}, run_name={"__main__"!r})\n'
            write(mim / path.relative_to(ROOT), lead)
        metafiles = sorted(str(path) for path in (ROOT / 'configs').glob('*/metafile.yml'))
        write(mim / 'model-index.yml', 'Import:\n' + ''.join(f'  - {path}\n' for path in metafiles))
        return result


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# If no compiler can build it, everything works with the slower backend 'tapwise' instead.
native = Extension(
    'mmslide.ops._native',
    ['mmslide/ops/native.cpp'],
    language='c++',
    extra_compile_args=[
        *('-O3', '-std=c++17', '-fopenmp'),
        *(('-mavx2', '-mfma', '-mf16c') if platform.machine() in ('x86_64', 'AMD64') else ()),
    ],
    extra_link_args=['-fopenmp'],
    optional=True,
)

setup(
    # Home-page, which `mim list` prints as the source; the URLs in pyproject.toml are no Home-page.
    url='https://arxiv.org/abs/2304.04237',
    ext_modules=[native],
    packages=find_packages(include=['mmslide', 'mmslide.*']),
    # Makes an editable install a plain path entry, so that site-packages/mmslide/.mim is not a second package.
    package_dir={'': '.'},
    include_package_data=False,
    cmdclass=dict(
        build_py=BuildWithMim, build_ext=BuildLibrary, bdist_wheel=AnyPythonWheel, editable_wheel=EditableWithMim
    ),
)
