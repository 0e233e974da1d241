"""Deltas of many silos become one: on disk until all are there, then merged in constant memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import torch

from dept_fl.codec import Encoded, encoded, packed_bytes, rows_and_width
from dept_fl.config import OuterConfig

Shapes = Mapping[str, tuple[int, ...]]

_CHUNK_NUMBERS = 1 << 20  # merged at a time; coordinate-wise merges hold as many of all silos


@dataclass(frozen=True)
class Delta:
    """One silo's delta for a merge.

    Attributes:
        rows: [n] int64, the rows it holds of token tensors; None being all (TRIM alone has some).
        scale: what it is multiplied with, for norm clipping.
    """

    tensors: Mapping[str, torch.Tensor]
    rows: torch.Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class _Part:
    """What a silo has of a piece of a tensor: numbers [n, width] at `places`, or at all rows."""

    numbers: torch.Tensor
    places: torch.Tensor | None
    scale: float


def holders(deltas: Sequence[Delta], rows: int) -> torch.Tensor:
    """[rows]: how many silos hold each row of the token tensors."""
    held = torch.zeros(rows)
    for delta in deltas:
        held[slice(None) if delta.rows is None else delta.rows] += 1
    return held


def merged(
    deltas: Sequence[Delta],
    shapes: Shapes,
    row_tensors: Collection[str],
    held: torch.Tensor,
    outer: OuterConfig,
) -> Iterator[tuple[str, torch.Tensor]]:
    """One delta from those of the silos, tensor by tensor; each takes the memory of the last one.

    A token tensor is merged row by row over the silos that hold the row (TRIM: "zero padding
    ignored"; 0 where none does), every other one over all. The order of `deltas` decides the last
    bits.

    Args:
        held: [rows], of the token tensors: how many of the silos hold a row (`holders`).

    Yields:
        names and fp32 tensors of `shapes`.
    """
    memory = torch.empty(max((prod(shape) for shape in shapes.values()), default=0))
    at_once = _CHUNK_NUMBERS // (1 if outer.merge == "mean" else len(deltas))
    # The median is the mean of the middle one or two: trimmed as far as it goes.
    fraction = 0.5 if outer.merge == "median" else outer.trim_fraction
    for name, shape in shapes.items():
        result, by_row = memory[: prod(shape)].view(shape), name in row_tensors
        rows = result.view(rows_and_width(shape))
        step = max(1, at_once // max(rows.shape[1], 1))
        for start in range(0, len(rows), step):
            into = rows[start : start + step]
            at = range(start, start + len(into))
            # Decoded when their turn comes: a mean holds one of them.
            parts = (_part(delta, name, at, by_row) for delta in deltas)
            of_rows = held[start : start + step] if by_row else torch.tensor([float(len(deltas))])
            if outer.merge == "mean":
                _mean(parts, of_rows.unsqueeze(1), into)
            else:
                _trimmed_mean(list(parts), of_rows.unsqueeze(1), fraction, into)
        yield name, result


def _part(delta: Delta, name: str, rows: range, by_row: bool) -> _Part:
    """What a silo has of some rows."""
    source = encoded(delta.tensors)
    if delta.rows is None or not by_row:
        return _Part(source.rows(name, rows.start, rows.stop), None, delta.scale)
    ends = torch.tensor([rows.start, rows.stop])
    first, behind = torch.searchsorted(delta.rows, ends).tolist()
    places = delta.rows[first:behind] - rows.start
    return _Part(source.rows(name, first, behind), places, delta.scale)


def _mean(parts: Iterable[_Part], held: torch.Tensor, into: torch.Tensor) -> None:
    """In fp32, one silo behind the other, over the silos that hold a row: `held`, [n or 1, 1]."""
    into.zero_()
    for part in parts:
        if part.places is None:
            into.add_(part.numbers, alpha=part.scale)
        else:
            into.index_add_(0, part.places, part.numbers, alpha=part.scale)
    into /= held.clamp(min=1)


# ---- merges that one silo cannot move at will (Yin et al., 2018) ------------------------------


def _trimmed_mean(
    parts: Sequence[_Part], held: torch.Tensor, fraction: float, into: torch.Tensor
) -> None:
    """Coordinate by coordinate, without the share `fraction` of the silos at either end."""
    stacked = torch.full((len(parts), *into.shape), torch.inf)  # behind all that silos hold
    for own, part in zip(stacked, parts, strict=True):
        own[slice(None) if part.places is None else part.places] = part.numbers * part.scale
    cut = _dropped(held, fraction)
    into.zero_()
    for place, numbers in enumerate(_sorted(list(stacked))):
        inside = (place >= cut) & (place < held - cut)
        if inside.any():
            into += torch.where(inside, numbers, 0.0)
    into /= (held - 2 * cut).clamp(min=1)


def _dropped(held: torch.Tensor, fraction: float) -> torch.Tensor:
    """How many of so many numbers are dropped at either end; one or two always stay."""
    wanted = (held.double() * fraction + 1e-9).floor()  # 0.42 * 150 is not 63
    return torch.minimum(wanted, ((held - 1) / 2).floor()).clamp(min=0)


def _sorted(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Number by number in ascending order, in the memory of the tensors and one more.

    A sorting network, tens of times faster than torch's sort along the first of few.
    """
    spare = torch.empty_like(tensors[0])
    for low, high in _comparators(len(tensors)):
        torch.minimum(tensors[low], tensors[high], out=spare)
        torch.maximum(tensors[low], tensors[high], out=tensors[high])
        tensors[low], spare = spare, tensors[low]
    return tensors


@cache
def _comparators(count: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge sort (Knuth, volume 3, 5.2.2, algorithm M): what to compare."""
    found = []
    width = 1  # of the runs that are sorted already
    while width < count:
        apart = width
        while apart:
            for first in range(apart % width, count - apart, 2 * apart):
                for low in range(first, min(first + apart, count - apart)):
                    if low // (2 * width) == (low + apart) // (2 * width):  # of the same two runs
                        found.append((low, low + apart))
            apart //= 2
        width *= 2
    return tuple(found)


# ---- replies on disk -----------------------------------------------------------------------


class Spool:
    """The accepted deltas of one round in a folder, so that memory does not grow with the silos.

    Tensor behind tensor as they came: nothing here outlives the round or is read by anyone else.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._codecs: dict[tuple[str, str], str] = {}

    def put(self, silo: str, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
        given = encoded(tensors)
        self._codecs[silo, part] = given.codec
        with self._file(silo, part).open("wb") as stream:
            stream.writelines(given.packed())

    def get(self, silo: str, part: str, shapes: Shapes) -> Encoded:
        """What was put there, memory-mapped; nothing that is done to it reaches the file."""
        codec = self._codecs[silo, part]
        if not packed_bytes(codec, shapes):  # an empty file has no map
            return Encoded.unpacked(codec, torch.empty(0, dtype=torch.uint8), shapes)
        numbers = np.memmap(self._file(silo, part), np.uint8, mode="c")
        return Encoded.unpacked(codec, torch.from_numpy(numbers), shapes)

    def _file(self, silo: str, part: str) -> Path:
        return self._folder / f"{silo}.{part}"


class Norms:
    """Norms of the deltas merged in the last rounds: what is usual, so what is too much.

    Attributes:
        rounds: by part, for each of the last rounds the norms merged in it, after clipping.
    """

    _ROUNDS = 5

    def __init__(self, rounds: Mapping[str, Sequence[Sequence[float]]] | None = None) -> None:
        self.rounds = {part: [list(r) for r in kept] for part, kept in (rounds or {}).items()}

    def median(self, part: str) -> float | None:
        """None before any round."""
        known = [norm for kept in self.rounds.get(part, []) for norm in kept]
        return _median(known) if known else None

    def limit(self, part: str, clip: float, this_round: Sequence[float]) -> float:
        """The norm to which deltas are clipped; the first round has only itself to go by."""
        usual = self.median(part) or _median(this_round)
        return clip * usual or float("inf")  # 0 asks for none; all-zero deltas have no measure

    def add(self, part: str, norms: Sequence[float]) -> None:
        self.rounds[part] = [*self.rounds.get(part, []), list(norms)][-self._ROUNDS :]


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
