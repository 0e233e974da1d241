"""A federation as its operator and its partners run it: real processes, each in its own folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dept_fl.local import end_tree, listens

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sys.executable).parent
CONNECTION = "partners"
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
# Where everything is checked, a missing nginx is a failure, not a reason to check less.
needs_nginx = pytest.mark.skipif(
    NGINX is None and not os.environ.get("CI"), reason="nginx is not installed"
)
_given_ports: set[int] = set()


def free_port() -> int:
    """A loopback port that nobody listens on and that no earlier call has given."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port not in _given_ports:
            _given_ports.add(port)
            return port


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0, what: str = "") -> None:
    """Return as soon as a condition holds; fail with `what` if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Live processes with a folder in their command line, environment or open files; not this one.

    The files are for nginx: its workers overwrite what they were started with.
    """
    found = []
    for process in psutil.process_iter():
        try:
            told = [*process.cmdline(), *process.environ().values()]
            told += [file.path for file in process.open_files()]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(str(folder) in word for word in told):
            found.append(process)
    return found


def speak(port: int, ca_file: Path, data: bytes, patience_s: float = 30.0) -> bytes:
    """Send bytes over TLS to localhost; return what comes until it is closed, or stays silent."""
    context = ssl.create_default_context(cafile=ca_file)
    with (
        socket.create_connection(("localhost", port), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        answer = b""
        try:
            connection.sendall(data)
            connection.settimeout(patience_s)
            while more := connection.recv(65_536):
                answer += more
        except OSError:
            pass
        return answer


def make_key(file: Path) -> Path:
    """An OpenSSH key pair as `ssh-keygen -t ecdsa -b 384 -N ""` makes it: FILE and FILE.pub."""
    key, ssh = ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.OpenSSH
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(key.private_bytes(pem, ssh, plain))
    file.chmod(0o600)
    openssh = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    public_file(file).write_bytes(key.public_key().public_bytes(*openssh) + b"\n")
    return file


def public_file(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


@dataclass
class Component:
    """A process with its output in a file, behind that of earlier ones of its name."""

    process: subprocess.Popen[bytes]
    log: Path
    log_start: int = 0

    @property
    def output(self) -> str:
        return self.log.read_bytes()[self.log_start :].decode(errors="replace")

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    def wait_for(self, text: str, timeout_s: float = 120.0) -> None:
        """Wait for a text in the output; fail with the whole output if the process ends first."""
        wait_until(
            lambda: text in self.output or not self.lives, timeout_s, f"{text!r}: {self.log}"
        )
        assert text in self.output, self.output

    def wait_for_exit(self, timeout_s: float = 120.0) -> int:
        wait_until(lambda: not self.lives, timeout_s, f"{self.log.name} still runs")
        return self.process.wait()

    def end(self) -> None:
        """End the process and all that it started.

        A SuperNode's children would wait for it to come back, for longer than a test can.
        """
        family = psutil.Process(self.process.pid).children(recursive=True) if self.lives else []
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            for each in [self.process] if self.lives else [p for p in family if p.is_running()]:
                end_tree(each.pid)


class Federation:
    """A SuperLink, SuperNodes and their operators' commands, under one folder.

    Each component has a folder with its log, its own FLWR_HOME, and a working directory.
    A secure federation is what `dept federation` makes of it: TLS, SuperNode authentication, and
    nginx in front of the SuperLink. One that is not secure is a bare SuperLink without TLS.
    As a context manager it closes itself, however the block ends.

    Attributes:
        folder: of everything here.
        init_folder: what `dept federation init` made, where it is secure.
        port: where SuperNodes connect.
        superlink_port: where the SuperLink itself listens.
    """

    def __init__(self, folder: Path, secure: bool) -> None:
        self.folder, self.secure = folder, secure
        self.superlink_port = free_port()
        self.port = free_port() if secure else self.superlink_port
        self.init_folder = folder / "federation"
        self.ca_file = self.init_folder / "ca.crt"
        self._components: list[Component] = []
        self._connect()

    def _connect(self) -> None:
        """Flower's configuration at the operator, and in a secure federation its folder."""
        if self.secure:
            ports = ["--port", str(self.port), "--superlink-port", str(self.superlink_port)]
            self.run("dept", "federation", "init", str(self.init_folder), "--host", "localhost",
                     "--name", CONNECTION, *ports)  # fmt: skip
        else:
            home = self.folder / "operator" / "flwr-home"
            home.mkdir(parents=True)
            address = f'address = "127.0.0.1:{self.superlink_port}"\ninsecure = true\n'
            (home / "config.toml").write_text(f"[superlink.{CONNECTION}]\n{address}")

    def superlink(self, *words: str, **variables: str) -> Component:
        """Start the SuperLink (a secure one with nginx) and wait until it serves.

        Args:
            words: more arguments for flower-superlink.
            variables: of its environment.
        """
        if self.secure:
            command = ["dept", "federation", "start", str(self.init_folder), "--", *words]
            made = self.start("superlink", *command, **variables)
            made.wait_for("open to partners")
        else:
            command = ["flower-superlink", "--insecure", "--port", str(self.superlink_port)]
            command += ["--disable-runtime-dependency-installation", *words]
            made = self.start("superlink", *command, **variables)
            made.wait_for("Uvicorn running")
        return made

    def nginx_command(self, conf: str) -> list[str]:
        assert NGINX is not None, "nginx is not installed"
        return [NGINX, "-p", str(self.init_folder / "nginx"), "-c", conf, "-e", "stderr",
                "-g", "daemon off;"]  # fmt: skip

    def nginx(self, conf: str, port: int) -> Component:
        """Start nginx alone, with a configuration file of the federation's nginx folder."""
        made = self.start("nginx", *self.nginx_command(conf))
        wait_until(lambda: listens(port) or not made.lives, 30, "nginx listens")
        assert made.lives, made.output
        return made

    def supernode(
        self,
        name: str,
        node_config: str = "",
        *words: str,
        key: Path | None = None,
        **variables: str,
    ) -> Component:
        """Start a SuperNode; see `wait_until_online`.

        Args:
            name: of its folder, and of its key where `key` names no other.
            node_config: as in `flower-supernode --node-config`.
            words: more arguments for flower-supernode; of two alike the last one counts.
            variables: of its environment.
        """
        command = ["flower-supernode", "--port", str(free_port())]
        if self.secure:
            command += ["--superlink", f"localhost:{self.port}"]
            command += ["--root-certificates", str(self.ca_file)]
            command += ["--auth-supernode-private-key", str(key or self.key(name))]
        else:
            command += ["--superlink", f"127.0.0.1:{self.port}", "--insecure"]
        if node_config:
            command += ["--node-config", node_config]
        return self.start(name, *command, *words, **variables)

    def key(self, name: str) -> Path:
        """The private key of a partner, made at the first call."""
        file = self.folder / name / "key"
        return file if file.exists() else make_key(file)

    def register(self, name: str, key: Path | None = None) -> str:
        """Admit a partner's key; return its node id."""
        public = public_file(key or self.key(name))
        words = ("supernode", "register", str(public), CONNECTION, "--name", name)
        return str(json.loads(self.flwr(*words, "--format", "json").stdout)["node-id"])

    def nodes(self) -> dict[str, str]:
        """The status of each SuperNode by node id: registered, online, offline, unregistered."""
        listed = json.loads(self.flwr("supernode", "list", CONNECTION, "--format", "json").stdout)
        return {each["node-id"]: each["status"] for each in listed["nodes"]}

    def wait_until_online(self, count: int, timeout_s: float = 120.0) -> None:
        """Wait until exactly so many SuperNodes are online."""

        def so_many() -> bool:
            return list(self.nodes().values()).count("online") == count

        wait_until(so_many, timeout_s, f"{count} SuperNodes online")

    def flwr(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `flwr` as the operator, to its end."""
        return self.run("flwr", *words, check=check)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as the operator, to its end; with `check` it must exit with 0."""
        folder = self.folder / "operator"
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, env=self.environment("operator"), cwd=folder, text=True,
                              capture_output=True, check=False)  # fmt: skip
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done

    def start(self, name: str, *command: str, **variables: str) -> Component:
        """Start a command in a component's folder, with its output in that folder's `log`."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log").open("ab") as log:
            before = log.tell()
            process = subprocess.Popen(command, env=self.environment(name, **variables),
                                       cwd=folder, stdout=log, stderr=log)  # fmt: skip
        self._components.append(Component(process, folder / "log", before))
        return self._components[-1]

    def environment(self, name: str, **variables: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "DEPT_"))}
        return {
            **kept,
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.folder / name / "flwr-home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "UV_OFFLINE": "1",  # nothing may be downloaded for a run
            "PYTHONUNBUFFERED": "1",
            **variables,
        }

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process; fail if one is left."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(Component.end, self._components))
        try:
            wait_until(lambda: not processes_of(self.folder), 30, f"all of {self.folder} ended")
        finally:
            for left in processes_of(self.folder):
                end_tree(left.pid)
