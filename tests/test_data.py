"""From data sources to documents, from documents to the token stream and its batches."""

from __future__ import annotations

import bz2
import gzip
import inspect
import io
import json
import lzma
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import numpy.typing as npt
import pyarrow
import pytest
import torch
from pyarrow import parquet

from dept_fl.config import Recipe, SiloConfig
from dept_fl.data import (
    Batches,
    Corpus,
    TokenStream,
    check_enough,
    load_corpus,
    load_tokens,
)
from dept_fl.errors import DeptError
from dept_fl.sources import docstrings, documents, source_key, without_licence
from dept_fl.tokenizer import SentencePieceTokenizer, Tokenizer, Vocabulary, train_sentencepiece
from tests.conftest import sentencepiece_model

RECIPE = Recipe(validation_fraction=0.2)


def read(*files: Path | str, **settings: Any) -> list[str]:
    return list(documents("ant", SiloConfig(files=[str(f) for f in files], **settings)))


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def rows(*texts: str | None) -> str:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


def table(**columns: Sequence[Any]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({k: list(v) for k, v in columns.items()}), stream)
    return stream.getvalue()


def zst(content: bytes) -> bytes:
    """Two frames, as large files have them."""
    half = len(content) // 2
    frames = (content[:half], content[half:])
    return b"".join(pyarrow.compress(f, "zstd", asbytes=True) for f in frames)


# ---- files -----------------------------------------------------------------------------------

CONTENTS = {
    ".txt": "one é\n\ntwo\n".encode(),
    ".jsonl": rows("one é", "two").encode(),
    ".parquet": table(text=["one é", "two"]),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}


@pytest.mark.parametrize("suffix", CONTENTS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_format_is_read_plain_and_compressed(
    tmp_path: Path, suffix: str, compression: str
) -> None:
    packed = COMPRESSIONS[compression](CONTENTS[suffix])
    assert read(write(tmp_path / f"data{suffix}{compression}", packed)) == ["one é", "two"]


def test_a_folder_gives_all_supported_files_below_it_in_order_of_their_paths(
    tmp_path: Path,
) -> None:
    write(tmp_path / "a" / "deep.jsonl", rows("first"))
    write(tmp_path / "b.parquet", table(text=["second"]))
    write(tmp_path / "c.txt.gz", gzip.compress(b"third"))
    write(tmp_path / "notes.docx", b"not data")
    assert read(tmp_path) == ["first", "second", "third"]


def test_a_glob_takes_what_it_matches_and_each_file_once(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "deep/c.txt", "deep/d.jsonl"):
        write(tmp_path / name, name if name.endswith("txt") else rows(name))
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "**" / "*.txt", tmp_path / "a.txt") == ["a.txt", "b.txt", "deep/c.txt"]


def test_a_name_with_glob_characters_is_that_file_alone(tmp_path: Path) -> None:
    write(tmp_path / "a1.txt", "another")
    assert read(write(tmp_path / "a[1].txt", "brackets")) == ["brackets"]
    assert read(write(tmp_path / "a*.txt", "star")) == ["star"]


def test_json_files_may_differ_in_the_columns_that_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "one", "id": null}\n')
    write(tmp_path / "b.jsonl", '{"text": "two", "id": "x", "more": [1]}\n\n{"text": "2020-01-01"}')
    assert read(tmp_path) == ["one", "two", "2020-01-01"]


def test_one_json_array_of_objects_is_read(tmp_path: Path) -> None:
    array = json.dumps([{"text": "one"}, {"text": "two"}], indent=1)
    assert read(write(tmp_path / "a.json", f"\n{array}")) == ["one", "two"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_named_column_is_read_and_nulls_are_left_out(tmp_path: Path, suffix: str) -> None:
    values = ["one", None, "two"]
    lines = "\n".join(json.dumps({"text": "no", "body": value}) for value in values)
    content = lines if suffix == ".jsonl" else table(text=["no"] * 3, body=values)
    assert read(write(tmp_path / f"a{suffix}", content), column="body") == ["one", "two"]


def test_json_text_is_unchanged(tmp_path: Path) -> None:
    text = " a\r\n\0\u2028\x85 ▁ e\u0301 😀\n\n"
    assert read(write(tmp_path / "a.jsonl", rows(text))) == [text]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbftext")) == ["text"]
    assert read(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + CONTENTS[".jsonl"])) == [
        "one é",
        "two",
    ]


@pytest.mark.parametrize(("suffix", "content"), [(".txt", "née"), (".jsonl", '{"text": "née"}')])
def test_another_encoding_is_read(tmp_path: Path, suffix: str, content: str) -> None:
    file = write(tmp_path / f"a{suffix}", content.encode("latin-1"))
    assert read(file, encoding="latin-1") == ["née"]


PARAGRAPHS = "one\nstill one\n\n \n\n  two\r\n\r\nthree"


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("auto", ["one\nstill one", "  two", "three"]),
        ("paragraph", ["one\nstill one", "  two", "three"]),
        ("line", ["one", "still one", "  two", "three"]),
        ("document", ["one\nstill one\n\n \n\n  two\n\nthree"]),
    ],
)
def test_sample_by_says_what_a_document_of_a_text_file_is(
    tmp_path: Path, sample_by: str, expected: list[str]
) -> None:
    assert read(write(tmp_path / "a.txt", PARAGRAPHS), sample_by=sample_by) == expected


