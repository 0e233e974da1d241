"""The handbook's silos: a small book made here, and the real one where it is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import handbook
from benchmarks.handbook import Block, Edition, Page, editions, read_page, write_silos
from dept_fl.errors import DeptError

REAL = Path("/") / handbook.HTML

HEAD = '<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head>{}</head><body>{}'
NAVIGATION = '<ul class="docnav"><li class="home">The Book</li></ul><p id="title">Site</p>'


def para(text: str) -> str:
    return f'<div class="para">\n\t\t{text}\n\t</div>'


def title(level: int, text: str) -> str:
    return f'<div class="titlepage"><div><h{level} class="title">{text}</h{level}></div></div>'


def sidebar(label: str, name: str, *inside: str) -> str:
    emphasis = f'<span class="emphasis"><em>{label}</em></span>'
    head = f'<div class="titlepage"><p class="title"><strong>{emphasis} {name}</strong></p></div>'
    return f'<div class="sidebar">{head}{"".join(inside)}</div>'


def write_page(folder: Path, name: str, body: str, up: str = "index.html") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    link = f'<link rel="up" href="{up}"/>' if up else ""
    file = folder / f"{name}.html"
    file.write_text(HEAD.format(link, f"{NAVIGATION}{body}</body></html>"), encoding="utf-8")
    return file


def blocks(tmp_path: Path, body: str) -> list[Block]:
    page = read_page(write_page(tmp_path, "page", body))
    assert page is not None
    return page.blocks


def found(tmp_path: Path, body: str) -> list[tuple[int, str]]:
    return [(block.level, block.text) for block in blocks(tmp_path, body)]


# ---- what is on a page -----------------------------------------------------------------------


def test_headings_prose_and_list_items_are_read_and_white_space_is_one_space(
    tmp_path: Path,
) -> None:
    items = f"<ul><li>{para('First.')}</li><li>{para('Second<br/> one.')}</li></ul>"
    term = f'<dl><dt><span class="term">A term</span></dt><dd>{para("Its meaning.")}</dd></dl>'
    body = title(2, "10.8. Networks") + para("One\n\t\tof \u00a0two.") + items + term
    assert found(tmp_path, body) == [
        (2, "Networks"),
        (0, "One of \u00a0two."),
        (0, "First."),
        (0, "Second one."),
        (0, "A term"),
        (0, "Its meaning."),
    ]


@pytest.mark.parametrize(
    "left_out",
    [
        '<pre class="screen"># ls <strong>-l</strong></pre>',
        '<div class="toc"><dl><dt><span class="term">1. One</span></dt></dl></div>',
        '<div class="example"><p class="title">Example 1.1. Code</p><pre>x</pre></div>',
        '<div class="figure"><p class="title">Figure 1.1. A picture</p><img alt="no"/></div>',
        f'<div class="legalnotice">{para("ISBN 1")}</div>',
        '<a class="indexterm"/>',
    ],
)
def test_code_captions_and_contents_are_left_out(tmp_path: Path, left_out: str) -> None:
    assert found(tmp_path, para("Before.") + left_out + para("After.")) == [
        (0, "Before."),
        (0, "After."),
    ]


def test_a_paragraph_with_code_a_list_or_an_address_in_it_is_several(tmp_path: Path) -> None:
    inside = f"Type:<pre>ls</pre>to see. <ul><li>{para('An item.')}</li></ul>"
    address = '<div class="url">→ <a href="http://x.org">http://x.org</a></div> (in English)'
    assert found(tmp_path, para(inside) + para(f"More at {address}")) == [
        (0, "Type:"),
        (0, "to see."),
        (0, "An item."),
        (0, "More at"),
        (0, "(in English)"),
    ]


@pytest.mark.parametrize("number", ["", "1. ", "10.8. ", "12.1.3. ", "B.1. ", "B.1.12. "])
def test_the_number_of_a_section_is_no_part_of_its_heading(tmp_path: Path, number: str) -> None:
    assert found(tmp_path, title(3, f"{number}Linux 2. A start")) == [(3, "Linux 2. A start")]


def test_a_sidebars_title_is_told_from_its_kind(tmp_path: Path) -> None:
    (heading,) = blocks(tmp_path, sidebar("BACK TO BASICS", "The <em>LDIF</em> format"))
    assert heading == Block(6, "The LDIF format", "theldifformat", "BACK TO BASICS")
    (heading,) = blocks(tmp_path, title(2, '<span class="emphasis"><em>Stable</em></span> Debian'))
    assert heading == Block(2, "Stable Debian", "stabledebian")


def test_letters_are_what_a_translator_writes(tmp_path: Path) -> None:
    reference = '<a class="xref" href="x">Abschnitt 3.1, „Über das Netz“</a>'
    text = f"See {reference}: run <code>apt update</code>, 2 times, in <em>MAIN</em>."
    (block,) = blocks(tmp_path, para(text))
    assert block.letters == "seeruntimesinmain"
    assert block.text == "See Abschnitt 3.1, „Über das Netz“: run apt update, 2 times, in MAIN."


def test_a_page_knows_its_chapter_and_the_title_page_is_none(tmp_path: Path) -> None:
    section = read_page(write_page(tmp_path, "sect.a", para("A."), up="network.html"))
    chapter = read_page(write_page(tmp_path, "network", para("B.")))
    assert section is not None
    assert chapter is not None
    assert [(p.name, p.chapter) for p in (section, chapter)] == [
        ("sect.a", "network"),
        ("network", "network"),
    ]
    assert read_page(write_page(tmp_path, "index", para("C."), up="")) is None


def test_a_page_that_is_no_xhtml_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<html><p>open</html>")
    with pytest.raises(DeptError, match=r"bad\.html: not readable as XHTML: mismatched tag"):
        read_page(tmp_path / "bad.html")


# ---- a small book ----------------------------------------------------------------------------

# Chapters by name, each with sections of their own page, in two languages and a half.
CHAPTERS = ("intro", "unix-services", "solving-problems", "network")
WORDS = {
    "en-US": ("{} is a chapter about the system.", "Read {} first, then come back to this page."),
    "de-DE": ("{} ist ein Kapitel über das System.", "Lies zuerst {}, dann komm hierher zurück."),
    "ja-JP": ("{} はシステムについての章です。", "まず {} を読み、このページに戻ってください。"),
    "sv-SE": ("{} is a chapter about the system.", "Read {} first, then come back to this page."),
}
REPEATED = {
    "en-US": "This very sentence stands in each of the chapters.",
    "de-DE": "Genau dieser Satz steht in jedem der Kapitel.",
    "ja-JP": "この文はまったく同じ形で各章に現れます。",
    "sv-SE": "Just den här meningen finns i varje kapitel.",
}


def write_book(html: Path) -> Path:
    for edition, (first, second) in WORDS.items():
        folder = html / edition
        write_page(folder, "index", para("The Book"), up="")
        for number, chapter in enumerate(CHAPTERS, start=1):
            name = f"{chapter.title()} "
            body = title(1, f"Chapter {number}. {name}") + para(first.format(name))
            body += sidebar("NOTE", "Only in English", para("Nobody translated this one."))
            write_page(folder, chapter, body)
            body = title(2, f"{number}.1. {second.format(name)}")
            body += para(second.format(f"{name}of {number}"))
            body += para(f"{REPEATED[edition]} {first.format(number)}") + title(3, "LDIF")
            write_page(folder, f"sect.{chapter}", body, up=f"{chapter}.html")
    return html


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Edition]:
    html = write_book(tmp_path_factory.mktemp("book"))
    return {made.name: made for made in editions(html, least_bytes=600)}


def places(made: Edition, split: handbook.Split) -> list[str]:
    return [document.place for document in made.split(split)]


def all_text(made: Edition) -> str:
    return "\n".join(document.text for document in made.documents)


def test_a_language_without_enough_of_the_book_is_left_out(book: dict[str, Edition]) -> None:
    assert list(book) == ["de-DE", "en-US", "ja-JP"]
    assert [made.language for made in book.values()] == ["de", "en", "ja"]


def test_what_is_left_in_english_is_dropped_but_from_the_original(book: dict[str, Edition]) -> None:
    for name, made in book.items():
        assert ("Nobody translated" in all_text(made)) == (name == "en-US")
        assert ("Only in English" in all_text(made)) == (name == "en-US")
        assert made.paragraphs == 16
        assert made.untranslated == (0 if name == "en-US" else 4)
    assert "Network of 4" in all_text(book["ja-JP"])


def test_a_heading_above_nothing_is_dropped(book: dict[str, Edition]) -> None:
    assert "LDIF" not in all_text(book["en-US"])
    assert "Chapter" not in all_text(book["de-DE"])


def test_a_document_is_a_heading_and_what_stands_below_it(book: dict[str, Edition]) -> None:
    texts = {d.place: d.text for d in book["de-DE"].documents}
    assert texts["sect.network#0"].split("\n\n") == [
        "Lies zuerst Network , dann komm hierher zurück.",
        "Lies zuerst Network of 4, dann komm hierher zurück.",
        "Genau dieser Satz steht in jedem der Kapitel. 4 ist ein Kapitel über das System.",
    ]


def test_the_same_chapters_are_for_validation_in_every_language(book: dict[str, Edition]) -> None:
    validation = {"unix-services#0", "solving-problems#0"}
    validation |= {f"sect.{place}" for place in validation}
    for made in book.values():
        assert set(places(made, "validation")) == validation
        assert not set(places(made, "train")) & validation
        assert places(made, "validation") == places(book["en-US"], "validation")


def test_no_sentence_stands_in_both_splits(book: dict[str, Edition]) -> None:
    for name, made in book.items():
        for split, there in (("train", False), ("validation", True)):
            texts = "\n".join(document.text for document in made.split(split))
            assert (REPEATED[name] in texts) == there


def test_sections_of_the_second_and_third_level_begin_a_document() -> None:
    levels = [1, 0, 2, 0, 6, 0, 3, 0, 4, 0, 2, 0]
    page = Page("p", "intro", [Block(v, f"t{i}", f"t{i}") for i, v in enumerate(levels)])
    made = handbook.edition("xx-XX", [page], handbook.Original([]))
    assert [(d.place, d.text.split("\n\n")) for d in made.documents] == [
        ("p#0", ["t1"]),
        ("p#1", ["t2", "t3", "t4", "t5"]),
        ("p#2", ["t6", "t7", "t8", "t9"]),
        ("p#3", ["t10", "t11"]),
    ]


def test_the_kind_of_a_sidebar_that_is_left_in_english_is_dropped() -> None:
    original = handbook.Original([Page("p", "c", [Block(6, "Formats", "formats", "NOTE")])])
    for label, text in (("NOTE", "書式\n\n本文"), ("注", "注 書式\n\n本文")):
        page = Page("p", "c", [Block(6, "書式", "書式", label), Block(0, "本文", "本文")])
        assert handbook.edition("ja-JP", [page], original).documents[0].text == text


def test_of_two_editions_of_a_language_the_larger_is_taken(tmp_path: Path) -> None:
    html = write_book(tmp_path)
    shutil.copytree(html / "de-DE", html / "de-AT")
    (html / "de-AT" / "sect.network.html").unlink()
    assert [made.name for made in editions(html, least_bytes=600)] == ["de-DE", "en-US", "ja-JP"]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (f"{'A' * 29}. {'b' * 29}! short.", {f"{'a' * 29}.", f"{'b' * 29}!"}),
        (f"www.x.org {'a' * 30}", {f"www.x.org {'a' * 30}"}),
        (f"{'日' * 9}。{'本' * 10}。", {f"{'日' * 9}。", f"{'本' * 10}。"}),
        (f"{'日' * 8}。{'ش' * 15}؟ {'ش' * 4}", {f"{'ش' * 15}؟"}),
    ],
)
def test_sentences_that_are_long_enough_are_told_apart(text: str, sentences: set[str]) -> None:
    assert handbook.sentences(text) == sentences


# ---- what is written -------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def test_each_language_gets_two_files_and_a_row(tmp_path: Path, book: dict[str, Edition]) -> None:
    rows = write_silos(book.values(), tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {
        "handbook.json",
        *(f"{name}/{split}.jsonl" for name in ("de", "en", "ja") for split in handbook_splits()),
    }
    for row, made in zip(rows, book.values(), strict=True):
        for split in handbook_splits():
            file = tmp_path / "out" / made.language / f"{split}.jsonl"
            written = [json.loads(line) for line in file.read_text().splitlines()]
            assert [each["section"] for each in written] == places(made, split)
            texts = [each["text"] for each in written]
            assert texts == [document.text for document in made.split(split)]
            assert getattr(row, f"{split}_bytes") == len("".join(texts).encode())
            assert getattr(row, f"{split}_sections") == 4
    assert [row.untranslated_share for row in rows] == [0.25, 0.0, 0.25]
    lines = handbook.table(rows).splitlines()
    assert [line.split() for line in lines][1:3] == [
        ["de-DE", "8", "0.00", "0", "25%"],
        ["en-US", "8", "0.00", "1", "0%"],
    ]


def handbook_splits() -> tuple[handbook.Split, handbook.Split]:
    return ("train", "validation")


def test_a_folder_written_before_is_written_anew_and_whole(
    tmp_path: Path, book: dict[str, Edition]
) -> None:
    write_silos(book.values(), tmp_path / "out")
    first = contents(tmp_path / "out")
    (tmp_path / "out" / "sv").mkdir(exist_ok=True)
    (tmp_path / "out" / "de" / "train.jsonl").write_text("")
    write_silos(book.values(), tmp_path / "out")
    assert contents(tmp_path / "out") == first
    assert not (tmp_path / "out" / "sv").exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_was_not_written_here_is_not_touched(
    tmp_path: Path, book: dict[str, Edition], kind: str
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    with pytest.raises(DeptError, match=r"holds something else; name a folder that is new or em"):
        write_silos(book.values(), tmp_path if kind == "folder" else mine)
    assert contents(tmp_path) == {"mine.txt": "mine"}


def test_the_command_tells_what_is_wrong_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for html, message in (
        (tmp_path, "no debian-handbook with en-US/ and its chapters"),
        (write_book(tmp_path / "book"), "no language has 400,000 bytes of prose; is it whole?"),
    ):
        assert handbook.main(["--html", str(html), "--out", str(out)]) == 1
        assert re.search(rf"^error: .*: {message}", capsys.readouterr().err, re.MULTILINE)
    assert not out.exists()


# ---- where the book comes from ---------------------------------------------------------------


def test_a_book_that_cannot_be_had_is_told_with_the_mend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(handbook, "HTML", Path("nowhere"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeptError) as raised, handbook.installed_book():
        pass
    assert str(raised.value).startswith("debian-handbook: not installed, and apt-get cannot get it")
    assert "`apt-get install debian-handbook`" in str(raised.value)
    assert "--html" in str(raised.value)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_a_package_that_is_fetched_is_unpacked_for_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A package made here; a stand-in for apt-get hands it out, since it comes from an archive."""
    monkeypatch.setattr(handbook, "HTML", Path("usr/share/doc/a-small-book/html"))
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: debian-handbook\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n"
    )
    write_book(tree / handbook.HTML)
    command = ["dpkg-deb", "--root-owner-group", "-b", str(tree), str(tmp_path / "book.deb")]
    subprocess.run(command, check=True, capture_output=True)
    fetcher = tmp_path / "bin" / "apt-get"
    fetcher.parent.mkdir()
    fetcher.write_text(
        f'#!/bin/sh\n[ "$*" = "download debian-handbook" ] && cp {tmp_path}/*.deb .\n'
    )
    fetcher.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fetcher.parent}:{os.environ['PATH']}")
    with handbook.installed_book() as html:
        assert len(editions(html, least_bytes=600)) == 3
    assert not html.exists()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (REAL / "en-US").is_dir():
        pytest.skip("debian-handbook is not installed, or without its documentation")
    out = tmp_path_factory.mktemp("real") / "handbook"
    assert handbook.main(["--out", str(out)]) == 0
    return out


