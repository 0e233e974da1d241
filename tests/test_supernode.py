"""A partner's SuperNode is started again whenever it ends, or can do nothing any more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dept_fl import supernode
from dept_fl.errors import DeptError
from dept_fl.interrupt import ENDING, interrupted_by
from dept_fl.servers import Watch, serving
from dept_fl.silo_file import load_silo_file
from dept_fl.supernode import SuperNode, keep_up
from tests.deployment import SCRIPTS, processes_of, wait_until


@pytest.fixture
def node(tmp_path: Path) -> SuperNode:
    (tmp_path / "fr.yaml").write_text("name: fr\nfiles: fr.jsonl\nvocab_size: 300\nhome: home\n")
    for name in ("fr.key", "ca.crt"):
        (tmp_path / name).touch()
    silo = load_silo_file(tmp_path / "fr.yaml")
    return SuperNode(silo, tmp_path / "fr.key", "host:443", tmp_path / "ca.crt", ["--port", "9"])


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for flower-supernode: what the test writes into it is run."""
    file = tmp_path / "bin" / "flower-supernode"
    file.parent.mkdir()
    monkeypatch.setattr(supernode, "AGAIN_S", 0.01)
    monkeypatch.setattr(
        supernode,
        "flower_environment",
        lambda home: {**os.environ, "PATH": f"{file.parent}:{os.environ['PATH']}"},
    )
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")
    yield file
    assert processes_of(tmp_path) == []


def write_program(file: Path, script: str) -> None:
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_the_command_names_the_silos_file_and_nothing_of_the_partners_comes_last(node: SuperNode):
    command = node.command()
    assert command[:3] == ["flower-supernode", "--port", "9"]
    assert command[-1] == f'silo="{node.silo.path}"'


def test_one_that_ends_is_started_again_until_a_signal(node: SuperNode, program: Path):
    started = program.with_name("started")
    write_program(program, f'echo "$@" >> {started}; [ $(wc -l < {started}) -lt 3 ] || sleep 600')
    told: list[str] = []

    def interrupt_the_third() -> None:
        wait_until(lambda: started.exists() and len(started.read_text().splitlines()) == 3)
        wait_until(lambda: any("sleep" in p.name() for p in processes_of(program.parent)))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt_the_third)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        keep_up(node, told.append)
    thread.join()
    assert len(told) == 2
    assert all("the SuperNode ended with exit status 0; starting it again" in t for t in told)
    assert "--auth-supernode-private-key" in started.read_text()


def test_one_that_lost_its_superexec_is_in_trouble(tmp_path: Path):
    helper = tmp_path / "flower-superexec"
    helper.write_text("import time\ntime.sleep(600)\n")
    parent = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '{helper}']); "
        "time.sleep(600)"
    )
    with (
        interrupted_by(ENDING, once=True),
        serving([sys.executable, "-c", parent], dict(os.environ)) as one,
    ):
        watch = Watch(one)
        wait_until(lambda: bool(psutil.Process(one.pid).children()))
        assert watch.trouble() == ""
        for child in psutil.Process(one.pid).children():
            child.kill()
        wait_until(lambda: watch.trouble() == "lost its flower-superexec")
    assert processes_of(tmp_path) == []


def test_a_server_that_was_killed_is_in_trouble(tmp_path: Path):
    with interrupted_by(ENDING, once=True), serving(["sleep", "600"], dict(os.environ)) as one:
        watch = Watch(one)
        assert watch.trouble() == ""
        one.send_signal(signal.SIGKILL)
        wait_until(lambda: watch.trouble() == "ended with exit status -9")


@pytest.mark.parametrize("missing", ["fr.key", "ca.crt"])
def test_a_missing_file_is_named_before_anything_starts(node: SuperNode, missing: str):
    (node.silo.path.parent / missing).unlink()
    with pytest.raises(DeptError, match=missing):
        keep_up(node, print)


def test_the_command_line_says_what_is_missing(node: SuperNode):
    command = [str(SCRIPTS / "dept"), "silo", "start", str(node.silo.path)]
    command += ["--superlink", "host:443", "--root-certificates", str(node.key.with_name("no.crt"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no.crt: no such root certificate" in done.stderr
