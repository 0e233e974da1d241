"""Servers that run for long: started, watched, and ended with all that they started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from uuid import uuid4

import psutil

from dept_fl.interrupt import ENDING, ignored
from dept_fl.local import end_tree, is_alive

_MARK = "DEPT_SERVER"  # in the environment of a server and of all that it starts


@contextmanager
def serving(
    command: list[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a session of its own: Ctrl-C is for us, who end the two in order."""
    marked = {**environment, _MARK: uuid4().hex}
    process = subprocess.Popen(command, env=marked, start_new_session=True)
    try:
        yield process
    finally:
        with ignored(ENDING):
            end_tree(process.pid)
            for each in psutil.process_iter():
                if _outlived(each, process.pid, marked[_MARK]):
                    end_tree(each.pid)
            process.wait()


def _outlived(process: psutil.Process, session: int, mark: str) -> bool:
    """Whether a server that was killed has left this: its children outlive it.

    nginx's worker has overwritten its environment, Flower's processes have left the session.
    """
    try:
        return os.getsid(process.pid) == session or process.environ().get(_MARK) == mark
    except (OSError, psutil.Error):  # it is gone, or another user's
        return False


class Watch:
    """Sees whether a server still does its work.

    A SuperLink or SuperNode whose flower-superexec has died looks well and starts no app any
    more; Flower neither notices nor tells.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._helper: psutil.Process | None = None

    def trouble(self) -> str:
        """What is wrong with it; nothing while all is well."""
        if self._process.poll() is not None:
            return f"ended with exit status {self._process.returncode}"
        if self._helper is None:
            self._helper = self._superexec()
        elif not is_alive(self._helper):
            return "lost its flower-superexec"
        return ""

    def _superexec(self) -> psutil.Process | None:
        try:
            children = psutil.Process(self._process.pid).children()
            return next((c for c in children if "flower-superexec" in " ".join(c.cmdline())), None)
        except psutil.Error:  # one of them is just ending
            return None
