"""Embeddings of SPEC's silos carried over to another vocabulary, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from dept_fl.auxiliary import Ids, Text, auxiliary, sparse_mix
from dept_fl.checkpoint import Tensors
from dept_fl.config import Recipe
from dept_fl.errors import DeptError
from dept_fl.linear_map import Fit, best_fit, identity, least_squares, procrustes
from dept_fl.model import Layout, initial_embeddings, layout, seed_of
from dept_fl.surface import Surface, SurfaceIndex, surfaces
from dept_fl.tokenizer import Tokenizer, Vocabulary

if TYPE_CHECKING:  # a silo itself starts from what is carried over
    from dept_fl.final import Final
    from dept_fl.silo import Silo

METHODS = ("copy", "mix", "stitch", "matched", "random")
ALIGNMENTS = ("measure", "identity", "procrustes")
AVERAGES = ("reference", "share")

_CHUNK_TOKENS = 1 << 22
_ALIGNMENTS: dict[str, Fit] = {"identity": identity, "procrustes": procrustes}
_STITCHES: dict[str, Fit] = {
    f"ridge {ridge:g}": partial(least_squares, ridge=ridge) for ridge in (0.0, 0.01, 0.1, 1.0)
}

Floats = npt.NDArray[np.float64]
Origins = npt.NDArray[np.str_]
Flags = npt.NDArray[np.bool_]


# ---- from where and to where -------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A silo's embeddings, with what tells which row stands for what.

    Attributes:
        embeddings: phi_k [|V_k|, ...] and psi_k by parameter name.
        counts: [|V_k|] how often each local id is in its training text.
    """

    name: str
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    embeddings: Tensors
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, final: Final) -> Source:
        silo, stream = final.silo, final.silo.stream
        counts = token_counts(stream.train, stream.vocabulary)
        return cls(silo.name, silo.tokenizer, stream.vocabulary, final.embeddings, counts)


@dataclass(frozen=True)
class Target:
    """A vocabulary in need of embeddings: a new silo's, or a global one.

    Attributes:
        text: [n] ids of its tokenizer (not local ones), such as a stream's training split,
            which shows what tokens are alike. None leaves that to their spelling.
        embeddings: its own, trained beside another body, for `stitch` alone; they may be of
            another width.
    """

    name: str
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    text: Text | None = None
    embeddings: Tensors = field(default_factory=dict)

    @classmethod
    def of(cls, silo: Silo, embeddings: Tensors | None = None) -> Target:
        stream = silo.stream
        return cls(silo.name, silo.tokenizer, stream.vocabulary, stream.train, embeddings or {})


def token_counts(text: Text, vocabulary: Vocabulary) -> npt.NDArray[np.int64]:
    """[|V_k|] how often each local id is in a text of the tokenizer's ids."""
    counts = np.zeros(vocabulary.full, dtype=np.int64)
    for start in range(0, len(text), _CHUNK_TOKENS):
        counts += np.bincount(text[start : start + _CHUNK_TOKENS], minlength=vocabulary.full)
    held: npt.NDArray[np.int64] = counts[vocabulary.ids]
    return held


def _written(owner: Source | Target) -> list[Surface]:
    every = surfaces(owner.tokenizer)
    return [every[i] for i in owner.vocabulary.ids]


def _places(written: Sequence[Surface], source: Source) -> Ids:
    """[|V|] the source's row of each piece, -1 where it has none that writes the same."""
    index = SurfaceIndex(_written(source))
    found = (index.find(surface) for surface in written)
    return np.asarray([-1 if place is None else place for place in found], dtype=np.int64)


