"""Long work on stderr: what it is, how far it is and how long it takes, never silent for long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner

from dept_fl.report import duration

T = TypeVar("T")

_LINE_EVERY_S = 2.0  # where stderr is no terminal; then ever more rarely, up to
_LINE_AT_LEAST_EVERY_S = 60.0


class Progress:
    """Shows one stage of work after the other, and counts the texts that pass in it."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._title = ""
        self._begin("")

    def _begin(self, title: str) -> None:
        self._title, self._began = title, time.monotonic()
        self._documents = self._bytes = 0
        self._done, self._steps, self._unit = 0, 0, "steps"

    def during(self, title: str, work: Callable[[], T]) -> T:
        """Do the work, and show meanwhile that it is being done."""
        with self.stage(title):
            return work()

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Show that this is being done, while it is."""
        self._begin(title)
        live = self._console.is_terminal and not self._console.is_dumb_terminal
        with self._in_place() if live else self._in_lines():
            yield

    def at(self, done: int, steps: int, unit: str = "steps") -> None:
        """So many of the stage's steps are done."""
        self._done, self._steps, self._unit = done, steps, unit

    def watch(self, texts: Iterator[str]) -> Iterator[str]:
        """Pass the texts on, and count them into the stage."""
        for text in texts:
            self._documents += 1
            self._bytes += len(text.encode())
            yield text

    def line(self) -> str:
        """The stage as it stands now."""
        elapsed = time.monotonic() - self._began
        if self._steps:
            done = f"{self._done:,} of {self._steps:,} {self._unit}"
            return f"{self._title} ... {done}, {self._time(elapsed)}"
        if not self._documents:
            return f"{self._title} ... {duration(elapsed)}"
        rate = self._bytes / max(elapsed, 1e-3)
        return (
            f"{self._title} ... {self._documents:,} documents, {self._bytes / 1e6:,.1f} MB, "
            f"{rate / 1e6:,.1f} MB/s, {duration(elapsed)}"
        )

    def _time(self, elapsed: float) -> str:
        if not self._done:
            return duration(elapsed)
        per_s = self._done / max(elapsed, 1e-3)
        rate = f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.2g}"
        left = (self._steps - self._done) / per_s
        return f"{rate} a second, {duration(elapsed)}; left: about {duration(left)}"

    def _in_place(self) -> AbstractContextManager[object]:
        spinner = Spinner("dots")

        def frame() -> Spinner:
            spinner.update(text=self.line())
            return spinner

        return Live(get_renderable=frame, console=self._console, transient=True)

    @contextmanager
    def _in_lines(self) -> Iterator[None]:
        done = threading.Event()

        def show() -> None:
            every_s = _LINE_EVERY_S
            while not done.wait(every_s):
                self._console.print(self.line(), soft_wrap=True)
                every_s = min(1.5 * every_s, _LINE_AT_LEAST_EVERY_S)

        self._console.print(f"{self._title} ...", soft_wrap=True)
        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
