"""The ledger survives kills and rewinds; figures are printed as computed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dept_fl.report import Ledger, Screen, duration, figure, plot


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path):
    ledger = Ledger(tmp_path)
    ledger.write("round", round=1)
    with ledger.file.open("a") as stream:
        stream.write('{"event": "rou')
    assert [(e["event"], e["round"]) for e in ledger.read()] == [("round", 1)]


def test_each_event_has_the_time_when_it_was_written_and_keeps_it(tmp_path: Path):
    ledger = Ledger(tmp_path)
    before = time.time()
    ledger.write("round", round=1)
    written = ledger.read()
    assert before - 0.001 <= written[0]["time"] <= time.time() + 0.001
    ledger.rewind(1)
    assert ledger.read() == written


def test_writing_behind_a_cut_off_line_loses_nothing(tmp_path: Path):
    ledger = Ledger(tmp_path)
    ledger.write("round", round=1)
    with ledger.file.open("a") as stream:
        stream.write('{"event": "rou')
    ledger.rewind(1)
    ledger.write("round", round=2)
    assert [e["round"] for e in ledger.read()] == [1, 2]


def test_rewinding_drops_what_will_be_done_again(tmp_path: Path):
    ledger = Ledger(tmp_path)
    ledger.write("plan")
    for round_ in (1, 2, 3):
        ledger.write("silo_eval", round=round_ - 1, during_round=round_, silo="a")
        ledger.write("silo_train", round=round_, silo="a")
    ledger.write("silo_eval", round=2, silo="a", final=True)
    ledger.write("end", round=2)
    ledger.rewind(2)
    kept = [(e["event"], e.get("round")) for e in ledger.read()]
    assert kept == [
        ("plan", None), ("silo_eval", 0), ("silo_train", 1), ("silo_eval", 1), ("silo_train", 2)
    ]  # fmt: skip


def test_every_line_is_json_that_other_tools_read(tmp_path: Path):
    ledger = Ledger(tmp_path)
    ledger.write("failure", silo="été", reason="a\nb")
    assert json.loads(ledger.file.read_text())["reason"] == "a\nb"
    with pytest.raises(ValueError, match="JSON"):
        ledger.write("round", loss=float("nan"))


def test_durations_are_said_as_people_say_them():
    said = [duration(s) for s in (3, 89, 240, 7200, 345_600)]
    assert said == ["3 s", "89 s", "4 min", "2.0 h", "4 days"]


def test_tables_hold_their_cells(capsys: pytest.CaptureFixture[str]):
    Screen().table(("silo", "loss"), [["fr", "1.234"]], "round 1")
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("round 1", "silo", "loss", "fr", "1.234"))


def test_figures_of_any_size_are_short():
    assert [figure(v) for v in (None, 0.0, 2.0, 123456.0, 1e9, 1e-5, 9e299)] == [
        "–", "0.000", "2.000", "123,456.000", "1e+09", "1e-05", "9e+299"
    ]  # fmt: skip
    assert [figure(v, 1) for v in (1_490_000, 9.87654e8)] == ["1,490,000.0", "9.88e+08"]
    assert [figure(v, 0) for v in (1_490_000, 1.49e9)] == ["1,490,000", "1.49e+09"]


def test_one_silos_absurd_figures_leave_room_for_names(capsys: pytest.CaptureFixture[str]):
    bad = dict.fromkeys(("bits_per_byte", "unigram_bits_per_byte", "tokens_per_s", "loss"), 9e299)
    bad |= dict.fromkeys(("perplexity", "unigram_perplexity"), 9e299)
    bytes_ = ("bytes_up_body", "bytes_up_embeddings", "bytes_down_body", "bytes_down_embeddings")
    rows = [{"silo": name, **bad, **dict.fromkeys(bytes_, 1000)} for name in ("ant", "bee")]
    screen = Screen()
    for show in (lambda: screen.round(rows, "round 1"), lambda: screen.final(rows)):
        show()
        printed = capsys.readouterr().out
        assert {"ant", "bee", "9e+299"} <= set(printed.split())
        assert all(len(line) <= 100 for line in printed.splitlines())


def test_the_plot_is_a_png(tmp_path: Path):
    events = [
        {"event": "silo_train", "silo": "a", "round": 1, "loss": 2.0},
        {"event": "silo_eval", "silo": "a", "round": 0, "bits_per_byte": 4.0,
         "unigram_bits_per_byte": 3.0},
    ]  # fmt: skip
    plot(events, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
