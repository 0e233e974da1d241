"""The `dept` command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from dept_fl.config import CONF_DIR, home_dir, load_recipe
from dept_fl.errors import DeptError
from dept_fl.model import layout

app = typer.Typer(no_args_is_help=True, add_completion=False, help="DEPT pre-training on Flower.")

_COMPLETED = "finished:completed"
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0


@app.callback()
def main() -> None:
    """DEPT pre-training on Flower."""


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="recipe file")] = "conf/demo.yaml",
    overrides: Annotated[list[str] | None, typer.Argument(help="such as variant=trim")] = None,
    run_dir: Annotated[str, typer.Option(help="folder of the run; default: a new one")] = "",
    home: Annotated[str, typer.Option(help="default: $DEPT_HOME, else ~/.dept-fl")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="go on with a stopped run")] = False,
    nodes: Annotated[int, typer.Option(help="virtual nodes of the simulation", min=1)] = 2,
    cpus: Annotated[int, typer.Option(help="CPU cores of one silo at work", min=1)] = 2,
) -> None:
    """Run a recipe in simulation: `flwr run` with the right environment and exit code.

    Starts a SuperLink of its own on a free port and ends it with the run.

    Example: dept run conf/demo.yaml variant=trim tokenizer=shared rounds=4
    """
    try:
        path, words = _recipe_path(recipe), " ".join(map(shlex.quote, overrides or []))
        made = load_recipe(path, words)  # every mistake shows before any process starts
        layout(made.model, made.sequence_tokens)
        config = {
            "recipe": path,
            "overrides": words,
            "home": str(home_dir(str(Path(home).expanduser().absolute()) if home else "")),
            "run-dir": str(Path(run_dir).expanduser().absolute()) if run_dir else "",
            "resume": resume,
        }
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGHUP, _interrupt)
        status = _simulate(config, nodes, cpus, len(made.silo_names))
    except DeptError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("stopped; go on with --resume and the same --run-dir", err=True)
        raise typer.Exit(130) from None
    if status != _COMPLETED:
        typer.echo(f"error: the run ended as {status}", err=True)
        raise typer.Exit(1)


def _recipe_path(recipe: str) -> str:
    """Absolute if the file is here; else as given, to be looked up beside conf/."""
    path = Path(recipe).expanduser()
    return str(path.resolve()) if path.is_file() else recipe


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt  # so that SIGTERM and a closed terminal end the SuperLink too


def _simulate(config: dict[str, Any], nodes: int, cpus: int, silos: int) -> str:
    """Submit one run to a SuperLink of our own; return Flower's final status of it."""
    flower_home = Path(config["home"]) / "flower"
    environment = _environment(flower_home)
    with _superlink(flower_home, environment) as connection:
        # As a file: Flower's reading of pairs on the command line breaks on quotes in a value.
        settings = Path(environment["FLWR_HOME"]) / "run-config.toml"
        settings.write_text("".join(f"{k} = {_toml(v)}\n" for k, v in config.items()), "utf-8")
        federation = f"num-supernodes={nodes} client-resources-num-cpus={cpus}"
        federation += f" init-args-num-cpus={_cpus_to_use(cpus, silos)}{_gpu_share()}"
        command = ["flwr", "run", str(CONF_DIR.parent), connection, "--stream"]
        command += ["--run-config", str(settings), "--federation-config", federation]
        try:
            subprocess.run(command, env=environment, check=False)
        except KeyboardInterrupt:
            _stop_runs(connection, environment)
            raise
        status = _last_status(connection, environment)
    if status == _COMPLETED:
        # Flower's copy of the app and its logs
        shutil.rmtree(environment["FLWR_HOME"], ignore_errors=True)
    return status


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)  # strings and booleans are alike in both


def _cpus_to_use(cpus: int, silos: int) -> int:
    """Cores for the simulation: those this process may use, and no more than the silos need."""
    usable = getattr(os, "sched_getaffinity", None)
    have = len(usable(0)) if usable else os.cpu_count() or 1
    return max(cpus, min(have, cpus * silos))


def _gpu_share() -> str:
    # Flower hides GPUs from simulated clients that do not ask for a share of one.
    return " client-resources-num-gpus=1.0" if torch.cuda.is_available() else ""


def _environment(flower_home: Path) -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),
        "FLWR_HOME": str(flower_home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": os.environ.get("FLWR_TELEMETRY_ENABLED", "0"),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "0",
        "DEPT_OWN_SUPERLINK": "1",
    }


@contextmanager
def _superlink(flower_home: Path, environment: dict[str, str]) -> Iterator[str]:
    """A SuperLink on a free loopback port, ended with the block; yields its connection name."""
    port = _free_port()
    name = f"dept-{port}"
    connection = f'[superlink.{name}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    folder = flower_home / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(f'[superlink]\ndefault = "{name}"\n{connection}')
    environment["FLWR_HOME"] = str(folder)
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-file", str(folder / "log")]
    with (folder / "superlink.out").open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            _wait_until_up(process, port, folder)
            yield name
        finally:
            _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_up(process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise DeptError(f"Flower's SuperLink did not start; see {folder}/superlink.out")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the SuperLink, and see to it that all it started has ended too.

    Its children live in sessions of their own and notice only by and by that it is gone.
    """
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for end in (lambda child: None, psutil.Process.terminate, psutil.Process.kill):
        for child in _living(family):
            with suppress(psutil.NoSuchProcess):
                end(child)
        deadline = time.monotonic() + _STOP_TIMEOUT_S / 3
        while _living(family) and time.monotonic() < deadline:
            time.sleep(0.1)


def _living(family: list[psutil.Process]) -> list[psutil.Process]:
    return [child for child in family if _lives(child)]


def _lives(child: psutil.Process) -> bool:
    try:
        return child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _runs(connection: str, environment: dict[str, str]) -> list[dict[str, Any]]:
    command = ["flwr", "list", connection, "--format", "json"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    try:
        runs: list[dict[str, Any]] = json.loads(printed.stdout)["runs"]
    except (ValueError, KeyError) as error:
        raise DeptError(f"`flwr list` failed: {printed.stdout}{printed.stderr}") from error
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
    for each in _runs(connection, environment):
        command = ["flwr", "stop", str(each["run-id"]), connection]
        subprocess.run(command, env=environment, capture_output=True, check=False)
