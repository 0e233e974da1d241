"""A multilingual federation that anyone with Debian can have: one silo for each language of a book.

python -m benchmarks.handbook [--out data/handbook]

The Debian Administrator's Handbook comes as the package `debian-handbook`, translated into many
languages as far as volunteers got. Each language that has enough of it gets a folder with
train.jsonl and validation.jsonl, one section a document. The book says the same in every
language, so the split is by chapter, and the same chapters are for validation in all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from dept_fl.checkpoint import whole_folder
from dept_fl.errors import DeptError
from dept_fl.progress import Progress

PACKAGE = "debian-handbook"
HTML = Path("usr/share/doc/debian-handbook/html")
OUT = Path("data/handbook")
ORIGINAL = "en-US"
LEAST_BYTES = 400_000
# Of a common size and well translated in every language that has enough of the book.
VALIDATION_CHAPTERS = ("unix-services", "solving-problems")

Split = Literal["train", "validation"]
Element = ElementTree.Element

_XHTML = "{http://www.w3.org/1999/xhtml}"
_FACTS = "handbook.json"  # marks a folder as written here
_DOCUMENT_LEVEL = 3  # h2 and h3 begin a document; what is below belongs to it
_SMALLEST_LEVEL = 6  # titles of sidebars and paragraphs
_BLOCKS = {"div", "pre", "ul", "ol", "dl", "table"}
_CODE = {"code", "kbd"}
_CAPTIONED = {"example", "figure", "table"}
_LEFT_OUT = {"toc", "url", "docnav", "legalnotice"}
_NUMBER = re.compile(r"\A(?:\d+|[A-Z])(?:\.\d+)*\.\s+")
_WHITE = re.compile(r"[ \t\r\n]+")  # a no-break space is part of the text
_NO_LETTERS = re.compile(r"[\W\d_]+")
_SENTENCE_END = re.compile(r"(?<=[.!?؟])\s+|(?<=[。！？])")
_SENTENCE_BYTES = 30  # shorter ones repeat by chance


# ---- what is on a page -----------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A heading or a paragraph.

    Attributes:
        level: of a heading, 1 to 6; 0 is prose.
        text: as it is read, white space normalised.
        letters: those that a translator writes, alone: without code, and without references,
            whose numbers and titles follow the language of the whole edition.
        label: the kind of sidebar, which stands before its title.
    """

    level: int
    text: str
    letters: str
    label: str = ""


@dataclass(frozen=True)
class Page:
    """A page of one language: a chapter's beginning or one of its sections."""

    name: str
    chapter: str
    blocks: list[Block]


def read_page(file: Path) -> Page | None:
    """A page's headings and prose; None for one that belongs to no chapter, as the title page.

    Raises:
        DeptError: the file is no XHTML.
    """
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise DeptError(f"{file}: not readable as XHTML: {error}") from error
    above = [e.get("href", "") for e in root.iter(f"{_XHTML}link") if e.get("rel") == "up"]
    if not above:
        return None
    chapter = file.name if above[0] == "index.html" else above[0]
    return Page(file.stem, Path(chapter).stem, list(_blocks(root)))


def _blocks(element: Element) -> Iterator[Block]:
    for child in element:
        if _tag(child) == "pre" or _class(child) in _LEFT_OUT:
            continue
        if level := _heading_level(child):
            if _class(element) not in _CAPTIONED:
                yield _heading(child, level)
        else:
            if _class(child) == "para" or (_tag(child), _class(child)) == ("span", "term"):
                yield from _prose(child)
            yield from _blocks(child)


def _tag(element: Element) -> str:
    return element.tag.removeprefix(_XHTML)


def _class(element: Element) -> str:
    return element.get("class", "").partition(" ")[0]


def _heading_level(element: Element) -> int:
    tag = _tag(element)
    if tag in ("h1", "h2", "h3", "h4", "h5"):
        return int(tag[1])
    return _SMALLEST_LEVEL if tag in ("p", "div") and _class(element) == "title" else 0


def _heading(element: Element, level: int) -> Block:
    emphasis = next((e for e in element.iter() if _class(e) == "emphasis"), None)
    label = "" if emphasis is None else _normalised(_raw(emphasis))
    text, own = (_NUMBER.sub("", _normalised(_raw(element, only))) for only in (False, True))
    if level != _SMALLEST_LEVEL or not label or not text.startswith(label):
        return Block(level, text, letters(own))
    return Block(level, text.removeprefix(label).strip(), letters(own.removeprefix(label)), label)


def _prose(element: Element) -> Iterator[Block]:
    """A paragraph; several, where a list or code stands within it."""
    texts, owns = (_raw(element, only).split("\0") for only in (False, True))
    for text, own in zip(texts, owns, strict=True):
        if _normalised(text):
            yield Block(0, _normalised(text), letters(own))


