"""What a comparison came to: ranked rows, as Markdown, CSV and JSON, and plots."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dept_fl.checkpoint import write_whole
from dept_fl.report import Event


@dataclass(frozen=True)
class Row:
    """An arm over its seeds; figures are means over silos, then over seeds, unless said.

    Attributes:
        spread: standard deviation over seeds of the silos' mean bits per byte; None for one.
        tokens, text_bytes, flops, hours: of all silos together; hours are those of training.
        epochs: how often a silo's training text was passed over.
        parameters: of the model that is evaluated.
        bytes_up: what one silo sent in the whole run.
        by_silo: bits per byte of each silo, mean over seeds.
        unigram: what token frequencies alone reach.
    """

    arm: str
    equal: str
    seeds: int
    bits_per_byte: float
    spread: float | None
    by_silo: dict[str, float]
    unigram: float
    tokens: float
    text_bytes: float
    epochs: float
    flops: float
    hours: float
    parameters: float
    bytes_up: float


def rows(results: Iterable[Event]) -> list[Row]:
    """One row for each arm and parity, the best first.

    An arm that needs no other steps for equal bytes is in that table with the run it has.
    """
    by_arm: dict[tuple[str, str], dict[int, list[Event]]] = {}
    for result in results:
        seeds = by_arm.setdefault((result["arm"], result["equal"]), {})
        seeds.setdefault(result["seed"], []).append(result)
    made = [_row(arm, equal, seeds) for (arm, equal), seeds in by_arm.items()]
    if any(row.equal == "bytes" for row in made):
        have = {row.arm for row in made if row.equal == "bytes"}
        made += [replace(row, equal="bytes") for row in made if row.arm not in have]
    return sorted(made, key=lambda row: row.bits_per_byte)


def _row(arm: str, equal: str, seeds: dict[int, list[Event]]) -> Row:
    runs = [_joined(parts) for parts in seeds.values()]
    hours = [math.fsum(part["train_s"] for part in parts) / 3600 for parts in seeds.values()]
    names = sorted(runs[0])

    def over_silos(key: str) -> list[float]:
        return [mean([run[name][key] for name in names]) for run in runs]

    def together(key: str) -> float:
        return mean(over_silos(key)) * len(names)

    bits = over_silos("bits_per_byte")
    return Row(
        arm=arm,
        equal=equal,
        seeds=len(runs),
        bits_per_byte=mean(bits),
        spread=deviation(bits),
        by_silo={name: mean([run[name]["bits_per_byte"] for run in runs]) for name in names},
        unigram=mean(over_silos("unigram_bits_per_byte")),
        tokens=together("tokens"),
        text_bytes=together("text_bytes"),
        epochs=mean(over_silos("epochs")),
        flops=together("flops"),
        hours=mean(hours),
        parameters=mean(over_silos("parameters")),
        bytes_up=mean(over_silos("bytes_up")),
    )


def _joined(parts: list[Event]) -> dict[str, Any]:
    """The silos of a seed: of `alone`, each is a job of its own."""
    return {name: silo for part in parts for name, silo in part["silos"].items()}


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None where there is but one value."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


# ---- tables ----------------------------------------------------------------------------------

_TOLERANCE = 0.03
_HEAD = ["arm", "bits/byte", "M parameters", "MB up", "M tokens", "MB text", "epochs", "TFLOP",
         "hours"]  # fmt: skip


def markdown(made: Sequence[Row]) -> str:
    """The ranked table, and below it the silos; one pair for each parity."""
    parts = []
    for equal in dict.fromkeys(row.equal for row in made):
        chosen = [row for row in made if row.equal == equal]
        silos = sorted(chosen[0].by_silo)
        parts += [
            f"Equal {equal}, {_seeds(chosen)}, mean of {len(silos)} silos:",
            _markdown(_HEAD, [_cells(row) for row in chosen]),
            f"Equal {equal}, bits per byte of each silo, mean over seeds:",
            _markdown(
                ["arm", *silos],
                [[r.arm, *(f"{r.by_silo[s]:.3f}" for s in silos)] for r in chosen],
            ),
        ]
        parts += _unequal(chosen, "tokens" if equal == "tokens" else "text_bytes")
    return "\n\n".join(parts) + "\n"


def _unequal(chosen: Sequence[Row], key: str) -> list[str]:
    """A line on the arms that did not see as much as most did."""
    amounts = {row.arm: getattr(row, key) for row in chosen}
    usual = statistics.median_high(amounts.values())
    others = [
        f"{arm} {amount / usual:.0%}"
        for arm, amount in amounts.items()
        if abs(amount / usual - 1) > _TOLERANCE
    ]
    return [f"Not as much as the others: {', '.join(others)}."] if others else []


def _seeds(chosen: Sequence[Row]) -> str:
    counts = {row.seeds for row in chosen}
    if counts == {1}:
        return "one seed"
    fewest, most = min(counts), max(counts)
    return f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"


def _cells(row: Row) -> list[str]:
    spread = f" ± {row.spread:.3f}" if row.spread is not None else ""
    return [
        row.arm,
        f"{row.bits_per_byte:.3f}{spread}",
        f"{row.parameters / 1e6:.2f}",
        f"{row.bytes_up / 1e6:.1f}",
        f"{row.tokens / 1e6:.2f}",
        f"{row.text_bytes / 1e6:.1f}",
        f"{row.epochs:.2f}",
        f"{row.flops / 1e12:.1f}",
        f"{row.hours:.2f}",
    ]


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines]
    )


def as_csv(made: Sequence[Row]) -> str:
    silos = sorted({silo for row in made for silo in row.by_silo})
    plain = [{**asdict(row), **{f"bits/byte {s}": row.by_silo.get(s, "") for s in silos}}
             for row in made]  # fmt: skip
    for each in plain:
        del each["by_silo"]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(plain[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    return text.getvalue()


# ---- plots -----------------------------------------------------------------------------------

_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_STYLES = ["-", "--", ":"]


def plots(results: Sequence[Event], made: Sequence[Row], folder: Path) -> list[Path]:
    """Ranking with spread, bits per byte by step, norms by round; as PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    equal = "tokens" if any(row.equal == "tokens" for row in made) else "bytes"
    chosen = [row for row in made if row.equal == equal]
    curves = {row.arm: _curve([r for r in results if r["arm"] == row.arm and r["equal"] == equal])
              for row in chosen}  # fmt: skip
    return [
        _plot_ranking(chosen, folder / "ranking.png"),
        plot_curves(curves, folder / "curves.png", {"bits_per_byte": "validation bits per byte"}),
        plot_curves(
            curves,
            folder / "norms.png",
            {"body_norm": "norm of the body", "activation_norm": "norm of activations"},
        ),
    ]


