"""Links into the code: a linked file of this repository becomes a page of the site.

`[pretrain](../dept_fl/rounds.py#pretrain)` is a link to the file where the page is read in the
repository; in the site it leads to that function. A name that the file does not have any more
breaks the strict build.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"(?<=\]\()((?:\.\./)+[^)#\s]+)(?=[)#])")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    linked = {p for f in files.documentation_pages() for p in _linked(f.content_string, f.src_uri)}
    for path in sorted(linked):
        page = File.generated(config, f"source/{path}.md", content=source_page(path))
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    here = page.file.src_uri

    def in_site(link: re.Match[str]) -> str:
        path = _repository_path(link[1], here)
        if not path:
            return link[1]
        return posixpath.relpath(f"source/{path}.md", posixpath.dirname(here) or ".")

    return _LINK.sub(in_site, markdown)


def _linked(markdown: str, here: str) -> Iterator[str]:
    yield from filter(None, (_repository_path(link[1], here) for link in _LINK.finditer(markdown)))


def _repository_path(link: str, here: str) -> str:
    """The path of a linked file that is no page; empty: it is one, or there is none."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(here), link))
    return path if not path.startswith("docs/") and (ROOT / path).is_file() else ""


def source_page(path: str) -> str:
    """A source file as a page, with a heading for each function, class and ordinary method."""
    text = (ROOT / path).read_text(encoding="utf-8")
    parts = [("", text.rstrip("\n"))]
    if path.endswith(".py"):
        parts = list(_parts(text))
    language = _LANGUAGES.get(Path(path).suffix, "text")
    lines = ["---\nsearch: {exclude: true}\n---", f"# {path}"]
    for name, code in parts:
        if name:
            lines.append(f"{'###' if '.' in name else '##'} `{name}` {{: #{name} }}")
        if code.strip():
            lines.append(f"~~~~~{language}\n{code}\n~~~~~")
    return "\n\n".join(lines)


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """The text cut before each definition, with the comment above it; names as ``Class.method``."""
    lines = text.splitlines()
    cuts = [(0, "")]
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        cuts.append((_start(node, lines), node.name))
        for inner in node.body if isinstance(node, ast.ClassDef) else []:
            function = isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            if function and not inner.name.startswith("__"):
                cuts.append((_start(inner, lines), f"{node.name}.{inner.name}"))
    for (start, name), (end, _) in zip(cuts, [*cuts[1:], (len(lines), "")], strict=True):
        yield name, "\n".join(lines[start:end]).strip("\n")


def _start(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """The first line, from 0, of a definition with its decorators and the comment above."""
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1
    while first and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return first