def _raw(element: Element, only_own: bool = False) -> str:
    """The element's own text, with a NUL for each block within it."""
    parts = [element.text or ""]
    for child in element:
        if _tag(child) in _BLOCKS:
            parts.append("\0")
        elif not only_own or (_tag(child) not in _CODE and _class(child) != "xref"):
            parts.append(_raw(child, only_own))
        parts.append(child.tail or "")
    return "".join(parts)


def _normalised(text: str) -> str:
    return _WHITE.sub(" ", text.replace("\0", " ")).strip(" ")


def letters(text: str) -> str:
    return _NO_LETTERS.sub("", text.casefold())


# ---- what is translated ----------------------------------------------------------------------


class Original:
    """The English text, to tell what of another edition is left as it was."""

    def __init__(self, pages: Iterable[Page]) -> None:
        blocks = [block for page in pages for block in page.blocks]
        self._letters = {block.letters for block in blocks}
        self._labels = {block.label for block in blocks}

    def has(self, block: Block) -> bool:
        """Whether the block is in English still, but for references and code."""
        return block.letters in self._letters

    def without_its_label(self, block: Block) -> Block:
        return replace(block, label="") if block.label in self._labels else block


@dataclass(frozen=True)
class Document:
    """A section in one language.

    Attributes:
        place: page and number of the section on it, the same in every language.
        blocks: those that are translated.
    """

    place: str
    chapter: str
    blocks: list[Block]

    @property
    def text(self) -> str:
        return "\n\n".join(f"{b.label} {b.text}".strip() for b in self.blocks)


@dataclass(frozen=True)
class Edition:
    """The book in one language, as far as it is translated.

    Attributes:
        name: language and country, such as pt-BR.
        paragraphs: how many the book has.
        untranslated: how many of them are left in English.
    """

    name: str
    documents: list[Document]
    paragraphs: int
    untranslated: int

    @property
    def language(self) -> str:
        return self.name.partition("-")[0].lower()

    @cached_property
    def text_bytes(self) -> int:
        return sum(len(document.text.encode()) for document in self.documents)

    def split(self, split: Split) -> list[Document]:
        """The documents of a split; what stands in both is left to validation alone.

        Their order is mixed, the same in every language, so that a part is a sample.
        """
        chosen = [d for d in self.documents if d.chapter in VALIDATION_CHAPTERS]
        if split == "train":
            rest = [d for d in self.documents if d.chapter not in VALIDATION_CHAPTERS]
            chosen = list(_without_sentences_of(rest, chosen))
        return sorted(chosen, key=lambda d: hashlib.sha256(d.place.encode()).digest())


def edition(name: str, pages: Sequence[Page], original: Original) -> Edition:
    """What of the pages is in the edition's own language."""
    prose = [b for page in pages for b in page.blocks if not b.level and b.letters]
    is_original = name == ORIGINAL
    documents = [
        Document(place, page.chapter, kept)
        for page in pages
        for place, blocks in _sections(page)
        if (kept := _with_prose(_own(blocks, original, is_original)))
    ]
    left = 0 if is_original else sum(original.has(block) for block in prose)
    return Edition(name, documents, len(prose), left)


def _sections(page: Page) -> Iterator[tuple[str, list[Block]]]:
    number, blocks = 0, list[Block]()
    for block in page.blocks:
        if 0 < block.level <= _DOCUMENT_LEVEL and blocks:
            yield f"{page.name}#{number}", blocks
            number, blocks = number + 1, []
        blocks.append(block)
    yield f"{page.name}#{number}", blocks


def _own(blocks: Iterable[Block], original: Original, is_original: bool) -> list[Block]:
    # A chapter's title is left out: its number stands where each language wants it.
    lettered = [block for block in blocks if block.letters and block.level != 1]
    if is_original:
        return lettered
    return [original.without_its_label(block) for block in lettered if not original.has(block)]


def _with_prose(blocks: Sequence[Block]) -> list[Block]:
    """Without headings that stand above nothing."""
    none = Block(1, "", "")
    return [b for b, after in pairwise([*blocks, none]) if not b.level or not after.level]


def sentences(text: str) -> set[str]:
    """The longer sentences of a text."""
    found = (sentence.strip().casefold() for sentence in _SENTENCE_END.split(text))
    return {sentence for sentence in found if len(sentence.encode()) >= _SENTENCE_BYTES}


def _without_sentences_of(
    documents: Iterable[Document], held_out: Iterable[Document]
) -> Iterator[Document]:
    """The documents without the paragraphs that share a sentence with those held out."""
    blocks = chain.from_iterable(document.blocks for document in held_out)
    known = set[str]().union(*(sentences(block.text) for block in blocks))
    for document in documents:
        kept = [b for b in document.blocks if b.level or known.isdisjoint(sentences(b.text))]
        if kept := _with_prose(kept):
            yield replace(document, blocks=kept)


