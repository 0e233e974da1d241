"""The real thing: Flower's own processes, started as a user starts them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dept_fl.checkpoint import load_state, round_folder, under_prefix
from dept_fl.config import Recipe
from dept_fl.traffic import traffic
from tests.federation import same, state_of, trained

pytestmark = pytest.mark.flower
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sys.executable).parent


def dept(*words: str, home: Path, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DEPT_HOME": str(home)}
    command = [str(SCRIPTS / "dept"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def processes(word: str) -> list[psutil.Process]:
    """Live processes with a word in their command line or environment; not this one."""
    found = []
    for each in psutil.process_iter(["name"]):  # the name tells which it is where a test fails
        try:
            told = [*each.cmdline(), *(f"{k}={v}" for k, v in each.environ().items())]
        except psutil.Error:
            continue
        if each.pid != os.getpid() and word in " ".join(told):
            found.append(each)
    return found


def test_dept_run_gives_the_tensors_of_the_plain_algorithm_and_leaves_no_process(
    recipe: Callable[..., Recipe], tiny_file: Path, tmp_path: Path
):
    home, run_dir = tmp_path / "home", tmp_path / "run"
    done = dept("run", str(tiny_file), "rounds=2", "--run-dir", str(run_dir), home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 2 of 2" in done.stdout
    assert str(run_dir / "metrics.jsonl") in done.stdout
    told = json.loads(dept("status", str(run_dir), "--json", home=home).stdout)
    assert (told["state"], told["round"], len(told["silos"])) == ("ended", 2, 3)
    assert {(each.up_ratio, each.down_ratio) for each in traffic(run_dir)} == {(1.0, 1.0)}
    server, silos = trained(recipe("rounds=2"), home)
    tensors, meta = load_state(round_folder(run_dir / "checkpoints", 2))
    assert same(under_prefix("body", tensors), server.body)
    for silo in silos.values():
        silo._states = silo._states.parent / meta["experiment"]
    assert same(state_of(server, silos), state_of(*trained(recipe("rounds=2"), home)))
    assert processes(str(home)) == []
    assert list((home / "flower").iterdir()) == []


def test_a_failed_run_exits_non_zero_with_its_reason(tiny_file: Path, tmp_path: Path):
    gone = "silos.dog.files=[/nowhere/*.txt]"
    done = dept("run", str(tiny_file), gone, home=tmp_path)
    assert done.returncode == 1
    assert "silo dog: no file matches ['/nowhere/*.txt']" in done.stdout
    assert "the run ended as finished:failed" in done.stderr
    assert processes(str(tmp_path)) == []


def test_a_bad_recipe_is_refused_before_any_process_starts(tiny_file: Path, tmp_path: Path):
    done = dept("run", str(tiny_file), "varient=trim", "rounds=0", home=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'variant'" in done.stderr
    assert not (tmp_path / "flower").exists()


@pytest.fixture
def fresh_flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of somebody who never ran `flwr`; the SuperLink it starts is ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "DEPT_"))}
    environment = {
        **kept,
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flwr-home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "UV_OFFLINE": "1",  # nothing may be downloaded for a run
    }
    yield environment
    for each in processes(f"--port {port}"):
        each.terminate()
    deadline = time.monotonic() + 30
    while processes(f"--port {port}") and time.monotonic() < deadline:
        time.sleep(0.2)


def test_plain_flwr_run_works_where_flwr_was_never_run(
    fresh_flower: dict[str, str], tiny_file: Path, tmp_path: Path
):
    """It downloads nothing, says how to stop Flower's SuperLink, and `make stop` does."""
    app = tmp_path / "dept-fl"
    ignored = shutil.ignore_patterns(
        ".venv", ".git", "runs", "silos", "flower", "*_cache", "*.model"
    )
    shutil.copytree(ROOT, app, ignore=ignored)
    shutil.copytree(tiny_file.parent, app / "conf", dirs_exist_ok=True)
    words = f'recipe="{tiny_file}" overrides="rounds=1" home="{tmp_path}/home"'
    command = ["flwr", "run", ".", "--stream", "--run-config", words]
    done = subprocess.run(command, cwd=app, env=fresh_flower, capture_output=True, text=True)
    assert "round 1 of 1" in done.stdout, done.stdout + done.stderr
    assert "`make stop` ends it" in done.stdout
    listed = subprocess.run(
        ["flwr", "list", "--format", "json"],
        cwd=app,
        env=fresh_flower,
        capture_output=True,
        text=True,
    )
    assert json.loads(listed.stdout)["runs"][0]["status"] == "finished:completed"
    port = fresh_flower["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]
    assert processes(f"--port {port}")
    stopped = subprocess.run(
        ["make", "stop"], cwd=ROOT, env=fresh_flower, capture_output=True, text=True
    )
    assert f"ended the SuperLink on port {port}" in stopped.stdout
    assert processes(fresh_flower["FLWR_HOME"]) == []


def test_a_killed_run_resumed_gives_the_tensors_of_an_unbroken_one(
    recipe: Callable[..., Recipe], tiny_file: Path, tmp_path: Path
):
    """The simulation dies by SIGKILL in the middle; the second command finishes the run."""
    home, run_dir = tmp_path / "home", tmp_path / "run"
    words = ["run", str(tiny_file), "rounds=40", "--run-dir", str(run_dir)]
    environment = {**os.environ, "DEPT_HOME": str(home)}
    first = subprocess.Popen([str(SCRIPTS / "dept"), *words], env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "round-00003").is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    for each in set(processes("flwr-simulation")) & set(processes(str(home))):
        each.kill()
    output, _ = first.communicate(timeout=180)
    assert first.returncode == 1, output
    second = dept(*words, "--resume", "--json", home=home)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "resumed behind round" in second.stderr
    told = json.loads(second.stdout)
    assert (told["run_dir"], told["run"]["state"]) == (str(run_dir), "ended")
    server, _ = trained(recipe("rounds=40"), home)
    tensors, _ = load_state(round_folder(run_dir / "checkpoints", 40))
    assert same(under_prefix("body", tensors), server.body)


def test_sigterm_ends_everything_and_the_run_can_be_resumed(tiny_file: Path, tmp_path: Path):
    home, run_dir = tmp_path / "home", tmp_path / "run"
    words = ["run", str(tiny_file), "rounds=400", "--run-dir", str(run_dir)]
    environment = {**os.environ, "DEPT_HOME": str(home)}
    command = [str(SCRIPTS / "dept"), *words]
    running = subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "round-00002").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.terminate()
    _, printed = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "go on with --resume" in printed
    assert processes(str(home)) == []