# ---- what comes of it --------------------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """How one source's tensor came into the reference's space.

    Attributes:
        kind: of the map taken.
        pairs: rows that both have, seen in both texts.
        residuals: by kind of map, ||x W - y|| / ||y|| on rows that W was not fitted to; 1.41 is
            that of vectors which have nothing in common. Empty where nothing was measured.
    """

    source: str
    tensor: str
    kind: str
    pairs: int
    residuals: dict[str, float]


@dataclass(frozen=True)
class Report:
    """What became of the target's tokens; plain values, so that `asdict` gives JSON.

    Attributes:
        rows: tokens by where their embeddings come from: `copied`, `mixed`, `mapped`, `drawn`.
        shares: the same weighted by how often tokens stand in the target's text, where it has
            one.
        reference: the source in whose space the embeddings are.
        shared: by source, how many of the target's tokens it has.
    """

    method: str
    rows: dict[str, int]
    shares: dict[str, float]
    reference: str = ""
    shared: dict[str, int] = field(default_factory=dict)
    alignments: list[Alignment] = field(default_factory=list)


@dataclass(frozen=True)
class Transferred:
    """Embeddings for a target's vocabulary.

    Attributes:
        embeddings: of the shapes that `Layout.embeddings` gives, fp32.
        maps: in `stitch`, by token parameter, W [own width, width].
    """

    embeddings: Tensors
    report: Report
    maps: Tensors = field(default_factory=dict)


def transfer(
    method: str,
    sources: Sequence[Source],
    target: Target,
    recipe: Recipe,
    alignment: str = "measure",
    average: str = "reference",
    reference: str = "",
) -> Transferred:
    """Embeddings for the target's vocabulary, to stand beside the sources' common body.

    Methods:
        copy: tokens that a source writes the same way get its row; the others are drawn from a
            normal distribution with the mean and the standard deviations of those rows.
        mix: as copy, but the others are sparse mixes of the copied rows (FOCUS), as far as
            anything is known of them.
        stitch: the target's own embeddings under the linear map that best brings its rows of
            shared tokens onto the copied ones.
        matched: a control, drawn with the copied rows' mean and spread.
        random: a control, the fresh embeddings of a silo of this name.

    Args:
        recipe: for the model, the sequence length and the seed.
        alignment: how sources come into the reference's space: as they are (`identity`, since
            one body was trained with all of them), by an orthogonal map fitted to shared tokens
            (`procrustes`), or by whichever does better on shared tokens that it was not fitted
            to (`measure`).
        average: what a token that several sources have gets: the `reference`'s row, else the
            mean of the others'; or always the mean of all, weighted by the token's `share` of
            each source's text, since silos train on equally many tokens whatever they have.
            Positions likewise: the reference's, or the mean.
        reference: the source in whose space the embeddings are to be; empty for the one whose
            tokens write most of the target's text.

    Raises:
        DeptError: naming what does not fit.
    """
    for setting, value, allowed in (
        ("method", method, METHODS),
        ("alignment", alignment, ALIGNMENTS),
        ("average", average, AVERAGES),
    ):
        if value not in allowed:
            raise DeptError(f"{setting}={value!r}: must be one of {', '.join(allowed)}")
    found = layout(recipe.model, recipe.sequence_tokens)
    size = target.vocabulary.size
    if method == "random":
        fresh = initial_embeddings(
            recipe.model, size, recipe.sequence_tokens, found, recipe.seed, target.name
        )
        return Transferred(fresh, _report(method, target, np.full(size, "drawn")))
    _check_sources(sources, found, reference)
    copies = _copied(sources, target, found, alignment, average, reference)
    tokens, alignments = copies.tokens, copies.alignments
    maps: Tensors = {}
    origins: Origins = np.where(copies.known, "copied", "drawn")
    if method == "mix":
        _mix(tokens, origins, target)
    elif method == "stitch":
        maps, stitches = _stitches(copies, target)
        alignments = [*alignments, *stitches]
        tokens = stitched(target.embeddings, maps, found)
        origins[:] = "mapped"
    elif method == "matched":
        origins[:] = "drawn"
    generator = torch.Generator().manual_seed(seed_of(recipe.seed, "transfer", target.name))
    _draw(tokens, copies.known, origins == "drawn", generator)
    facts = _report(method, target, origins)
    report = replace(facts, reference=copies.reference, shared=copies.shared, alignments=alignments)
    return Transferred({**tokens, **copies.positions}, report, maps)


def _check_sources(sources: Sequence[Source], found: Layout, reference: str) -> None:
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise DeptError(f"sources={names}: name at least one, and each once")
    if reference and reference not in names:
        raise DeptError(f"reference={reference!r}: no such source; sources: {', '.join(names)}")
    for source in sources:
        shapes = {name: tuple(tensor.shape) for name, tensor in source.embeddings.items()}
        expected = found.embeddings(source.vocabulary.size)
        if shapes != expected:
            raise DeptError(
                f"source {source.name}: its embeddings are {shapes}, the recipe's model has "
                f"{expected}; give the recipe of the run that made them"
            )


def _report(method: str, target: Target, origins: Origins) -> Report:
    kinds = [str(kind) for kind in np.unique(origins)]
    rows = {kind: int((origins == kind).sum()) for kind in kinds}
    if target.text is None:
        return Report(method, rows, shares={})
    use = _use(target)
    total = max(use.sum(), 1.0)
    return Report(method, rows, {kind: float(use[origins == kind].sum() / total) for kind in kinds})


# ---- tokens that sources have ------------------------------------------------------------------


@dataclass(frozen=True)
class _Copies:
    """What the sources have for a target.

    Attributes:
        tokens: [|V|, ...] by name; 0 where no source has the token.
        known: [|V|] whether one has; `seen`: whether one has it and its text as well.
    """

    tokens: Tensors
    positions: Tensors
    known: Flags
    seen: Flags
    reference: str
    shared: dict[str, int]
    alignments: list[Alignment]


def _copied(
    sources: Sequence[Source],
    target: Target,
    found: Layout,
    alignment: str,
    average: str,
    reference: str,
) -> _Copies:
    written, use = _written(target), _use(target)
    places = {source.name: _places(written, source) for source in sources}
    ordered = sorted(
        sources, key=lambda s: (s.name != reference, -use[places[s.name] >= 0].sum(), s.name)
    )
    rows = np.stack([places[source.name] for source in ordered])
    if (rows < 0).all():
        raise DeptError(
            f"target {target.name}: no token in common with {', '.join(places)}; method=random "
            "needs none"
        )
    tokens = {name: torch.zeros(len(written), *shape) for name, shape in found.tokens.items()}
    positions = {name: torch.zeros(shape) for name, shape in found.positions.items()}
    kinds = {k: fit for k, fit in _ALIGNMENTS.items() if alignment in ("measure", k)}
    alignments = []
    shares = _token_weights(ordered, rows, average), _source_weights(len(ordered), average)
    for source, row, weight, whole in zip(ordered, rows, *shares, strict=True):
        moved, how = _moved(source, ordered[0], found, kinds)
        alignments += how
        for name, total in tokens.items():
            scale = torch.from_numpy(weight).float().view(-1, *[1] * (total.dim() - 1))
            total += scale * moved[name][row]  # row -1 weighs nothing
        for name, total in positions.items():
            total += float(whole) * moved[name]
    trained = [(row >= 0) & (s.counts[row] > 0) for s, row in zip(ordered, rows, strict=True)]
    return _Copies(
        tokens=tokens,
        positions=positions,
        known=np.any(rows >= 0, axis=0),
        seen=np.any(trained, axis=0) & (use > 0),
        reference=ordered[0].name,
        shared={name: int((place >= 0).sum()) for name, place in places.items()},
        alignments=alignments,
    )


def _use(target: Target) -> Floats:
    """[|V|] how often each token is in the target's text; once each where there is none."""
    if target.text is None:
        return np.ones(target.vocabulary.size)
    return token_counts(target.text, target.vocabulary).astype(np.float64)


