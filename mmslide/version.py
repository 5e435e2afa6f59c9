from __future__ import annotations  # mmslide.doctor reads this with an older Python too

import re

__version__ = '0.2.0'

PYTHON = '3.10'  # and later, as in pyproject.toml
# Supported versions: from the first (inclusive) to the second (exclusive).
VERSIONS = {
    'torch': ('2.1', '3'),
    'mmengine': ('0.10', '1'),
    'mmcv': ('2.0.0', '3'),
    'mmdet': ('3.1', '4'),
    'mmseg': ('1.0', '2'),
    'mmpretrain': ('1.0', '2'),
}
REQUIRED = ('torch', 'mmengine', 'mmcv')
DISTRIBUTIONS = {'mmseg': 'mmsegmentation'}
# mmdet and mmseg refuse mmcv 2.2. The forks' mmcv, which goes on to 2.3, is another distribution, onedl-mmcv.
LIMITS = {'mmcv': '2.2.0'}


def version_range(name: str) -> str:
    """The versions of an installed package that are supported."""
    return '>={},<{}'.format(*VERSIONS[name])


def fits(name: str, version: str) -> bool:
    """Whether a version of an installed package is supported; text that is no version is not."""
    minimum, limit = map(_key, VERSIONS[name])
    return minimum <= _key(version) < limit


def _key(version: str) -> list[int]:
    numbers, suffix = re.fullmatch(r'([\d.]*)(.*)', version.split('+')[0]).groups()  # type: ignore[union-attr]
    release = [int(number) for number in f'{numbers}.0.0'.split('.') if number]
    return [*release[:3], -bool(re.match(r'a|b|rc|dev', suffix))]  # 2.0.0rc4 is before 2.0.0


def requirement(name: str) -> str:
    """The requirement for pip and mim, quoted for a shell."""
    minimum, limit = VERSIONS[name]
    return f'"{DISTRIBUTIONS.get(name, name)}>={minimum},<{LIMITS.get(name, limit)}"'


def install_command(*names: str, options: str = '', requirements: str = '') -> str:
    """The shell command that installs packages in supported versions, or in those of `requirements`."""
    # In an isolated build mmcv finds no torch and leaves out its operators.
    isolation = '--no-build-isolation ' if 'mmcv' in names else ''
    wanted = requirements or ' '.join(map(requirement, names))
    return f'{"pip" if "torch" in names else "mim"} install {options}{isolation}{wanted}'
