"""The page of a run: figures by hand, hostile text, bounds, HTML that stands alone."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dept_fl.checkpoint import save_state
from dept_fl.cli import app
from dept_fl.config import Recipe
from dept_fl.errors import DeptError
from dept_fl.page import bounds, chart, render
from dept_fl.page.facts import Facts, Sample, Trouble, gather
from dept_fl.page.render import moment, page, write_page
from dept_fl.report import Event, figure
from dept_fl.traffic import Traffic
from tests.federation import run

FOLDER = Path(__file__).resolve().parents[1] / "dept_fl" / "page"

PLAN = {
    "event": "plan", "time": 1000.0, "name": "small", "recipe": "spec-opt", "seed": 7,
    "experiment": "c91962f035dd", "rounds": 2, "estimate_s": 40.0, "body_parameters": 2_500_000,
    "versions": {"torch": "2.13.0", "flwr": "1.41.0"},
    "silos": {
        "ant": {"vocabulary": 400, "train_bytes": 9000, "train_tokens": 3000, "device": "gpu"},
        "bee": {"vocabulary": 500, "train_bytes": 8000, "train_tokens": 2000, "device": "cpu"},
    },
}  # fmt: skip


def event(kind: str, at: float, **fields: Any) -> Event:
    return {"event": kind, "time": at, **fields}


def evaluated(round_: int, silo: str, bits: float, **fields: Any) -> Event:
    return event(
        "silo_eval", 1010.0 + round_, round=round_, silo=silo, bits_per_byte=bits,
        unigram_bits_per_byte=3.5, perplexity=20 * bits, activation_norm=10 * bits, **fields,
    )  # fmt: skip


def trained(round_: int, silo: str, loss: float, **fields: Any) -> Event:
    facts = {
        "tokens_per_s": 500.0, "body_delta_norm": loss / 2, "body_norm": 40.0,
        "bytes_up_body": 100, "bytes_up_embeddings": 0,
        "bytes_down_body": 200, "bytes_down_embeddings": 0,
        "train_s": 4.0, "evaluate_s": 1.0, "transfer_s": 0.5, "encode_s": 0.0,
    }  # fmt: skip
    return event(
        "silo_train", 1010.0 + round_, round=round_, silo=silo, loss=loss, **(facts | fields)
    )


LEDGER = [
    event("join", 999.0, round=0, silo="ant", new=True, vocabulary=400, train_tokens=3000),
    PLAN,
    evaluated(0, "ant", 8.0),
    evaluated(0, "bee", 7.0),
    trained(1, "ant", 6.0),
    trained(1, "bee", 5.0, train_s=6.0),
    event("round", 1011.0, round=1, sampled=["ant", "bee"], merged=["ant", "bee"],
          push_s=1.0, wait_s=7.0, outer_s=0.5, seconds=10.0),
    event("checkpoint", 1011.5, round=1, save_s=0.25),
    event("failure", 1011.7, round=2, silo="bee", reason="silo bee: has NaN"),
    event("late", 1011.8, round=2, silo="bee", of_round=1),
    evaluated(1, "ant", 4.0),
    trained(2, "ant", 3.0),
    event("round", 1012.0, round=2, sampled=["ant", "bee"], merged=["ant"],
          push_s=1.0, wait_s=5.0, outer_s=0.5, seconds=8.0),
    evaluated(2, "ant", 2.0, final=True),
    evaluated(2, "bee", 3.0, final=True),
    event("sample", 1013.0, round=2, silo="ant", text="leaf after leaf"),
    event("end", 1014.0, round=2, seconds=14.0),
]  # fmt: skip


def write(run_dir: Path, *events: Event) -> Path:
    text = "".join(json.dumps(e) + "\n" for e in events)
    (run_dir / "metrics.jsonl").write_text(text, encoding="utf-8")
    return run_dir


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    return gather(write(tmp_path, *LEDGER), now=1100.0)


def shown(run_dir: Path, *events: Event, now: float = 1100.0) -> str:
    return page(gather(write(run_dir, *events), now))


class Document(HTMLParser):
    """Fails where a tag is not closed, or closed twice; keeps tags with attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes)
        if tag not in ("meta", "link", "br", "img", "input", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(text)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


# ---- facts by hand -------------------------------------------------------------------------------


def test_curves_are_by_measure_silo_and_round(facts: Facts):
    assert facts.curves["bits_per_byte"] == {
        "ant": {0: 8.0, 1: 4.0, 2: 2.0}, "bee": {0: 7.0, 2: 3.0}
    }  # fmt: skip
    assert facts.curves["loss"] == {"ant": {1: 6.0, 2: 3.0}, "bee": {1: 5.0}}
    assert facts.curves["body_delta_norm"]["ant"] == {1: 3.0, 2: 1.5}
    assert facts.curves["activation_norm"]["bee"] == {0: 70.0, 2: 30.0}
    assert "embedding_norm" not in facts.curves
    assert (facts.bits_per_byte, facts.unigram_bits_per_byte) == (2.5, 3.5)


def test_bytes_and_seconds_are_by_part_and_round(facts: Facts):
    assert facts.bytes == {"up, body": {1: 200, 2: 100}, "down, body": {1: 400, 2: 200}}
    assert facts.silo_s == {
        "evaluate": {1: 1.0, 2: 1.0}, "train": {1: 5.0, 2: 4.0}, "transfer": {1: 0.5, 2: 0.5}
    }  # fmt: skip
    assert facts.server_s == {
        "send": {1: 1.0, 2: 1.0}, "wait for silos": {1: 7.0, 2: 5.0},
        "take in replies": {1: 1.5, 2: 1.5}, "merge, outer step": {1: 0.5, 2: 0.5},
        "save": {1: 0.25},
    }  # fmt: skip


def test_a_checkpoint_within_the_next_round_counts_once(tmp_path: Path):
    rounds = [{**e, "save_s": 0.75} if e["event"] == "round" else e for e in LEDGER]
    made = gather(write(tmp_path, *rounds), now=2001.0)
    assert made.server_s["save"] == {1: 0.75, 2: 0.75}
    assert made.server_s["take in replies"] == {1: 0.75, 2: 0.75}


def test_a_row_for_each_silo(facts: Facts):
    ant, bee = facts.silos
    assert (ant.status.silo, ant.rounds, ant.loss, ant.perplexity) == ("ant", 2, 3.0, 40.0)
    assert (ant.bytes_up, ant.bytes_down, ant.device) == (200, 400, "gpu")
    assert (bee.rounds, bee.loss, bee.bytes_up, bee.vocabulary) == (1, 5.0, 100, 500)
    assert bee.status.failures == 1


def test_what_went_wrong_and_what_was_written(facts: Facts):
    assert facts.troubles == [
        Trouble("failure", 1011.7, 2, "bee", "silo bee: has NaN"),
        Trouble("late", 1011.8, 2, "bee", "its answer of round 1 came late"),
    ]
    assert facts.counts == {"failure": 1, "warning": 0, "absent": 0, "late": 1}
    assert facts.samples == [Sample("ant", 2, "leaf after leaf")]


def test_a_round_that_was_done_again_counts_once(tmp_path: Path):
    again = [event("resume", 2000.0, round=1), trained(2, "ant", 1.0)]
    made = gather(write(tmp_path, *LEDGER[:-1], *again), now=2001.0)
    assert made.curves["loss"]["ant"] == {1: 6.0, 2: 1.0}
    assert made.silos[0].rounds == 2
    assert made.resumed == [1]


def test_the_figures_are_on_the_page(tmp_path: Path):
    text = Document(shown(tmp_path, *LEDGER)).text
    for words in (
        "small", "SPEC-OPT", "experiment c91962f035dd", "ended", "2 of 2", "2.50 M parameters",
        "Bits per byte 2.500 mean of 2 silos; unigram floor 3.500", "Seed 7",
        "flwr 1.41.0, torch 2.13.0", "cpu, gpu", "silo bee: has NaN", "leaf after leaf",
        "1 × failure, 1 × late", "Behind round 2", "1970-01-01 00:16 UTC",
        "no checkpoint lies beside the ledger",
    ):  # fmt: skip
        assert words in text
    # server: wait 12 of 18.25 s; the figures of its chart, a row a round
    assert "wait for silos server 6 s 12 s 65.8%" in text
    assert "1 1 s 7 s 1.5 s 500 ms 250 ms 10.2 s" in text


# ---- runs of every kind --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "now", "words"),
    [
        (LEDGER[:8], 1012.0, "running, about 9 s left"),
        (LEDGER[:9], 9000.0, "stopped or stalled"),
        ([PLAN], 1001.0, "0 of 2"),
        (LEDGER[:1], 1001.0, "running"),
        ([event("failure", 1.0, round=0, silo="", reason="node 3: no such key")], 2.0, "a node"),
    ],
    ids=["running", "stopped", "planned", "before the plan", "nobody came"],
)
def test_a_run_is_shown_as_it_stands(tmp_path: Path, events: list[Event], now: float, words: str):
    assert words in Document(shown(tmp_path, *events, now=now)).text


