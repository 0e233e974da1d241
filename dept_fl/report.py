"""What people see of a run: metrics.jsonl, tables in the terminal, a plot."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from dept_fl.checkpoint import write_whole

if TYPE_CHECKING:
    from dept_fl.cost import Cost

Event = dict[str, Any]


class Ledger:
    """`metrics.jsonl`: one JSON object a line, each with an `event` and a `time` field.

    `time` is in seconds since 1970.
    """

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / "metrics.jsonl"

    def write(self, event: str, **fields: Any) -> None:
        stamped = {"event": event, "time": round(time.time(), 3), **fields}
        line = json.dumps(stamped, sort_keys=True, allow_nan=False)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def read(self) -> list[Event]:
        """All whole lines; a last one that a kill cut off is left out."""
        return self.read_from(0)[0]

    def read_from(self, position: int) -> tuple[list[Event], int]:
        """The whole lines behind a position in bytes, and the position behind them."""
        if not self.file.is_file():
            return [], position
        with self.file.open("rb") as stream:
            stream.seek(position)
            lines = stream.read().decode("utf-8").splitlines()
            position = stream.tell()
        events = []
        for line in lines:
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
        return events, position

    def rewind(self, round_: int) -> None:
        """Drop what was written behind whole round `round_`, which will be done again."""
        kept = [
            e
            for e in self.read()
            if e["event"] == "failure"  # why a run stopped is worth keeping
            or (
                max(e.get("round", 0), e.get("during_round", 0)) <= round_
                and e["event"] != "end"
                and not e.get("final", False)
            )
        ]
        write_whole(self.file, "".join(json.dumps(e, sort_keys=True) + "\n" for e in kept))


def harmless(text: str) -> str:
    return "".join(each if each.isprintable() or each == "\n" else "?" for each in text)


class Screen:
    """Prints tables and lines; all figures are computed elsewhere."""

    def __init__(self) -> None:
        self._console = Console(width=100, highlight=False, markup=False, soft_wrap=True)

    def line(self, text: str = "") -> None:
        """Print a text, which may come from a silo: nothing in it steers the terminal."""
        self._console.print(harmless(text))

    def table(self, head: Iterable[str], rows: Iterable[Iterable[str]], title: str = "") -> None:
        self._console.print(table(head, rows, title))

    def plan(
        self, costs: Mapping[str, Cost], registrations: Iterable[Any], words: list[str]
    ) -> None:
        for text in words:
            self.line(text)
        rows = [
            [
                r.silo,
                f"{r.train_bytes / 1e6:.1f} MB",
                f"{r.train_tokens:,}",
                f"{r.vocabulary:,}",
                f"{costs[r.silo].held_parameters / 1e6:.2f} M",
                f"{costs[r.silo].up_parameters / 1e6:.2f} M",
                f"{costs[r.silo].up_bytes / 1e6:.2f} MB",
            ]
            for r in registrations
        ]
        head = ("silo", "train text", "tokens", "vocabulary", "parameters", "travel", "up/round")
        self.table(head, rows)

    def round(self, rows: Iterable[Event], title: str) -> None:
        cells = [
            [
                e["silo"],
                figure(e["loss"]),
                figure(e.get("bits_per_byte")),  # not evaluated in every round
                figure(e.get("unigram_bits_per_byte")),
                figure(e["tokens_per_s"], 0),
                f"{(e['bytes_up_body'] + e['bytes_up_embeddings']) / 1e6:.2f}",
                f"{(e['bytes_down_body'] + e['bytes_down_embeddings']) / 1e6:.2f}",
            ]
            for e in rows
        ]
        head = ("silo", "loss", "bits/byte", "unigram", "tokens/s", "MB up", "MB down")
        self.table(head, cells, title)

    def final(self, rows: Iterable[Event]) -> None:
        cells = [
            [
                e["silo"],
                figure(e["bits_per_byte"]),
                figure(e["unigram_bits_per_byte"]),
                figure(e["perplexity"], 1),
                figure(e["unigram_perplexity"], 1),
            ]
            for e in rows
        ]
        head = ("silo", "bits/byte", "unigram", "perplexity", "unigram ppl")
        self.table(head, cells, "final body, each silo on its own validation text")


def figure(value: float | None, digits: int = 3) -> str:
    """So many digits behind the point, and nine in all; else by its power of ten.

    Silos choose their figures: a long one would leave no room in a table for anything else.
    """
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 10.0 ** (9 - digits):
        return f"{value:.3g}"
    return f"{value:,.{digits}f}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], title: str = "") -> Table:
    """Names to the left, figures to the right; where it is too wide, the names are folded."""
    made = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="")
    for i, name in enumerate(head):
        if i == 0:
            made.add_column(name, overflow="fold")
        else:
            made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 5 min, 3.2 h, 4 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def size(count: int) -> str:
    """Bytes as people say them: 800 bytes, 19.4 kB, 5.9 MB, 1.2 GB."""
    if count < 1e3:
        return f"{count} bytes"
    for unit, scale in (("kB", 1e3), ("MB", 1e6)):
        if count < 1e3 * scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e9:,.1f} GB"


def plot(events: list[Event], file: Path) -> None:
    """Training loss and validation bits per byte of each silo by round, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    silos = sorted({e["silo"] for e in events if e["event"] == "silo_eval"})
    legend = len(silos) <= 12
    for i, silo in enumerate(silos):
        style = {"color": colours[i % len(colours)], "label": silo, "marker": ".", "lw": 1.5}
        train = [e for e in events if e["event"] == "silo_train" and e["silo"] == silo]
        left.plot([e["round"] for e in train], [e["loss"] for e in train], **style)
        evals = [e for e in events if e["event"] == "silo_eval" and e["silo"] == silo]
        right.plot([e["round"] for e in evals], [e["bits_per_byte"] for e in evals], **style)
        floor = evals[-1]["unigram_bits_per_byte"]
        right.axhline(floor, color=style["color"], ls=":", lw=1)
    left.set(title="training loss", xlabel="round", ylabel="nats per token")
    right.set(
        title="validation (dotted: unigram floor)", xlabel="whole rounds", ylabel="bits per byte"
    )
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if legend:
        right.legend(frameon=False)
    draft = file.with_name(f".{file.name}.png")
    figure.savefig(draft, dpi=120)
    pyplot.close(figure)
    draft.replace(file)
