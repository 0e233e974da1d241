"""Maps between spaces by hand: found where they exist, and refused where they only fit noise."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from dept_fl import linear_map
from dept_fl.linear_map import best_fit, identity, least_squares, procrustes

BOTH = {"identity": identity, "procrustes": procrustes}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(width: int, seed: int = 1) -> torch.Tensor:
    return torch.linalg.qr(normal(width, width, seed=seed)).Q


def test_procrustes_finds_a_quarter_turn():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # (a, b) -> (-b, a)
    y = torch.tensor([[0.0, 1.0], [-2.0, 0.0], [-1.0, 3.0]])
    torch.testing.assert_close(procrustes(x, y), turn)


@pytest.mark.parametrize("chunk", [7, 1 << 13])
def test_procrustes_recovers_a_known_rotation(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_map, "_CHUNK_ROWS", chunk)
    x, turn = normal(50, 8), rotation(8)
    torch.testing.assert_close(procrustes(x, x @ turn), turn, atol=1e-5, rtol=0.0)


def test_procrustes_never_stretches():
    x = normal(50, 8)
    found = procrustes(x, 3.0 * x @ rotation(8) + normal(50, 8, seed=2))
    torch.testing.assert_close(found @ found.T, torch.eye(8), atol=1e-5, rtol=0.0)


def test_least_squares_by_hand():
    x, y = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [2.0]])
    assert least_squares(x, y).item() == pytest.approx(2.0)
    # The column's square sum is 2; half of it is a penalty of 1: 4 / (2 + 1).
    assert least_squares(x, y, ridge=0.5).item() == pytest.approx(4.0 / 3.0)


def test_least_squares_recovers_a_map_between_widths():
    x, weight = normal(50, 6), normal(6, 4, seed=1)
    torch.testing.assert_close(least_squares(x, x @ weight), weight, atol=1e-4, rtol=0.0)


def test_with_fewer_rows_than_columns_the_smallest_map_is_taken():
    x, y = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0]])
    torch.testing.assert_close(least_squares(x, y), torch.tensor([[1.0], [1.0]]))


def test_the_residual_of_a_half_under_the_map_of_the_other_half_by_hand():
    # Even rows say W = 1, odd rows W = 3. Residuals (3-1)^2 + (1-3)^2, twice, over 1+9+1+9.
    x, y = torch.ones(4, 1), torch.tensor([[1.0], [3.0], [1.0], [3.0]])
    found = best_fit({"identity": identity, "squares": least_squares}, x, y)
    assert found.residuals["squares"] == pytest.approx(math.sqrt(16 / 20))
    assert found.residuals["identity"] == pytest.approx(math.sqrt(8 / 20))
    assert (found.kind, found.pairs) == ("identity", 4)


def test_a_rotated_space_is_turned_back():
    x = normal(60, 8)
    found = best_fit(BOTH, x, x @ rotation(8))
    assert found.kind == "procrustes"
    assert found.residuals["procrustes"] < 1e-5
    assert found.residuals["identity"] > 1.0
    torch.testing.assert_close(found.weight, rotation(8), atol=1e-5, rtol=0.0)


def test_a_common_space_is_left_as_it_is_where_a_rotation_would_only_fit_noise():
    x = normal(12, 16)  # half of the pairs leave most of a rotation open
    found = best_fit(BOTH, x, x + 0.1 * normal(12, 16, seed=2))
    assert found.kind == "identity"
    assert found.residuals["identity"] < 0.2 < found.residuals["procrustes"]
    assert torch.equal(found.weight, torch.eye(16))


def test_a_penalty_is_chosen_where_without_one_noise_is_fitted():
    x, weight = normal(24, 10), 0.1 * normal(10, 10, seed=1)
    y = x @ weight + normal(24, 10, seed=2)
    kinds = {f"{r}": partial(least_squares, ridge=r) for r in (0.0, 1.0)}
    assert best_fit(kinds, x, y).kind == "1.0"
    assert best_fit(kinds, x, x @ weight).kind == "0.0"


@pytest.mark.parametrize("pairs", [0, 3])
def test_too_few_pairs_are_not_measured(pairs: int):
    found = best_fit(BOTH, normal(pairs, 4), normal(pairs, 4, seed=1))
    assert (found.kind, found.residuals, found.pairs) == ("identity", {}, pairs)
