"""A silo that works past the server's deadline ends itself: Flower cannot cancel it."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from dept_fl.errors import DeptError

_HARD_S = 30.0  # what does not even notice the first end is killed so much later
_STDERR = 2


@contextmanager
def ends_within(limit_s: float, what: str) -> Iterator[None]:
    """Raise DeptError in this block after `limit_s` seconds; kill the process if that fails.

    A SuperNode gives one process one message at a time and waits for it without end, so a silo
    that hangs would be lost to its federation. Only for a process of its own, in its main thread.
    """

    def overdue(*_: object) -> None:
        raise DeptError(f"{what}: not done within the {limit_s:.3g} s the server gave")

    # Python's own threads and signals wait for a C call to return; this watchdog does not. It
    # writes where the process hangs, and ends it.
    faulthandler.dump_traceback_later(limit_s + _HARD_S, exit=True, file=_STDERR)
    before = signal.signal(signal.SIGALRM, overdue)
    alarm = signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # first, or it could go off in here
        signal.setitimer(signal.ITIMER_REAL, *alarm)
        signal.signal(signal.SIGALRM, before)