def test_a_comparisons_job_has_neither_plan_nor_round(tmp_path: Path):
    (tmp_path / "spec-seed-1").mkdir()
    facts = {"bits_per_byte": 5.0, "unigram_bits_per_byte": 3.0, "body_delta_norm": 2.0}
    events = [
        event("silo_train", 10.0, round=1, silo="ant", loss=6.0, train_s=3.0, **facts),
        event("silo_train", 11.0, round=2, silo="ant", loss=4.0, train_s=5.0),
        evaluated(2, "ant", 2.0),
    ]
    made = gather(write(tmp_path / "spec-seed-1", *events), now=9000.0)
    # What arrived in round 1 is the body of round 0.
    assert made.curves["bits_per_byte"] == {"ant": {0: 5.0, 2: 2.0}}
    assert (made.status.name, made.status.round) == ("spec-seed-1", 2)
    assert made.silo_s == {"train": {1: 3.0, 2: 5.0}}
    assert made.server_s == {}
    assert "spec-seed-1" in Document(page(made)).text


def test_a_comparisons_job_that_goes_on_has_figures_and_no_end(
    recipe: Callable[..., Recipe], tmp_path: Path
):
    bits = {"unigram_bits_per_byte": 3.0, "perplexity": 40.0}
    events = [
        trained(r, n, 4.0, bits_per_byte=7.0 - r, **bits) for r in (1, 2) for n in ("ant", "bee")
    ][:3]  # bee is still at round 2
    write(tmp_path, *events)
    meta = {"recipe": json.loads(recipe("rounds=2").to_json())}
    save_state(tmp_path / "checkpoints" / "round-00001", {}, meta)
    made = gather(tmp_path, now=1020.0)
    assert (made.status.round, made.status.rounds, made.status.state) == (1, 2, "running")
    assert [row.status.bits_per_byte for row in made.silos] == [5.0, 6.0]
    assert [row.perplexity for row in made.silos] == [40.0, 40.0]
    text = Document(page(made)).text
    assert "Rounds 1 of 2 Bits per byte 5.500 mean of 2 silos; unigram floor 3.000" in text
    save_state(tmp_path / "checkpoints" / "round-00002", {}, meta)
    made = gather(tmp_path, now=1020.0)  # the last bodies are still to be evaluated
    assert (made.status.round, made.status.state) == (2, "running")
    (tmp_path / "result.json").write_text("{}")
    assert gather(tmp_path, now=1020.0).status.state == "ended"


