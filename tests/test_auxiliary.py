"""Which tokens are alike, and sparse mixes of them, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import sparse

from dept_fl import auxiliary as module
from dept_fl.auxiliary import (
    Auxiliary,
    auxiliary,
    context_vectors,
    ngram_vectors,
    sparse_mix,
    sparsemax,
)
from dept_fl.surface import Surface
from dept_fl.tokenizer import Vocabulary


def whole(size: int) -> Vocabulary:
    return Vocabulary(np.arange(size), size)


def written(*texts: str) -> list[Surface]:
    return [Surface("text", text.encode()) for text in texts]


def every(size: int) -> np.ndarray:
    return np.arange(size)


# ---- sparsemax ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "weights"),
    [
        # Threshold (1.0 + 0.5 - 1) / 2 = 0.25: the third is below it.
        ([0.1, 1.0, 0.5], [0.0, 0.75, 0.25]),
        ([2.0, 0.9], [1.0, 0.0]),  # a lead of 1 takes all
        ([0.3, 0.3, 0.3, 0.3], [0.25] * 4),
        ([-5.0], [1.0]),
    ],
)
def test_sparsemax_by_hand(scores: list[float], weights: list[float]):
    assert dense(torch.tensor([scores])) == [pytest.approx(weights)]


def dense(scores: torch.Tensor) -> list[list[float]]:
    weights, columns = sparsemax(scores)
    return torch.zeros_like(scores).scatter(1, columns, weights).tolist()


def test_sparsemax_is_exact_where_more_columns_weigh_than_expected():
    assert module._FIRST_GUESS < 1000
    found = dense(torch.cat([torch.zeros(1, 1000), torch.eye(1, 1000)]))
    assert found[0] == pytest.approx([1 / 1000] * 1000)
    assert found[1] == [1.0] + [0.0] * 999


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    """No step towards a corner comes nearer."""
    scores = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.tensor(dense(scores), dtype=torch.float64)
    torch.testing.assert_close(found.sum(1), torch.ones(20, dtype=torch.float64))
    for corner in torch.eye(6, dtype=torch.float64):
        nearer = ((found - scores) * (corner - found)).sum(1)
        assert (nearer > -1e-9).all()


# ---- contexts ----------------------------------------------------------------------------------

A, B, X, Y, Z = range(5)


def text(*lines: list[int]) -> np.ndarray:
    return np.asarray([token for line in lines for token in line], dtype=np.uint16)


def test_neighbours_are_counted_by_side():
    parts = [np.asarray([A, B, A])]
    found = module._neighbours(parts, whole(2), window=2, contexts=2).toarray()
    # Contexts by frequency: A, B. Behind A: B, and two on A; before A: B, and two back A.
    assert found.tolist() == [[1, 1, 1, 1], [1, 0, 1, 0]]


def test_only_the_most_frequent_tokens_are_contexts():
    parts = [np.asarray([A, B, A])]
    found = module._neighbours(parts, whole(2), window=1, contexts=1).toarray()
    assert found.tolist() == [[0, 0], [1, 1]]


def test_positive_mutual_information_by_hand():
    counts = sparse.csr_array([[4.0, 0.0], [4.0, 8.0]])
    found = module._positive_mutual_information(counts).toarray()
    # Both contexts stand 8 times, so half each whatever the power. Tokens: 4 and 12 times.
    assert found[0].tolist() == pytest.approx([math.log(4 / (4 * 0.5)), 0.0])
    # Expected 6 of each: 4 is less than that, which counts as 0.
    assert found[1].tolist() == pytest.approx([0.0, math.log(8 / 6)])


def test_contexts_are_smoothed():
    counts = sparse.csr_array([[16.0, 1.0], [0.0, 0.0]])
    found = module._positive_mutual_information(counts).toarray()
    # 16^0.75 = 8: the rare context counts as a ninth of all, not a seventeenth.
    assert found[0].tolist() == pytest.approx([math.log(16 / (17 * 8 / 9)), 0.0])


def test_tokens_in_the_same_contexts_are_alike():
    vectors = context_vectors(text(*[[A, X, B], [A, Y, B], [Z, Z]] * 20), whole(5), window=1)
    cosines = vectors @ vectors.T
    assert cosines[X, Y] > 0.95
    assert cosines[X, Z] < 0.6


def test_a_token_that_the_text_never_has_is_all_zeros():
    vectors = context_vectors(text([A, B, A, X] * 5), whole(6))
    norms = np.linalg.norm(vectors, axis=1)
    assert norms.tolist() == pytest.approx([1, 1, 1, 0, 0, 0])


def test_ids_are_local_ones_and_others_are_passed_over():
    tokens = text(*[[A, X, B], [A, Y, B], [Z, Z]] * 20)
    shifted = np.insert(tokens + 7, slice(0, None, 2), 3)  # 3 is outside the vocabulary
    vocabulary = Vocabulary(np.arange(7, 12), full=12)
    found = context_vectors(shifted, vocabulary)
    np.testing.assert_allclose(found, context_vectors(tokens, whole(5)))


@pytest.mark.parametrize("tokens", [[], [A], [A, A]])
def test_a_text_without_contexts_says_nothing(tokens: list[int]):
    vectors = context_vectors(np.asarray(tokens, dtype=np.uint16), whole(5))
    assert not vectors[B:].any()
    assert np.isfinite(vectors).all()


def test_of_a_long_text_so_much_is_read_from_places_all_over_it(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_TOKENS", 10)
    parts = list(module._parts(np.arange(95), whole(95), most_tokens=35))
    assert [int(part[0]) for part in parts] == [0, 30, 60, 90]
    assert sum(map(len, parts)) == 35


def test_the_same_text_gives_the_same_vectors():
    tokens = np.random.default_rng(1).integers(0, 40, size=2000)
    first, second = (context_vectors(tokens, whole(40), dimensions=8) for _ in range(2))
    assert first.shape == (40, 8)
    assert np.array_equal(first, second)


# ---- spelling ----------------------------------------------------------------------------------


def test_ngrams_have_both_ends_and_up_to_so_many_characters():
    found = module._ngrams(written("ab")[0], longest=3)
    assert found == sorted(["\x02a", "ab", "b\x03", "\x02ab", "ab\x03"])


def test_similarity_of_spelling_by_hand():
    # 2-grams alone. <a a> against <b b>: none; <a ab b> and <a ac c> share "<a", which two of
    # four pieces have; the others are their own.
    found = ngram_vectors(written("ab", "ac", "x", "ab"), longest=2)
    cosines = (found @ found.T).toarray()
    begins, own, twice = math.log(1 + 4 / 3), math.log(1 + 4), math.log(1 + 4 / 2)
    ab = math.sqrt(begins**2 + 2 * twice**2)
    ac = math.sqrt(begins**2 + 2 * own**2)
    assert cosines[0].tolist() == pytest.approx([1.0, begins**2 / (ab * ac), 0.0, 1.0])


def test_only_text_is_spelled():
    pieces = [Surface("byte", b"A"), Surface("end", b""), Surface("special", b"<pad>")]
    assert ngram_vectors(pieces).nnz == 0


def test_a_piece_may_be_a_part_of_a_character():
    found = ngram_vectors([Surface("text", b"\xd0"), Surface("text", b"\xd0\xba")])
    assert np.linalg.norm(found.toarray(), axis=1) == pytest.approx([1.0, 1.0])


# ---- both --------------------------------------------------------------------------------------


def test_contexts_and_spelling_count_half_each_and_alone_where_they_are_alone():
    pieces = [*written("ab", "abd", "cd", "ab"), Surface("byte", b"A")]
    tokens = text([0, 1, 2, 1] * 10)  # nothing of 3 and 4
    found = auxiliary(pieces, whole(5), tokens).cosines(every(5), every(5))
    spelling = auxiliary(pieces, whole(5)).cosines(every(5), every(5))
    contexts = context_vectors(tokens, whole(5))
    np.testing.assert_allclose(
        found[:3, :3], (spelling + contexts @ contexts.T)[:3, :3] / 2, atol=1e-6
    )
    assert np.diag(found).tolist() == pytest.approx([1, 1, 1, 1, 0])
    assert spelling[0, 3] == pytest.approx(1.0)
    assert found[0, 3] == pytest.approx(math.sqrt(0.5))  # a half of 0 is all there is of 3


# ---- mixes -------------------------------------------------------------------------------------


def unit_vectors(*angles: float) -> Auxiliary:
    return Auxiliary([np.asarray([[math.cos(a), math.sin(a)] for a in angles], np.float32)])


def test_a_mix_by_hand():
    # Cosines to the first: 0.5, 0.5, -1. Sparsemax of the first two: a half each.
    vectors = unit_vectors(0.0, math.pi / 3, -math.pi / 3, math.pi)
    found = sparse_mix(vectors, np.asarray([0]), np.asarray([3, 1, 2]))
    assert found.toarray().tolist() == [pytest.approx([0.0, 0.5, 0.5])]


def test_what_no_known_token_is_like_gets_no_mix():
    vectors = Auxiliary([np.asarray([[1, 0], [0, 0], [0, 1], [-1, 0]], np.float32)])
    found = sparse_mix(vectors, np.asarray([0, 1]), np.asarray([2, 3]))
    assert found.nnz == 0
    assert found.shape == (2, 2)


@pytest.mark.parametrize(("rows", "known"), [([], [0, 1]), ([0, 1], []), ([], [])])
def test_nothing_to_mix_is_no_mix(rows: list[int], known: list[int]):
    found = sparse_mix(unit_vectors(0.0, 1.0), np.asarray(rows, int), np.asarray(known, int))
    assert found.shape == (len(rows), len(known))
    assert found.nnz == 0


def test_a_mix_does_not_depend_on_how_much_is_held_at_once(monkeypatch):
    pieces = written(*[f"{a}{b}{c}" for a in "abc" for b in "def" for c in "ghi"])
    tokens = np.random.default_rng(0).integers(0, 27, size=500)
    vectors = auxiliary(pieces, whole(27), tokens)
    at_once = sparse_mix(vectors, np.arange(11), np.arange(11, 27)).toarray()
    monkeypatch.setattr(module, "_CHUNK_NUMBERS", 50)
    in_parts = sparse_mix(vectors, np.arange(11), np.arange(11, 27)).toarray()
    np.testing.assert_allclose(in_parts, at_once, atol=1e-6)
    np.testing.assert_allclose(at_once.sum(axis=1), 1.0, rtol=1e-6)
