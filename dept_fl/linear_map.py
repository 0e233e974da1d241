"""Linear maps between embedding spaces, fitted to rows that both have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Fit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_CHUNK_ROWS = 1 << 13
_FEWEST_PAIRS = 4  # two to fit a map to, two to measure it on


@dataclass(frozen=True)
class Fitted:
    """The map that did best on rows it had not seen, fitted to all rows.

    Attributes:
        kind: its name among those tried.
        weight: W [width of x, width of y], for x @ W.
        residuals: by kind, ||x W - y|| / ||y|| of each half under the map fitted to the other
            half; empty where there are too few pairs to measure.
        pairs: rows that both spaces have.
    """

    kind: str
    weight: torch.Tensor
    residuals: dict[str, float]
    pairs: int


def best_fit(kinds: Mapping[str, Fit], x: torch.Tensor, y: torch.Tensor) -> Fitted:
    """Try each kind of map from x [n, width] to y [n, other width]; of equals the first wins."""
    measured = len(kinds) > 1 and len(x) >= _FEWEST_PAIRS
    residuals = {kind: _unseen_residual(fit, x, y) for kind, fit in kinds.items() if measured}
    chosen = min(residuals or kinds, key=lambda kind: residuals.get(kind, 0.0))
    return Fitted(chosen, kinds[chosen](x, y), residuals, len(x))


def _unseen_residual(fit: Fit, x: torch.Tensor, y: torch.Tensor) -> float:
    # Every other row: ids often go by frequency, so that both halves are alike.
    square = torch.zeros((), dtype=torch.float64)
    for half in (0, 1):
        weight = fit(x[half::2], y[half::2])
        square += (x[1 - half :: 2] @ weight - y[1 - half :: 2]).double().square().sum()
    return float(square.sqrt() / y.double().norm().clamp(min=1e-30))


def identity(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.eye(x.shape[1], y.shape[1], dtype=x.dtype)


def procrustes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The orthogonal W with the least ||x W - y|| (Schönemann, 1966)."""
    left, _, right = torch.linalg.svd(_product(x, y))
    turn: torch.Tensor = left @ right
    return turn.to(x.dtype)


def least_squares(x: torch.Tensor, y: torch.Tensor, ridge: float = 0.0) -> torch.Tensor:
    """The W with the least ||x W - y||^2 + penalty ||W||^2.

    Args:
        ridge: the penalty over the mean square of x's columns, sums over the rows. Where it is 0
            and rows are too few, W is the smallest of the best.
    """
    gram = _product(x, x)
    penalty = ridge * gram.trace() / len(gram)
    regular = gram + penalty * torch.eye(len(gram), dtype=gram.dtype)
    best: torch.Tensor = torch.linalg.lstsq(regular, _product(x, y), driver="gelsd").solution
    return best.to(x.dtype)


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x^T y in fp64, without a whole copy of either."""
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for a, b in zip(x.split(_CHUNK_ROWS), y.split(_CHUNK_ROWS), strict=True):
        total += a.double().T @ b.double()
    return total