def test_one_model_on_all_silos_text_is_no_silo(tmp_path: Path):
    events = [trained(1, "all", 6.0), evaluated(1, "ant", 2.0), evaluated(1, "bee", 3.0)]
    made = gather(write(tmp_path, *events), now=9000.0)
    assert made.as_one
    assert made.bits_per_byte == 2.5
    assert "Silos 2 Learning" in Document(page(made)).text
    assert not gather(write(tmp_path, PLAN, *events), now=9000.0).as_one


def test_a_real_run_has_samples_versions_and_measured_bytes(
    recipe: Callable[..., Recipe], home: Path, tmp_path: Path
):
    run(recipe("rounds=2"), home, tmp_path)
    file = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (0, f"{file}\n")
    text = Document(file.read_text(encoding="utf-8")).text
    assert re.search(r"ant, bee, cat 6 ([\d,]+) \1 1\.0000 \1 \1 1\.0000 ", text)
    assert "Resolved recipe" in text
    assert "hidden_size: 16" in text
    assert "torch 2." in text
    assert re.search(r"a silo sends [\d,]+ parameters a step", text)
    made = gather(tmp_path, now=0.0)
    assert [(s.silo, s.round) for s in made.samples] == [("ant", 2), ("bee", 2), ("cat", 2)]
    assert all(s.text for s in made.samples)
    assert made.status.state == "ended"