def _token_weights(ordered: Sequence[Source], rows: npt.NDArray[np.int64], average: str) -> Floats:
    """[K, |V|] what each source's row of a token weighs, with sum 1 where any has it."""
    held = rows >= 0
    shares = [s.counts[row] / max(s.counts.sum(), 1) for s, row in zip(ordered, rows, strict=True)]
    weights = np.where(held, np.stack(shares), 0.0)
    never_seen = weights.sum(axis=0) == 0.0
    weights[:, never_seen] = held[:, never_seen]
    if average == "reference":
        weights[:, held[0]] = 0.0
        weights[0, held[0]] = 1.0
    found: Floats = weights / np.maximum(weights.sum(axis=0), 1e-30)
    return found


def _source_weights(sources: int, average: str) -> Floats:
    """[K] what each source's positions weigh."""
    first: Floats = np.eye(sources)[0]
    return first if average == "reference" else np.full(sources, 1.0 / sources)


def _moved(
    source: Source, reference: Source, found: Layout, kinds: dict[str, Fit]
) -> tuple[Tensors, list[Alignment]]:
    """A source's embeddings in the reference's space, each tensor by a map of its own."""
    if source is reference:
        return source.embeddings, []
    own = _places(_written(reference), source)
    both = np.flatnonzero((own >= 0) & (reference.counts > 0) & (source.counts[own] > 0))
    moved, alignments = {}, []
    for name, tensor in source.embeddings.items():
        x, y = _matrix(tensor), _matrix(reference.embeddings[name])
        pairs = (x[own[both]], y[both]) if name in found.tokens else (x, y)
        # A bias has one dimension, in which there is nothing to rotate.
        fit = best_fit(kinds if x.shape[1] > 1 else {"identity": identity}, *pairs)
        moved[name] = (x @ fit.weight).view_as(tensor)
        alignments.append(Alignment(source.name, name, fit.kind, fit.pairs, fit.residuals))
    return moved, alignments


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """[V, ...] as [V, numbers in a row]."""
    return tensor.reshape(len(tensor), -1)


