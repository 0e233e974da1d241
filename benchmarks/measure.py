"""What the benchmarks of training share: cases in processes of their own, medians, tables."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from dept_fl.jobs import about
from dept_fl.report import Event


class RandomSequences:
    """Training sequences of tokens drawn evenly, the same for the same position."""

    def __init__(self, vocabulary: int, sequence_tokens: int) -> None:
        self._vocabulary, self._width = vocabulary, sequence_tokens + 1

    def at(self, position: int, count: int) -> npt.NDArray[np.int64]:
        draw = np.random.default_rng(position)
        return draw.integers(0, self._vocabulary, (count, self._width))


def alone(module: str, case: Mapping[str, object]) -> Event:
    """The line of JSON that `python -m module --one CASE` prints, in a process of its own."""
    command = [sys.executable, "-m", module, "--one", json.dumps(case)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(", ".join(f"{k}={v}" for k, v in case.items()), file=sys.stderr, flush=True)
    found: Event = json.loads(done.stdout.splitlines()[-1])
    return found


def interleaved(works: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each work returns, in turns, so that a slow spell of the machine strikes all. Comes with
    a first turn that warms up."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            found[name].append(work())
    return found


def ratio(of: Sequence[float], to: Sequence[float]) -> Event:
    """Median, lowest and highest of the turns' ratios."""
    each = [a / b for a, b in zip(of, to, strict=True)]
    return {"median": median(each), "low": min(each), "high": max(each)}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def keep(file: Path | None, module: str, rows: Sequence[Event]) -> None:
    """Write the rows with what the machine was, where a file is given."""
    if file:
        facts = {"machine": about(f"python -m {module}"), "rows": rows}
        file.write_text(json.dumps(facts, indent=1) + "\n")