# ---- hostile ledgers -----------------------------------------------------------------------------

MARKUP = "</pre></title></style><script>alert(1)</script><img src=http://evil.test onerror=x>\"'&"
STEERS = "\x1b[31m\x00\u202ebackwards\ud800"


def test_no_text_becomes_markup_or_steers(tmp_path: Path):
    bad = MARKUP + STEERS
    plan = {**PLAN, "name": bad, "recipe": bad, "experiment": bad, "seed": bad,
            "versions": {bad: bad}, "silos": {bad: {"device": bad, "vocabulary": bad}}}  # fmt: skip
    events = [
        plan,
        trained(1, bad, 6.0),
        evaluated(1, bad, 2.0),
        event("warning", 1.0, round=1, silo=bad, reason=bad),
        event("failure", 1.0, round=1, silo=bad, reason=bad),
        event("sample", 1.0, round=1, silo=bad, text=bad),
        event(bad, 1.0, silo=bad),
    ]
    text = shown(tmp_path, *events)
    made = Document(text)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in made.tags)
    assert made.text.count("alert(1)") > 10
    assert all(each.isprintable() or each == "\n" for each in text)
    assert MARKUP in gather(tmp_path, now=0.0).samples[0].text


def test_a_page_is_bounded_whatever_is_in_the_ledger(tmp_path: Path):
    long, huge = "x" * 1_000_000, 10**400
    events = [
        {**PLAN, "silos": {f"{i}{'y' * 5000}": {} for i in range(3000)}},
        *(event("failure", 1.0, round=1, silo="ant", reason=long) for _ in range(10)),
        *(event("failure", 1.0, round=i, silo="ant", reason="no") for i in range(5000)),
        *(event("sample", 1.0, round=i, silo="ant", text=long[:9000]) for i in range(500)),
        *(trained(i, "ant", 1.0 / (i + 1)) for i in range(1, 20_000)),
        trained(1, "bee", 6.0, bytes_up_body=huge, train_s=1e299, body_norm=-1e14),
        evaluated(1, "bee", 1e299),
        event("round", 1e299, round=10**14, seconds=1.0, sampled=[], merged=[]),
    ]
    text = shown(tmp_path, *events)
    Document(text)
    assert len(text) < 3_000_000
    assert "more silos are too many for this page" in text


@pytest.mark.parametrize(
    "odd",
    [
        event("silo_train", 1.0, round=1, silo="ant", loss=[[1]], train_s="no", body_norm=None),
        event("silo_train", 1.0, round=-5, silo="ant", loss=5e-324, body_norm=-0.0),
        event("late", 1.0, round="one", silo=["ant"], of_round={}),
        event("sample", 1.0, round=1, silo=3, text=["a"]),
        event("resume", 1.0), event("checkpoint", 1.0, save_s=1.0), event("warning", 1.0),
        event("join", 1.0, silo="ant", vocabulary=True, train_tokens=-1),
        {**PLAN, "silos": {"ant": 5}, "versions": 5, "body_parameters": "many", "rounds": -1},
        event("end", -1e14),
    ],
)  # fmt: skip
def test_odd_values_are_left_out(tmp_path: Path, odd: Event):
    Document(shown(tmp_path, *LEDGER[:8], odd))


def test_a_figure_that_is_too_large_is_unknown_and_told(tmp_path: Path):
    bad = evaluated(1, "bee", 2e15, during_round=2)
    made = gather(write(tmp_path, *LEDGER[:8], bad, evaluated(1, "ant", 4.0)), now=1100.0)
    assert [row.status.bits_per_byte for row in made.silos] == [4.0, None]
    assert [row.perplexity for row in made.silos] == [80.0, None]
    assert (made.bits_per_byte, made.unigram_bits_per_byte) == (4.0, 3.5)
    assert made.curves["bits_per_byte"]["bee"] == {0: 7.0}
    reason = "too large to be shown: bits_per_byte=2e+15, perplexity=4e+16, activation_norm=2e+16"
    assert made.troubles == [Trouble("warning", 1011.0, 1, "bee", reason)]
    text = Document(page(made)).text
    assert "Bits per byte 4.000 unigram floor" in text
    assert "bee – 3.500 – 5.000" in text
    assert reason in text