def _curve(results: Sequence[Event]) -> dict[str, list[tuple[int, float]]]:
    """By figure: steps and the mean over silos and seeds."""
    collected: dict[str, dict[int, list[float]]] = {}
    for result in results:
        for point in result["curve"]:
            for key in ("bits_per_byte", "activation_norm", "body_norm"):
                value = point[key]
                values = value.values() if isinstance(value, dict) else [value]
                known = [v for v in values if v is not None]
                collected.setdefault(key, {}).setdefault(point["steps"], []).extend(known)
    return {
        key: [(steps, mean(values)) for steps, values in sorted(points.items()) if values]
        for key, points in collected.items()
    }


def plot_curves(
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    file: Path,
    panels: Mapping[str, str],
) -> Path:
    """Lines over steps, by name and figure, with a panel for each figure: a PNG."""
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(7.5 * len(panels), 5), layout="constrained", squeeze=False
    )
    for panel, (key, title) in zip(axes[0], panels.items(), strict=True):
        for i, (arm, figures) in enumerate(curves.items()):
            points = figures.get(key, [])
            style = _STYLES[i // len(_COLOURS) % len(_STYLES)]
            colour = _COLOURS[i % len(_COLOURS)]
            panel.plot(*zip(*points, strict=True), color=colour, ls=style, lw=1.6, label=arm)
        panel.set(title=title, xlabel="steps of one silo (or of the one model)")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    left = axes[0][0]
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    left.yaxis.set_major_formatter(ScalarFormatter())  # 150, not 1.5 x 10^2
    left.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return _saved(figure, file)


def _plot_ranking(chosen: Sequence[Row], file: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.35 * len(chosen) + 1.2), layout="constrained")
    for place, row in enumerate(chosen):
        for bits in row.by_silo.values():
            axes.plot(bits, place, "o", color="#BBBBBB", ms=4, zorder=1)
        axes.errorbar(
            row.bits_per_byte, place, xerr=row.spread, fmt="o", color=_COLOURS[0], capsize=3
        )
    axes.set_yticks(range(len(chosen)), [row.arm for row in chosen])
    axes.invert_yaxis()
    axes.set(xlabel="bits per byte: mean and spread over seeds (grey: each silo)")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure, file)


def _saved(figure: Any, file: Path) -> Path:
    from matplotlib import pyplot

    draft = file.with_name(f".{file.name}.png")
    figure.savefig(draft, dpi=110)
    pyplot.close(figure)
    draft.replace(file)
    return file


def write(results: Sequence[Event], facts: Event, folder: Path) -> list[Row]:
    """comparison.md, .csv, .json and the plots, in `folder`; returns the rows.

    Args:
        facts: about machine and command, for the JSON.
    """
    import json

    made = rows(results)
    write_whole(folder / "comparison.md", markdown(made))
    write_whole(folder / "comparison.csv", as_csv(made))
    whole = {**facts, "rows": [asdict(row) for row in made], "results": list(results)}
    write_whole(folder / "comparison.json", json.dumps(whole, indent=1, sort_keys=True) + "\n")
    plots(results, made, folder)
    return made
