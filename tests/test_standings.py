"""What a comparison came to, by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from dept_fl.standings import as_csv, deviation, markdown, rows, write


def silo(bits: float, **figures: float) -> dict[str, float]:
    usual = {
        "perplexity": 9.0, "unigram_bits_per_byte": 3.0, "activation_norm": 1.0, "tokens": 1e6,
        "text_bytes": 4e6, "epochs": 2.0, "parameters": 2e6, "bytes_up": 5e6, "flops": 1e12,
    }  # fmt: skip
    return {**usual, "bits_per_byte": bits, **figures}


def result(arm: str, seed: int, silos: dict[str, Any], **more: Any) -> dict[str, Any]:
    curve = [
        {
            "round": r, "steps": 10 * r, "bits_per_byte": {n: s["bits_per_byte"] for n, s in
            silos.items()}, "activation_norm": dict.fromkeys(silos, 1.0 + r), "body_norm": 5.0,
        }
        for r in range(3)
    ]  # fmt: skip
    facts = {"equal": "tokens", "silo": "", "train_s": 1800.0, "curve": curve}
    return {"arm": arm, "seed": seed, "silos": silos, **facts, **more}


RESULTS = [
    result("glob", 1, {"a": silo(2.0), "b": silo(4.0)}),  # mean 3
    result("glob", 2, {"a": silo(4.0), "b": silo(6.0)}),  # mean 5
    result("alone", 1, {"a": silo(1.0, bytes_up=0)}, silo="a"),
    result("alone", 1, {"b": silo(2.0, bytes_up=0)}, silo="b"),
    result("alone", 2, {"a": silo(2.0, bytes_up=0)}, silo="a"),
    result("alone", 2, {"b": silo(3.0, bytes_up=0)}, silo="b"),
]


def test_rows_by_hand():
    alone, glob = rows(RESULTS)  # the best first
    assert (alone.arm, glob.arm) == ("alone", "glob")
    assert glob.bits_per_byte == 4.0
    assert glob.spread == pytest.approx(2**0.5)  # of 3 and 5
    assert glob.by_silo == {"a": 3.0, "b": 5.0}
    assert alone.bits_per_byte == 2.0
    assert alone.spread == pytest.approx(0.5**0.5)  # of 1.5 and 2.5
    assert (glob.tokens, glob.text_bytes, glob.flops) == (2e6, 8e6, 2e12)  # both silos'
    assert (glob.parameters, glob.bytes_up, glob.epochs) == (2e6, 5e6, 2.0)  # of one
    assert glob.hours == 0.5
    assert alone.hours == 1.0  # its silos are jobs of their own
    assert alone.bytes_up == 0


def test_one_seed_has_no_spread():
    assert deviation([1.0]) is None
    (row,) = rows(RESULTS[:1])
    assert row.spread is None
    assert "| glob | 3.000 | 2.00 | 5.0 | 2.00 | 8.0 | 2.00 | 2.0 | 0.50 |" in markdown([row])


def test_equal_bytes_is_a_table_of_its_own_with_the_arms_that_have_them_already():
    more = [
        result("glob", 1, {"a": silo(1.0), "b": silo(1.0)}, equal="bytes"),
    ]
    made = rows([*RESULTS, *more])
    in_bytes = [row for row in made if row.equal == "bytes"]
    assert [(row.arm, row.bits_per_byte) for row in in_bytes] == [("glob", 1.0), ("alone", 2.0)]
    text = markdown(made)
    assert "Equal tokens, 2 seeds, mean of 2 silos:" in text
    assert "Equal bytes, 1 to 2 seeds, mean of 2 silos:" in text


def test_files_are_whole_and_hold_the_same(tmp_path: Path):
    made = write(RESULTS, {"date": "today"}, tmp_path)
    assert (tmp_path / "comparison.md").read_text() == markdown(made)
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["date"] == "today"
    assert [row["arm"] for row in found["rows"]] == ["alone", "glob"]
    assert len(found["results"]) == len(RESULTS)
    lines = list(csv.DictReader(as_csv(made).splitlines()))
    assert [line["bits/byte b"] for line in lines] == ["2.5", "5.0"]
    for name in ("ranking.png", "curves.png", "norms.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
