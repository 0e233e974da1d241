"""Rounds of NVFlare's FedAvg in a deployment of its own: a peer for `benchmarks.clock`.

NVFlare is what an interpreter of another environment has installed (tried with 2.9.0): its pins
differ from this project's. Its POC mode makes start-up kits, whose scripts start a server and a
process for each client, on loopback and, like the clock's other deployments, without TLS. All
else is as NVFlare sets it: HTTP as transport, arrays fetched in chunks of 2 MB, full weights both
ways, results added up as they come. A client runs its script within the job's process, which
lives for all rounds; it waits two seconds after a task before it asks for the next, and the server
looks every half second whether all are done, so that no round takes less than about 2.5 s. The
model is not saved, as Flower's FedAvg does not save it either.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import server_peaks
from dept_fl.local import end_tree
from dept_fl.report import Event
from tests.deployment import Component, free_port, processes_of

SCRIPT = Path(__file__).with_name("nvflare_job.py")
_EXECUTOR = "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor"
_JOB_PROCESS = "runner_process"  # of the command line of the process that a server starts for a job
_PROJECT = "clock"
_ADMIN = "admin@clock.local"
# The name that is loopback's: with any other, NVFlare listens on all addresses.
_SERVER = "localhost"
_BUILDERS = {
    "workspace.WorkspaceBuilder": {"template_file": "master_template.yml"},
    "static_file.StaticFileBuilder": {"config_folder": "config"},
    "cert.CertBuilder": {},
    "signature.SignatureBuilder": {},
}


def version(python: Path) -> str:
    """Of the NVFlare that an interpreter has installed."""
    code = "from importlib.metadata import version; print(version('nvflare'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"no NVFlare with {python}: {error}") from error
    return done.stdout.strip()


def fedavg(
    python: Path, folder: Path, shapes: Mapping[str, tuple[int, ...]], silos: int, rounds: int
) -> tuple[list[Event], dict[str, int]]:
    """Seconds and bytes by round, and the peaks of the server and of its process for the job.

    Seconds are the server's, from sending the model to having the merged one. Bytes are those of
    the arrays' numbers, as the server sends and gets them, without what NVFlare wraps them in.
    """
    job, out = folder / "job", folder / "rounds.jsonl"
    write_job(job, out, shapes, silos, rounds)
    with (
        Deployment(python, folder, silos) as deployment,
        server_peaks(psutil.Process(deployment.server.process.pid), _JOB_PROCESS) as memory,
    ):
        deployment.run(job)
    return [json.loads(line) for line in out.read_text().splitlines()], memory


def write_job(
    job: Path, out: Path, shapes: Mapping[str, tuple[int, ...]], silos: int, rounds: int
) -> None:
    """The folder of a job, whose server writes a line for each round to `out`."""
    given = job.with_name("shapes.json")
    given.write_text(json.dumps(shapes))
    controller = {"num_clients": silos, "num_rounds": rounds, "persistor_id": ""}
    controller |= {"save_filename": "", "shapes": str(given), "out": str(out)}
    runs = {"execution_mode": "in_process", "task_script_path": SCRIPT.name}
    runs |= {"params_exchange_format": "numpy"}
    workflow = {"id": "controller", "path": f"{SCRIPT.stem}.Timed", "args": controller}
    tasks = {"tasks": ["*"], "executor": {"path": _EXECUTOR, "args": runs}}
    server = {"format_version": 2, "workflows": [workflow]}
    client = {"format_version": 2, "executors": [tasks]}
    meta = {"name": job.name, "min_clients": silos, "deploy_map": {"app": ["@ALL"]}}
    config, code = job / "app" / "config", job / "app" / "custom"
    config.mkdir(parents=True)
    code.mkdir()
    (config / "config_fed_server.json").write_text(json.dumps(server))
    (config / "config_fed_client.json").write_text(json.dumps(client))
    (job / "meta.json").write_text(json.dumps(meta))
    shutil.copy(SCRIPT, code)


@dataclass
class Deployment:
    """A server and its clients, with all that they keep in one folder.

    As a context manager it starts them, and ends them however the block ends.
    """

    python: Path
    folder: Path
    silos: int
    server: Component = field(init=False)
    _ending: ExitStack = field(init=False)

    def __enter__(self) -> Deployment:
        with ExitStack() as ending:
            ending.callback(self._end_left)
            self._provision()
            self.server = self._start(_SERVER, ending)
            for client in [self._start(name, ending) for name in self._clients()]:
                client.wait_for("Successfully registered client")
            self._ending = ending.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def run(self, job: Path) -> None:
        """Submit a job, and wait until it is done.

        Raises:
            SystemExit: it failed.
        """
        kit = ("--startup-kit", str(self._kit(_ADMIN)), "--format", "json")
        submitted = json.loads(self._nvflare("job", "submit", "--job-folder", str(job), *kit))
        self._nvflare("job", "wait", submitted["data"]["job_id"], *kit)

    def _provision(self) -> None:
        """Make the start-up kits."""
        file = self.folder / "project.yml"
        file.write_text(json.dumps(self._project(free_port())))
        self._nvflare("poc", "prepare", "--project-input", str(file), "--force")

    def _project(self, port: int) -> dict[str, Any]:
        people: list[dict[str, Any]] = [
            {"name": _SERVER, "type": "server", "fed_learn_port": port},
            {"name": _ADMIN, "type": "admin", "role": "project_admin"},
            *({"name": name, "type": "client"} for name in self._clients()),
        ]
        paths = {f"nvflare.lighter.impl.{name}": args for name, args in _BUILDERS.items()}
        return {
            "api_version": 3,
            "name": _PROJECT,
            "connection_security": "clear",
            "participants": [{**each, "org": _PROJECT} for each in people],
            "builders": [{"path": path, "args": args} for path, args in paths.items()],
        }

    def _start(self, name: str, ending: ExitStack) -> Component:
        """Start a participant by its kit's script, which becomes NVFlare's process."""
        command = ["bash", str(self._kit(name) / "startup" / "sub_start.sh"), "--once"]
        file = self.folder / f"{name}.log"
        with file.open("wb") as log:
            process = subprocess.Popen(
                command, env=self._environment(), cwd=self.folder, stdout=log, stderr=log
            )
        component = Component(process, file)
        ending.callback(component.end)
        return component

    def _nvflare(self, *words: str) -> str:
        """What a command of NVFlare prints.

        Raises:
            SystemExit: it failed; with what it and the participants have printed.
        """
        done = subprocess.run(
            ["nvflare", *words],
            env=self._environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            told = [done.stdout, done.stderr]
            told += [log.read_text(errors="replace") for log in sorted(self.folder.glob("*.log"))]
            raise SystemExit(f"nvflare {' '.join(words)} failed:\n" + "\n".join(told))
        return done.stdout

    def _environment(self) -> dict[str, str]:
        """NVFlare's interpreter comes first, and the user's settings of NVFlare are not touched."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NVFL", "PYTHON"))}
        return {
            **kept,
            "PATH": f"{self.python.absolute().parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "NVFLARE_POC_WORKSPACE": str(self.folder / "poc"),
        }

    def _kit(self, name: str) -> Path:
        return self.folder / "poc" / _PROJECT / "prod_00" / name

    def _clients(self) -> list[str]:
        return [f"silo-{i}" for i in range(self.silos)]

    def _end_left(self) -> None:
        """End what still uses the folder: a job's process, if its parent ended by itself."""
        for left in processes_of(self.folder):
            end_tree(left.pid)
