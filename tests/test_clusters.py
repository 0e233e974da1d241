"""Real text of three kinds falls apart into its kinds; agreement by hand."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from sklearn import metrics
from typer.testing import CliRunner

from dept_fl.cli import app
from dept_fl.clusters import (
    Agreement,
    Clusters,
    Part,
    Request,
    Split,
    agreement,
    excerpt,
    marks,
    sample,
    split_files,
)
from dept_fl.config import SiloConfig, load_recipe
from dept_fl.errors import DeptError
from dept_fl.progress import Progress
from dept_fl.silo import Silo
from dept_fl.sources import documents

GERMAN = (
    """
Der Bäcker öffnet seinen Laden jeden Morgen um sechs Uhr. Die Kinder gehen zu Fuß in die Schule.
Im Winter liegt auf den Feldern oft hoher Schnee. Meine Großmutter hat einen Garten mit
Apfelbäumen. Der Zug nach Leipzig fährt heute von einem anderen Gleis ab. Wir haben gestern Abend
lange über das Buch gesprochen. Auf dem Markt gibt es frische Möhren und Kartoffeln. Niemand
wusste, warum das Licht in der Küche noch brannte. Die Stadt baut eine neue Brücke über den Fluss.
Er schrieb ihr einen Brief und vergaß, ihn abzuschicken. Nach dem Regen riecht es im Wald nach
Pilzen. Das Museum ist am Montag geschlossen. Ohne seine Brille kann er die Zeitung nicht lesen.
Sie lernt seit zwei Jahren Geige und übt jeden Tag. Der Hund schläft am liebsten unter dem Tisch.
""".replace("\n", " ")
    .strip()
    .split(". ")
)


def german(count: int = 60) -> list[str]:
    draw = random.Random(1)
    return [". ".join(draw.sample(GERMAN, 6)) + "." for _ in range(count)]


def installed(content: str, count: int = 60) -> list[str]:
    source = SiloConfig(packages=["stdlib"], include=["*.py"], content=content)
    # The end of a program has no docstring of its module, which would be English.
    found = (text[-3000:] for text in documents("x", source) if len(text) > 400)
    return [next(found) for _ in range(count)]


@pytest.fixture(scope="module")
def corpus() -> list[tuple[str, str]]:
    """Documents with their kind, mixed."""
    kinds = {"german": german(), "code": installed("code"), "english": installed("docstrings")}
    pairs = [(text, kind) for kind, texts in kinds.items() for text in texts]
    random.Random(2).shuffle(pairs)
    return pairs


# ---- agreement ---------------------------------------------------------------------------


def test_agreement_by_hand():
    # Source a: two documents in cluster 0, one in 1; source b: both in 1. Pairs together: in a
    # source 3 + 1, in a cluster 1 + 3, in both 1 + 1, of 10 in all; by chance 4 * 4 / 10.
    found = agreement(Counter({("a", 0): 2, ("a", 1): 1, ("b", 1): 2}), clusters=2)
    assert found.sources == ["a", "b"]
    assert found.confusion.tolist() == [[2, 1], [0, 2]]
    assert found.adjusted_rand_index == pytest.approx((2 - 1.6) / (4 - 1.6))
    assert found.purity == pytest.approx(4 / 5)
    # Entropies of both margins: of (3/5, 2/5); of the cells: of (2/5, 1/5, 2/5).
    margin = -(0.6 * np.log(0.6) + 0.4 * np.log(0.4))
    cells = -(0.8 * np.log(0.4) + 0.2 * np.log(0.2))
    assert found.normalised_mutual_information == pytest.approx((2 * margin - cells) / margin)


@pytest.mark.parametrize(
    ("confusion", "rand", "mutual"),
    [
        ([[0, 3], [2, 0]], 1.0, 1.0),  # the same partition under other numbers
        ([[1, 1], [1, 1]], -0.5, 0.0),  # (0 - 4/6) / (2 - 4/6): worse than chance
        ([[4]], 1.0, 1.0),
        ([[2], [2]], 0.0, 0.0),
    ],
)
def test_the_ends_of_the_scale(confusion: list[list[int]], rand: float, mutual: float):
    found = Agreement(["a", "b"][: len(confusion)], np.array(confusion))
    assert found.adjusted_rand_index == pytest.approx(rand)
    assert found.normalised_mutual_information == pytest.approx(mutual)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=40))
def test_agreement_is_that_of_scikit_learn(pairs: list[tuple[int, int]]):
    found = agreement(Counter((str(source), cluster) for source, cluster in pairs), clusters=5)
    sources, clusters = zip(*pairs, strict=True)
    assert found.adjusted_rand_index == pytest.approx(
        metrics.adjusted_rand_score(sources, clusters)
    )
    assert found.normalised_mutual_information == pytest.approx(
        metrics.normalized_mutual_info_score(sources, clusters), abs=1e-12
    )


# ---- sample and excerpt ------------------------------------------------------------------


def test_an_excerpt_is_taken_from_all_over_a_document():
    assert excerpt("x" * 2000) == "x" * 2000
    long = "".join(f"{i:04d}" for i in range(1025))  # parts of 500 begin at 0, 1200, 2400, 3600
    parts = excerpt(long).split("\n")
    assert [part[:4] for part in parts] == ["0000", "0300", "0600", "0900"]
    assert parts[-1].endswith("1024")
    assert {len(part) for part in parts} == {500}


def test_a_sample_depends_on_neither_order_nor_repetition():
    texts = [f"document {i}" for i in range(300)]
    once = sample(texts, 20, seed=1)
    assert len(once) == 20
    assert sample(reversed(texts * 3), 20, seed=1) == once
    assert sample(texts, 20, seed=2).keys() != once.keys()
    assert sample(texts, 1000, seed=1).keys() == set(texts)


def test_a_sample_knows_the_bytes_of_the_whole_document():
    assert list(sample(["é" * 5000], 1, seed=1).values()) == [10_000]


def test_a_sample_is_of_the_whole_corpus():
    found = sample((f"{i}" for i in range(2000)), 200, seed=1)
    below = sum(int(text) < 1000 for text in found)
    assert 70 < below < 130  # within four standard deviations of a half


# ---- clusters -----------------------------------------------------------------------------


def test_three_kinds_of_text_are_found_again(corpus: list[tuple[str, str]]):
    texts = [text for text, _ in corpus]
    weights = [len(text.encode()) for text in texts]
    found = Clusters(texts, weights, 3, seed=2).assign(texts)
    pairs = Counter((kind, int(c)) for (_, kind), c in zip(corpus, found, strict=True))
    assert agreement(pairs, 3).adjusted_rand_index > 0.8  # docstrings that are half doctest
    assert len({cluster for kind, cluster in pairs if kind == "german"}) == 1


def test_the_same_seed_gives_the_same_clusters(corpus: list[tuple[str, str]]):
    texts = [text for text, _ in corpus]
    first, second = (Clusters(texts[:90], [1.0] * 90, 4, seed=3).assign(texts) for _ in range(2))
    assert np.array_equal(first, second)


def test_the_first_cluster_has_most_of_the_text(corpus: list[tuple[str, str]]):
    texts = [text for text, _ in corpus]
    for heavy in ("german", "code", "english"):
        weights = [100.0 if kind == heavy else 1.0 for _, kind in corpus]
        found = Clusters(texts, weights, 3, seed=1).assign(texts)
        kinds = {kind for (_, kind), cluster in zip(corpus, found, strict=True) if cluster == 0}
        assert heavy in kinds


def test_a_document_that_was_not_seen_joins_its_kind(corpus: list[tuple[str, str]]):
    fit = corpus[:120]
    clusters = Clusters([text for text, _ in fit], [1.0] * 120, 3, seed=1)
    of_kind = {kind: clusters.assign([text])[0] for text, kind in fit}
    new = "Am Sonntag besuchen wir die Tante und trinken mit ihr Kaffee im Garten."
    assert clusters.assign([new])[0] == of_kind["german"]


def test_what_marks_a_cluster_by_hand():
    texts = ["apple pear plum", "apple pear", "apple stone", "stone wall"]
    # p log(p / q) in cluster 0 of three documents: apple 4/5 log(4/5 * 3/1), pear 3/5 log(3/5 * 3),
    # plum 2/5 log(2/5 * 3); stone 2/5 log(2/5 * 3/2) < 0. In cluster 1: stone 2/3 log(2/3 * 5/2),
    # wall 2/3 log(2/3 * 5).
    found = marks(texts, np.array([0, 0, 0, 1]), count=2)
    assert found == [["apple", "pear", "plum"], ["wall", "stone"]]


def test_scripts_without_spaces_have_marks_too():
    found = marks(["天气很好", "天气不好", "книга"], np.array([0, 0, 1]), count=2)
    assert found[0][0] == "天气"
    assert found[1] == ["книга"]


def test_text_without_words_has_no_marks():
    assert marks(["1 2", "3 + 4"], np.array([0, 1]), count=2) == [[], []]


# ---- files to silos -----------------------------------------------------------------------


def write_jsonl(file: Path, pairs: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"text": text, "source": kind}) + "\n" for text, kind in pairs]
    with gzip.open(file, "wt") if file.suffix == ".gz" else file.open("w") as stream:
        stream.writelines(lines)


def texts_of(file: Path) -> Iterator[str]:
    for line in file.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["text"]


@pytest.fixture
def files(corpus: list[tuple[str, str]], tmp_path: Path) -> list[str]:
    """The corpus over three files of three kinds."""
    write_jsonl(tmp_path / "a.jsonl", corpus[:60])
    write_jsonl(tmp_path / "b.jsonl.gz", corpus[60:120])
    rows = [{"text": text, "source": kind} for text, kind in corpus[120:]]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    return [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]


@pytest.fixture
def made(files: list[str], tmp_path: Path) -> Split:
    request = Request(files, tmp_path / "out", silos=3, labels="source")
    return split_files(request, Progress())


def test_every_document_is_in_one_silo(made: Split, corpus: list[tuple[str, str]]):
    written = {part.name: list(texts_of(made.folder / f"{part.name}.jsonl")) for part in made.parts}
    assert list(written) == ["silo-1", "silo-2", "silo-3"]
    everything = [text for texts in written.values() for text in texts]
    assert sorted(everything) == sorted(text for text, _ in corpus)
    for part in made.parts:
        assert part.documents == len(written[part.name])
        assert part.text_bytes == sum(len(text.encode()) for text in written[part.name])
    order = {text: i for i, (text, _) in enumerate(corpus)}
    places = [order[text] for text in written["silo-1"]]
    assert places == sorted(places)


def test_agreement_with_the_column_that_names_the_source(made: Split):
    assert made.agreement is not None
    assert made.agreement.sources == ["code", "english", "german"]
    assert made.agreement.confusion.sum(axis=1).tolist() == [60, 60, 60]
    assert made.agreement.adjusted_rand_index > 0.8


def test_the_recipe_is_one_that_runs(made: Split, tmp_path: Path):
    recipe = load_recipe(made.folder / "silos.yaml", "vocab_size=400")
    assert recipe.silo_names == [part.name for part in made.parts]
    for part in made.parts:
        silo = Silo(part.name, recipe, tmp_path / "home", "")
        assert silo.corpus.documents + silo.corpus.duplicates == part.documents
        assert silo.stream.vocabulary.size == 400


def test_the_facts_as_json(made: Split):
    facts = json.loads(made.to_json())
    assert facts["silos"].keys() == {part.name for part in made.parts}
    sources = facts["agreement"]["sources"]
    assert sources["german"] == {made.parts[-1].name: 60}
    assert {source: sum(counts.values()) for source, counts in sources.items()} == {
        "code": 60, "english": 60, "german": 60,
    }  # fmt: skip


def test_without_labels_there_is_no_agreement(files: list[str], tmp_path: Path):
    found = split_files(Request(files, tmp_path / "out", silos=2), Progress())
    assert found.agreement is None
    assert found.documents == found.fitted == 180


def test_text_files_are_cut_as_silos_cut_them(tmp_path: Path):
    (tmp_path / "all.txt").write_text("\n".join([*german(30), *(f"{i} + {i}" for i in range(30))]))
    request = Request(
        [str(tmp_path / "all.txt")], tmp_path / "out", silos=2, settings=["sample_by=line"]
    )
    found = split_files(request, Progress())
    assert [part.documents for part in found.parts] == [30, 30]


@pytest.mark.parametrize("labels", ["", "source"])
def test_reading_stops_behind_max_bytes(files: list[str], tmp_path: Path, labels: str):
    request = Request(files, tmp_path / "out", 2, labels=labels, settings=["max_bytes=20000"])
    found = split_files(request, Progress())
    assert 20_000 <= found.text_bytes < 23_500  # the document that reaches it is the last


def test_a_silo_with_less_than_a_tenth_of_an_equal_share_is_small():
    parts = [Part("silo-1", 9, 961, []), Part("silo-2", 1, 39, [])]
    found = Split(Path("x"), parts, fitted=10, seed=1, agreement=None)
    assert found.small == [parts[1]]  # 39 < 0.1 * 1000 / 2
    assert Split(Path("x"), [parts[0], Part("silo-2", 1, 60, [])], 10, 1, None).small == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"silos": 1}, "--silos 1: must be from 2 to 500"),
        ({"silos": 400}, "--silos 400: the corpus has only 180 different documents"),
        ({"column": "body"}, "no column 'body'; columns: text, source; set --column"),
        ({"labels": "origin"}, r"a.jsonl, line 1: no column 'origin'; columns: text, source"),
        ({"files": ["nowhere/*.txt"]}, "no file matches .*nowhere.*; check FILES"),
        ({"settings": ["sample_by"]}, "--set 'sample_by': expected KEY=VALUE"),
        ({"settings": ["hub=x"]}, "--set 'hub=x': expected KEY=VALUE with a KEY of sample_by"),
        ({"settings": ["sample_by=word"]}, "--set sample_by='word': must be one of auto"),
        ({"settings": ["max_bytes=much"]}, "--set 'max_bytes=much': must be a whole number"),
    ],
)
def test_a_mistake_is_told_in_options_and_leaves_nothing(
    files: list[str], tmp_path: Path, changes: dict[str, object], reason: str
):
    given = {"files": files, "out": tmp_path / "out", "silos": 3, **changes}
    with pytest.raises(DeptError, match=reason):
        split_files(Request(**given), Progress())
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_not_overwritten(files: list[str], tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(DeptError, match="is there already and is never overwritten"):
        split_files(Request(files, tmp_path / "out", silos=2), Progress())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x y", "source": None}, "line 2: null in column 'source'"),
        ({"text": "x y"}, "line 2: no column 'source'; columns: text"),
    ],
)
def test_a_document_without_its_label(tmp_path: Path, row: dict[str, str], reason: str):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a b", "source": "s"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DeptError, match=reason):
        split_files(Request([str(file)], tmp_path / "out", 2, labels="source"), Progress())


def test_a_label_column_in_parquet_that_is_not_there(files: list[str], tmp_path: Path):
    with pytest.raises(DeptError, match=r"c.parquet: no column 'origin'; columns: text, source"):
        split_files(Request(files[2:], tmp_path / "out", 2, labels="origin"), Progress())


def test_plain_text_has_no_labels(tmp_path: Path):
    (tmp_path / "a.txt").write_text("some text")
    request = Request([str(tmp_path / "a.txt")], tmp_path / "out", 2, labels="source")
    with pytest.raises(DeptError, match=r"a.txt: has no columns, .* give .jsonl or .parquet"):
        split_files(request, Progress())


def test_a_column_of_names_that_are_all_different_is_no_source(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    write_jsonl(file, [(f"text {i}", f"id-{i}") for i in range(1500)])
    with pytest.raises(DeptError, match=r"--labels: over 1000 different values \(such as id-0, "):
        split_files(Request([str(file)], tmp_path / "out", 2, labels="source"), Progress())
    assert not (tmp_path / "out").exists()


def test_copies_of_one_text_are_no_clusters(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    write_jsonl(file, [("the same", "s")] * 50)
    with pytest.raises(DeptError, match="only 1 different documents"):
        split_files(Request([str(file)], tmp_path / "out", 2), Progress())


# ---- the command --------------------------------------------------------------------------


def test_the_command_prints_silos_terms_and_agreement(files: list[str], tmp_path: Path):
    out = str(tmp_path / "parts")
    words = ["silo", "split", *files, "--silos", "3", "--labels", "source", "--out", out]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "180 documents of " in done.stdout
    assert re.search(r"adjusted Rand index (0\.[89]|1\.0)", done.stdout)
    marked = next(line for line in done.stdout.splitlines() if " die " in f"{line} ")
    assert marked.startswith("  silo-")
    assert f"recipe  {out}/silos.yaml" in done.stdout


def test_the_command_as_json(files: list[str], tmp_path: Path):
    words = ["silo", "split", *files, "--silos", "2", "--out", str(tmp_path / "p"), "--json"]
    found = json.loads(CliRunner().invoke(app, words).stdout)
    assert sum(silo["documents"] for silo in found["silos"].values()) == 180
    assert found["agreement"] is None


def test_a_mistake_in_the_command_is_one_line(tmp_path: Path):
    done = CliRunner().invoke(app, ["silo", "split", "no.jsonl", "--silos", "2"])
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith("error: no file matches")
