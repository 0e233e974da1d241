"""Flower's processes on this machine: one run on a SuperLink of its own, and their end."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import psutil

from dept_fl import PACKAGE, ROOT
from dept_fl.checkpoint import whole_folder
from dept_fl.errors import DeptError, Failed
from dept_fl.progress import Progress

COMPLETED = "finished:completed"
IN_CHECKOUT = PACKAGE.parent == ROOT
TASK_POLL_S = "0.2"  # how often Flower looks whether there is work; its own 1.0 is felt each round
APP = "dept-fl"  # the folder of the Flower app that is made of what is installed
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0


def simulate(
    config: dict[str, Any],
    nodes: int,
    cpus: int,
    silos: int,
    gpus: int,
    progress: Progress,
    output: IO[str],
) -> str:
    """Submit one run to a SuperLink of our own; return Flower's final status of it.

    Args:
        cpus, gpus: of one simulated client; GPUs only where there are any.
        silos: that run side by side at most.
        output: takes what the run prints.
    """
    flower_home = Path(config["home"]) / "flower"
    environment = flower_environment(flower_home)
    with _superlink(flower_home, environment, progress) as connection:
        # As a file: Flower's reading of pairs on the command line breaks on quotes in a value.
        settings = Path(environment["FLWR_HOME"]) / "run-config.toml"
        settings.write_text("".join(f"{k} = {_toml(v)}\n" for k, v in config.items()), "utf-8")
        federation = f"num-supernodes={nodes} client-resources-num-cpus={cpus}"
        federation += f" init-args-num-cpus={_cpus_to_use(cpus, silos)}{_gpu_share(gpus)}"
        app = app_folder(Path(environment["FLWR_HOME"]))
        command = ["flwr", "run", str(app), connection, "--stream"]
        command += ["--run-config", str(settings), "--federation-config", federation]
        try:
            subprocess.run(command, env=environment, stdout=output, check=False)
        except KeyboardInterrupt:
            _stop_runs(connection, environment)
            raise
        status = _last_status(connection, environment)
    if status == COMPLETED:
        # Flower's copy of the app and its logs
        shutil.rmtree(environment["FLWR_HOME"], ignore_errors=True)
    return status


def app_folder(scratch: Path) -> Path:
    """The folder of the Flower app: the checkout, or one in `scratch` of what is installed now."""
    if IN_CHECKOUT:
        return ROOT
    code = shutil.ignore_patterns("__pycache__", ROOT.name)
    with whole_folder(scratch / APP, overwrite=True) as draft:
        shutil.copytree(ROOT, draft, dirs_exist_ok=True)
        for package in (PACKAGE.name, "server_app", "client_app"):
            shutil.copytree(PACKAGE.parent / package, draft / package, ignore=code)
    return scratch / APP


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)  # strings and booleans are alike in both


def _cpus_to_use(cpus: int, silos: int) -> int:
    """Cores for the simulation: those this process may use, and no more than the silos need."""
    usable = getattr(os, "sched_getaffinity", None)
    have = len(usable(0)) if usable else os.cpu_count() or 1
    return max(cpus, min(have, cpus * silos))


def _gpu_share(gpus: int) -> str:
    """Flower hides GPUs from simulated clients that do not ask for a share of one."""
    import torch  # takes seconds that `dept stop` need not wait

    return f" client-resources-num-gpus={gpus}.0" if torch.cuda.is_available() else ""


def flower_environment(flower_home: Path) -> dict[str, str]:
    """What every process of ours hands to Flower's: no telemetry, no downloads, its own home."""
    scripts = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),
        "FLWR_HOME": str(flower_home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": os.environ.get("FLWR_TELEMETRY_ENABLED", "0"),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": os.environ.get(
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL", TASK_POLL_S
        ),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "0",
        "DEPT_OWN_SUPERLINK": "1",
    }


