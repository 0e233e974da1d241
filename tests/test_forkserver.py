"""Messages' processes are forked from one that has imported already, and are as fresh as ever."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dept_fl import forkserver
from dept_fl.supernode import quick_messages
from tests.deployment import SCRIPTS, processes_of, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")

# Stands for Flower's own; says where and as what it runs.
TELLS = """
import json, os, sys, time
print(json.dumps({
    "loaded": "torch" in sys.modules, "pid": os.getpid(), "words": sys.argv[1:],
    "folder": os.getcwd(), "name": __name__, "word": os.environ.get("WORD"),
    "ours": [name for name in sys.modules if name.startswith("dept_fl")],
}), flush=True)
print("to stderr", file=sys.stderr, flush=True)
if "sleep" in sys.argv:
    time.sleep(600)
sys.exit(7)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fork")
    program = folder / "flwr-clientapp"
    program.write_text(f"#!{sys.executable}\n{TELLS}")
    program.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def quick(home: Path) -> Iterator[Mapping[str, str]]:
    """The environment of a SuperNode with a fork server."""
    path = f"{home}{os.pathsep}{os.environ['PATH']}"
    with quick_messages({**os.environ, "PATH": path, "HOME_OF_TEST": str(home)}) as environment:
        yield environment
    assert processes_of(home) == []


def start(environment: Mapping[str, str], *words: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["flwr-clientapp", *words], env={**environment, "WORD": "here"}, cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def server_of(process: int) -> psutil.Process:
    parent = psutil.Process(process).parent()
    assert parent is not None
    return parent


def test_it_runs_in_a_forked_process_as_if_started(quick: Mapping[str, str], tmp_path: Path):
    process = start(quick, "--token", "x y", folder=tmp_path)
    out, err = process.communicate(timeout=120)
    told = json.loads(out)
    assert process.returncode == 7
    assert told["loaded"] and told["ours"] == []
    assert (told["words"], told["folder"]) == (["--token", "x y"], str(tmp_path))
    assert (told["name"], told["word"]) == ("__main__", "here")
    assert err == "to stderr\n"
    again = start(quick, folder=tmp_path)
    assert json.loads(again.communicate(timeout=120)[0])["pid"] != told["pid"]


def test_several_run_side_by_side_and_signals_reach_the_right_one(
    quick: Mapping[str, str], tmp_path: Path
):
    started = [start(quick, "sleep", folder=tmp_path) for _ in range(3)]
    pids = [json.loads(each.stdout.readline())["pid"] for each in started if each.stdout]
    assert len({server_of(pid).pid for pid in pids}) == 1
    for each in started[:2]:
        each.send_signal(signal.SIGTERM)
    assert [each.wait(30) for each in started[:2]] == [128 + signal.SIGTERM] * 2
    assert [psutil.pid_exists(pid) for pid in pids] == [False, False, True]
    started[2].kill()  # who started it cannot pass that on
    wait_until(lambda: not psutil.pid_exists(pids[2]), 30)
    for each in started:
        each.communicate()


@pytest.mark.parametrize(
    "noise", [b"", b"\0", b"\xff" * 4, b"\0\0\0\2[]", b"\0\0\0\2{}", b"\0\0\0\3{}"]
)
@pytest.mark.parametrize("files", [[], [0, 1, 2]])
def test_what_is_no_request_does_not_end_it(
    quick: Mapping[str, str], tmp_path: Path, noise: bytes, files: list[int]
):
    address = quick["PATH"].partition(os.pathsep)[0] + "/socket"
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(address)
        if noise:
            socket.send_fds(caller, [noise], files)
        caller.shutdown(socket.SHUT_WR)
        caller.settimeout(30)
        with suppress(ConnectionResetError):  # where it did not read to the end
            assert caller.recv(1) == b""
    process = start(quick, folder=tmp_path)
    assert json.loads(process.communicate(timeout=120)[0])["loaded"]


def test_where_the_fork_server_is_killed_messages_start_by_themselves(home: Path, tmp_path: Path):
    path = f"{home}{os.pathsep}{os.environ['PATH']}"
    with quick_messages({**os.environ, "PATH": path}) as environment:
        process = start(environment, "sleep", folder=tmp_path)
        assert process.stdout is not None
        pid = json.loads(process.stdout.readline())["pid"]
        server_of(pid).kill()
        assert process.wait(30) == 1
        assert psutil.pid_exists(pid)  # at work
        os.kill(pid, signal.SIGKILL)
        process.communicate()
        alone = start(environment, folder=tmp_path)
        assert not json.loads(alone.communicate(timeout=60)[0])["loaded"]
        assert alone.returncode == 7


def test_installed_packages_that_changed_are_not_run_from_memory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    site = tmp_path / "site"
    (site / "one.dist-info").mkdir(parents=True)
    # As a file beside the fork server, which is run by its path.
    script = tmp_path / "forkserver.py"
    code = Path(forkserver.__file__).read_text()
    changed = code.replace(
        "Path(entry) for entry in sys.path", f"Path(entry) for entry in [{str(site)!r}]"
    )
    assert changed != code
    script.write_text(changed.replace("importlib.import_module(name)", "pass"))
    (tmp_path / "forkclient.py").write_text(
        Path(forkserver.__file__).with_name("forkclient.py").read_text()
    )
    monkeypatch.setattr("dept_fl.supernode.PACKAGE", tmp_path)
    path = f"{home}{os.pathsep}{os.environ['PATH']}"
    with quick_messages({**os.environ, "PATH": path}) as environment:
        first = start(environment, "sleep", folder=tmp_path)
        assert first.stdout is not None
        pid = json.loads(first.stdout.readline())["pid"]
        assert "forkserver.py" in " ".join(server_of(pid).cmdline())
        first.kill()
        first.communicate()
        (site / "new-package").touch()
        second = start(environment, "sleep", folder=tmp_path)
        assert second.stdout is not None
        pid = json.loads(second.stdout.readline())["pid"]
        assert pid == second.pid  # it became the command
        second.kill()
        second.communicate()


def test_all_that_the_app_imports_is_preloaded_and_no_thread_of_python_runs():
    code = """
import importlib, sys, threading
for name in {names!r}:
    importlib.import_module(name)
assert threading.active_count() == 1
import torch
assert not torch.cuda.is_initialized()
before = set(sys.modules)
import client_app.app
print(*(n for n in sys.modules if n not in before and n.startswith(("torch.", "transformers."))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code.format(names=forkserver.PRELOADED)],
        capture_output=True, text=True, check=True, cwd=Path(forkserver.__file__).parents[1],
    )  # fmt: skip
    assert done.stdout.split() == []


def test_without_it_the_environment_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    environment = {"PATH": str(SCRIPTS)}
    with quick_messages({"PATH": "/nowhere"}) as same:
        assert same == {"PATH": "/nowhere"}
    told: list[str] = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with quick_messages(environment, told.append) as same:
        assert same is environment
    assert len(told) == 1 and "no fork server" in told[0]


def test_a_fork_server_that_cannot_be_is_told(home: Path, monkeypatch: pytest.MonkeyPatch):
    long = home / ("x" * 120)  # longer than the name of a socket may be
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    told: list[str] = []
    path = f"{home}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    with quick_messages(environment, told.append) as same:
        assert same is environment
    assert told == ["messages start slowly: the fork server ended (1)"]