def test_far_off_figures_leave_others_their_lines_and_means(tmp_path: Path):
    made = gather(write(tmp_path, *LEDGER, evaluated(2, "cat", 9e14)), now=1100.0)
    assert made.bits_per_byte == 2.5
    words = "mean of 2 silos; unigram floor 3.500; left out as far off: 1"
    assert words in Document(page(made)).text


def test_a_line_nested_too_deep_is_one_clear_error(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(f"{'[' * 100_000}\n")
    with pytest.raises(DeptError, match="line 1: no right 'event'"):
        gather(tmp_path, now=0.0)


# ---- many silos ----------------------------------------------------------------------------------


def test_seconds_that_sum_to_nothing_have_no_share(tmp_path: Path):
    events = [PLAN, trained(1, "ant", 1.0, train_s=-5.0, evaluate_s=5.0, transfer_s=0.0)]
    text = Document(shown(tmp_path, *events)).text
    assert re.search(r"evaluate a silo 5 s 5 s – ", text)


def test_ratios_are_those_of_the_measured_traffic(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Traffic, "up_ratio", 0.5)
    monkeypatch.setattr(Traffic, "down_ratio", 0.25)
    (row,) = render._formula([Traffic("ant", [1], 1, 1, 1, 1), Traffic("bee", [1], 1, 1, 1, 1)])
    assert isinstance(row, dict)
    assert (row["silos"], row["up_ratio"], row["down_ratio"]) == ("ant, bee", "0.5000", "0.2500")


def test_a_hundred_silos_are_muted_lines_with_their_mean(tmp_path: Path):
    names = [f"silo-{i:03}" for i in range(100)]
    plan = {**PLAN, "silos": {name: {} for name in names}}
    events = [trained(r, n, 6.0 - r / 100 + i / 100) for r in range(1, 61)
              for i, n in enumerate(names)]  # fmt: skip
    text = shown(tmp_path, plan, *events)
    assert len(text) < 1_500_000
    words = Document(text).text
    assert all(words.count(name) == 1 for name in names[1:99])
    loss = chart.lines("l", "u", gather(tmp_path, 0.0).curves["loss"], figure)
    assert [line.look for line in loss.lines] == [-1] * 100 + [-2]
    assert loss.lines[-1].last == figure(6.0 - 0.6 + 0.495)
    assert loss.note == "Last values: lowest 5.400 (silo-000), highest 6.390 (silo-099)."
    assert loss.rows[-1] == ["60", "5.895", "5.400", "6.390"]


def test_the_mean_is_over_the_silos_that_a_round_has():
    curves = {f"s{i}": {1: float(i)} if i else {1: 0.0, 2: 9.0} for i in range(13)}
    made = chart.lines("l", "u", curves, figure)
    assert made.rows == [["1", "6.000", "0.000", "12.000"], ["2", "9.000", "9.000", "9.000"]]


# ---- charts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 10.0, [0, 2, 4, 6, 8, 10]),
        (2.007, 4.282, [2.0, 2.5, 3.0, 3.5, 4.0, 4.5]),
        (5.0, 5.0, [4.5, 4.7, 4.9, 5.1, 5.3, 5.5]),
        (-3.0, 0.0, [-3, -2, -1, 0]),
    ],
)
def test_ticks_are_round_numbers_around_the_values(low: float, high: float, expected: list[float]):
    made = chart.ticks(low, high)
    assert len(made) <= 8
    assert made[0] <= low
    assert made[-1] >= high
    if low != high:
        assert made == pytest.approx(expected)


