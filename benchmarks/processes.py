"""Memory of a command and of all that it starts, by kind of process, while it runs."""

from __future__ import annotations

import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from dept_fl.local import end_tree

_LOOK_EVERY_S = 0.5


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
