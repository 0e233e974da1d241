"""Measured bytes: what Flower's messages carried in a run, beside the formula."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dept_fl.cli import app
from dept_fl.config import Recipe
from dept_fl.cost import cost
from dept_fl.errors import DeptError
from dept_fl.model import layout
from dept_fl.report import Ledger
from dept_fl.traffic import recipe_of, traffic
from tests.federation import ALL_VARIANTS, run

Make = Callable[..., Recipe]


@pytest.mark.parametrize("settings", ALL_VARIANTS.values(), ids=ALL_VARIANTS.keys())
def test_a_run_sends_what_the_formula_says(recipe: Make, home: Path, tmp_path: Path, settings: str):
    made = recipe(f"{settings} rounds=2")
    run(made, home, tmp_path / "run")
    assert recipe_of(tmp_path / "run").label == made.label
    plan = next(e for e in Ledger(tmp_path / "run").read() if e["event"] == "plan")
    found = layout(made.model, made.sequence_tokens)
    silos = traffic(tmp_path / "run")
    assert [each.silo for each in silos] == ["ant", "bee", "cat"]
    for each in silos:
        vocabulary = plan["silos"][each.silo]["vocabulary"]
        assert each.rounds == [1, 2]
        assert each.formula_up == each.formula_down == cost(made, found, vocabulary).up_bytes
        assert (each.up_ratio, each.down_ratio) == (1.0, 1.0)


@pytest.fixture
def run_dir(recipe: Make, home: Path, tmp_path: Path) -> Path:
    run(recipe("rounds=1"), home, tmp_path / "run")
    return tmp_path / "run"


def rewrite(run_dir: Path, change: Callable[[dict[str, object]], None]) -> None:
    file = Ledger(run_dir).file
    events = [json.loads(line) for line in file.read_text().splitlines()]
    for event in events:
        change(event)
    file.write_text("".join(json.dumps(event) + "\n" for event in events))


def test_rounds_that_are_not_alike_are_told_apart(run_dir: Path):
    ledger = Ledger(run_dir)
    first = next(e for e in ledger.read() if e["event"] == "silo_train" and e["silo"] == "ant")
    first = {k: v for k, v in first.items() if k not in ("event", "time", "round")}
    more = {**first, "bytes_up_body": 2 * first["bytes_up_body"]}
    for round_, facts in ((2, first), (3, more), (4, more), (6, more)):
        ledger.write("silo_train", round=round_, **facts)
    ant = [each for each in traffic(run_dir) if each.silo == "ant"]
    assert [(each.rounds, each.up_ratio) for each in ant] == [([1, 2], 1.0), ([3, 4, 6], 2.0)]
    done = CliRunner().invoke(app, ["cost", "--measured", str(run_dir)])
    assert done.exit_code == 0
    assert "1-2" in done.stdout
    assert "3-4, 6" in done.stdout
    assert "2.0000" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_a_silo_that_joined_late_has_its_vocabulary_from_then(run_dir: Path):
    def late(event: dict[str, object]) -> None:
        if event["event"] == "plan":
            del event["silos"]["cat"]  # type: ignore[attr-defined]

    before = traffic(run_dir)
    rewrite(run_dir, late)
    assert traffic(run_dir) == before


def test_the_command_as_json(run_dir: Path):
    done = CliRunner().invoke(app, ["cost", "--measured", str(run_dir), "--json"])
    facts = json.loads(done.stdout)
    assert {each["silo"] for each in facts} == {"ant", "bee", "cat"}
    assert {each["down_ratio"] for each in facts} == {1.0}


def test_a_folder_without_a_run_is_one_clear_error(tmp_path: Path):
    for folder, reason in ((tmp_path, "metrics.jsonl"), (tmp_path / "gone", "no such folder")):
        done = CliRunner().invoke(app, ["cost", "--measured", str(folder)])
        assert done.exit_code == 2
        assert reason in done.stderr
        assert "Traceback" not in done.output


def test_a_run_without_a_checkpoint_or_an_update_is_one_clear_error(run_dir: Path):
    ledger = Ledger(run_dir)
    ledger.rewind(0)
    with pytest.raises(DeptError, match="no update was merged"):
        traffic(run_dir)
    (run_dir / "checkpoints" / "round-00001" / "state.json").write_text("{")
    with pytest.raises(DeptError, match="round-00001: not readable as saved state"):
        traffic(run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(DeptError, match="holds no checkpoint"):
        traffic(run_dir)


def test_a_ledger_without_the_bytes_is_one_clear_error(run_dir: Path):
    rewrite(run_dir, lambda event: event.pop("bytes_up_body", None) and None)
    with pytest.raises(DeptError, match="has no 'bytes_up_body'"):
        traffic(run_dir)