@contextmanager
def _superlink(flower_home: Path, environment: dict[str, str], progress: Progress) -> Iterator[str]:
    """A SuperLink on a free loopback port, ended with the block; yields its connection name."""
    port = _free_port()
    name = f"dept-{port}"
    flower_home.mkdir(parents=True, exist_ok=True)
    # A new one each time: that of a run that failed stays, and its port may come again.
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=flower_home))
    connection = f'[superlink.{name}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (folder / "config.toml").write_text(f'[superlink]\ndefault = "{name}"\n{connection}')
    environment["FLWR_HOME"] = str(folder)
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-file", str(folder / "log")]
    with (folder / "superlink.out").open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            with progress.stage("starting Flower"):
                wait_until_up(process, port, f"Flower's SuperLink (see {folder}/superlink.out)")
            yield name
        finally:
            with progress.stage("ending Flower"):
                end_tree(process.pid)
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_up(process: subprocess.Popen[bytes], port: int, name: str) -> None:
    """Wait for a server to listen.

    Raises:
        Failed: it ended, or does not listen after a minute.
    """
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if listens(port):
            return
        time.sleep(0.2)
    raise Failed(f"{name} did not start")


def listens(port: int) -> bool:
    """Whether something takes connections on a loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def end_superlink(port: int) -> bool:
    """End this user's SuperLink on a port with all that it started; False if there is none."""
    processes = psutil.process_iter(["cmdline", "uids"])
    found = [each.pid for each in processes if _is_superlink(each.info, port)]
    for pid in found:
        end_tree(pid)
    return bool(found)


def _is_superlink(process: dict[str, Any], port: int) -> bool:
    words, uids = process["cmdline"] or [], process["uids"]  # None where the system hides them
    named = any(Path(word).name == "flower-superlink" for word in words[:2])  # behind python
    return bool(
        named and ("--port", str(port)) in pairwise(words) and uids and uids.real == os.getuid()
    )


def end_tree(pid: int) -> None:
    """End a process, and see to it that all it started has ended too.

    Flower's children live in sessions of their own and notice only by and by that it is gone.
    """
    try:
        root = psutil.Process(pid)
        family = _family(root)
    except psutil.NoSuchProcess:
        return
    _end([root], psutil.Process.terminate, _STOP_TIMEOUT_S)
    _end([root], psutil.Process.kill, _STOP_TIMEOUT_S)
    _await_end(family, _STOP_TIMEOUT_S / 3)
    _end(family, psutil.Process.terminate, _STOP_TIMEOUT_S / 3)
    _end(family, psutil.Process.kill, _STOP_TIMEOUT_S / 3)


def _family(root: psutil.Process) -> list[psutil.Process]:
    """All that a process started: its children, and what is left of the sessions that they lead.

    A worker whose parent has just ended is nobody's child any more, but still of its session.
    """
    family = root.children(recursive=True)
    led = {each.pid for each in [root, *family] if _session(each) == each.pid}
    known = {root, *family}
    return family + [p for p in psutil.process_iter() if p not in known and _session(p) in led]


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:  # it is gone
        return None


def _end(
    family: list[psutil.Process], end: Callable[[psutil.Process], None], patience_s: float
) -> None:
    for each in _living(family):
        with suppress(psutil.NoSuchProcess):
            end(each)
    _await_end(family, patience_s)


def _await_end(family: list[psutil.Process], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while _living(family) and time.monotonic() < deadline:
        time.sleep(0.1)


def _living(family: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in family if is_alive(each)]


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that ended and was not collected by its parent does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _runs(connection: str, environment: dict[str, str]) -> list[dict[str, Any]]:
    command = ["flwr", "list", connection, "--format", "json"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    try:
        runs: list[dict[str, Any]] = json.loads(printed.stdout)["runs"]
    except (ValueError, KeyError) as error:
        raise Failed(f"`flwr list` failed: {printed.stdout}{printed.stderr}") from error
    return runs


def _last_status(connection: str, environment: dict[str, str]) -> str:
    """The status Flower gives the run: `flwr run --stream` exits 0 for a failed one too."""
    while True:  # the log's stream may break while the run is well
        runs = _runs(connection, environment)
        status = str(runs[0]["status"]) if runs else "never started"
        if status.startswith("finished") or not runs:
            return status
        time.sleep(1.0)


def _stop_runs(connection: str, environment: dict[str, str]) -> None:
    """Ask Flower to stop them; where it cannot, ending the SuperLink ends them too."""
    with suppress(DeptError, OSError):
        for each in _runs(connection, environment):
            command = ["flwr", "stop", str(each["run-id"]), connection]
            subprocess.run(command, env=environment, capture_output=True, check=False)