# ---- tokens that no source has -----------------------------------------------------------------


def _mix(tokens: Tensors, origins: Origins, target: Target) -> None:
    """Fill rows of origin "drawn" from those of origin "copied" as far as tokens are alike."""
    known, unknown = np.flatnonzero(origins == "copied"), np.flatnonzero(origins == "drawn")
    vectors = auxiliary(_written(target), target.vocabulary, target.text)
    weights = sparse_mix(vectors, unknown, known)
    for tensor in tokens.values():
        mixed = weights @ _matrix(tensor)[known].numpy()
        tensor[unknown] = torch.from_numpy(mixed).view(-1, *tensor.shape[1:])
    origins[unknown[np.diff(weights.indptr) > 0]] = "mixed"


def _draw(tokens: Tensors, known: Flags, into: Flags, generator: torch.Generator) -> None:
    """Fill rows from a normal distribution with the known rows' mean and standard deviations."""
    here, there = torch.from_numpy(known), torch.from_numpy(into)
    for tensor in tokens.values():
        mean, spread = tensor[here].mean(dim=0), tensor[here].std(dim=0, correction=0)
        noise = torch.randn(int(there.sum()), *tensor.shape[1:], generator=generator)
        tensor[there] = mean + spread * noise


# ---- embeddings of another body ----------------------------------------------------------------


def _stitches(copies: _Copies, target: Target) -> tuple[Tensors, list[Alignment]]:
    """The maps W from the target's own space into that of the copied rows."""
    _check_own(copies, target)
    pairs = torch.from_numpy(copies.seen)
    maps, alignments = {}, []
    for name, rows in copies.tokens.items():
        own = _matrix(target.embeddings[name])
        fit = best_fit(_STITCHES, own[pairs], _matrix(rows)[pairs])
        maps[name] = fit.weight
        alignments.append(Alignment(target.name, name, fit.kind, fit.pairs, fit.residuals))
    return maps, alignments


def _check_own(copies: _Copies, target: Target) -> None:
    size, own = target.vocabulary.size, target.embeddings
    for name in copies.tokens:
        if name not in own or not own[name].dim() or len(own[name]) != size:
            have = tuple(own[name].shape) if name in own else "none"
            raise DeptError(
                f"target {target.name}: method=stitch needs its own {name} of {size} rows, it has "
                f"{have}; give the embeddings of a model of this kind with the target's tokenizer"
            )
    if not copies.seen.any():
        raise DeptError(
            f"target {target.name}: no token of its text is in a source's text, so that "
            "method=stitch has nothing to fit a map to; use method=mix"
        )


def stitched(own: Tensors, maps: Tensors, found: Layout) -> Tensors:
    """Token tensors of the layout's shapes: own rows [V, own width] under the maps W."""
    return {
        name: (_matrix(own[name]) @ weight).view(-1, *found.tokens[name])
        for name, weight in maps.items()
    }
