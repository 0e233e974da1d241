"""Deltas of many silos become one: on disk until all are there, then merged in constant memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dept_fl.checkpoint import Tensors
from dept_fl.config import OuterConfig

Shapes = Mapping[str, tuple[int, ...]]

_CHUNK_NUMBERS = 1 << 22  # of all silos together, in one piece of a coordinate-wise merge


@dataclass(frozen=True)
class Delta:
    """One silo's delta for a merge.

    Attributes:
        rows: [n] int64, the rows it holds of token tensors; None being all (TRIM alone has some).
        scale: what it is multiplied with, for norm clipping.
    """

    tensors: Tensors
    rows: torch.Tensor | None = None
    scale: float = 1.0


def merged(
    deltas: Sequence[Delta], shapes: Shapes, row_tensors: Collection[str], outer: OuterConfig
) -> tuple[Tensors, torch.Tensor]:
    """One delta from those of the silos, and the rows of token tensors that no silo held.

    A token tensor is merged row by row over the silos that hold the row (TRIM: "zero padding
    ignored"), every other one over all. The order of `deltas` decides the last bits.

    Returns:
        fp32 tensors of `shapes`, and [n] int64 row numbers.
    """
    if outer.merge == "mean":
        mean = MeanDelta(shapes, row_tensors)
        for delta in deltas:
            mean.add(delta)
        return mean.mean(), mean.unheld()
    # The median is the mean of the middle one or two: trimmed as far as it goes.
    fraction = 0.5 if outer.merge == "median" else outer.trim_fraction
    found = {
        name: _trimmed_mean(deltas, name, shape, name in row_tensors, fraction)
        for name, shape in shapes.items()
    }
    return found, _unheld(deltas, next((shapes[name][0] for name in row_tensors), 0))


class MeanDelta:
    """Mean over silos of what they add, one silo at a time, in fp32."""

    def __init__(self, shapes: Shapes, row_tensors: Collection[str]) -> None:
        self._sums = {name: torch.zeros(shape) for name, shape in shapes.items()}
        self._row_tensors = frozenset(row_tensors)
        rows = next((shapes[name][0] for name in self._row_tensors), 0)
        self._holders = torch.zeros(rows)
        self._added = dict.fromkeys(shapes, 0)

    def add(self, delta: Delta) -> None:
        for name, tensor in delta.tensors.items():
            if delta.rows is not None and name in self._row_tensors:
                self._sums[name].index_add_(0, delta.rows, tensor, alpha=delta.scale)
            else:
                self._sums[name].add_(tensor, alpha=delta.scale)
            self._added[name] += 1
        if self._row_tensors & delta.tensors.keys():
            self._holders[slice(None) if delta.rows is None else delta.rows] += 1

    def mean(self) -> Tensors:
        """The mean deltas, in the memory of the sums; nothing can be added afterwards."""
        for name, total in self._sums.items():
            if name in self._row_tensors:
                holders = self._holders.clamp(min=1)
                total /= holders.view(-1, *[1] * (total.dim() - 1))
            else:
                total /= max(self._added[name], 1)
        return self._sums

    def unheld(self) -> torch.Tensor:
        """[n] int64: the rows that no silo held, which must not change."""
        return (self._holders == 0).nonzero().flatten()


# ---- merges that one silo cannot move at will (Yin et al., 2018) ------------------------------


def _trimmed_mean(
    deltas: Sequence[Delta], name: str, shape: tuple[int, ...], by_row: bool, fraction: float
) -> torch.Tensor:
    """Coordinate by coordinate, without the share `fraction` of the silos at either end."""
    result = torch.zeros(shape)
    flat = result.view(shape[0] if shape else 1, -1)
    step = max(1, _CHUNK_NUMBERS // (len(deltas) * max(flat.shape[1], 1)))
    for start in range(0, len(flat), step):
        piece = flat[start : start + step]
        stacked = torch.full((len(deltas), *piece.shape), torch.nan)
        for i, delta in enumerate(deltas):
            _lay(stacked[i], delta, name, start, by_row)
        piece.copy_(_middle(stacked, fraction))
    return result


def _lay(into: torch.Tensor, delta: Delta, name: str, start: int, by_row: bool) -> None:
    """Put a silo's rows from `start` into `into` [rows, numbers]; NaN stays where it has none."""
    tensor = delta.tensors[name]
    tensor = tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)
    if delta.rows is None or not by_row:
        into.copy_(tensor[start : start + len(into)])
    else:
        first, behind = torch.searchsorted(
            delta.rows, torch.tensor([start, start + len(into)])
        ).tolist()
        into[delta.rows[first:behind] - start] = tensor[first:behind]
    into.mul_(delta.scale)


def _middle(stacked: torch.Tensor, fraction: float) -> torch.Tensor:
    """Trimmed mean over the first axis, ignoring NaN; 0 where there is nothing else."""
    ordered = stacked.sort(dim=0).values  # NaN last
    held = (~stacked.isnan()).sum(dim=0)
    wanted = (held.double() * fraction + 1e-9).floor()  # 0.42 * 150 is not 63
    cut = torch.minimum(wanted, ((held - 1) / 2).floor()).clamp(min=0)
    place = torch.arange(len(stacked)).view(-1, *[1] * (stacked.dim() - 1))
    inside = (place >= cut) & (place < held - cut)
    kept = torch.where(inside, ordered, 0.0)
    return kept.sum(dim=0) / inside.sum(dim=0).clamp(min=1)


def _unheld(deltas: Sequence[Delta], rows: int) -> torch.Tensor:
    held = torch.zeros(rows, dtype=torch.bool)
    for delta in deltas:
        held[slice(None) if delta.rows is None else delta.rows] = True
    return (~held).nonzero().flatten()


# ---- replies on disk -----------------------------------------------------------------------


class Spool:
    """The accepted deltas of one round in a folder, so that memory does not grow with the silos.

    Raw fp32, tensor behind tensor: nothing here outlives the round or is read by anyone else.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, silo: str, part: str, tensors: Tensors) -> None:
        with self._file(silo, part).open("wb") as stream:
            for name in sorted(tensors):
                stream.write(tensors[name].contiguous().numpy().data)

    def get(self, silo: str, part: str, shapes: Shapes) -> Tensors:
        """What was put there, memory-mapped; nothing that is done to it reaches the file."""
        if not shapes:
            return {}
        numbers = torch.from_numpy(np.memmap(self._file(silo, part), np.float32, mode="c"))
        return {name: part.view(shapes[name]) for name, part in _cut(numbers, shapes)}

    def _file(self, silo: str, part: str) -> Path:
        return self._folder / f"{silo}.{part}"


def _cut(numbers: torch.Tensor, shapes: Shapes) -> Iterator[tuple[str, torch.Tensor]]:
    start = 0
    for name in sorted(shapes):
        size = torch.Size(shapes[name]).numel()
        yield name, numbers[start : start + size]
        start += size


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
