"""Nobody waits without being told for what, on a terminal or off it."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from dept_fl import progress as progress_module
from dept_fl.progress import Progress


def test_a_stage_off_a_terminal_says_again_and_again_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "_LINE_EVERY_S", 0.02)
    progress = Progress()
    with progress.stage("reading"):
        assert list(progress.watch(iter(["é" * 1000, "b"]))) == ["é" * 1000, "b"]
        time.sleep(0.2)
    first, *later = capsys.readouterr().err.splitlines()
    assert first == "reading ..."
    assert len(later) >= 2
    assert later[-1].startswith("reading ... 2 documents, 0.0 MB, ")


def test_a_stage_on_a_terminal_is_shown_in_place_and_gone_at_its_end() -> None:
    progress = Progress()
    screen = io.StringIO()
    progress._console = Console(file=screen, force_terminal=True, width=60)
    assert progress.during("training", lambda: time.sleep(0.3) or 7) == 7
    assert "training ... 0 s" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K")  # the line is empty again


def test_each_stage_counts_its_own() -> None:
    progress = Progress()
    with progress.stage("one"):
        list(progress.watch(iter(["a"] * 1500)))
    assert progress.line().startswith("one ... 1,500 documents, 0.0 MB, ")
    with progress.stage("two"):
        assert progress.line() == "two ... 0 s"


def test_a_stage_with_steps_says_how_many_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    progress = Progress()
    with progress.stage("training"):
        progress.at(0, 4000)
        assert progress.line() == "training ... 0 of 4,000 steps, 0 s"
        progress.at(1000, 4000)
        clock[0] = 120.0
        assert progress.line() == (
            "training ... 1,000 of 4,000 steps, 50 a second, 20 s; left: about 60 s"
        )
        progress.at(1, 4000, "texts")
        assert progress.line() == (
            "training ... 1 of 4,000 texts, 0.05 a second, 20 s; left: about 22.2 h"
        )
    with progress.stage("evaluating"):
        assert progress.line() == "evaluating ... 0 s"


def test_an_error_ends_a_stage() -> None:
    progress = Progress()
    with pytest.raises(ValueError, match="x"), progress.stage("one"):
        raise ValueError("x")
