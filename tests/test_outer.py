"""The outer optimiser against hand formulas and torch's own."""

from __future__ import annotations

import pytest
import torch

from dept_fl.config import OuterConfig
from dept_fl.merge import Delta, merged
from dept_fl.outer import OuterOptimizer


def rows(*values: float) -> torch.Tensor:
    """[n, 1]: an embedding of one dimension, so that a row is a number."""
    return torch.tensor(values).unsqueeze(1)


def test_averaging_moves_parameters_to_the_mean_of_the_silos():
    optimizer = OuterOptimizer(OuterConfig("average"), {"w": torch.tensor([1.0, 2.0])}, ())
    deltas = [
        Delta({"w": torch.tensor([0.5, -1.0])}),  # a silo at 1.5, 1
        Delta({"w": torch.tensor([1.5, 3.0])}),  # a silo at 2.5, 5
    ]
    optimizer.step(
        merged(deltas, {"w": (2,)}, (), torch.zeros(0), OuterConfig()),
        torch.empty(0, dtype=torch.long),
    )
    assert optimizer.parameters["w"].tolist() == [2.0, 3.0]


def test_nesterov_follows_the_hand_formula():
    # g = -delta; b <- 0.9 b + g; w <- w - 0.7 (g + 0.9 b); with deltas 1, then 2:
    # b = -1,   w = 0    + 0.7 (1 + 0.9)    = 1.33
    # b = -2.9, w = 1.33 + 0.7 (2 + 0.9*2.9) = 1.33 + 3.227 = 4.557
    optimizer = OuterOptimizer(OuterConfig("nesterov"), {"w": torch.zeros(1)}, ())
    none = torch.empty(0, dtype=torch.long)
    optimizer.step({"w": torch.tensor([1.0])}.items(), none)
    assert optimizer.parameters["w"].item() == pytest.approx(1.33)
    optimizer.step({"w": torch.tensor([2.0])}.items(), none)
    assert optimizer.parameters["w"].item() == pytest.approx(4.557)


def test_adam_is_torchs_adam_on_the_negative_delta():
    config = OuterConfig("adam", learning_rate=0.1, betas=[0.8, 0.9], epsilon=1e-3)
    start, deltas = torch.randn(5), torch.randn(3, 5)
    optimizer = OuterOptimizer(config, {"w": start}, ())
    reference = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([reference], lr=0.1, betas=(0.8, 0.9), eps=1e-3, fused=True)
    for delta in deltas:
        optimizer.step({"w": delta.clone()}.items(), torch.empty(0, dtype=torch.long))
        reference.grad = -delta
        adam.step()
    assert torch.equal(optimizer.parameters["w"], reference)


@pytest.mark.parametrize("name", ["average", "nesterov", "adam"])
def test_a_row_that_nobody_holds_keeps_its_value_and_its_moments(name: str):
    optimizer = OuterOptimizer(OuterConfig(name), {"phi": rows(5.0, 7.0)}, {"phi"})
    optimizer.step({"phi": rows(1.0, 1.0)}.items(), torch.empty(0, dtype=torch.long))
    value = optimizer.parameters["phi"].clone()
    moments = {k: v.clone() for k, v in optimizer.state().items() if v.dim()}
    optimizer.step({"phi": rows(1.0, 0.0)}.items(), torch.tensor([1]))
    assert optimizer.parameters["phi"][1] == value[1]
    assert optimizer.parameters["phi"][0] != value[0]
    for key, before in moments.items():
        after = optimizer.state()[key]
        assert after[1] == before[1]
        assert after[0] != before[0]


@pytest.mark.parametrize("name", ["average", "nesterov", "adam"])
def test_an_outer_optimizer_resumed_from_its_state_goes_on_the_same(name: str):
    none = torch.empty(0, dtype=torch.long)
    unbroken = OuterOptimizer(OuterConfig(name), {"w": torch.ones(3)}, ())
    unbroken.step({"w": torch.tensor([1.0, 2.0, 3.0])}.items(), none)
    resumed = OuterOptimizer(
        OuterConfig(name), {"w": unbroken.parameters["w"].detach().clone()}, ()
    )
    resumed.load({key: value.clone() for key, value in unbroken.state().items()})
    for each in (unbroken, resumed):
        each.step({"w": torch.tensor([-1.0, 0.5, 2.0])}.items(), none)
    assert torch.equal(unbroken.parameters["w"], resumed.parameters["w"])