@pytest.mark.parametrize(("files", "documents_each"), [(19, 2), (20, 1)])
def test_auto_takes_many_small_files_whole(tmp_path: Path, files: int, documents_each: int) -> None:
    for i in range(files):
        write(tmp_path / f"{i}.txt", "one\n\ntwo")
    assert len(read(tmp_path)) == files * documents_each


def test_auto_takes_paragraphs_where_one_of_many_files_is_big(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / f"{i}.txt", "one\n\ntwo")
    big = write(tmp_path / "big.txt", "one\n\ntwo\n\n")
    os.truncate(big, (8 << 20) + 1)  # the rest is NUL characters: one more paragraph
    assert len(read(tmp_path)) == 20 * 2 + 3


def test_max_bytes_stops_behind_the_document_that_reaches_it(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", rows("éé", "four", "next"))
    assert read(file, max_bytes=4) == ["éé"]
    assert read(file, max_bytes=5) == ["éé", "four"]


# ---- hub -------------------------------------------------------------------------------------


def hub(folder: Path, **settings: Any) -> list[str]:
    return list(documents("ant", SiloConfig(hub=str(folder), **settings)))


@pytest.mark.parametrize(
    ("suffix", "compression"), [(".jsonl", ""), (".jsonl", ".gz"), (".parquet", "")]
)
def test_a_local_folder_is_read_as_a_hub_data_set(
    tmp_path: Path, suffix: str, compression: str
) -> None:
    packed = COMPRESSIONS[compression](CONTENTS[suffix])
    write(tmp_path / f"train{suffix}{compression}", packed)
    assert hub(tmp_path) == ["one é", "two"]


def test_the_split_of_a_hub_data_set_can_be_named(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows("one"))
    write(tmp_path / "test.jsonl", rows("two"))
    assert hub(tmp_path, hub_split="test") == ["two"]


NESTED = [
    {"text": "one", "meta": {"set": "a b", "lines": 3, "old": True}},
    {"text": "two", "meta": {"set": "c", "lines": 3, "old": False}},
    {"text": "three", "meta": {"set": "a b", "lines": 4, "old": True}},
]


@pytest.mark.parametrize(
    ("where", "texts"),
    [
        ([], ["one", "two", "three"]),
        (["meta.set=a b"], ["one", "three"]),
        (["meta.lines=3"], ["one", "two"]),
        (["meta.lines=3", "meta.set=a b"], ["one"]),
        (["meta.old=false"], ["two"]),
        (["text=two"], ["two"]),
        (["meta.set=a=b"], []),
    ],
)
def test_rows_of_a_hub_data_set_are_chosen_by_their_fields(
    tmp_path: Path, where: list[str], texts: list[str]
) -> None:
    write(tmp_path / "train.jsonl", "\n".join(map(json.dumps, NESTED)))
    assert hub(tmp_path, hub_where=where) == texts


def test_a_field_that_is_null_has_that_value_alone(tmp_path: Path) -> None:
    nulls = [{"text": "four", "meta": None}, {"text": "five", "meta": {"set": None}}]
    write(tmp_path / "train.jsonl", "\n".join(map(json.dumps, [*NESTED, *nulls])))
    assert hub(tmp_path, hub_where=["meta.set=c"]) == ["two"]
    assert hub(tmp_path, hub_where=["meta.set=null"]) == ["four", "five"]


def test_the_files_of_a_split_can_be_named_and_packed(tmp_path: Path) -> None:
    write(tmp_path / "train" / "0.jsonl.zst", zst(rows("one").encode()))
    write(tmp_path / "train" / "1.jsonl.zst", zst(rows("two").encode()))
    write(tmp_path / "other.jsonl.zst", zst(rows("three").encode()))
    files = ["train=train/0.*", "train=train/1.*", "dev=other.jsonl.zst"]
    assert hub(tmp_path, hub_files=files) == ["one", "two"]
    assert hub(tmp_path, hub_files=files, hub_split="dev") == ["three"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_HUB_OFFLINE=1 sets where it is there before the libraries are imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.timeout(20)
def test_a_missing_hub_data_set_is_named_with_the_mend(offline: None) -> None:
    with pytest.raises(DeptError) as raised:
        list(documents("ant", SiloConfig(hub="nobody/nothing")))
    assert "silo ant: hub data set 'nobody/nothing'" in str(raised.value)
    assert "check silos.ant.hub, hub_config and hub_split" in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hub_split": "test"}, r"split 'test'.*check silos.ant.hub, hub_config and hub_split"),
        ({"hub_config": "fr"}, r"config 'fr'.*check silos.ant.hub, hub_config and hub_split"),
        (
            {"hub_where": ["meta.set=x"]},
            r"row 1: no field 'meta.set'; where 'meta' should be: id, text; set silos.ant.hub_wh",
        ),
        (
            {"hub_where": ["text.set=x"]},
            r"row 1: no field 'text.set'; where 'set' should be: 'one'; set silos.ant.hub_where",
        ),
        ({"column": "body"}, r"row 1: no column 'body'; columns: id, text; set silos.ant.column"),
    ],
)
def test_a_wrong_hub_setting_is_named_with_the_mend(
    tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    write(tmp_path / "train.jsonl", rows("one"))
    with pytest.raises(DeptError, match=rf"^silo ant: .*{message}"):
        hub(tmp_path, **settings)


# ---- packages --------------------------------------------------------------------------------


def packages(*names: str, **settings: Any) -> list[str]:
    return list(documents("ant", SiloConfig(packages=list(names), **settings)))


def test_the_standard_library_is_read_by_patterns_of_its_paths() -> None:
    folder = Path(json.__file__).parent
    expected = sorted(file.read_text() for file in folder.glob("*.py"))
    assert sorted(packages("stdlib", include=["json/*.py"])) == expected


def test_tests_of_the_standard_library_are_left_out() -> None:
    with pytest.raises(DeptError, match="matches"):
        packages("stdlib", include=["test/*.py", "*/__pycache__/*", "site-packages/*"])


def test_an_installed_package_is_read_by_patterns_of_its_paths() -> None:
    found = packages("torch", include=["torch/include/c10/core/Scalar*.h"], content="code")
    folder = Path(torch.__file__).parent / "include" / "c10" / "core"
    originals = [file.read_text() for file in folder.glob("Scalar*.h")]
    assert sorted(found) == sorted(without_licence(text) for text in originals)
    assert len(found) > 1


def test_docstrings_are_those_of_the_files() -> None:
    found = packages("stdlib", include=["json/__init__.py"], content="docstrings")
    owners = (json, json.dump, json.dumps, json.load, json.loads)
    assert found == ["\n\n".join(inspect.getdoc(owner) or "" for owner in owners)]


def test_short_docstrings_and_those_that_are_no_unicode_are_left_out() -> None:
    code = f'"""{"a" * 200}"""\ndef f():\n "short"\ndef g():\n "\\ud800 {"b" * 200}"\n'
    assert docstrings(code) == "a" * 200


@pytest.mark.parametrize("code", ["def f(:", "\0", "a" + ".b" * 100_000])
def test_a_file_that_does_not_parse_has_no_docstrings(code: str) -> None:
    assert docstrings(code) == ""


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("# Licence\n#\n\n# more\nimport os  # why\n", "import os  # why\n"),
        ("/* a\n b */\n// c\n#pragma once\n// d\n", "#pragma once\n// d\n"),
        ("// a\n#define A 1\n", "#define A 1\n"),
        ("// a\n#if A\n", "#if A\n"),
        ("x = 1  # no licence\n", "x = 1  # no licence\n"),
    ],
)
def test_the_leading_comments_alone_are_cut_off(text: str, kept: str) -> None:
    assert without_licence(text) == kept


