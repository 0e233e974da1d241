"""Charts as numbers: where lines, bars, ticks and marks lie. The page's template draws them as SVG.

Libraries (matplotlib, pygal) write colours into their SVG, which then does not follow the reader's
light or dark page, and lines that do not differ in dash and mark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from dept_fl.page.bounds import reach

WIDTH, HEIGHT = 400, 238
RIGHT, TOP, BOTTOM = 392, 12, 202
NAMED = 12  # more lines are muted, and their mean stands out
COLOURS = 7

_POINTS = 8_000  # of all lines of a chart
_LEAST_POINTS = 24  # of one
_MARKS = 14  # of one
_BARS = 60
_ROWS = 60  # of the table under a chart
_FAR_NAMES = 3
_R = 3.2  # half a mark's size
_LETTER = 7.2  # how wide at most, where ticks are written

Curve = Mapping[int, float]
Form = Callable[[float], str]


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A curve. look: which colour, dash and mark; -1 is muted, and -2 the mean of muted ones."""

    name: str
    look: int
    path: str
    marks: str
    last: str
    floor: float | None = None  # y of a line across, beside it
    floor_text: str = ""


@dataclass(frozen=True)
class Bar:
    """All of one part's rectangles."""

    name: str
    look: int
    path: str
    mean: str


@dataclass(frozen=True)
class Chart:
    """Of some measure by round.

    Attributes:
        about: what one who does not see it should know.
        left: where the axis of rounds begins.
        head, rows: the figures by round.
    """

    title: str
    about: str
    left: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    unit: str = ""


class _Axes:
    """From a chart's values to its points. form: of the values at the ticks."""

    def __init__(self, rounds: Sequence[float], values: Sequence[float], form: Form) -> None:
        at = ticks(min(values), max(values))
        texts = [form(value) for value in at]
        self.left = 12 + _LETTER * max(map(len, texts))
        self._x = min(rounds), max(max(rounds), min(rounds) + 1)
        self._y = min(at[0], *values), max(at[-1], *values)
        self.x_ticks = [Tick(self.x(r), str(r)) for r in _whole_ticks(min(rounds), max(rounds))]
        self.y_ticks = [Tick(self.y(v), text) for v, text in zip(at, texts, strict=True)]

    def x(self, round_: float) -> float:
        low, high = self._x
        return round(self.left + (round_ - low) / (high - low) * (RIGHT - self.left), 1)

    def y(self, value: float) -> float:
        low, high = self._y
        return round(BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP), 1)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, from one at or below the lowest to one at or above the highest."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 2.5, 5, 10, 20) if m * power >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _whole_ticks(low: float, high: float) -> list[int]:
    step = max(1, math.ceil(ticks(0, max(high - low, 1))[1]))
    return list(range(math.ceil(low / step) * step, math.floor(high) + 1, step))


def thin(rounds: Sequence[int], most: int) -> list[int]:
    """Every so many of them, the last among them."""
    step = max(1, math.ceil(len(rounds) / most))
    return list(rounds[::-1][::step][::-1])


# ---- lines --------------------------------------------------------------------------------------


