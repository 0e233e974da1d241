"""What the clock's benchmark makes and reads; its runs are real and take minutes."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from benchmarks.clock import FEDAVG, WIRES, Size, is_ours, round_of, row, table
from benchmarks.nvflare_peer import write_job
from dept_fl.config import load_recipe
from dept_fl.model import layout
from dept_fl.report import Event


@pytest.mark.parametrize("parameters", [3e6, 6e6, 50e6, 100e6])
def test_the_body_has_about_the_parameters_asked_for(tmp_path: Path, parameters: float):
    file = tmp_path / "recipe.yaml"
    for wire in WIRES.split(","):
        file.write_text(Size.of(parameters, silos=4, rounds=3).recipe(wire))
        recipe = load_recipe(file)
        assert f"{recipe.wire.up}/{recipe.wire.down}" == wire
        found = layout(recipe.model, recipe.sequence_tokens).body_parameters()
        assert found == pytest.approx(parameters, rel=0.1)


def silo(name: str, **more: float) -> Event:
    seconds = dict.fromkeys(("load_s", "settle_s", "encode_s", "save_s", "transfer_s"), 1.0)
    facts = {"event": "silo_train", "silo": name, "merge_s": 0.5, "train_s": 2.0, **seconds}
    return {**facts, "bytes_up_body": 10, "bytes_down_body": 20, **more}


def test_seconds_of_silos_are_those_of_the_slowest():
    found = round_of(
        [
            silo("a", evaluate_s=3.0),
            silo("b", train_s=4.0, save_s=6.0),
            {"event": "round", "push_s": 2.0, "outer_s": 0.25},
            {"event": "checkpoint", "save_s": 7.0},
        ],
        37.0,
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
        {**common, "wire": FEDAVG, "seconds": 80.0, "step_s": 0.0, "rest_s": 80.0},
        {**common, "wire": "int4/int8", "seconds": 22.0, "step_s": 2.0, "rest_s": 20.0, **parts},
    ]
    assert "| int4/int8 | 22.0 | 2.0 | 0.25 |" in table(rows)


def test_rows_of_peers_have_no_codecs():
    assert [is_ours(wire) for wire in (FEDAVG, "NVFlare FedAvg 2.9.0", "int4/int4")] == [
        False,
        False,
        True,
    ]


def test_the_first_round_is_left_out_and_the_rest_told_by_their_median():
    rounds: list[Event] = [
        {"seconds": seconds, "step_s": step, "up": 10, "down": down}
        for seconds, step, down in ((90.0, 9.0, 80), (3.0, 2.0, 20), (7.0, 1.0, 20), (4.0, 0.5, 20))
    ]
    size = Size.of(3e6, silos=2, rounds=4)
    found = row(
        "int4/int8", size, {"a": (2, 3), "b": (5,)}, rounds, {"superlink": 1, "serverapp": 2}
    )
    assert found == {
        "wire": "int4/int8",
        "silos": 2,
        "parameters": 11,
        "seconds": 4.0,
        "step_s": 1.0,
        "rest_s": 3.5,  # of 1, 6 and 3.5
        "up": 10,
        "down": 20,
        "superlink_bytes": 1,
        "serverapp_bytes": 2,
        "rounds": rounds,
    }


def test_a_job_for_nvflare_names_what_it_brings_along(tmp_path: Path):
    job, out = tmp_path / "job", tmp_path / "rounds.jsonl"
    write_job(job, out, {"a": (2, 3)}, silos=3, rounds=5)
    server, client = (
        json.loads((job / f"app/config/config_fed_{side}.json").read_text())
        for side in ("server", "client")
    )
    workflow = server["workflows"][0]
    given = workflow["args"]
    assert (given["num_clients"], given["num_rounds"], given["out"]) == (3, 5, str(out))
    assert json.loads(Path(given["shapes"]).read_text()) == {"a": [2, 3]}
    custom = job / "app" / "custom"
    module, name = workflow["path"].split(".")
    code = ast.parse((custom / f"{module}.py").read_text())
    assert name in [each.name for each in code.body if isinstance(each, ast.ClassDef)]
    script = client["executors"][0]["executor"]["args"]["task_script_path"]
    assert (custom / script).is_file()