# ---- bad data --------------------------------------------------------------------------------

BAD_FILES: dict[str, tuple[str, str | bytes, str, str]] = {
    "unsupported": ("a.docx", "x", "cannot be read", "convert it or leave it out"),
    "undecodable text": ("a.txt", b"ok\xff", "not utf-8 text (byte 0xff", "set silos.ant.encoding"),
    "undecodable json": ("a.jsonl", b'{"text": "\xe9"}', "(byte 0xe9", "set silos.ant.encoding"),
    "misnamed gzip": ("a.txt", gzip.compress(b"x"), "not utf-8 text", "convert the file"),
    "broken json": ("a.jsonl", '{"text": "a"}\n\n{"text": ', "line 3: not JSON", "mend it"),
    "broken array": ("a.json", '[{"text": "a"}', "not JSON", "mend it or leave it out"),
    "json of strings": ("a.jsonl", '"a"\n', 'line 1: str instead of an object such as {"text"', ""),
    "missing column": (
        "a.jsonl",
        '{"body": "a"}',
        "line 1: no column 'text'; columns: body",
        "ant.c",
    ),
    "number": ("a.jsonl", '{"text": 3}', "line 1: column 'text' holds int", "silos.ant.column"),
    "surrogate": ("a.jsonl", r'{"text": "\ud800"}', r"line 1: text with a lone surr", "clean the"),
    "broken parquet": ("a.parquet", b"PAR1 no PAR1", "cannot be read", "mend it or leave it out"),
    "parquet column": ("a.parquet", table(b=["a"]), "no column 'text'; columns: b", "ant.column"),
    "parquet type": ("a.parquet", table(text=[3]), "row 1: column 'text' holds int", "ant.column"),
    "no gzip": ("a.txt.gz", "x", "cannot be read: Not a gzipped file", "leave it out of silos.ant"),
    "cut gzip": ("a.txt.gz", gzip.compress(b"x" * 99)[:-9], "cannot be read", "mend it"),
    "cut xz": ("a.txt.xz", lzma.compress(b"x" * 99)[:-9], "cannot be read", "mend it"),
    "cut bz2": ("a.txt.bz2", bz2.compress(b"x" * 99)[:-9], "cannot be read", "mend it"),
    "cut zst": ("a.txt.zst", zst(b"x" * 99)[:-9], "cannot be read: Truncated", "mend it"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_silo_and_the_mend(tmp_path: Path, case: str) -> None:
    name, content, what, mend = BAD_FILES[case]
    write(tmp_path / "0.txt", "a good file")
    bad = write(tmp_path / name, content)
    with pytest.raises(DeptError) as raised:
        read(tmp_path / "0.txt", bad)
    message = str(raised.value)
    assert message.startswith(f"silo ant: {bad}")
    assert what in message
    assert mend in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (SiloConfig(files=["/nowhere/*.txt"]), r"no file matches \['/nowhere/\*.txt'\]; check "),
        (SiloConfig(packages=["no-such"]), "package 'no-such' is not installed; install it or "),
        (
            SiloConfig(packages=["stdlib"], include=["*.nothing"]),
            r"no file of \['stdlib'\] matches \['\*.nothing'\]; check silos.ant.include",
        ),
    ],
)
def test_a_source_that_finds_nothing_is_named_with_the_mend(
    source: SiloConfig, message: str
) -> None:
    with pytest.raises(DeptError, match=f"^silo ant: {message}"):
        list(documents("ant", source))