def test_a_line_lies_where_its_values_are():
    made = chart.lines("l", "u", {"a": {0: 0.0, 1: 5.0, 2: 10.0}}, figure, {"a": 2.5})
    left, right, top, bottom = made.left, chart.RIGHT, chart.TOP, chart.BOTTOM
    middle = f"{(left + right) / 2:g},{(top + bottom) / 2:g}"
    assert made.lines[0].path == f"M{left:g},{bottom}L{middle}L{right},{top}"
    assert made.lines[0].floor == bottom - (bottom - top) / 4
    assert [tick.text for tick in made.y_ticks] == ["0", "2", "4", "6", "8", "10"]
    assert [tick.text for tick in made.x_ticks] == ["0", "1", "2"]
    assert "a 10.000" in made.about


def test_values_far_off_are_neither_drawn_nor_in_the_mean():
    curves = {"a": {0: 8.0, 1: 4.0}, "b": {0: 7.0, 1: 9e14}, "c": {1: 9e14}}
    made = chart.lines("l", "u", curves, figure, {"a": 3.0, "b": 9e14})
    without = chart.lines("l", "u", {"a": {0: 8.0, 1: 4.0}, "b": {0: 7.0}}, figure, {"a": 3.0})
    assert made.y_ticks == without.y_ticks
    assert [line.path for line in made.lines] == [*(line.path for line in without.lines), ""]
    assert [(line.last, line.floor_text) for line in made.lines] == [
        ("4.000", "3.000"), ("9e+14", ""), ("9e+14", "")
    ]  # fmt: skip
    assert made.note == "Values too far off to be drawn, or in a mean: 2 of b, c."
    assert without.note == ""
    many = chart.lines(
        "l", "u", {f"s{i:02}": {1: 9e14 if i > 8 else 2.0} for i in range(14)}, figure
    )
    assert many.lines[-1].last == "2.000"
    assert many.note.endswith("in a mean: 5 of s09, s10, s11 and 2 more.")


def test_what_is_far_off_is_a_thousand_times_the_middle():
    assert bounds.near([2.0, 3.0, 1e6, None]) == [2.0, 3.0]
    assert bounds.near([2.0, 999.0]) == [2.0, 999.0]  # a model that diverged
    assert bounds.near([5e-324, 5e-324, 6.0, 0.0]) == [5e-324, 5e-324, 6.0, 0.0]
    assert bounds.near([9e14]) == [9e14]
    assert bounds.near([0.0, -2e4, -30.0, -31.0]) == [0.0, -2e4, -30.0, -31.0]


def test_bars_are_stacked_and_many_rounds_share_one():
    made = chart.bars("b", {"a": {1: 2.0, 2: 1.0}, "b": {1: 2.0}}, figure)
    tops = [[float(y) for y in re.findall(r"V([\d.]+)H", bar.path)] for bar in made.bars]
    height = chart.BOTTOM - chart.TOP
    assert tops[0] == pytest.approx([chart.TOP + height / 2, chart.TOP + height * 3 / 4])
    assert tops[1] == [chart.TOP]
    assert made.rows == [["1", "2.000", "2.000", "4.000"], ["2", "1.000", "–", "1.000"]]
    assert [bar.mean for bar in made.bars] == ["1.500", "1.000"]
    many = chart.bars("b", {"a": dict.fromkeys(range(1, 241), 1.0)}, figure)
    assert many.bars[0].path.count("z") == 60
    assert many.note == "Each bar is the mean of 4 rounds."


def test_the_last_round_is_always_drawn():
    assert chart.thin(range(10), 4) == [0, 3, 6, 9]
    assert chart.thin(range(11), 4) == [1, 4, 7, 10]
    assert chart.thin([5], 4) == [5]


def test_seconds_and_moments_of_any_size_are_short():
    said = [render._seconds(s) for s in (0, 1e-4, 0.5, 0.9997, 21.94, 999.7, 1234.0)]
    assert said == ["0 s", "< 1 ms", "500 ms", "1 s", "21.9 s", "1,000 s", "1,234 s"]
    assert moment(-1e15 + 1).endswith("UTC")
    assert len(moment(1e15 - 1)) < 30


# ---- the HTML ------------------------------------------------------------------------------------


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path):
    text = shown(tmp_path, *LEDGER)
    made = Document(text)
    for tag, attributes in made.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img", "base", "use")
        for name, value in attributes.items():
            assert name != "style"
            assert not name.startswith("on")
            if name in ("href", "src", "action", "data", "srcset", "poster") or ":" in name:
                assert (value or "").startswith("#")
    assert re.findall(r"(?:https?:)?//[\w.]+|@import", text) == []
    assert set(re.findall(r"url\(([^)]*)\)", text)) == {"#hatch"}