def real_texts(folder: Path) -> list[str]:
    files = (folder / f"{split}.jsonl" for split in handbook_splits())
    return [json.loads(line)["text"] for file in files for line in file.open(encoding="utf-8")]


def test_the_real_book_has_the_recipes_languages(real: Path) -> None:
    folders = sorted(folder.name for folder in real.iterdir() if folder.is_dir())
    assert folders == "ar ca de en es fa fr id it ja nb pt ru zh".split()


def test_the_real_silos_are_large_enough_and_hold_out_two_chapters(real: Path) -> None:
    for row in json.loads((real / "handbook.json").read_text()):
        assert 400_000 < row["train_bytes"] < 900_000
        assert 60_000 < row["validation_bytes"] < 130_000
        assert row["untranslated_share"] <= 0.51


def test_the_real_silos_hold_neither_markup_nor_english(real: Path) -> None:
    english = re.compile(r"\b(?:the|and|which|with|are|this)\b")
    for folder in (f for f in real.iterdir() if f.is_dir()):
        texts = real_texts(folder)
        whole = "\n".join(texts)
        assert "\ufffd" not in whole
        assert "\t" not in whole
        assert not re.search(r"</?(?:div|span|em|code|p)\b", whole)
        if folder.name != "en":
            paragraphs = whole.split("\n")
            left = [p for p in paragraphs if len(english.findall(p)) >= 4]
            assert sum(map(len, left)) < 0.002 * len(whole)