def test_an_unknown_encoding_is_named_with_the_mend(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "x")
    with pytest.raises(DeptError, match=r"^silo ant: 'utf-9' is no enc.*set silos.ant.encoding"):
        read(file, encoding="utf-9")


def test_a_huge_paragraph_asks_for_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", ("x" * (1 << 20) + "\n") * 65)
    with pytest.raises(DeptError, match=r"no blank line in .*set silos.ant.sample_by=line"):
        read(file)
    assert len(read(file, sample_by="line")) == 65


@pytest.mark.parametrize("content", ["", " \n\n\t\u2003\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_data_without_text_is_named_with_the_mend(tmp_path: Path, name: str, content: str) -> None:
    text = content if name == "a.txt" else rows(content)
    source = SiloConfig(files=[str(write(tmp_path / name, text))])
    with pytest.raises(DeptError, match=r"^silo ant: no text in its data; check silos\.ant"):
        load_corpus("ant", source, RECIPE, tmp_path / "cache")


# ---- the corpus ------------------------------------------------------------------------------


def some_texts(count: int = 100) -> list[str]:
    draw = random.Random(1)
    words = ["the", "leaf", "is", "under", "small", "green", "tree", "where", "été", "ants"]
    words += ["carry", "home", "over", "brown", "quick", "jumping", "lazy", "dozen"]
    return [f"{i} " + " ".join(draw.choices(words, k=30)) for i in range(count)]


def corpus_of(folder: Path, texts: Sequence[str], recipe: Recipe = RECIPE) -> Corpus:
    file = write(folder / "data.jsonl", rows(*texts))
    return load_corpus("ant", SiloConfig(files=[str(file)]), recipe, folder / "cache")


def test_every_document_falls_into_one_split_in_its_order(tmp_path: Path) -> None:
    texts = some_texts()
    corpus = corpus_of(tmp_path, texts)
    train, validation = list(corpus.texts("train")), list(corpus.texts("validation"))
    held_out = set(validation)
    assert train == [text for text in texts if text not in held_out]
    assert validation == [text for text in texts if text in held_out]
    assert (corpus.train_documents, corpus.validation_documents) == (len(train), len(validation))
    assert 5 <= len(validation) <= 40  # a fifth of a hundred, in expectation


def test_every_byte_of_a_split_is_counted(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [f"{i} é😀\n" for i in range(100)])
    for split, counted in (
        ("train", corpus.train_bytes),
        ("validation", corpus.validation_bytes),
    ):
        # A number, a space, two and four bytes, and the line end.
        assert counted == sum(len(t.split()[0]) + 8 for t in corpus.texts(split))


def test_copies_that_differ_in_white_space_alone_are_dropped(tmp_path: Path) -> None:
    texts = some_texts()
    copies = [text.replace(" ", "\n\t ") + " " for text in texts[:10]]
    corpus = corpus_of(tmp_path, [*texts, *copies, *texts[:3]])
    assert corpus.duplicates == 13
    assert corpus.train_documents + corpus.validation_documents == 100


def test_without_deduplication_copies_stay_but_none_of_a_validation_document(
    tmp_path: Path,
) -> None:
    texts = some_texts()
    recipe = replace(RECIPE, deduplicate=False, validation_max_bytes=400)
    corpus = corpus_of(tmp_path, [*texts, *texts], recipe)
    train, validation = list(corpus.texts("train")), list(corpus.texts("validation"))
    assert len(train) > 100
    assert validation
    assert not set(train) & set(validation)


def test_the_split_is_the_same_for_every_seed_variant_and_vocabulary(tmp_path: Path) -> None:
    other = replace(RECIPE, seed=99, variant="glob", tokenizer="shared", vocab_size=512)
    first = corpus_of(tmp_path / "a", some_texts())
    second = corpus_of(tmp_path / "b", some_texts(), other)
    assert first.digest == second.digest
    assert list(first.texts("validation")) == list(second.texts("validation"))


@pytest.mark.parametrize("limit", [300, 1000])
def test_the_validation_split_is_filled_to_its_limit_and_never_over_it(
    tmp_path: Path, limit: int
) -> None:
    longest = max(len(text.encode()) for text in some_texts())
    corpus = corpus_of(tmp_path, some_texts(), replace(RECIPE, validation_max_bytes=limit))
    assert limit - longest < corpus.validation_bytes <= limit


def test_the_digest_is_of_the_data_and_its_split(tmp_path: Path) -> None:
    texts = some_texts()
    same = [corpus_of(tmp_path / name, texts).digest for name in "ab"]
    changed = corpus_of(tmp_path / "c", [texts[0] + "!", *texts[1:]]).digest
    resplit = corpus_of(tmp_path / "d", texts, replace(RECIPE, validation_fraction=0.5)).digest
    assert same[0] == same[1]
    assert len({same[0], changed, resplit}) == 3


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_the_key_of_a_source_changes_with_its_files_and_settings(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / "train.jsonl", rows("one"))
    source = SiloConfig(files=[str(file)]) if kind == "files" else SiloConfig(hub=str(tmp_path))
    first = source_key(source, RECIPE)
    assert source_key(source, replace(RECIPE, seed=5, variant="trim")) == first
    assert source_key(replace(source, max_bytes=9), RECIPE) != first
    assert source_key(source, replace(RECIPE, deduplicate=False)) != first
    write(file, rows("two"))
    os.utime(file, ns=(1, 1))  # the same size at another time
    assert source_key(source, RECIPE) != first


# ---- validation text of its own ----------------------------------------------------------------


def given_split(
    folder: Path, train: Sequence[str], validation: Sequence[str], recipe: Recipe = RECIPE
) -> Corpus:
    source = SiloConfig(
        files=[str(write(folder / "train.jsonl", rows(*train)))],
        validation_files=[str(write(folder / "validation.jsonl", rows(*validation)))],
    )
    return load_corpus("ant", source, recipe, folder / "cache")


def splits(corpus: Corpus) -> tuple[list[str], list[str]]:
    return list(corpus.texts("train")), list(corpus.texts("validation"))


def test_validation_files_are_all_of_validation_and_the_others_of_training(tmp_path: Path) -> None:
    texts = some_texts()
    corpus = given_split(tmp_path, texts[:90], texts[90:])
    assert splits(corpus) == (texts[:90], texts[90:])
    assert (corpus.train_documents, corpus.validation_documents) == (90, 10)
    assert corpus.validation_bytes == sum(len(text.encode()) for text in texts[90:])


@pytest.mark.parametrize("deduplicate", [True, False])
def test_a_training_document_that_is_in_validation_too_is_dropped(
    tmp_path: Path, deduplicate: bool
) -> None:
    recipe = replace(RECIPE, deduplicate=deduplicate)
    corpus = given_split(tmp_path, ["a", "b  c", "a", "d"], ["b\nc", "b c", "e"], recipe)
    train = ["a", "d"] if deduplicate else ["a", "a", "d"]
    assert splits(corpus) == (train, ["b\nc", "e"])
    assert corpus.duplicates == (3 if deduplicate else 2)


def test_a_validation_document_that_does_not_fit_is_dropped_not_trained_on(tmp_path: Path) -> None:
    recipe = replace(RECIPE, validation_max_bytes=5)
    corpus = given_split(tmp_path, ["train"], ["ééx", "too", "x", "y"], recipe)
    assert splits(corpus) == (["train"], ["ééx"])
    corpus = given_split(tmp_path, ["train", "longer"], ["four", "longer", "x"], recipe)
    assert splits(corpus) == (["train", "longer"], ["four", "x"])


def test_max_bytes_bounds_training_alone(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", rows("one", "two"))
    validation = write(tmp_path / "v.jsonl", rows("six", "ten"))
    source = SiloConfig(files=[str(train)], validation_files=[str(validation)], max_bytes=1)
    assert splits(load_corpus("ant", source, RECIPE, tmp_path)) == (["one"], ["six", "ten"])


def test_validation_texts_are_cut_into_documents_as_training_texts_are(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / "train" / f"{i}.txt", f"{i}\n\ntwo")
    file = write(tmp_path / "v.txt", "one\n\ntwo")
    source = SiloConfig(files=[str(tmp_path / "train")], validation_files=[str(file)])
    corpus = load_corpus("ant", source, RECIPE, tmp_path / "cache")
    assert list(corpus.texts("validation")) == ["one\n\ntwo"]
    assert corpus.train_documents == 20


def test_a_hub_data_sets_own_validation_split_is_read_with_the_same_conditions(
    tmp_path: Path,
) -> None:
    for name, words in (("train", "abc"), ("validation", "xyc")):
        lines = [{"text": word, "of": word > "a"} for word in words]
        write(tmp_path / f"{name}.jsonl", "\n".join(map(json.dumps, lines)))
    source = SiloConfig(
        hub=str(tmp_path), hub_validation_split="validation", hub_where=["of=true"], max_bytes=99
    )
    corpus = load_corpus("ant", source, RECIPE, tmp_path / "cache")
    assert splits(corpus) == (["b"], ["x", "y", "c"])


def test_the_key_changes_with_the_validation_text_alone(tmp_path: Path) -> None:
    source = SiloConfig(files=[str(write(tmp_path / "t.jsonl", rows("one")))])
    file = write(tmp_path / "v.jsonl", rows("two"))
    given = replace(source, validation_files=[str(file)])
    keys = [source_key(source, RECIPE), source_key(given, RECIPE)]
    os.utime(file, ns=(1, 1))
    keys.append(source_key(given, RECIPE))
    from_hub = SiloConfig(hub="a/b")
    for change in (
        {},
        {"hub_validation_split": "v"},
        {"hub_where": ["a=b"]},
        {"hub_files": ["v=x"]},
    ):
        keys.append(source_key(replace(from_hub, **change), RECIPE))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (
            ["a"],
            ["longer"],
            r"no document of silos.ant.validation_files is kept .* fits validation_max_bytes=5; gi",
        ),
        (["a"], [" "], "no document of silos.ant.validation_files is kept for validation: it has"),
        (["a"], ["a", "b"], "each of its documents is in silos.ant.validation_files too, so that"),
    ],
)
def test_a_split_that_is_left_empty_is_named_with_the_mend(
    tmp_path: Path, train: list[str], validation: list[str], message: str
) -> None:
    with pytest.raises(DeptError, match=rf"^silo ant: {message}"):
        given_split(tmp_path, train, validation, replace(RECIPE, validation_max_bytes=5))


def test_what_is_wrong_with_validation_text_names_its_setting(tmp_path: Path) -> None:
    train = str(write(tmp_path / "train.jsonl", rows("one")))
    bad = write(tmp_path / "bad.txt.gz", b"x")
    for pattern, message in (
        ("/nowhere/*", r"no file matches \['/nowhere/\*'\]; check silos.ant.validation_files$"),
        (str(bad), "cannot be read: Not a gzipped file.*leave it out of silos.ant.validation_fil"),
    ):
        source = SiloConfig(files=[train], validation_files=[pattern])
        with pytest.raises(DeptError, match=f"^silo ant: .*{message}"):
            load_corpus("ant", source, RECIPE, tmp_path / "cache")
    source = SiloConfig(hub=str(tmp_path), hub_validation_split="dev", hub_files=["train=*.jsonl"])
    with pytest.raises(DeptError, match=r"split 'dev'.*silos.ant.hub, .* and hub_validation_split"):
        load_corpus("ant", source, RECIPE, tmp_path / "cache")


@pytest.mark.parametrize(
    ("at_most_bytes", "sample"),
    [
        (18, ["aaaa", "b", "éé", "d", "eeeeeeee"]),
        (9, ["aaaa", "éé", "e"]),  # every second one, the last cut at nine bytes
        (7, ["aaaa", "d"]),  # every third one
        (3, ["aaa"]),
    ],
)
def test_the_sample_for_a_tokenizer_is_spread_and_bounded(
    tmp_path: Path, at_most_bytes: int, sample: list[str]
) -> None:
    corpus = by_hand(tmp_path, ["aaaa", "b", "éé", "d", "eeeeeeee"], ["x"])
    assert list(corpus.training_sample(at_most_bytes)) == sample


def test_a_cut_sample_never_ends_within_a_character(tmp_path: Path) -> None:
    assert list(by_hand(tmp_path, ["éé"], ["x"]).training_sample(3)) == ["é"]


def test_no_validation_document_is_named_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(DeptError) as raised:
        corpus_of(tmp_path, ["the only one"], replace(RECIPE, validation_fraction=1e-9))
    message = str(raised.value)
    assert "silo ant: none of its 1 documents fell into the validation split" in message
    assert "validation_fraction=1e-09" in message
    assert "silos.ant.sample_by=paragraph or line" in message


# ---- the token stream ------------------------------------------------------------------------


class Bytes(Tokenizer):
    """A tokenizer whose ids can be counted by hand: each byte is its own id, 256 ends."""

    size, end_id, fingerprint = 257, 256, "bytes"

    def arrays(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        return [np.asarray(list(text.encode()), dtype=np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()

    def pieces(self) -> list[str]:
        return [*(f"<0x{byte:02X}>" for byte in range(256)), "</s>"]

    def specials(self) -> set[int]:
        return {256}


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_sentencepiece("ant", some_texts(), 300))


def by_hand(folder: Path, train: Sequence[str], validation: Sequence[str]) -> Corpus:
    for split, texts in (("train", train), ("validation", validation)):
        write(folder / f"{split}.jsonl", "".join(json.dumps(t) + "\n" for t in texts))
    size = [sum(len(t.encode()) for t in texts) for texts in (train, validation)]
    return Corpus(folder, "0" * 64, len(train), size[0], len(validation), size[1], 0)


def in_documents(ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The texts between the end ids; the stream must start and end with one."""
    ends = np.flatnonzero(ids == tokenizer.end_id)
    assert ends[0] == 0
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in pairwise(ends)]


@pytest.mark.parametrize("restrict", [False, True])
def test_the_stream_is_the_documents_joined_by_end_ids(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, restrict: bool
) -> None:
    awkward = ["</s> <s>\0▁", "\r\n\t  日本 "]
    corpus = by_hand(tmp_path, [*some_texts(50), *awkward], [*awkward, "the été 日"])
    stream = load_tokens("ant", corpus, tokenizer, restrict, tmp_path / "tokens")
    assert in_documents(stream.train, tokenizer) == list(corpus.texts("train"))
    assert in_documents(stream.validation, tokenizer) == list(corpus.texts("validation"))


def test_the_stream_is_mapped_from_disk_in_a_small_type(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    stream = load_tokens("ant", by_hand(tmp_path, ["a"], ["b"]), tokenizer, False, tmp_path / "t")
    assert isinstance(stream.train, np.memmap)
    assert isinstance(stream.validation, np.memmap)
    assert stream.train.dtype == np.uint16


def test_the_unigram_and_its_cross_entropy_are_those_counted_by_hand(tmp_path: Path) -> None:
    corpus = by_hand(tmp_path, ["aab"], ["ab"])
    stream = load_tokens("ant", corpus, Bytes(), False, tmp_path / "tokens")
    a, b, end = ord("a"), ord("b"), 256
    assert stream.train.tolist() == [end, a, a, b, end]
    assert stream.validation.tolist() == [end, a, b, end]
    # Five tokens and one more for each of 257 ids.
    assert stream.unigram[[a, b, end, 0]] * 262 == pytest.approx([3, 2, 3, 1])
    assert stream.unigram.sum() == pytest.approx(1)
    expected = -(math.log(3 / 262) + math.log(2 / 262) + math.log(3 / 262)) / 3
    assert stream.unigram_nats() == pytest.approx(expected)
    assert (stream.train_bytes, stream.validation_bytes) == (3, 2)


def test_a_restricted_stream_holds_its_part_of_the_vocabulary_alone(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    corpus = by_hand(tmp_path, ["the leaf"], ["the small green tree"])
    whole = load_tokens("ant", corpus, tokenizer, False, tmp_path / "tokens")
    stream = load_tokens("ant", corpus, tokenizer, True, tmp_path / "tokens")
    part = set(stream.vocabulary.ids.tolist())
    assert len(part) < tokenizer.size
    assert not set(whole.validation.tolist()) <= part
    assert set(stream.train.tolist()) | set(stream.validation.tolist()) <= part
    assert np.array_equal(stream.train, whole.train)
    assert len(stream.unigram) == len(part)
    assert stream.unigram.sum() == pytest.approx(1)
    assert math.isfinite(stream.unigram_nats())


def long_text(tokenizer: Tokenizer) -> str:
    """Over a million characters of words that are one piece each, so that a cut in one shows."""
    words = [p[1:] for p in tokenizer.pieces() if p.startswith("▁") and len(p) > 4]
    assert len(words) > 2
    draw = random.Random(1)
    lines = ["".join(f" {word}" for word in draw.choices(words, k=9)) for _ in range(25_000)]
    return "\n".join(f"x{line}" for line in lines[:12_500]) + "\n\n   " + "".join(lines[12_500:])


def with_prefix_space() -> SentencePieceTokenizer:
    """A tokenizer that puts a space before each text, as Llama's does."""
    model = sentencepiece_model(
        some_texts(),
        vocab_size=300,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
    )
    return SentencePieceTokenizer(model)


@pytest.mark.parametrize("prefix", [False, True])
def test_a_long_document_has_the_ids_that_it_has_in_one_piece(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, prefix: bool
) -> None:
    used = with_prefix_space() if prefix else tokenizer
    text = long_text(used)
    assert len(text) > 1 << 20
    corpus = by_hand(tmp_path, ["a", text, "a"], ["b"])
    stream = load_tokens("ant", corpus, used, False, tmp_path / "tokens")
    short, whole = used.encode(["a", text])
    end = used.end_id
    assert np.array_equal(stream.train, [end, *short, end, *whole, end, *short, end])


@pytest.mark.parametrize("threads", [1, 3])
def test_the_stream_is_that_of_each_document_encoded_by_itself_whatever_the_threads(
    tmp_path: Path,
    tokenizer: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    draw = random.Random(1)
    words = [*"the leaf été 日本 </s> ▁ ▁▁ \0 \u2028".split(" "), "\r\n", "", "\n\n"]
    texts = [" ".join(draw.choices(words, k=draw.choice([1, 30, 3000]))) for _ in range(500)]
    assert sum(map(len, texts)) > 4 << 18
    stream = load_tokens("ant", by_hand(tmp_path, texts, ["b"]), tokenizer, False, tmp_path / "t")
    each = [[*tokenizer.encode([text])[0], tokenizer.end_id] for text in texts]
    assert np.array_equal(stream.train, [tokenizer.end_id, *chain.from_iterable(each)])


class Counting(Bytes):
    """Says how many texts were read when each was encoded."""

    def __init__(self) -> None:
        self.read = 0
        self.read_at: list[int] = []

    def watch(self, texts: Iterator[str]) -> Iterator[str]:
        for text in texts:
            self.read += 1
            yield text

    def arrays(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        if len(texts[0]) > 100:
            time.sleep(0.01)  # slower than reading
            self.read_at.append(self.read)
        return super().arrays(texts)


def test_few_documents_are_read_before_they_are_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    tokenizer = Counting()
    corpus = by_hand(tmp_path, ["a" * (1 << 18)] * 20, ["b"])
    load_tokens("ant", corpus, tokenizer, False, tmp_path / "tokens", tokenizer.watch)
    # The first is due when two threads have two batches each; then one is read for each encoded.
    ahead = [read - encoded for encoded, read in enumerate(sorted(tokenizer.read_at))]
    assert tokenizer.read == len(ahead) == 20
    assert max(ahead) <= 5


def test_a_long_run_without_spaces_comes_back_whole(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    text = "日本é" * 70_000
    corpus = by_hand(tmp_path, [text], ["b"])
    stream = load_tokens("ant", corpus, tokenizer, False, tmp_path / "tokens")
    assert in_documents(stream.train, tokenizer) == [text]


def test_fewer_tokens_than_a_batch_are_named_with_the_mend(tmp_path: Path) -> None:
    corpus = by_hand(tmp_path, ["a" * 62], ["b"])
    stream = load_tokens("ant", corpus, Bytes(), False, tmp_path / "tokens")
    inner = replace(RECIPE.inner, batch_size=4)
    assert len(stream.train) == 64  # one less than 4 * 16 + 1
    with pytest.raises(DeptError, match=r"silo ant: .* 64 tokens, one batch takes 65 .*give more"):
        check_enough("ant", stream, replace(RECIPE, inner=inner, sequence_tokens=16))
    check_enough("ant", stream, replace(RECIPE, inner=inner, sequence_tokens=15))


# ---- caches ----------------------------------------------------------------------------------


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each file, both of which change where one is written anew."""
    facts = {str(p): p.stat() for p in folder.rglob("*")}
    return {name: (fact.st_ino, fact.st_mtime_ns) for name, fact in facts.items()}


def test_what_is_prepared_once_is_not_written_again(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    source = SiloConfig(files=[str(write(tmp_path / "a.jsonl", rows(*some_texts())))])

    def prepare() -> tuple[Corpus, TokenStream]:
        corpus = load_corpus("ant", source, RECIPE, tmp_path / "text")
        return corpus, load_tokens("ant", corpus, tokenizer, True, tmp_path / "tokens")

    first, first_stream = prepare()
    before = files_below(tmp_path)
    second, second_stream = prepare()
    assert files_below(tmp_path) == before
    assert second == first
    assert np.array_equal(second_stream.train, first_stream.train)
    assert np.array_equal(second_stream.unigram, first_stream.unigram)


def test_a_changed_file_is_prepared_anew(tmp_path: Path) -> None:
    first = corpus_of(tmp_path, some_texts())
    second = corpus_of(tmp_path, some_texts(101))
    assert first.folder != second.folder
    assert second.train_documents + second.validation_documents == 101


def test_a_corpus_that_fails_leaves_no_folder_behind(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", rows(*some_texts()))
    bad = write(tmp_path / "b.jsonl", "{")
    with pytest.raises(DeptError, match="not JSON"):
        load_corpus("ant", SiloConfig(files=[str(good), str(bad)]), RECIPE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


class WithoutBytes(Bytes):
    def pieces(self) -> list[str]:
        return [f"piece {i}" for i in range(257)]


def test_a_token_stream_that_fails_leaves_no_folder_behind(tmp_path: Path) -> None:
    corpus = by_hand(tmp_path, ["a"], ["b"])
    with pytest.raises(DeptError, match="silo ant: the shared tokenizer has no byte pieces"):
        load_tokens("ant", corpus, WithoutBytes(), True, tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []


def test_text_that_fails_while_it_is_tokenised_leaves_no_folder_behind(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    def failing(texts: Iterator[str]) -> Iterator[str]:
        yield from islice(texts, 3)
        raise DeptError("no more")

    corpus = by_hand(tmp_path, ["a" * (1 << 18)] * 9, ["b"])
    with pytest.raises(DeptError, match="no more"):
        load_tokens("ant", corpus, tokenizer, False, tmp_path / "tokens", failing)
    assert list((tmp_path / "tokens").iterdir()) == []


# ---- batches ---------------------------------------------------------------------------------


def counting(tokens: int) -> TokenStream:
    """A stream of 0, 1, 2, ...: each token says where it stands."""
    ids = np.arange(tokens, dtype=np.uint16)
    vocabulary = Vocabulary(np.arange(tokens), tokens)
    return TokenStream(ids, ids, vocabulary, np.full(tokens, 1 / tokens), tokens, tokens)


def test_sequences_tile_the_stream_and_targets_are_inputs_shifted_by_one() -> None:
    batches = Batches(counting(14), sequence_tokens=4, seed=1)
    assert batches.sequences == 3  # tokens 0..12; the last one does not fill a sequence
    batch = batches.at(0, 3)
    in_order = batch[np.argsort(batch[:, 0])]
    assert in_order.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]
    assert np.array_equal(batch[:, 1:], batch[:, :-1] + 1)


@pytest.mark.parametrize(("tokens", "sequences"), [(12, 2), (13, 3), (16, 3), (17, 4)])
def test_a_sequence_needs_a_target_for_its_last_token(tokens: int, sequences: int) -> None:
    assert Batches(counting(tokens), sequence_tokens=4, seed=1).sequences == sequences


def test_a_batch_is_a_function_of_seed_and_position_alone() -> None:
    positions = [0, 7, 19, 3, 40, 7]
    straight = Batches(counting(41), 4, seed=5)
    expected = {p: straight.at(p, 4) for p in sorted(positions)}
    for seed, position in enumerate(positions):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        assert np.array_equal(straight.at(position, 4), expected[position])
        assert np.array_equal(Batches(counting(41), 4, seed=5).at(position, 4), expected[position])


def test_a_large_batch_is_the_small_ones_in_a_row_across_epochs() -> None:
    batches = Batches(counting(41), 4, seed=5)
    rows_ = [batches.at(position, 1) for position in range(6, 26)]
    assert np.array_equal(batches.at(6, 20), np.concatenate(rows_))


def test_each_epoch_has_every_sequence_once_in_an_order_of_its_own() -> None:
    batches = Batches(counting(401), 4, seed=5)
    epochs = [batches.at(100 * epoch, 100)[:, 0] // 4 for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(100))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_differs_between_seeds() -> None:
    starts = [Batches(counting(401), 4, seed).at(0, 100)[:, 0] for seed in range(3)]
    assert len({tuple(order) for order in starts}) == 3


def test_batches_are_in_local_ids() -> None:
    ids = np.array([3, 5, 9, 3, 9], dtype=np.uint16)
    vocabulary = Vocabulary(np.array([3, 5, 9]), 10)
    stream = TokenStream(ids, ids, vocabulary, np.full(3, 1 / 3), 1, 1)
    assert Batches(stream, 4, seed=0).at(0, 1).tolist() == [[0, 1, 2, 0, 2]]
