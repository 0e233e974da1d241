"""The parts of a round add up to it, and only rounds behind the first count."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks.round_overhead import ROOT, parts, silo_file, table
from dept_fl.report import Event
from dept_fl.silo_file import load_silo_file


def events(round_: int, scale: float) -> list[Event]:
    """Two silos; in all 20 s, times `scale`, and a checkpoint while the next round goes on."""
    seconds = {"load_s": 0.5, "settle_s": 0.0, "evaluate_s": 1.0, "train_s": 3.0}
    seconds |= {"encode_s": 0.25, "save_s": 0.25, "merge_s": 0.5}
    silo = {key: value * scale for key, value in seconds.items()}
    return [
        {"event": "silo_train", "round": round_, "silo": "ant", **silo},
        {"event": "silo_train", "round": round_, "silo": "bee", **silo},
        {"event": "round", "round": round_, "seconds": 20.0 * scale, "outer_s": 0.5 * scale},
        {"event": "checkpoint", "round": round_, "save_s": 1.0 * scale},
    ]


@pytest.mark.parametrize(("side_by_side", "train", "rest"), [(1, 9.0, 12.75), (2, 4.5, 20.25)])
def test_the_parts_of_a_round(side_by_side: int, train: float, rest: float):
    run = events(1, 100.0) + events(2, 1.0) + events(3, 2.0)  # means are those of 1.5
    found = parts(run, side_by_side)
    assert found["train"] == pytest.approx(train)
    assert found["check and merge"] == pytest.approx(2.25)
    assert sum(found.values()) == pytest.approx(30.0)
    assert found["transfer, queueing, start of processes"] == pytest.approx(rest)


def test_the_table_tells_what_is_not_training():
    lines = table({"simulation": parts(events(2, 1.0), 1)}).splitlines()
    assert "| **all but train** | 14.000 | 70.0 % |" in lines
    assert lines[-1] == "| round | 20.000 | 100.0 % |"


def test_a_partners_file_takes_nothing_of_the_demo_that_means_another_thing_there(tmp_path: Path):
    settings = yaml.safe_load((ROOT / "conf/demo.yaml").read_text())
    name, source = next(iter(settings.pop("silos").items()))
    assert settings["tokenizer"] == "own"  # in a silo's file: the name of one
    file = load_silo_file(silo_file(tmp_path, tmp_path / "home", settings, name, source))
    own = file.alone().silos[name]
    assert (file.name, own.tokenizer) == (name, "")
