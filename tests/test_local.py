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
from dept_fl.errors import Failed
from dept_fl.local import _free_port, _runs, _stop_runs, _superlink, _toml, app_folder, end_tree
from dept_fl.progress import Progress


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
# As Ray does: a leader of a session, and a process in it whose own parent has just ended.
LEAVES_AN_ORPHAN = """
import subprocess, time
orphan = "orphan=$( (sleep 600 > /dev/null 2>&1 & echo $!) )"  # its parent is gone behind this
leader = ["sh", "-c", f"{orphan}; echo $orphan; exec sleep 600"]
with subprocess.Popen(leader, stdout=subprocess.PIPE, start_new_session=True) as started:
    print(int(started.stdout.readline()), flush=True)
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


def test_an_orphan_of_a_session_that_a_process_started_ends_with_it(
    started: Callable[..., tuple[int, int]],
):
    parent, orphan = started(sys.executable, "-c", LEAVES_AN_ORPHAN)
    family = [each.pid for each in psutil.Process(parent).children(recursive=True)]
    assert alive(orphan) and orphan not in family
    end_tree(parent)
    assert not alive(parent) and not alive(orphan)


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


# ---- what fails at Flower ----------------------------------------------------------------------


def script(folder: Path, name: str, code: str) -> dict[str, str]:
    """An environment in which a command is this."""
    (folder / name).write_text(f"#!{sys.executable}\n{code}")
    (folder / name).chmod(0o755)
    return {"PATH": str(folder)}


def test_a_superlink_that_does_not_start_failed_and_its_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    environment = script(tmp_path, "flower-superlink", "raise SystemExit('no')")
    port = _free_port()
    monkeypatch.setattr(local, "_free_port", lambda: port)  # as it may come again
    for _ in range(2):
        with (
            pytest.raises(Failed, match="did not start"),
            _superlink(tmp_path / "flower", environment, Progress()),
        ):
            raise AssertionError
    folders = list((tmp_path / "flower").iterdir())
    assert [(folder / "superlink.out").read_text() for folder in folders] == ["no\n", "no\n"]


def test_runs_that_flower_cannot_list_fail_and_do_not_disturb_the_end(tmp_path: Path):
    environment = script(tmp_path, "flwr", "print('nonsense')")
    with pytest.raises(Failed, match="`flwr list` failed: nonsense"):
        _runs("here", environment)
    _stop_runs("here", environment)  # the Ctrl-C behind it goes on


def test_the_app_of_what_is_installed_takes_the_place_of_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    site, made = tmp_path / "site", tmp_path / "scratch" / "dept-fl"
    for name in ("dept_fl/project/conf/a.yaml", "server_app/app.py", "client_app/app.py"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("1")
    monkeypatch.setattr(local, "IN_CHECKOUT", False)
    monkeypatch.setattr(local, "PACKAGE", site / "dept_fl")
    monkeypatch.setattr(local, "ROOT", site / "dept_fl" / "project")
    assert app_folder(made.parent) == made
    assert (made / "conf" / "a.yaml").read_text() == "1"
    (site / "client_app" / "app.py").write_text("2")
    (site / "dept_fl" / "project" / "conf" / "a.yaml").rename(site / "dept_fl/project/conf/b.yaml")
    assert app_folder(made.parent) == made
    assert (made / "client_app" / "app.py").read_text() == "2"
    assert [file.name for file in (made / "conf").iterdir()] == ["b.yaml"]
    assert not (made / "dept_fl" / "project").exists()
