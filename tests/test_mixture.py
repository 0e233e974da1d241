"""A silo of several sources: shares by weight or by size, in both splits, counted by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dept_fl.config import Recipe, SiloConfig, SourceConfig
from dept_fl.data import Corpus, load_corpus
from dept_fl.errors import DeptError
from dept_fl.story import dropped
from tests.test_data import rows, write

# One document in five is for validation; ten bytes each below.
RECIPE = Recipe(validation_fraction=0.2, validation_max_bytes=100)


def texts(of: str, count: int) -> list[str]:
    """Documents of ten bytes."""
    return [f"{of}{i:09d}" for i in range(count)]


def mixed(
    folder: Path,
    sources: dict[str, Sequence[str]],
    weights: dict[str, float] | None = None,
    recipe: Recipe = RECIPE,
    **settings: Any,
) -> Corpus:
    made = {
        name: SourceConfig(
            files=[str(write(folder / f"{name}.jsonl", rows(*documents)))],
            weight=(weights or {}).get(name, 0.0),
        )
        for name, documents in sources.items()
    }
    config = SiloConfig(sources=made, **settings)
    return load_corpus("ant", config, recipe, folder / "cache")


def train_of(corpus: Corpus, of: str) -> list[str]:
    return [text for text in corpus.texts("train") if text.startswith(of)]


def test_sources_without_weights_are_read_once_each(tmp_path: Path) -> None:
    given = {"b": texts("b", 30), "a": texts("a", 60)}
    corpus = mixed(tmp_path, given)
    train, validation = list(corpus.texts("train")), list(corpus.texts("validation"))
    assert sorted([*train, *validation]) == sorted([*given["a"], *given["b"]])
    assert [text[0] for text in train] == sorted(text[0] for text in train)  # by their names
    assert {name: own["passes"] for name, own in corpus.sources.items()} == {"a": 1.0, "b": 1.0}


def test_the_source_with_most_for_its_weight_is_read_once_and_the_other_again(
    tmp_path: Path,
) -> None:
    corpus = mixed(tmp_path, {"a": texts("a", 40), "b": texts("b", 40)}, {"a": 3, "b": 1})
    a, b = train_of(corpus, "a"), train_of(corpus, "b")
    once = len(set(b))
    assert b == list(dict.fromkeys(b))  # the largest for its weight
    # Bytes of a are three times those of b, up to a document.
    assert 0 <= 10 * len(a) - 3 * 10 * once < 10
    # In their order, from the beginning again and again.
    first = list(dict.fromkeys(a))
    assert a == (first * 4)[: len(a)]
    assert corpus.sources["a"]["passes"] == len(a) / len(first)
    assert corpus.sources["b"]["passes"] == 1.0
    assert corpus.sources["a"]["documents"] == len(first)
    assert corpus.train_bytes == 10 * (len(a) + len(b))
    assert corpus.train_documents == len(a) + len(b)


def test_equal_weights_are_equal_shares_whatever_the_sizes(tmp_path: Path) -> None:
    corpus = mixed(tmp_path, {"a": texts("a", 100), "b": texts("b", 25)}, {"a": 1, "b": 1})
    assert len(train_of(corpus, "a")) == len(train_of(corpus, "b"))


def test_with_max_bytes_a_source_is_cut_at_its_share(tmp_path: Path) -> None:
    recipe = replace(RECIPE, validation_fraction=0.1)
    given = {"a": texts("a", 100), "b": texts("b", 100)}
    corpus = mixed(tmp_path, given, {"a": 3, "b": 1}, recipe, max_bytes=400)
    seen = {
        name: {t for split in ("train", "validation") for t in corpus.texts(split) if t[0] == name}
        for name in "ab"
    }
    assert seen == {"a": set(given["a"][:30]), "b": set(given["b"][:10])}
    a, b = len(train_of(corpus, "a")), len(train_of(corpus, "b"))
    assert abs(a - 3 * b) <= 3


def test_validation_has_each_sources_share_of_its_limit(tmp_path: Path) -> None:
    # 400 documents have about 80 for validation, far more than the limit of 10 together.
    given = {"a": texts("a", 400), "b": texts("b", 400)}
    by_weight = mixed(tmp_path / "w", given, {"a": 4, "b": 1})
    kept = [text[0] for text in by_weight.texts("validation")]
    assert (kept.count("a"), kept.count("b")) == (8, 2)
    by_size = mixed(tmp_path / "s", {"a": given["a"], "b": texts("b", 100)})
    kept = [text[0] for text in by_size.texts("validation")]
    assert (kept.count("a"), kept.count("b")) == (8, 2)
    assert by_size.sources["a"]["validation_bytes"] == 80
    # What is not kept is trained on, and nothing is in both.
    assert by_size.documents == 500
    assert not set(by_size.texts("train")) & set(by_size.texts("validation"))


def test_a_source_whose_share_is_less_than_a_document_keeps_one(tmp_path: Path) -> None:
    given = {"a": texts("a", 400), "b": texts("b", 40)}
    corpus = mixed(tmp_path, given, {"a": 99, "b": 1})
    kept = [text[0] for text in corpus.texts("validation")]
    assert (kept.count("a"), kept.count("b")) == (9, 1)  # of 99 bytes and of 1
    assert not set(corpus.texts("train")) & set(corpus.texts("validation"))


def test_of_more_sources_than_have_room_those_without_validation_are_named(tmp_path: Path) -> None:
    given = {f"s{i:02d}": texts(chr(ord("a") + i), 40) for i in range(12)}
    corpus = mixed(tmp_path, given)  # each has a share of 8 bytes
    assert [text[0] for text in corpus.texts("validation")] == list("abcdefghij")
    assert corpus.unvalidated == ["s10", "s11"]
    assert dropped(corpus).endswith("no document kept for validation of s10, s11")
    assert corpus.documents == 12 * 40


def test_what_does_not_fit_into_a_sources_share_does_not_keep_out_what_does(
    tmp_path: Path,
) -> None:
    whole = [*texts("v", 2), "w" * 40, *texts("w", 9)]
    own = SourceConfig(
        files=[str(write(tmp_path / "a.jsonl", rows(*texts("a", 50))))],
        validation_files=[str(write(tmp_path / "v.jsonl", rows(*whole)))],
        weight=1,
    )
    other = SourceConfig(files=[str(write(tmp_path / "b.jsonl", rows(*texts("b", 99))))], weight=1)
    config = SiloConfig(sources={"a": own, "b": other})
    corpus = load_corpus("ant", config, RECIPE, tmp_path / "cache")
    kept = [text for text in corpus.texts("validation") if text[0] in "vw"]
    assert kept == [*texts("v", 2), *texts("w", 3)]  # 50 bytes


def test_a_copy_is_not_the_one_document_that_a_source_keeps(tmp_path: Path) -> None:
    both = texts("x", 20)
    corpus = mixed(tmp_path, {"a": both, "b": [*both, *texts("b", 40)]}, {"a": 19, "b": 1})
    assert corpus.unvalidated == []
    assert corpus.sources["b"]["validation_documents"] == 1
    kept = list(corpus.texts("validation"))
    assert len(kept) == len(set(kept))


def test_a_single_document_is_trained_on(tmp_path: Path) -> None:
    recipe = replace(RECIPE, validation_fraction=0.9)
    corpus = mixed(tmp_path, {"a": texts("a", 40), "b": ["b" * 50]}, {"a": 9, "b": 1}, recipe)
    assert set(train_of(corpus, "b")) == {"b" * 50}
    assert corpus.unvalidated == ["b"]


def test_what_two_sources_have_is_taken_once_and_never_from_validation(tmp_path: Path) -> None:
    both = texts("x", 50)
    corpus = mixed(tmp_path, {"a": [*texts("a", 50), *both], "b": [*texts("b", 50), *both]})
    train, validation = list(corpus.texts("train")), list(corpus.texts("validation"))
    assert len(train) + len(validation) == 150
    assert corpus.duplicates == 50
    assert not set(train) & set(validation)


def test_without_deduplication_no_validation_document_is_trained_on(tmp_path: Path) -> None:
    both = texts("x", 50)
    recipe = replace(RECIPE, deduplicate=False)
    corpus = mixed(tmp_path, {"a": both, "b": [*both, *texts("b", 9)]}, recipe=recipe)
    train, validation = list(corpus.texts("train")), list(corpus.texts("validation"))
    assert len(train) > len(set(train))
    assert not set(train) & set(validation)


def test_a_source_with_validation_text_of_its_own_keeps_it(tmp_path: Path) -> None:
    own = SourceConfig(
        files=[str(write(tmp_path / "a.jsonl", rows(*texts("a", 50))))],
        validation_files=[str(write(tmp_path / "v.jsonl", rows(*texts("v", 50))))],
    )
    other = SourceConfig(files=[str(write(tmp_path / "b.jsonl", rows(*texts("b", 60))))])
    config = SiloConfig(sources={"a": own, "b": other})
    corpus = load_corpus("ant", config, RECIPE, tmp_path / "cache")
    assert train_of(corpus, "a") == texts("a", 50)
    assert train_of(corpus, "v") == []  # what does not fit is not trained on
    kept = [text for text in corpus.texts("validation") if text[0] == "v"]
    assert kept == texts("v", len(kept))
    assert 0 < len(kept) < 10


def test_another_weight_reads_no_source_again_and_gives_another_text(tmp_path: Path) -> None:
    given = {"a": texts("a", 40), "b": texts("b", 40)}
    first = mixed(tmp_path, given, {"a": 1, "b": 1})
    parts = sorted((tmp_path / "cache/sources").iterdir())
    stamps = [(part / "train.jsonl").stat().st_mtime_ns for part in parts]
    config = SiloConfig(
        sources={
            name: SourceConfig(files=[str(tmp_path / f"{name}.jsonl")], weight=weight)
            for name, weight in (("b", 1.0), ("a", 2.0))
        }
    )
    second = load_corpus("ant", config, RECIPE, tmp_path / "cache")
    assert second.digest != first.digest
    assert sorted((tmp_path / "cache/sources").iterdir()) == parts
    assert [(part / "train.jsonl").stat().st_mtime_ns for part in parts] == stamps


def test_the_order_in_which_sources_are_named_changes_nothing(tmp_path: Path) -> None:
    given = {"a": texts("a", 40), "b": texts("b", 40)}
    first = mixed(tmp_path / "1", given, {"a": 1, "b": 2})
    second = mixed(tmp_path / "2", dict(reversed(given.items())), {"b": 2, "a": 1})
    assert first.digest == second.digest


def test_a_weight_that_nobody_can_mean_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeptError) as raised:
        mixed(tmp_path, {"a": texts("a", 300), "b": texts("b", 3)}, {"a": 1, "b": 3})
    message = str(raised.value)
    assert message.startswith("silo ant.sources.b: its ")
    assert "a share of 75.0%; at most 100 do: lower silos.ant.sources.b.weight, or set" in message


def test_a_source_without_text_of_its_own_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeptError, match=r"^silo ant.sources.b: no text for training that no other"):
        mixed(tmp_path, {"a": texts("a", 50), "b": texts("a", 50)}, {"a": 1, "b": 1})
    with pytest.raises(DeptError, match=r"^silo ant.sources.c: no text in its data; check silos"):
        mixed(tmp_path, {"a": texts("a", 50), "c": [" "]})


def test_a_small_source_may_have_nothing_for_validation(tmp_path: Path) -> None:
    few = texts("b", 3)
    recipe = replace(RECIPE, validation_fraction=0.05)
    corpus = mixed(tmp_path, {"a": texts("a", 200), "b": few}, recipe=recipe)
    assert train_of(corpus, "b") == few
    assert corpus.sources["b"]["validation_documents"] == 0
    assert corpus.unvalidated == ["b"]


def test_a_wrong_setting_of_a_source_is_named_with_its_path(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps({"body": "x"}))
    config = SiloConfig(sources={"web": SourceConfig(files=[str(file)])})
    with pytest.raises(DeptError, match=r"^silo ant.sources.web: .*set silos.ant.sources.web.colu"):
        load_corpus("ant", config, RECIPE, tmp_path / "cache")


def test_a_corpus_of_before_has_no_sources(tmp_path: Path) -> None:
    """What older versions wrote beside the text is still read."""
    file = write(tmp_path / "a.jsonl", rows(*texts("a", 40)))
    config = SiloConfig(files=[str(file)])
    made = load_corpus("ant", config, RECIPE, tmp_path / "cache")
    facts = json.loads((made.folder / "corpus.json").read_text())
    old = {k: v for k, v in facts.items() if k not in ("near_duplicates", "left_out")}
    (made.folder / "corpus.json").write_text(json.dumps(old))
    assert load_corpus("ant", config, RECIPE, tmp_path / "cache") == made
