"""Memory that processes hold while they run: of one, or of a command and all that it starts."""

from __future__ import annotations

import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from dept_fl.local import TASK_POLL_S, end_tree
from dept_fl.supernode import quick_messages
from tests.deployment import Federation

_LOOK_EVERY_S = 0.5
_LOOK_AT_SERVER_EVERY_S = 0.1


def held_bytes(process: int | str = "self") -> int:
    """Bytes that a process alone has in memory."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{process}/status tells no RssAnon; run this on Linux")


@contextmanager
def repeated(look: Callable[[], None], every_s: float) -> Iterator[None]:
    """Look again and again, in a thread, for as long as the block lasts."""
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(every_s):
            look()

    watcher = threading.Thread(target=go_on)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


@contextmanager
def server_peaks(server: psutil.Process, app: str) -> Iterator[dict[str, int]]:
    """The most bytes that a SuperLink, and the run's ServerApp, hold for themselves.

    Or those of another framework's server, and of the process that it starts for a run.

    Args:
        app: part of a word in the command line of that process.
    """
    most = {"superlink": 0, "serverapp": 0}

    def look() -> None:
        most["superlink"] = max(most["superlink"], held_bytes(server.pid))
        for each in server.children(recursive=True):
            with suppress(OSError, RuntimeError, psutil.Error):  # it is just ending
                if any(app in word for word in each.cmdline()):
                    most["serverapp"] = max(most["serverapp"], held_bytes(each.pid))

    with repeated(look, _LOOK_AT_SERVER_EVERY_S):
        yield most


def partners_own(
    federation: Federation, name: str, ended: ExitStack, **variables: str
) -> dict[str, str]:
    """Variables of a SuperNode's environment as `dept silo start` has them, a fork server too.

    Args:
        ended: what the fork server ends with.
    """
    asks = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": TASK_POLL_S, **variables}
    whole = federation.environment(name, **asks)
    return {**asks, "PATH": ended.enter_context(quick_messages(whole))["PATH"]}


@dataclass
class Peaks:
    """The most memory that was held, bytes.

    Attributes:
        together: by kind, by all its processes at one moment; pages that several share count once.
        one: by kind, by one of its processes.
    """

    together: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    one: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def look(self, root: psutil.Process, kind_of: Callable[[str], str]) -> None:
        """See what a process and all that it started hold now."""
        now: dict[str, int] = defaultdict(int)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):
                kind = kind_of(" ".join(process.cmdline()))
                held = process.memory_full_info().pss
                now[kind] += held
                self.one[kind] = max(self.one[kind], held)
        for kind, held in now.items():
            self.together[kind] = max(self.together[kind], held)


def run_watched(command: Sequence[str], log: Path, kind_of: Callable[[str], str]) -> Peaks:
    """Run a command to its end, with its output in `log`.

    Args:
        kind_of: what to call a process with this command line.

    Raises:
        CalledProcessError: it failed.
    """
    peaks = Peaks()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                peaks.look(root, kind_of)
            time.sleep(_LOOK_EVERY_S)
    finally:
        end_tree(process.pid)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command, log.read_text())
    return peaks
