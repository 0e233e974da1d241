"""The command line up to the point where Flower takes over."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dept_fl.cli import _toml, app


@pytest.mark.parametrize(
    "value",
    ["a=1 b=2", "/a b/c", 'x="y"', "x='y'", "back\\slash", "été", "😀", "a\tb", True, False],
)
def test_every_setting_reaches_flower_as_it_was_given(value: object):
    assert tomllib.loads(f"key = {_toml(value)}\n")["key"] == value


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


def test_a_relative_home_from_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DEPT_HOME", "somewhere")
    done = CliRunner().invoke(app, ["run"])
    assert done.exit_code == 2
    assert "must be absolute" in done.stderr
