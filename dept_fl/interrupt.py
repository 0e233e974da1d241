"""Signals that end a process, heard as Ctrl-C is."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

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

    with _restored(signals) as before:
        for each, handler in before.items():
            if handler is not signal.SIG_IGN:  # as `nohup` leaves it
                signal.signal(each, interrupt)
        yield


@contextmanager
def ignored(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """None of these signals is heard in the block."""
    with _restored(signals) as before:
        ignore(before)
        yield


@contextmanager
def _restored(signals: Iterable[signal.Signals]) -> Iterator[dict[signal.Signals, Any]]:
    """Yields the signals' handlers, which they have again behind the block."""
    before = {each: signal.getsignal(each) for each in signals}
    try:
        yield before
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def ignore(signals: Iterable[signal.Signals]) -> None:
    for each in signals:
        signal.signal(each, signal.SIG_IGN)
