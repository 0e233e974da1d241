"""Which tokens are alike, found offline: by the contexts they stand in, and by their spelling.

The sparse mixes of similar tokens are those of FOCUS (arXiv 2305.14481), whose own vectors are
fastText's: they join contexts and spelling as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from scipy.sparse.linalg import svds

from dept_fl.surface import Surface
from dept_fl.tokenizer import Vocabulary

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Text = npt.NDArray[Any]  # [n] a tokenizer's ids, of any unsigned type

_CHUNK_TOKENS = 1 << 20  # of a text, whose neighbours are counted at once
_CHUNK_NUMBERS = 1 << 24  # similarities at once
_FIRST_GUESS = 256  # tokens that a sparse mix is at first expected to stay below


@dataclass(frozen=True)
class Auxiliary:
    """Vectors of a vocabulary's tokens, which have nothing to do with any model's embeddings.

    Attributes:
        blocks: [V, n] each, side by side one vector a token, of L2 norm 1, or 0 where nothing is
            known of the token.
    """

    blocks: list[Any]  # dense or sparse: scipy's sparse arrays have no types

    def cosines(self, rows: Ids, columns: Ids) -> Floats:
        """[len(rows), len(columns)] similarities."""
        parts = (block[rows] @ block[columns].T for block in self.blocks)
        found: Floats = reduce(add, (p.toarray() if sparse.issparse(p) else p for p in parts))
        return found


def auxiliary(
    written: Sequence[Surface], vocabulary: Vocabulary, text: Text | None = None
) -> Auxiliary:
    """Vectors of contexts and spelling with equal weight, or of the one that is known.

    Args:
        written: [|V_k|] what the pieces of the vocabulary write.
        text: in which their contexts are found; None leaves only their spelling.
    """
    blocks: list[Any] = [ngram_vectors(written)]
    if text is not None:
        blocks.append(context_vectors(text, vocabulary))
    known = sum(_norms(block) > 0.0 for block in blocks)
    return Auxiliary([_scaled(block, 1.0 / np.sqrt(np.maximum(known, 1))) for block in blocks])


# ---- by spelling -------------------------------------------------------------------------------


def ngram_vectors(written: Sequence[Surface], longest: int = 4) -> sparse.csr_array:
    """[V, n] character n-grams of each piece that writes text, rare ones counting more.

    Args:
        longest: n-grams of 2 to so many characters, the piece's two ends among them.

    Returns:
        rows of norm 1, so that products are cosines; 0 where a piece writes no text.
    """
    found = [_ngrams(surface, longest) for surface in written]
    holders = Counter(gram for grams in found for gram in grams)
    column = {gram: i for i, gram in enumerate(holders)}
    rows = [i for i, grams in enumerate(found) for _ in grams]
    columns = [column[gram] for grams in found for gram in grams]
    rarity = [np.log(1.0 + len(found) / holders[gram]) for grams in found for gram in grams]
    shape = (len(found), max(len(column), 1))
    values = np.asarray(rarity, dtype=np.float32)
    return _unit(sparse.csr_array((values, (rows, columns)), shape=shape))


def _ngrams(surface: Surface, longest: int) -> list[str]:
    if surface.kind != "text" or not surface.value:
        return []
    text = f"\x02{surface.value.decode(errors='surrogateescape')}\x03"
    return sorted(
        {text[i : i + n] for n in range(2, longest + 1) for i in range(len(text) - n + 1)}
    )


# ---- by context --------------------------------------------------------------------------------


def context_vectors(
    text: Text,
    vocabulary: Vocabulary,
    window: int = 4,
    contexts: int = 4096,
    dimensions: int = 128,
    most_tokens: int = 8 * _CHUNK_TOKENS,
) -> Floats:
    """Static vectors from a text: positive pointwise mutual information, narrowed by an SVD.

    Left and right neighbours count apart. Contexts are smoothed by the power 0.75, and singular
    values enter by their root (Levy et al., 2015).

    Args:
        text: [n] the tokenizer's ids.
        window: neighbours on either side.
        contexts: so many of the most frequent tokens count as neighbours.
        most_tokens: of a longer text so many, from places spread evenly over it.

    Returns:
        [|V_k|, dimensions] or narrower, rows of norm 1; 0 where a token has no such neighbour.
    """
    counts = _neighbours(list(_parts(text, vocabulary, most_tokens)), vocabulary, window, contexts)
    weights = _positive_mutual_information(counts)
    kept = min(dimensions, min(weights.shape) - 1)
    if not weights.nnz or kept < 1:
        return np.zeros((vocabulary.size, 1), dtype=np.float32)
    start = np.random.default_rng(0).normal(size=min(weights.shape))
    left, singular, _ = svds(weights, k=kept, v0=start)
    vectors = (left * np.sqrt(np.maximum(singular, 0.0))).astype(np.float32)
    vectors[np.diff(weights.indptr) == 0] = 0.0  # where the SVD leaves rounding errors
    found: Floats = _unit(vectors)
    return found


def _parts(text: Text, vocabulary: Vocabulary, most_tokens: int) -> Iterator[Ids]:
    """A text in chunks of local ids; of a long one only some, spread evenly over it."""
    local = vocabulary.local_ids()
    starts = range(0, len(text), _CHUNK_TOKENS)
    stride = -(-len(text) // most_tokens)
    for start in starts[:: max(stride, 1)]:
        part = local[text[start : start + _CHUNK_TOKENS]]
        yield part[part >= 0]


def _neighbours(
    parts: Sequence[Ids], vocabulary: Vocabulary, window: int, contexts: int
) -> sparse.csr_array:
    """[|V_k|, 2 C] how often each token has each of the C contexts behind it, before it."""
    size = vocabulary.size
    frequency = sum((np.bincount(part, minlength=size) for part in parts), np.zeros(size))
    chosen = np.argsort(-frequency, kind="stable")[:contexts]
    column = np.full(size, -1, dtype=np.int64)
    column[chosen] = np.arange(len(chosen))
    total = sparse.csr_array((size, 2 * len(chosen)), dtype=np.float64)
    for part in parts:
        pairs = []
        for offset in range(1, window + 1):
            before, behind = part[:-offset], part[offset:]
            for token, other, side in ((before, behind, 0), (behind, before, len(chosen))):
                near = column[other] >= 0
                pairs.append((token[near], column[other[near]] + side))
        rows, columns = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
        total = total + sparse.csr_array((np.ones(len(rows)), (rows, columns)), total.shape)
    return total


def _positive_mutual_information(counts: sparse.csr_array) -> sparse.csr_array:
    """max(log p(token, context) / (p(token) p'(context)), 0), p' smoothed by the power 0.75."""
    tokens, contexts = counts.sum(axis=1), counts.sum(axis=0) ** 0.75
    entries = counts.tocoo()
    row, column = entries.coords
    expected = tokens[row] * contexts[column] / max(contexts.sum(), 1.0)
    values = np.maximum(np.log(entries.data / expected), 0.0)
    found = sparse.csr_array((values, (row, column)), shape=counts.shape)
    found.eliminate_zeros()
    return found


# ---- mixes -------------------------------------------------------------------------------------


def sparse_mix(vectors: Auxiliary, rows: Ids, known: Ids) -> sparse.csr_array:
    """Weights with which each of `rows` is a mix of the known tokens that are most like it.

    Sparsemax over cosines (FOCUS), of which never more than a few million are held at once.

    Args:
        rows, known: local ids.

    Returns:
        [len(rows), len(known)], rows with sum 1; 0 where no known token is like it at all.
    """
    if not len(rows) or not len(known):
        return sparse.csr_array((len(rows), len(known)), dtype=np.float32)
    parts = []
    step = max(1, _CHUNK_NUMBERS // len(known))
    for start in range(0, len(rows), step):
        similar = vectors.cosines(rows[start : start + step], known)
        found, columns = sparsemax(torch.from_numpy(similar))
        found[torch.from_numpy(similar.max(axis=1) <= 0.0)] = 0.0
        place, rank = found.numpy().nonzero()
        where = (place, columns.numpy()[place, rank])
        parts.append(sparse.csr_array((found.numpy()[place, rank], where), similar.shape))
    return sparse.csr_array(sparse.vstack(parts))


def sparsemax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The point of the simplex nearest to each row, which is mostly zeros (arXiv 1602.02068).

    Args:
        scores: [B, n].

    Returns:
        [B, k] weights, largest first, and [B, k] their columns; all other columns weigh 0.
    """
    most = min(_FIRST_GUESS, scores.shape[1])
    while True:
        top, columns = scores.topk(most, dim=1)
        excess = top.cumsum(dim=1) - 1.0
        rank = torch.arange(1, most + 1)
        support = (top * rank > excess).sum(dim=1, keepdim=True)
        if most == scores.shape[1] or bool((support < most).all()):
            threshold = excess.gather(1, support - 1) / support
            return (top - threshold).clamp(min=0.0), columns
        most = min(4 * most, scores.shape[1])


def _norms(matrix: Any) -> Floats:
    found: Floats = np.sqrt((matrix * matrix).sum(axis=1))
    return found


def _unit(matrix: Any) -> Any:
    """Rows divided by their norm; rows of zeros stay."""
    norms = _norms(matrix)
    return _scaled(matrix, np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0.0))


def _scaled(matrix: Any, factors: npt.NDArray[Any]) -> Any:
    return sparse.diags_array(factors.astype(matrix.dtype)).tocsr() @ matrix
