"""MkDocs hook: relative links that work on GitHub also work in the site, including those to files outside docs/.

A linked file outside docs/ becomes a part of the site below `repository/`: a Markdown file as a page, a picture
unchanged, any other file as a page that shows its text, and a directory as a list of its files. A link to a file that
does not exist stays unchanged, so that MkDocs reports it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = "docs/"
OUTSIDE = "repository/"
INDEX = "README.md"
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
UNCHANGED = {".md", ".png", ".svg"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash"}


def on_config(config: MkDocsConfig) -> None:
    """Replace `DIRECTORY/*` in the navigation by the pages of the directory, README.md first."""
    config.nav = _expand(config.nav)


def _expand(item: Any) -> Any:
    if isinstance(item, list):
        return [_expand(each) for each in item]
    if isinstance(item, dict):
        return {title: _expand(each) for title, each in item.items()}
    if isinstance(item, str) and item.endswith("/*"):
        pages = sorted((ROOT / DOCS / item).parent.glob("*.md"), key=lambda page: (page.name != INDEX, page.name))
        return [page.relative_to(ROOT / DOCS).as_posix() for page in pages]
    return item


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add every file outside docs/ that a page links to, and the files that those pages link to."""
    pages = [DOCS + file.src_uri for file in files.documentation_pages()]
    seen = set(pages)
    while pages:
        page = pages.pop()
        for path in set(_linked_paths(page)) - seen:
            seen.add(path)
            if path.startswith(DOCS) or not (ROOT / path).exists():
                continue
            files.append(_file(path, config))
            if path.endswith(".md"):
                pages.append(path)


def _linked_paths(page: str) -> Iterator[str]:
    """What a page links to, as paths in the repository."""
    for link in LINK.findall((ROOT / page).read_text()):
        if "://" not in link:
            yield _resolved(page, link)


def _resolved(page: str, link: str) -> str:
    path = os.path.normpath(PurePosixPath(page).parent / link)
    return f"{path}/{INDEX}" if (ROOT / path / INDEX).is_file() else path


def _file(path: str, config: MkDocsConfig) -> File:
    source = ROOT / path
    if source.suffix in UNCHANGED:
        return File.generated(config, _uri(path), abs_src_path=str(source))
    text = "\n".join(sorted(each.name for each in source.iterdir())) if source.is_dir() else source.read_text()
    content = f"# {path}\n\n~~~~{LANGUAGES.get(source.suffix, 'text')}\n{text}\n~~~~\n"
    return File.generated(config, _uri(path), content=content)


def _uri(path: str) -> str:
    """The place of a file of the repository among the sources of the site."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return OUTSIDE + (path if Path(path).suffix in UNCHANGED else f"{path}.md")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links between docs/ and the rest of the repository."""
    uri = page.file.src_uri
    path = uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else DOCS + uri
    if not (ROOT / path).is_file():  # a page that shows the text of another file
        return markdown

    def rewritten(match: re.Match[str]) -> str:
        target = "" if "://" in match[0] else _resolved(path, match[0])
        if not target or not (ROOT / target).exists():
            return match[0]
        return os.path.relpath(_uri(target), PurePosixPath(uri).parent)

    return LINK.sub(rewritten, markdown)
