"""The command line up to the point where Flower takes over."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dept_fl.cli import app


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere.yaml"], "no such file"),
        (["conf/demo.yaml", "rounds=many"], "rounds='many'"),
        (["conf/demo.yaml", "rounds"], "expected key=value"),
    ],
)
def test_a_mistake_is_one_clear_error(tmp_path: Path, words: list[str], reason: str):
    done = CliRunner().invoke(app, ["run", *words, "--home", str(tmp_path)])
    assert done.exit_code == 2
    assert reason in done.stderr
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_without_silos_is_refused_before_any_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dept_fl.cli.runs.simulate", None)  # would be called in vain
    done = CliRunner().invoke(app, ["run", "conf/demo.yaml", "silos={}", "--home", str(tmp_path)])
    assert done.exit_code == 2
    assert "silos: none; name at least one" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_relative_home_from_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DEPT_HOME", "somewhere")
    done = CliRunner().invoke(app, ["run"])
    assert done.exit_code == 2
    assert "must be absolute" in done.stderr
