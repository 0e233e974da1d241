"""Documents that are nearly the same."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from dept_fl.config import Recipe, SiloConfig, SourceConfig
from dept_fl.near import NearCopies, shingles
from dept_fl.sources import source_key
from tests.test_data import corpus_of, some_texts

RECIPE = Recipe(validation_fraction=0.2)


def long_text(seed: int, words: int = 300) -> list[str]:
    draw = random.Random(seed)
    return [f"w{draw.randrange(5000)}" for _ in range(words)]


def edited(words: list[str], changes: int) -> list[str]:
    """With so many words changed, far from each other: each is in five shingles."""
    stride = len(words) // (changes + 1)
    return [f"{w}x" if i and i % stride == 0 and i // stride <= changes else w
            for i, w in enumerate(words)]  # fmt: skip


def test_shingles_are_five_words_in_a_row() -> None:
    assert list(shingles("The leaf, is UNDER a tree.")) == [
        "the leaf is under a",
        "leaf is under a tree",
    ]
    assert list(shingles("two words")) == ["two words"]
    assert list(shingles("?!")) == ["?!"]
    assert list(shingles("日本語の文章です")) == [
        "日 本 語 の 文",
        "本 語 の 文 章",
        "語 の 文 章 で",
        "の 文 章 で す",
    ]


def jaccard(a: str, b: str) -> float:
    one, two = set(shingles(a)), set(shingles(b))
    return len(one & two) / len(one | two)


@pytest.mark.parametrize(("changes", "near"), [(1, True), (20, False)])
def test_what_is_above_the_threshold_is_found_and_what_is_below_is_not(
    changes: int, near: bool
) -> None:
    right = 0
    for seed in range(20):
        words = long_text(seed)
        text, other = " ".join(words), " ".join(edited(words, changes))
        assert (jaccard(text, other) > 0.9) == near
        assert near or jaccard(text, other) < 0.6
        known = NearCopies(0.8)
        known.add(text)
        right += known.has(other) == near
    assert right == 20


@pytest.mark.parametrize(("threshold", "changes"), [(0.8, 10), (0.9, 3)])
def test_what_is_a_little_above_the_threshold_is_found_as_the_sketches_tell(
    threshold: float, changes: int
) -> None:
    found = 0
    for seed in range(40):
        words = long_text(seed, 600)
        text, other = " ".join(words), " ".join(edited(words, changes))
        assert jaccard(text, other) == pytest.approx(threshold + 0.05, abs=0.01)
        known = NearCopies(threshold)
        known.add(text)
        estimate = known._sketch(text).jaccard(known._sketch(other))
        assert known.has(other) == (estimate >= threshold)
        found += known.has(other)
    assert found >= 36


def test_text_of_before_more_was_found_is_read_anew() -> None:
    file = ["/nowhere/*.jsonl"]
    keys = [
        source_key(SiloConfig(files=file), replace(Recipe(), near_duplicates=0.8)),
        source_key(SiloConfig(files=file, where=["a=b"]), Recipe()),
        source_key(SiloConfig(sources={"a": SourceConfig(files=file)}), Recipe()),
    ]
    assert not {"0813daac27094a06", "b95b357fe4a50fd9", "d9c42346f83148f5"} & set(keys)


def test_other_documents_are_not_near_and_the_same_words_are() -> None:
    known = NearCopies(0.8)
    for seed in range(50):
        assert not known.has(" ".join(long_text(seed)))
        known.add(" ".join(long_text(seed)))
    assert known.has("!! " + ",\n".join(long_text(7)).upper())


def test_the_same_documents_give_the_same_answers() -> None:
    found = []
    for _ in range(2):
        known = NearCopies(0.7)
        answers = []
        for seed in range(30):
            words = long_text(seed % 15)
            text = " ".join(edited(words, seed // 2))
            answers.append(known.has(text))
            known.add(text)
        found.append(answers)
    assert found[0] == found[1]


def test_near_copies_are_dropped_counted_and_never_on_the_other_side(tmp_path: Path) -> None:
    texts = [" ".join(long_text(seed)) for seed in range(60)]
    near = [" ".join(edited(long_text(seed), 1)) for seed in range(60)]
    exact = corpus_of(tmp_path / "exact", [*texts, *near, *texts[:5]], RECIPE)
    assert (exact.duplicates, exact.near_duplicates) == (5, 0)
    corpus = corpus_of(
        tmp_path / "near", [*texts, *near, *texts[:5]], replace(RECIPE, near_duplicates=0.8)
    )
    assert (corpus.duplicates, corpus.near_duplicates) == (65, 60)
    assert [*corpus.texts("train"), *corpus.texts("validation")].count(texts[0]) == 1
    assert set(corpus.texts("train")) | set(corpus.texts("validation")) == set(texts)


def test_without_near_copies_the_corpus_is_the_same(tmp_path: Path) -> None:
    texts = some_texts()
    plain = corpus_of(tmp_path / "a", texts, RECIPE)
    near = corpus_of(tmp_path / "b", texts, replace(RECIPE, near_duplicates=0.9))
    assert near.near_duplicates == 0
    assert near.digest == plain.digest