def lines(
    title: str,
    unit: str,
    curves: Mapping[str, Curve],
    form: Form,
    floors: Mapping[str, float] | None = None,
) -> Chart:
    """A line for each silo. floors: a level of each to compare it with.

    Where there are more than NAMED, their mean over those that have a value stands out. Values far
    off are neither drawn nor in the mean.
    """
    curves = {k: v for k, v in curves.items() if v}
    most = reach([v for curve in curves.values() for v in curve.values()])
    levels = {name: level for name, level in (floors or {}).items() if abs(level) <= most}
    many = len(curves) > NAMED
    middle = _over_silos({name: _within(curve, most) for name, curve in curves.items()}, fmean)
    drawn: dict[str, Curve] = {name: curves[name] for name in sorted(curves)}
    if many:
        name = f"mean of {len(curves)} silos"
        drawn[name] = middle
        levels = {name: fmean(levels.values())} if levels else {}
    values = [v for curve in curves.values() for v in _within(curve, most).values()]
    axes = _Axes(_rounds(curves), [*values, *levels.values()], "{:g}".format)
    points = max(_LEAST_POINTS, _POINTS // len(curves))
    made = [
        _line(silo, _look(i, len(curves), many), curve, most, axes, form, levels.get(silo), points)
        for i, (silo, curve) in enumerate(drawn.items())
    ]
    shown = {made[-1].name: middle} if many else drawn
    ends: dict[str, Callable[[list[float]], float]] = {"lowest": min, "highest": max}
    spread = {k: _over_silos(curves, pick) for k, pick in ends.items()} if many else {}
    head, rows = _table(shown, form, spread)
    return Chart(
        title=title,
        unit=unit,
        about=_said(made[-1:] if many else made, _rounds(curves)),
        left=axes.left,
        x_ticks=axes.x_ticks,
        y_ticks=axes.y_ticks,
        lines=made,
        head=head,
        rows=rows,
        note=" ".join(filter(None, [_extremes(curves, form) if many else "", _far(curves, most)])),
    )


def _within(curve: Curve, most: float) -> Curve:
    return {round_: value for round_, value in curve.items() if abs(value) <= most}


def _far(curves: Mapping[str, Curve], most: float) -> str:
    counts = {name: len(curve) - len(_within(curve, most)) for name, curve in curves.items()}
    names = sorted(name for name, count in counts.items() if count)
    if not names:
        return ""
    rest = f" and {len(names) - _FAR_NAMES:,} more" if len(names) > _FAR_NAMES else ""
    who = ", ".join(names[:_FAR_NAMES]) + rest
    return f"Values too far off to be drawn, or in a mean: {sum(counts.values()):,} of {who}."


def _look(i: int, count: int, many: bool) -> int:
    if not many:
        return i
    return -2 if i == count else -1


def _line(
    name: str,
    look: int,
    curve: Curve,
    most: float,
    axes: _Axes,
    form: Form,
    floor: float | None,
    count: int,
) -> Line:
    """most: what is larger is not drawn. count: of points, at most."""
    rounds = thin(sorted(_within(curve, most)), count)
    points = [(axes.x(r), axes.y(curve[r])) for r in rounds]
    marked = points if len(points) == 1 or look >= 0 else []
    return Line(
        name=name,
        look=look,
        path="M" + "L".join(f"{x:g},{y:g}" for x, y in points) if points else "",
        marks="".join(mark(look, x, y) for x, y in thin_points(marked, _MARKS)),
        last=form(curve[max(curve)]),
        floor=None if floor is None else axes.y(floor),
        floor_text="" if floor is None else form(floor),
    )


def thin_points(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    return [points[i] for i in thin(range(len(points)), most)]


def mark(look: int, x: float, y: float) -> str:
    """A shape around a point, as a path; each colour has one of its own."""
    r = _R
    return [
        f"M{x - r:.1f},{y:g}a{r},{r} 0 1 0 {2 * r},0a{r},{r} 0 1 0 {-2 * r},0z",  # disc
        f"M{x - r:.1f},{y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",  # square
        f"M{x:g},{y - 4:.1f}l4,7h-8z",  # triangle
        f"M{x:g},{y - 4.4:.1f}l4.4,4.4l-4.4,4.4l-4.4,-4.4z",  # diamond
        f"M{x:g},{y + 4:.1f}l4,-7h-8z",  # triangle on its tip
        f"M{x - 1:g},{y - 4:.1f}h2v3h3v2h-3v3h-2v-3h-3v-2h3z",  # plus
        f"M{x - 4:.1f},{y - 1.5:.1f}h8v3h-8z",  # dash
    ][max(look, 0) % COLOURS]


def _over_silos(
    curves: Mapping[str, Curve], pick: Callable[[list[float]], float]
) -> dict[int, float]:
    """One curve of many, by the values that are there in each round."""
    return {r: pick([c[r] for c in curves.values() if r in c]) for r in _rounds(curves)}


def _rounds(curves: Mapping[str, Curve]) -> list[int]:
    return sorted({r for curve in curves.values() for r in curve})


def _extremes(curves: Mapping[str, Curve], form: Form) -> str:
    last = {name: curve[max(curve)] for name, curve in curves.items()}
    low, high = min(last, key=lambda n: last[n]), max(last, key=lambda n: last[n])
    return f"Last values: lowest {form(last[low])} ({low}), highest {form(last[high])} ({high})."


def _said(drawn: Sequence[Line], rounds: Sequence[int]) -> str:
    ends = "; ".join(f"{line.name} {line.last}" for line in drawn)
    return f"Lines over rounds {rounds[0]} to {rounds[-1]}. Last values: {ends}."


# ---- bars ---------------------------------------------------------------------------------------


def bars(title: str, parts: Mapping[str, Curve], form: Form) -> Chart:
    """A stack for each round, from below in the order of the parts; the mean of many rounds."""
    rounds = _rounds(parts)
    groups = _groups(rounds)
    heights = {
        part: [sum(curve.get(r, 0.0) for r in group) / len(group) for group in groups]
        for part, curve in parts.items()
    }
    tops = [sum(max(v, 0.0) for v in each) for each in zip(*heights.values(), strict=True)]
    axes = _Axes([groups[0][0] - 0.5, groups[-1][-1] + 0.5], [0.0, *tops], form)
    below, made = [0.0] * len(groups), []
    for i, (part, of_groups) in enumerate(heights.items()):
        path = ""
        for j, (group, height) in enumerate(zip(groups, of_groups, strict=True)):
            if height > 0:
                path += _rectangle(axes, group, below[j], below[j] + height)
                below[j] += height
        per_round = sum(parts[part].values()) / len(rounds)
        made.append(Bar(part, i, path, form(per_round)))
    head, rows = _table(parts, form, {"in all": _total(parts)})
    ends = ", ".join(f"{bar.name} {bar.mean}" for bar in made)
    many = len(groups[0]) > 1
    return Chart(
        title=title,
        about=f"Stacked bars, rounds {rounds[0]} to {rounds[-1]}. Mean of a round: {ends}.",
        left=axes.left,
        x_ticks=axes.x_ticks,
        y_ticks=axes.y_ticks,
        bars=made,
        head=head,
        rows=rows,
        note=f"Each bar is the mean of {len(groups[0])} rounds." if many else "",
    )


def _groups(rounds: Sequence[int]) -> list[list[int]]:
    size = math.ceil(len(rounds) / _BARS)
    return [list(rounds[i : i + size]) for i in range(0, len(rounds), size)]


def _rectangle(axes: _Axes, group: Sequence[int], low: float, high: float) -> str:
    left, right = axes.x(group[0] - 0.42), axes.x(group[-1] + 0.42)
    top, bottom = axes.y(high), axes.y(low)
    return f"M{left:g},{bottom:g}V{top:g}H{right:g}V{bottom:g}z"


def _total(parts: Mapping[str, Curve]) -> dict[int, float]:
    return {r: sum(curve.get(r, 0.0) for curve in parts.values()) for r in _rounds(parts)}


# ---- the table under a chart --------------------------------------------------------------------


def _table(
    columns: Mapping[str, Curve], form: Form, more: Mapping[str, Curve]
) -> tuple[list[str], list[list[str]]]:
    """The figures by round, for who does not see the chart or wants to know exactly."""
    shown = {**columns, **more}
    rounds = thin(_rounds(shown), _ROWS)
    rows = [
        [str(r), *(form(curve[r]) if r in curve else "–" for curve in shown.values())]
        for r in rounds
    ]
    return ["round", *shown], rows
