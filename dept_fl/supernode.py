"""A partner's SuperNode, started again whenever it ends."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dept_fl.errors import DeptError
from dept_fl.interrupt import ENDING, interrupted_by
from dept_fl.local import flower_environment
from dept_fl.servers import Watch, serving
from dept_fl.silo_file import SiloFile

AGAIN_S = 15.0


@dataclass(frozen=True)
class SuperNode:
    """How to start the SuperNode of a silo.

    Attributes:
        key: private key, whose public half the operator has registered.
        superlink: HOST:PORT.
        words: more arguments for flower-supernode.
    """

    silo: SiloFile
    key: Path
    superlink: str
    root_certificates: Path
    words: Sequence[str] = ()

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
            serving(node.command(), environment) as process,
        ):
            trouble = _trouble(process)
        tell(f"the SuperNode {trouble}; starting it again in {AGAIN_S:.0f} s (Ctrl-C ends this)")
        time.sleep(AGAIN_S)


def _trouble(process: subprocess.Popen[bytes]) -> str:
    watch = Watch(process)
    while not (trouble := watch.trouble()):
        time.sleep(1.0)
    return trouble
