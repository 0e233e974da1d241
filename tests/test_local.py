"""Processes on this machine are started with whole settings and ended with all they started."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from dept_fl import local
from dept_fl.cli import app
from dept_fl.local import _free_port, _toml, end_tree


@pytest.mark.parametrize(
    "value",
    ["a=1 b=2", "/a b/c", 'x="y"', "x='y'", "back\\slash", "été", "😀", "a\tb", True, False],
)
def test_every_setting_reaches_flower_as_it_was_given(value: object):
    assert tomllib.loads(f"key = {_toml(value)}\n")["key"] == value


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
child = [sys.executable, "-c", sys.argv.pop(1)]
with subprocess.Popen(child, stdout=subprocess.PIPE, start_new_session=True) as started:
    started.stdout.readline()
    print(started.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, int]]]:
    """started(*command): pids of a process and of its child, which hears no SIGTERM."""
    monkeypatch.setattr(local, "_STOP_TIMEOUT_S", 1.5)
    parents = []

    def start(*command: str) -> tuple[int, int]:
        parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        parents.append(parent)
        assert parent.stdout is not None
        return parent.pid, int(parent.stdout.readline())

    yield start
    for parent in parents:
        end_tree(parent.pid)
        parent.communicate()


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_what_a_process_started_in_a_session_of_its_own_ends_with_it(
    started: Callable[..., tuple[int, int]],
):
    parent, child = started(sys.executable, "-c", PARENT, STUBBORN)
    assert alive(parent) and alive(child)
    end_tree(parent)
    assert not alive(parent) and not alive(child)


def test_ending_a_process_that_is_gone_is_no_mistake():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    end_tree(gone.pid)


def test_stop_ends_the_superlink_of_its_port_alone(
    started: Callable[..., tuple[int, int]], tmp_path: Path
):
    script = tmp_path / "flower-superlink"
    script.write_text(f"#!{sys.executable}\n{PARENT}")
    script.chmod(0o755)
    port = _free_port()
    processes = started(str(script), STUBBORN, "--port", str(port))
    beginning = str(port)[:-1]  # of the same digits, but another port
    other = CliRunner().invoke(app, ["stop", "--port", beginning])
    assert other.stdout == f"no local SuperLink on port {beginning}\n"
    assert all(map(alive, processes))
    done = CliRunner().invoke(app, ["stop", "--port", str(port)])
    assert done.stdout == f"ended the SuperLink on port {port}\n"
    assert not any(map(alive, processes))


def test_stop_looks_where_flower_was_told_to_listen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "39998")
    assert CliRunner().invoke(app, ["stop"]).stdout == "no local SuperLink on port 39998\n"
