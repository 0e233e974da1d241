"""Which rows and documents a source takes, and what of a row is its text."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from dept_fl.config import Recipe, SiloConfig
from dept_fl.data import load_corpus
from dept_fl.errors import DeptError
from dept_fl.sources import documents, source_key, text_columns
from tests.test_data import table, write

ROWS = [
    {"text": "one", "lang": "fr", "score": 0.9, "meta": {"year": 1999}},
    {"text": "two", "lang": "en", "score": 0.8, "meta": {"year": 2001}},
    {"text": "three", "lang": "fr", "score": None, "meta": None},
    {"text": "four", "lang": None, "score": 0.1, "meta": {"year": 2020}},
]


def of_rows(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    if suffix == ".parquet":
        return write(folder / "a.parquet", table(**{k: [r[k] for r in rows] for k in rows[0]}))
    return write(folder / "a.jsonl", "\n".join(map(json.dumps, rows)))


def taken(*files: Path, counts: Counter[str] | None = None, **settings: Any) -> list[str]:
    return list(documents("ant", SiloConfig(files=[str(f) for f in files], **settings), counts))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("where", "texts"),
    [
        (["lang=fr"], ["one", "three"]),
        (["lang!=fr"], ["two", "four"]),  # null is another value
        (["lang=null"], ["four"]),
        (["score>=0.8"], ["one", "two"]),  # null is neither more nor less
        (["score<=0.8"], ["two", "four"]),
        (["score>=0.2", "lang=fr"], ["one"]),
        (["meta.year>=2000"], ["two", "four"]),
        (["meta.year=1999"], ["one"]),
        (["score>=1e3"], []),
    ],
)
def test_rows_are_chosen_by_their_fields(
    tmp_path: Path, suffix: str, where: list[str], texts: list[str]
) -> None:
    counts: Counter[str] = Counter()
    assert taken(of_rows(tmp_path, suffix, ROWS), where=where, counts=counts) == texts
    assert counts["where"] == len(ROWS) - len(texts)


@pytest.mark.parametrize(
    ("where", "texts"),
    [
        (["day=2020-01-31"], ["one"]),
        (["day!=2020-01-31"], ["two", "three"]),
        (["price=1.50"], ["one"]),
        (["price!=1.50", "price>=2"], ["two"]),
        (["time=2020-01-31 12:00:00"], ["one"]),
        (["day=null"], ["three"]),
        (['days=["2020-01-31"]'], ["one"]),  # within what JSON writes
    ],
)
def test_dates_and_decimals_are_compared_as_they_are_written(
    tmp_path: Path, where: list[str], texts: list[str]
) -> None:
    content = table(
        text=["one", "two", "three"],
        day=[date(2020, 1, 31), date(2021, 1, 31), None],
        time=[datetime(2020, 1, 31, 12), datetime(2021, 1, 31, 12), None],
        price=[Decimal("1.50"), Decimal("2.50"), None],
        days=[[date(2020, 1, 31)], [], None],
    )
    assert taken(write(tmp_path / "a.parquet", content), where=where) == texts


def test_an_empty_field_and_nan_are_neither_more_nor_less(tmp_path: Path) -> None:
    csv = write(tmp_path / "a.csv", "text,score\none,0.9\ntwo,\nthree, \nfour,NaN\n")
    lines = '{"text": "one", "score": 0.9}\n{"text": "two", "score": NaN}'
    nan = write(tmp_path / "b.jsonl", lines)
    parquet = write(tmp_path / "c.parquet", table(text=["one", "two"], score=[0.9, math.nan]))
    for file in (csv, nan, parquet):
        assert taken(file, where=["score>=0.5"]) == ["one"]
        assert taken(file, where=["score<=0.5"]) == []


def test_the_hubs_rows_are_chosen_likewise(tmp_path: Path) -> None:
    of_rows(tmp_path, ".jsonl", ROWS[:2])
    source = SiloConfig(hub=str(tmp_path), where=["score>=0.9"])
    assert list(documents("ant", source)) == ["one"]


def test_the_first_sign_counts(tmp_path: Path) -> None:
    rows = [{"text": "one", "kind": "a=b"}, {"text": "two", "kind": "x>=1"}]
    file = of_rows(tmp_path, ".jsonl", rows)
    assert taken(file, where=["kind=a=b"]) == ["one"]
    assert taken(file, where=["kind!=a=b"]) == ["two"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"where": ["size=3"]}, "no field 'size'; where 'size' should be: text, lang, score, meta"),
        ({"where": ["lang>=3"]}, "row 1|line 1: field 'lang' holds 'fr', no number that is more"),
        ({"where": ["meta.month=3"]}, "where 'month' should be: year; set silos.ant.where"),
        ({"columns": ["lang", "body"]}, "no column 'body'; columns: .*; set silos.ant.columns"),
        ({"columns": ["score"]}, "column 'score' holds float, not text; set silos.ant.columns"),
    ],
)
def test_a_wrong_column_or_field_is_named_with_those_there_are(
    tmp_path: Path, suffix: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DeptError, match=rf"^silo ant: .*({message})"):
        taken(of_rows(tmp_path, suffix, ROWS), **settings)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.parquet", table(body=["x"], lang=["fr"])), ("a.csv", "body,lang\nx,fr\n")],
)
def test_a_wrong_column_is_not_hidden_by_conditions_that_no_row_meets(
    tmp_path: Path, name: str, content: str | bytes
) -> None:
    file = write(tmp_path / name, content)
    counts: Counter[str] = Counter()
    with pytest.raises(DeptError, match=r"no column 'text'; columns: body, lang; set silos.ant.c"):
        taken(file, where=["lang=en"], counts=counts)
    with pytest.raises(DeptError, match=r"no field 'language'; .*: body, lang; set silos.ant.wh"):
        taken(file, column="body", where=["language=en"], counts=counts)
    assert not counts


def test_a_row_that_is_not_taken_need_not_have_the_text(tmp_path: Path) -> None:
    rows = [{"kind": "image"}, {"kind": "text", "text": "one"}]
    assert taken(of_rows(tmp_path, ".jsonl", rows), where=["kind=text"]) == ["one"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_several_columns_are_joined_by_a_blank_line_and_nulls_left_out(
    tmp_path: Path, suffix: str
) -> None:
    rows = [
        {"title": "One", "text": "a", "x": 1},
        {"title": None, "text": "b", "x": 2},
        {"title": None, "text": None, "x": 3},
    ]
    file = of_rows(tmp_path, suffix, rows)
    assert taken(file, columns=["title", "text"]) == ["One\n\na", "b"]
    assert taken(file, columns=["title", "text"], where=["x>=2"]) == ["b"]


def test_documents_are_left_out_by_their_length_in_characters(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "é\n\néé\n\néééé\n\n\u2003")
    counts: Counter[str] = Counter()
    assert taken(file, min_characters=2, max_characters=3, counts=counts) == ["éé"]
    assert counts == {"length": 2}  # what is empty was never a document
    assert taken(file, max_characters=2) == ["é", "éé"]


def test_a_text_file_has_no_columns_to_choose_by(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "x")
    for settings, setting in (({"where": ["a=b"]}, "where"), ({"columns": ["a"]}, "columns")):
        with pytest.raises(DeptError, match=rf"a.txt: has no columns, which silos.ant.{setting} n"):
            taken(file, **settings)


# ---- .csv and .tsv -----------------------------------------------------------------------------


def test_csv_is_read_with_quotes_line_ends_and_compression(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbfid,text,lang\r\n1,"one, ""two""\r\nthree",fr\r\n\r\n2,,fr\r\n3,four,en\r\n'
    )
    for name, packed in (("a.csv", content), ("a.csv.gz", gzip.compress(content))):
        file = write(tmp_path / name, packed)
        assert taken(file) == ['one, "two"\nthree', "four"]
        assert taken(file, where=["id>=2"]) == ["four"]
        assert taken(file, columns=["lang", "text"], where=["lang=en"]) == ["en\n\nfour"]
    source = SiloConfig(files=[str(tmp_path / "a.csv")])
    assert text_columns("ant", source) == {"id": True, "text": True, "lang": True}


def test_tabs_separate_the_fields_of_tsv(tmp_path: Path) -> None:
    assert taken(write(tmp_path / "a.tsv", "id\ttext\n1\tone, two\n")) == ["one, two"]


def test_a_folder_of_all_kinds_is_read_as_one(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "text\none\n")
    write(tmp_path / "b.jsonl", '{"text": "two"}')
    write(tmp_path / "c.parquet", table(text=["three"]))
    write(tmp_path / "d.txt", "four")
    assert taken(tmp_path) == ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,a\none\n", "line 2: 1 fields, where the first line names 2 columns; quote fields"),
        ("a\none\n", "line 1: no column 'text'; columns: a; set silos.ant.column"),
        ('text\nzero\n"one\ntwo\n', "lines 3 to 4: cannot be read: unexpected end of data; close"),
        ('text\n"one"x\n', "line 2: cannot be read: .* expected after .*; close quotes, and do"),
        ('"text', "line 1: cannot be read: unexpected end of data"),
    ],
)
def test_a_bad_csv_is_named_with_the_mend(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DeptError, match=f"^silo ant: .*a.csv.*{message}"):
        taken(write(tmp_path / "a.csv", content))


# ---- the corpus --------------------------------------------------------------------------------


def test_what_is_left_out_is_counted_with_the_corpus(tmp_path: Path) -> None:
    rows = [{"text": f"{i} " * (i + 1), "n": i} for i in range(40)]
    file = of_rows(tmp_path, ".jsonl", rows)
    source = SiloConfig(files=[str(file)], where=["n>=10"], max_characters=90)
    recipe = Recipe(validation_fraction=0.3)
    for _ in range(2):  # made, then from the cache
        corpus = load_corpus("ant", source, recipe, tmp_path / "cache")
        assert corpus.left_out == {"where": 10, "length": 10}
        assert corpus.documents == 20


def test_conditions_that_leave_nothing_are_named(tmp_path: Path) -> None:
    file = of_rows(tmp_path, ".jsonl", ROWS)
    source = SiloConfig(files=[str(file)], where=["lang=de"])
    with pytest.raises(DeptError, match=r"^silo ant: its conditions leave out all .*4 by where"):
        load_corpus("ant", source, Recipe(), tmp_path / "cache")


def test_each_setting_has_a_key_of_its_own_and_none_at_its_default(tmp_path: Path) -> None:
    source = SiloConfig(files=["/nowhere/*.jsonl"])
    changes: list[dict[str, Any]] = [
        {},
        {"where": ["a=b"]},
        {"columns": ["a"]},
        {"min_characters": 1},
        {"max_characters": 1},
    ]
    keys = [source_key(SiloConfig(files=source.files, **change), Recipe()) for change in changes]
    keys.append(source_key(source, Recipe(near_duplicates=0.8)))
    assert len(set(keys)) == len(keys)
    # That of before there were these settings: text read then is not read again.
    assert keys[0] == "3f7a69e936c07eb4"
