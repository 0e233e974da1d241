"""Signals that end a process, heard as Ctrl-C is."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interrupted_by(signals: Iterable[signal.Signals], once: bool = False) -> Iterator[None]:
    """Each of these signals is a KeyboardInterrupt in the block, but for those that are ignored.

    Args:
        once: behind the first one none is heard any more, so that none can disturb the clearing.
    """

    def interrupt(*_: object) -> None:
        if once:
            ignore(before)
        raise KeyboardInterrupt

    before = {each: signal.getsignal(each) for each in signals}
    for each, handler in before.items():
        if handler is not signal.SIG_IGN:  # as `nohup` leaves it
            signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def ignored(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """None of these signals is heard in the block."""
    before = {each: signal.getsignal(each) for each in signals}
    ignore(before)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def ignore(signals: Iterable[signal.Signals]) -> None:
    for each in signals:
        signal.signal(each, signal.SIG_IGN)