def test_the_policy_forbids_all_but_the_pages_own_style(tmp_path: Path):
    text = shown(tmp_path, *LEDGER)
    (policy,) = (
        attributes["content"]
        for tag, attributes in Document(text).tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    style = text[text.index("<style>") + 7 : text.index("</style>")]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy is not None
    assert policy.split("; ") == [
        "default-src 'none'", f"style-src 'sha256-{digest}'", "base-uri 'none'",
        "form-action 'none'",
    ]  # fmt: skip


def test_who_does_not_see_the_page_can_read_it(tmp_path: Path):
    made = Document(shown(tmp_path, *LEDGER))
    ids = [a["id"] for _, a in made.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    links = {a["href"][1:] for tag, a in made.tags if tag == "a"}  # type: ignore[index]
    labels = {i for _, a in made.tags for i in (a.get("aria-labelledby") or "").split()}
    assert links | labels <= set(ids)
    tags = [tag for tag, _ in made.tags]
    charts = [a for tag, a in made.tags if tag == "svg" and a.get("role") == "img"]
    assert len(charts) == tags.count("desc") == tags.count("title") - 1 == 8
    assert tags.count("table") == tags.count("caption") == 10
    assert tags.count("h1") == 1
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in pairwise(levels))


def _contrast(a: str, b: str) -> float:
    """Of two colours as #rrggbb (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_have_the_contrast_of_level_aa(theme: int):
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    colours = dict(
        re.findall(
            r"--(\w+): (#[0-9a-f]{6});", re.findall(r":root {(.*?)}", style, re.DOTALL)[theme]
        )
    )
    for ground in ("paper", "panel"):
        for text in ("ink", "quiet", "good", "bad", "link"):
            assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for i in range(chart.COLOURS):
        assert _contrast(colours[f"c{i}"], colours["paper"]) >= 3, i


# ---- the command ---------------------------------------------------------------------------------


def test_what_the_page_shows_as_json(tmp_path: Path):
    out = tmp_path / "page.html"
    words = ["report", str(write(tmp_path, *LEDGER)), "--out", str(out), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["curves"]["loss"]["ant"] == {"1": 6.0, "2": 3.0}
    assert told["status"]["name"] == "small"
    assert Document(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("folder", "out", "reason"),
    [
        ("nowhere", "a.html", "nowhere: no such folder"),
        ("empty", "a.html", "metrics.jsonl: No such file"),
        (".", "none/a.html", "none/a.html: cannot be written: No such file"),
        (".", "empty", "empty: is not a regular file; name another file with --out"),
    ],
)
def test_a_mistake_is_one_clear_error(tmp_path: Path, folder: str, out: str, reason: str):
    (tmp_path / "empty").mkdir()
    write(tmp_path, *LEDGER)
    words = ["report", str(tmp_path / folder), "--out", str(tmp_path / out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert reason in done.stderr
    assert "Traceback" not in done.output
    left = {path.name for path in tmp_path.rglob("*")}
    assert left == {"empty", "metrics.jsonl"}


def test_a_link_is_followed_and_a_pipe_left_alone(tmp_path: Path):
    write(tmp_path, *LEDGER)
    (tmp_path / "link.html").symlink_to("there.html")
    for _ in range(2):  # one that leads nowhere yet, and one that leads to a page
        _, file = write_page(tmp_path, tmp_path / "link.html")
        assert file == tmp_path / "link.html"
        assert file.is_symlink()
        assert Document((tmp_path / "there.html").read_text(encoding="utf-8"))
        (tmp_path / "there.html").write_text("")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DeptError, match=r"pipe: is not a regular file; name another .* --out"):
        write_page(tmp_path, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_the_wheel_has_what_the_page_is_made_of():
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    named = project["tool"]["setuptools"]["package-data"]["dept_fl.page"]
    there = [p.name for p in FOLDER.iterdir() if p.is_file() and p.suffix != ".py"]
    assert sorted(named) == sorted(there)
