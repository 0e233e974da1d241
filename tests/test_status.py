"""What `dept status` tells of a run is right by hand-made ledgers, and damage is named."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dept_fl import status
from dept_fl.cli import app
from dept_fl.errors import DeptError
from dept_fl.report import Event
from dept_fl.status import Incident, SiloStatus, Status, look, read, summary, view, watch

PLAN = {
    "event": "plan", "time": 1000.0, "recipe": "spec-opt", "experiment": "c91962f035dd",
    "rounds": 4, "estimate_s": 40.0, "silos": {"bee": {}, "ant": {}},
}  # fmt: skip


BITS = {"bits_per_byte": 5.0, "unigram_bits_per_byte": 3.5}


def event(kind: str, at: float, **fields: Any) -> Event:
    return {"event": kind, "time": at, **fields}


def whole_round(round_: int, at: float, seconds: float = 20.0) -> list[Event]:
    """A round that merged ant, in the order in which the strategy writes it."""
    return [
        event("silo_eval", at, round=round_ - 1, during_round=round_, silo="ant",
              bits_per_byte=4.0 - round_, unigram_bits_per_byte=3.5),
        event("silo_train", at, round=round_, silo="ant", tokens_per_s=500.0),
        event("round", at, round=round_, sampled=["ant"], merged=["ant"], seconds=seconds),
    ]  # fmt: skip


def failure(round_: int, at: float, reason: str = "has NaN") -> Event:
    return event("failure", at, round=round_, silo="bee", reason=reason)


def write(run_dir: Path, *events: Event, end: str = "") -> Path:
    file = run_dir / "metrics.jsonl"
    file.write_text("".join(json.dumps(e) + "\n" for e in events) + end)
    return run_dir


def shown(made: Status, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width, highlight=False, markup=False, emoji=False)
    console.print(view(made))
    return console.file.getvalue()  # type: ignore[attr-defined]


# ---- facts ---------------------------------------------------------------------------------


def test_before_the_first_round_all_is_known_that_the_plan_tells():
    made = summary([PLAN], now=1005.0)
    assert (made.variant, made.experiment, made.round, made.rounds) == (
        "spec-opt", "c91962f035dd", 0, 4
    )  # fmt: skip
    assert (made.state, made.last_event, made.left_s) == ("running", 1000.0, 35.0)
    assert made.silos == [SiloStatus("ant"), SiloStatus("bee")]


def test_a_silo_is_what_its_last_answers_tell():
    made = summary([PLAN, *whole_round(1, 1020.0), *whole_round(2, 1040.0)], now=1041.0)
    assert made.round == 2
    assert made.silos == [
        SiloStatus(
            "ant", seen=1040.0, merged_round=2, bits_per_byte=2.0, unigram_bits_per_byte=3.5,
            tokens_per_s=500.0,
        ),
        SiloStatus("bee"),
    ]  # fmt: skip


def test_a_comparisons_job_tells_its_round_and_no_speed(tmp_path: Path):
    trained = [event("silo_train", 1000.0 + r, round=r, silo="ant") for r in (1, 2)]
    made = summary(read(write(tmp_path, *trained)), now=1003.0)
    assert made.round == 1  # other silos may not have trained in the second one
    assert made.silos == [SiloStatus("ant", seen=1002.0, merged_round=2)]
    assert (
        summary([*trained, event("silo_eval", 1003.0, round=2, silo="ant", **BITS)], 1003.0).round
        == 2
    )


def test_a_comparisons_job_stands_as_its_folder_tells(tmp_path: Path):
    trained = [event("silo_train", 1.0, round=1, silo=n, **BITS) for n in ("ant", "bee")]
    write(tmp_path, *trained)
    assert (look(tmp_path).round, look(tmp_path).state) == (0, "silent")
    (tmp_path / "checkpoints" / "round-00001").mkdir(parents=True)
    assert (look(tmp_path).round, look(tmp_path).state) == (1, "silent")
    (tmp_path / "result.json").write_text("{}")
    assert (look(tmp_path).round, look(tmp_path).state) == (1, "ended")
    assert [silo.bits_per_byte for silo in look(tmp_path).silos] == [5.0, 5.0]


def test_a_runs_rounds_are_those_that_it_wrote(tmp_path: Path):
    (tmp_path / "checkpoints" / "round-00009").mkdir(parents=True)
    (tmp_path / "result.json").write_text("{}")
    ahead = event("silo_train", 1021.0, round=3, silo="ant", tokens_per_s=1.0)
    made = look(write(tmp_path, PLAN, *whole_round(1, 1020.0), ahead))
    assert (made.round, made.state) == (1, "silent")


def test_the_time_left_is_that_of_the_rounds_left_less_what_this_one_has_had():
    events = [PLAN, *whole_round(1, 1010.0, seconds=10.0), *whole_round(2, 1040.0, seconds=30.0)]
    assert summary(events, now=1040.0).left_s == 2 * 20.0
    assert summary(events, now=1055.0).left_s == 20.0 + 5.0
    assert summary(events, now=1080.0).left_s == 20.0


def test_the_time_left_follows_the_last_rounds():
    rounds = [e for i in range(1, 8) for e in whole_round(i, 1000.0 + i, 100.0 if i < 3 else 1.0)]
    assert summary([{**PLAN, "rounds": 9}, *rounds], now=1007.0).left_s == 2 * 1.0


def test_with_the_last_round_done_nothing_is_left():
    assert summary([{**PLAN, "rounds": 1}, *whole_round(1, 1020.0)], now=1021.0).left_s == 0.0


@pytest.mark.parametrize(
    ("round_s", "silence_s", "state"),
    [(1.0, 119.0, "running"), (1.0, 121.0, "silent"), (100.0, 299.0, "running"),
     (100.0, 301.0, "silent")],
)  # fmt: skip
def test_a_run_is_called_silent_after_three_rounds_without_an_event(
    round_s: float, silence_s: float, state: str
):
    made = summary([PLAN, *whole_round(1, 2000.0, round_s)], now=2000.0 + silence_s)
    assert made.state == state
    assert (made.left_s is None) == (state == "silent")


def test_an_ended_run_stays_ended():
    made = summary([PLAN, *whole_round(4, 1100.0), event("end", 1110.0, round=4)], now=9e9)
    assert (made.state, made.left_s, made.last_event) == ("ended", None, 1110.0)


def test_a_resumed_run_goes_by_its_newest_plan():
    later = {**PLAN, "time": 5000.0, "rounds": 10}
    events = [PLAN, *whole_round(1, 1020.0), event("resume", 4999.0, round=1), later]
    made = summary(events, now=5001.0)
    assert (made.state, made.round, made.rounds) == ("running", 1, 10)
    assert made.left_s == 8 * 20.0 + 19.0


def test_a_silo_that_joins_late_is_seen_then():
    joined = event("join", 1030.0, round=2, silo="cat", vocabulary=320)
    made = summary([PLAN, *whole_round(1, 1020.0), joined], now=1031.0)
    assert made.silos[2] == SiloStatus("cat", seen=1030.0)


def test_a_silo_is_absent_until_it_answers_or_joins():
    away = event("absent", 1010.0, round=1, silo="ant", reason="no node has it")
    gone = summary([PLAN, away], now=1011.0)
    assert gone.silos[0] == SiloStatus("ant", absent=True)
    assert gone.incidents == [Incident("absent", 1010.0, 1, "ant", "no node has it")]
    for back in (whole_round(2, 1020.0), [event("join", 1020.0, round=2, silo="ant")]):
        again = summary([PLAN, away, *back], now=1021.0)
        assert not again.silos[0].absent
        assert again.incidents == []


def test_failures_are_counted_and_the_last_ones_told_oldest_first():
    events = [PLAN, *(failure(i, 1000.0 + i, f"reason {i}") for i in range(7))]
    made = summary(events, now=1010.0)
    assert made.silos[1] == SiloStatus("bee", failures=7)
    assert [i.reason for i in made.incidents] == [f"reason {i}" for i in range(2, 7)]


def test_a_failure_before_the_plan_is_told():
    made = summary([failure(0, 999.0)], now=1000.0)
    assert (made.rounds, made.state, made.left_s) == (0, "running", 0.0)
    assert "no plan yet\nrunning, last event 1 s ago\n" in shown(made)


def test_other_events_are_passed_over():
    made = summary([PLAN, event("checkpoint", 1002.0), event("news", 1003.0, silo=3)], now=1004.0)
    assert (made.last_event, len(made.silos)) == (1003.0, 2)


# ---- the ledger ------------------------------------------------------------------------------


def test_a_last_line_that_is_being_written_is_left_out(tmp_path: Path):
    write(tmp_path, PLAN, end='{"event": "rou')
    assert read(tmp_path) == [PLAN]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("\0\0\0", "no right 'event'"),
        ("[1]", "no right 'event'"),
        ('{"time": 1}', "no right 'event'"),
        ('{"event": "round", "round": 1, "seconds": 2.0}', "no right 'time'"),
        ('{"event": "round", "time": 1, "round": "1", "seconds": 2.0}', "no right 'round'"),
        ('{"event": "round", "time": 1, "round": 1, "seconds": NaN}', "no right 'seconds'"),
        (
            f'{{"event": "round", "time": 1, "round": 1, "seconds": {10**400}}}',
            "no right 'seconds'",
        ),
        ('{"event": "failure", "time": 1, "round": 1, "silo": "a"}', "no right 'reason'"),
        (
            '{"event": "silo_train", "time": 1, "round": 1, "silo": "a", "tokens_per_s": "many"}',
            "no right 'tokens_per_s'",
        ),
        ("[" * 100_000, "no right 'event'"),
    ],
)
def test_a_damaged_line_is_named_with_its_number(tmp_path: Path, line: str, reason: str):
    write(tmp_path, PLAN, end=f"{line}\n")
    with pytest.raises(DeptError, match=f"line 2: {reason} in .*; remove this line"):
        read(tmp_path)


# ---- in the terminal ---------------------------------------------------------------------------


def test_what_is_shown(tmp_path: Path):
    events = [{**PLAN, "name": "demo"}, *whole_round(1, 1020.0), failure(2, 1030.0)]
    text = shown(summary(events, now=1032.0))
    assert text.startswith(
        "demo, spec-opt, experiment c91962f035dd\n"
        "round 1 of 4: running, last event 2 s ago; left: about 48 s\n"
    )
    rows = [line.split() for line in text.splitlines()]
    assert ["ant", "12", "s", "ago", "1", "3.000", "3.500", "500", "0"] in rows
    assert ["bee", "–", "–", "–", "–", "–", "1"] in rows
    assert text.endswith("\n  2 s ago, round 2, bee: has NaN\n")


def test_a_reason_takes_one_line_and_is_no_markup():
    reason = f"silo bee: [red]no[/] :smile:\n    file {'x' * 100}"
    last = shown(summary([PLAN, failure(1, 1001.0, reason)], now=1001.0)).splitlines()[-1]
    assert last.startswith("  0 s ago, round 1, bee: [red]no[/] :smile: file xxx")
    assert last.endswith("…")
    assert len(last) == 80


def test_nothing_in_a_ledger_steers_the_terminal():
    bad = "x\x1b[2J\x9b1m\u202e\ny"
    plan = {**PLAN, "name": bad, "recipe": bad, "experiment": bad, "silos": {bad: {}}}
    events = [plan, {**failure(1, 1001.0, bad), "silo": bad}, {**failure(1, 1001.0, bad)}]
    text = shown(summary(events, now=1002.0), width=200)
    assert all(each.isprintable() or each == "\n" for each in text)
    assert text.count("x?[2J?1m? y") == 7


def test_one_silos_absurd_figures_leave_room_for_names():
    bad = {"bits_per_byte": 9e299, "unigram_bits_per_byte": 9e299}
    events = [event("silo_eval", 1001.0, round=0, silo=name, **bad) for name in ("ant", "bee")]
    events += [event("silo_train", 1001.0, round=1, silo="ant", tokens_per_s=9e299)]
    text = shown(summary([PLAN, *events], now=1002.0))
    assert {"ant", "bee", "9e+299"} <= set(text.split())
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_refused_node_is_told_without_a_silo():
    refused = event("failure", 1001.0, round=1, silo="", reason="a node says nothing")
    made = summary([PLAN, refused], now=1002.0)
    assert len(made.silos) == 2
    assert shown(made).endswith("\n  1 s ago, round 1: a node says nothing\n")


def test_a_long_name_leaves_the_figures_whole():
    name = "university-hospital-of-a-town-with-a-name"
    text = shown(summary([{**PLAN, "silos": {name: {}}}, *whole_round(1, 1020.0)], now=1021.0))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "tokens/s   failed" in text
    assert name in "".join(line[2:15].strip() for line in text.splitlines())


def test_watching_goes_on_to_the_end_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, PLAN)
    later = [whole_round(1, 1020.0), [event("end", 1030.0, round=1)]]
    monkeypatch.setattr(status.time, "time", lambda: 1031.0)
    monkeypatch.setattr(
        status.time,
        "sleep",
        lambda _: write(tmp_path, *read(tmp_path), *later.pop(0)),
    )
    console = Console(file=StringIO(), force_terminal=True, width=80)
    watch(tmp_path, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert later == []
    assert text.index("round 0 of 4: running") < text.index("round 1 of 4: running")
    assert text.index("round 1 of 4: running") < text.index("round 1 of 4: ended 1 s ago")


def test_watching_is_left_by_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", interrupted)
    watch(write(tmp_path, PLAN), Console(file=StringIO(), force_terminal=True))


# ---- the command ---------------------------------------------------------------------------------


def test_one_json_object_holds_the_same_facts(tmp_path: Path):
    write(tmp_path, PLAN, *whole_round(1, 1020.0), failure(1, 1021.0))
    done = CliRunner().invoke(app, ["status", str(tmp_path), "--json"])
    told = json.loads(done.stdout)
    assert (told["state"], told["round"], told["silos"][0]["silo"]) == ("silent", 1, "ant")
    assert told["incidents"][0]["reason"] == "has NaN"


def test_watching_without_a_terminal_prints_once(tmp_path: Path):
    done = CliRunner().invoke(app, ["status", str(write(tmp_path, PLAN)), "--watch"])
    assert done.exit_code == 0
    assert done.output.count("round 0 of 4: stopped or stalled, last event") == 1
    assert "\x1b" not in done.output


@pytest.mark.parametrize(
    ("name", "reason"),
    [("nowhere", "nowhere: no such folder"), ("", "metrics.jsonl: No such file"),
     ("empty", "metrics.jsonl: holds no event"), ("damaged", "metrics.jsonl, line 1: no right")],
)  # fmt: skip
def test_a_folder_without_a_whole_ledger_is_one_clear_error(tmp_path: Path, name: str, reason: str):
    for folder, text in (("empty", ""), ("damaged", "what?\n")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, end=text)
    done = CliRunner().invoke(app, ["status", str(tmp_path / name)])
    assert done.exit_code == 2
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
