"""A partner's SuperNode, started again whenever it ends."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from dept_fl import PACKAGE
from dept_fl.errors import DeptError
from dept_fl.interrupt import ENDING, interrupted_by
from dept_fl.local import flower_environment
from dept_fl.servers import Watch, serving
from dept_fl.silo_file import SiloFile

AGAIN_S = 15.0
_CLIENT_APP = "flwr-clientapp"  # what Flower starts for each message


@dataclass(frozen=True)
class SuperNode:
    """How to start the SuperNode of a silo.

    Attributes:
        key: private key, whose public half the operator has registered.
        superlink: HOST:PORT.
        words: more arguments for flower-supernode.
        forks: see `quick_messages`.
    """

    silo: SiloFile
    key: Path
    superlink: str
    root_certificates: Path
    words: Sequence[str] = ()
    forks: bool = True

    def command(self) -> list[str]:
        return [
            "flower-supernode",
            *self.words,
            *("--superlink", self.superlink),
            *("--root-certificates", str(self.root_certificates)),
            *("--auth-supernode-private-key", str(self.key)),
            *("--node-config", f'silo="{self.silo.path}"'),
        ]


def keep_up(node: SuperNode, tell: Callable[[str], None]) -> None:
    """Run the SuperNode until a signal ends it; start it again whenever it ends by itself.

    One that was killed is not let in again for about a minute, and one whose SuperLink was
    started again ends as if all were well: so it is tried again, for as long as it takes.

    Raises:
        DeptError: a file is missing.
    """
    for what, file in (("key", node.key), ("root certificate", node.root_certificates)):
        if not file.is_file():
            raise DeptError(f"{file}: no such {what}")
    environment = flower_environment(node.silo.home / "flower")
    while True:
        with (
            interrupted_by(ENDING, once=True),
            quick_messages(environment, tell) if node.forks else nullcontext(environment) as quick,
            serving(node.command(), quick) as process,
        ):
            trouble = _trouble(process)
        tell(f"the SuperNode {trouble}; starting it again in {AGAIN_S:.0f} s (Ctrl-C ends this)")
        time.sleep(AGAIN_S)


def _trouble(process: subprocess.Popen[bytes]) -> str:
    watch = Watch(process)
    while not (trouble := watch.trouble()):
        time.sleep(1.0)
    return trouble


@contextmanager
def quick_messages(
    environment: Mapping[str, str], tell: Callable[[str], None] = print
) -> Iterator[Mapping[str, str]]:
    """The environment of a SuperNode whose messages need not wait for imports.

    A fork server serves them for as long as the block lasts (forkserver.py). Where there can be
    none, which is told, the environment stays as it is.
    """
    with ExitStack() as ended:
        yield _with_fork_server(environment, ended, tell)


def _with_fork_server(
    environment: Mapping[str, str], ended: ExitStack, tell: Callable[[str], None]
) -> Mapping[str, str]:
    command = shutil.which(_CLIENT_APP, path=environment["PATH"])
    if command is None or sys.platform != "linux":
        return environment
    try:
        # Not in the silo's home: the name of a socket has a hundred characters at most.
        name = ended.enter_context(TemporaryDirectory(prefix="dept-"))
        socket, stand_in = Path(name) / "socket", Path(name) / _CLIENT_APP
        words = [sys.executable, "-IS", str(PACKAGE / "forkclient.py"), str(socket), command]
        stand_in.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
        stand_in.chmod(0o700)
    except OSError as error:
        tell(f"messages start slowly: no fork server ({error})")
        return environment
    server = [sys.executable, "-P", str(PACKAGE / "forkserver.py"), str(socket)]
    process = ended.enter_context(serving(server, environment))
    while not socket.exists():
        if process.poll() is not None:
            tell(f"messages start slowly: the fork server ended ({process.returncode})")
            return environment
        time.sleep(0.01)
    return {**environment, "PATH": os.pathsep.join([name, environment["PATH"]])}
