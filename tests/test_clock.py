"""What the clock's benchmark makes and reads; its runs are real and take minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.clock import DOWN, FEDAVG, Size, round_of, table
from dept_fl.config import load_recipe
from dept_fl.model import layout
from dept_fl.report import Event


@pytest.mark.parametrize("parameters", [3e6, 6e6, 50e6, 100e6])
def test_the_body_has_about_the_parameters_asked_for(tmp_path: Path, parameters: float):
    file = tmp_path / "recipe.yaml"
    for wire, down in DOWN.items():
        file.write_text(Size.of(parameters, silos=4, rounds=3).recipe(wire))
        recipe = load_recipe(file)
        assert (recipe.wire.up, recipe.wire.down) == (wire, down)
        found = layout(recipe.model, recipe.sequence_tokens).body_parameters()
        assert found == pytest.approx(parameters, rel=0.1)


def silo(name: str, **more: float) -> Event:
    seconds = dict.fromkeys(("load_s", "settle_s", "encode_s", "save_s", "transfer_s"), 1.0)
    facts = {"event": "silo_train", "silo": name, "merge_s": 0.5, "train_s": 2.0, **seconds}
    return {**facts, "bytes_up_body": 10, "bytes_down_body": 20, **more}


def test_a_round_is_that_of_its_slowest_silo_with_its_checkpoint():
    found = round_of(
        [
            silo("a", evaluate_s=3.0),
            silo("b", train_s=4.0, save_s=6.0),
            {"event": "round", "seconds": 30.0, "push_s": 2.0, "outer_s": 0.25},
            {"event": "checkpoint", "save_s": 7.0},
        ]
    )
    assert found == {
        "seconds": 37.0,
        "up": 20,
        "down": 40,
        "step_s": 5.0,
        "push_s": 2.0,
        "silo_s": 9.0,
        "fetch_s": 2.0,
        "check_s": 1.0,
        "outer_s": 0.25,
        "save_s": 7.0,
    }


def test_the_rest_of_a_round_is_told_as_a_share_of_fedavgs():
    common = {"silos": 4, "parameters": 10**8, "up": 0, "down": 0}
    common |= {"superlink_bytes": 2 * 10**9, "serverapp_bytes": 10**9}
    parts = dict.fromkeys(("push_s", "silo_s", "fetch_s", "check_s", "outer_s", "save_s"), 1.0)
    rows: list[Event] = [
        {**common, "wire": FEDAVG, "seconds": 80.0, "step_s": 0.0},
        {**common, "wire": "int4", "seconds": 22.0, "step_s": 2.0, **parts},
    ]
    assert "| int4 | 22.0 | 2.0 | 0.25 |" in table(rows)