# ---- the book --------------------------------------------------------------------------------


def editions(html: Path, least_bytes: int = LEAST_BYTES) -> list[Edition]:
    """The languages with at least so much of the book, each once, the original among them.

    Raises:
        DeptError: there is no such book, not with the chapters for validation, or too little.
    """
    folders = sorted(file.parent for file in html.glob("*-*/index.html"))
    pages = {folder.name: _pages(folder) for folder in folders}
    chapters = {page.chapter for page in pages.get(ORIGINAL, [])}
    if not chapters.issuperset(VALIDATION_CHAPTERS):
        raise DeptError(
            f"{html}: no {PACKAGE} with {ORIGINAL}/ and its chapters {VALIDATION_CHAPTERS}; "
            "give the folder html of that package"
        )
    original = Original(pages[ORIGINAL])
    made = [edition(name, found, original) for name, found in pages.items()]
    made.sort(key=lambda each: each.text_bytes)
    largest = {each.language: each for each in made if each.text_bytes >= least_bytes}
    if not largest:
        raise DeptError(f"{html}: no language has {least_bytes:,} bytes of prose; is it whole?")
    return sorted(largest.values(), key=lambda each: each.language)


def _pages(folder: Path) -> list[Page]:
    found = (read_page(file) for file in sorted(folder.glob("*.html")))
    return [page for page in found if page is not None]


@contextmanager
def installed_book() -> Iterator[Path]:
    """The package's folder html: the installed one, else that of a package fetched for the time.

    Raises:
        DeptError: neither is to be had.
    """
    if (Path("/") / HTML / ORIGINAL).is_dir():
        yield Path("/") / HTML
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run(["apt-get", "download", PACKAGE], folder)
        for package in folder.glob("*.deb"):
            _run(["dpkg-deb", "-x", package.name, "."], folder)
        yield folder / HTML


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1]
        raise DeptError(
            f"{PACKAGE}: not installed, and {command[0]} cannot get it ({said}); on Debian or "
            f"Ubuntu run `apt-get update` and `apt-get install {PACKAGE}`; elsewhere unpack that "
            "package and give its folder html with --html"
        ) from error


# ---- the silos -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What a language has, for the table."""

    language: str
    edition: str
    train_sections: int
    train_bytes: int
    validation_sections: int
    validation_bytes: int
    untranslated_share: float


def check_out(out: Path) -> None:
    """Raise DeptError if the folder holds what was not written here."""
    if out.exists() and not (out / _FACTS).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise DeptError(f"--out {out}: holds something else; name a folder that is new or empty")


def write_silos(made: Iterable[Edition], out: Path) -> list[Row]:
    """Write train.jsonl and validation.jsonl of each language; what was written before goes.

    Raises:
        DeptError: the folder holds something else.
    """
    check_out(out)
    with whole_folder(out, overwrite=True) as draft:
        rows = [_write_silo(each, draft / each.language) for each in made]
        facts = json.dumps([asdict(row) for row in rows], indent=1)
        (draft / _FACTS).write_text(facts + "\n", encoding="utf-8")
    return rows


def _write_silo(made: Edition, folder: Path) -> Row:
    folder.mkdir()
    counts: Counter[str] = Counter()
    for split in ("train", "validation"):
        documents = made.split(split)
        lines = [
            json.dumps({"text": d.text, "section": d.place}, ensure_ascii=False) for d in documents
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        counts[f"{split}_sections"] = len(documents)
        counts[f"{split}_bytes"] = sum(len(d.text.encode()) for d in documents)
    share = round(made.untranslated / made.paragraphs, 3)
    return Row(made.language, made.name, **counts, untranslated_share=share)


def table(rows: Collection[Row]) -> str:
    head = f"{'language':<10}{'sections':>9}{'train MB':>10}{'validation kB':>15}"
    lines = [f"{head}{'untranslated':>14}"]
    lines += [
        f"{row.edition:<10}{row.train_sections + row.validation_sections:>9}"
        f"{row.train_bytes / 1e6:>10.2f}{row.validation_bytes / 1e3:>15.0f}"
        f"{row.untranslated_share:>14.0%}"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT}")
    parser.add_argument("--html", type=Path, help="the package's folder html; default: found")
    options = parser.parse_args(arguments)
    try:
        check_out(options.out)
        with Progress().stage("reading the book"):
            if options.html:
                made = editions(options.html)
            else:
                with installed_book() as html:
                    made = editions(html)
            rows = write_silos(made, options.out.absolute())
    except DeptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    print(f"\n{len(rows)} silos in {options.out}; untranslated: share of paragraphs, left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
