"""MkDocs hook: README, CONTRIBUTING, CHANGELOG and the configs' pages are part of the site, and so is every file of the
repository that a page links to. Links stay as they work in a checkout and on GitHub; here they are rewritten.

In the site `docs/` is the root, and everything else keeps its path. Undocumented arguments of the names on the API
page, and documented ones that do not exist, stop the build.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = [
    'README.md',
    'CONTRIBUTING.md',
    'CHANGELOG.md',
    *(f'configs/{x.parent.name}/README.md' for x in ROOT.glob('configs/*/README.md')),
]
# The address of [text](address#anchor) and <img src="address">, unless it is a URL or an anchor alone.
LINK = re.compile(r'(?<=\]\()(?!\w+:|#)[^)#\s]+|(?<=src=")(?!\w+:)[^"]+')
API = ROOT / 'docs/api.md'


def on_pre_build(config: MkDocsConfig) -> None:
    if problems := docstring_problems():
        raise PluginError('\n'.join(problems))


def docstring_problems() -> list[str]:
    """The problems in the docstrings of the API page, one line each."""
    package = griffe.load('mmslide', search_paths=[ROOT], resolve_aliases=True)
    problems = []
    for name in re.findall(r'^::: (\S+)$', API.read_text(), re.M):
        thing = package[name.removeprefix('mmslide.')]
        if thing.is_module:  # with a function of the same name
            thing = thing[thing.name]
        parts = [thing, *thing.mro()] if thing.is_class else [thing]
        arguments = {parameter.name.lstrip('*') for parameter in thing.parameters} - {'self'}
        documented = {name for part in parts for name in documented_arguments(part)}
        if not thing.docstring:
            problems.append(f'{name}: no docstring')
        if missing := arguments - documented:
            problems.append(f'{name}: undocumented arguments {sorted(missing)}')
        # The arguments of a class without an `__init__` in mmslide are from another package, which is not loaded.
        if arguments and (unknown := documented - arguments):
            problems.append(f'{name}: documented arguments {sorted(unknown)} do not exist')
    return problems


def documented_arguments(thing: griffe.Object | griffe.Alias) -> set[str]:
    sections = thing.docstring.parse('google', warnings=False) if thing.docstring else []
    return {
        name  # one line may document several, `q, k, v: ...`
        for section in sections
        if section.kind is griffe.DocstringSectionKind.parameters
        for parameter in section.value
        for name in parameter.name.split(', ')
    }


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in PAGES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for page in files.documentation_pages():
        for link in LINK.findall(page.content_string):
            target = target_of(link, page)
            if not files.get_file_from_path(in_site(target)) and (ROOT / target).is_file():
                files.append(File.generated(config, in_site(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    folder = posixpath.dirname(page.file.src_uri) or '.'
    return LINK.sub(lambda link: posixpath.relpath(in_site(target_of(link[0], page.file)), folder), markdown)


def target_of(link: str, page: File) -> str:
    """The path in the repository that a page's link leads to."""
    source = page.src_uri if page.src_uri in PAGES else f'docs/{page.src_uri}'
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def in_site(path: str) -> str:
    return path.removeprefix('docs/')
