"""What the memory benchmark makes of its rows; its runs are real and take minutes."""

from __future__ import annotations

from benchmarks.memory import fitting, table
from dept_fl.report import Event


def row(sequences: int, measured: float, parameters: float) -> Event:
    return {
        "variant": "spec-opt",
        "vocabulary": 4_096,
        "sequences": sequences,
        "whole": False,
        "measured": int(measured * 1e9),
        "formula": int(measured * 1e9) // 2,
        "formula_parameters": int(parameters * 1e9),
    }


def test_what_is_free_beside_the_parameters_takes_more_sequences():
    """4 sequences take 2 GB beside 1 GB of parameters: 11 GB beside it have room for 22."""
    assert fitting(row(4, 3.0, 1.0), row(4, 12.0, 5.0)) == 22


def test_the_table_tells_the_sequences():
    line = table([row(22, 3.0, 1.0)]).splitlines()[-1]
    assert line.startswith("| spec-opt | 4,096 | 22 | a slice at a time | 3.0 GB | 1.5 GB | 2.00 |")
