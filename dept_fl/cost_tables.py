"""How `dept cost` shows what it counted: tables of 100 columns, and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from dept_fl.bill import Share, Size, Vocabularies, bill, vocabularies
from dept_fl.config import Recipe
from dept_fl.cost import METHODS, trains_in_bf16
from dept_fl.paper import (
    ALIBI,
    FORMULAS,
    LEARNED,
    LOCAL_STEPS,
    SEQUENCE_TOKENS,
    Comparison,
    Reading,
    compare,
    off_formula,
)
from dept_fl.report import size, table
from dept_fl.traffic import traffic

WIDTH = 100


@dataclass(frozen=True)
class Shown:
    """What was counted, for people and for programs."""

    view: RenderableType
    facts: Any

    def to_json(self) -> str:
        return json.dumps(self.facts, sort_keys=True, allow_nan=False)


# ---- a recipe -----------------------------------------------------------------------------------


def of_recipe(recipe: Recipe, home: Path, given: Mapping[str, int]) -> Shown:
    """What every method costs the recipe's silos. given: as `bill.vocabularies` takes them."""
    known = vocabularies(recipe, home, given)
    shares = bill(recipe, known)
    own = [share for share in shares if share.method == recipe.label]
    view = Group(
        _head(recipe, own),
        _parameters(recipe, shares),
        _sent(recipe, shares),
        _memory(recipe, shares),
        _by_silo(recipe, own),
        *_notes(recipe, known),
    )
    facts = {
        "recipe": recipe.name,
        "method": recipe.label,
        "local_steps": recipe.inner.local_steps,
        "bf16": trains_in_bf16(recipe),
        "shares": [share.to_dict() for share in shares],
    }
    return Shown(view, facts)


def _head(recipe: Recipe, own: Sequence[Share]) -> str:
    inner = recipe.inner
    return (
        f"{recipe.name}: {recipe.label}; {_many(len(own), 'silo')}; rounds of "
        f"{_many(inner.local_steps, 'local step')} of {inner.batch_size} x "
        f"{recipe.sequence_tokens} tokens"
    )


def _parameters(recipe: Recipe, shares: Sequence[Share]) -> Table:
    rows = []
    for method, of_method in _by_method(shares):
        held = [share.parameters for share in of_method]
        rows.append(
            [
                _marked(method, recipe),
                _mean_size([share.vocabulary for share in of_method]),
                _count(mean(p.body for p in held)),
                _count(mean(p.tokens for p in held)),
                _count(mean(p.positions for p in held)),
                _count(mean(p.total for p in held)),
            ]
        )
    head = ("method", "vocabulary", "body", "tokens", "positions", "in all")
    return table(head, rows, "parameters" + _of_silos(shares))


def _sent(recipe: Recipe, shares: Sequence[Share]) -> Table:
    rows = [
        [
            _marked(method, recipe),
            _count(mean(share.sent_a_step for share in of_method)),
            size(round(mean(share.up_bytes for share in of_method))),
            size(round(mean(share.down_bytes for share in of_method))),
        ]
        for method, of_method in _by_method(shares)
    ]
    head = ("method", "parameters a step", "up a round", "down a round")
    codecs = f"{recipe.wire.up} up, {recipe.wire.down} down"
    return table(head, rows, f"what is sent, {codecs} (STD: fp32){_of_silos(shares)}")


def _of_silos(shares: Sequence[Share]) -> str:
    silos = len({share.silo for share in shares})
    return f"; mean of {silos} silos" if silos > 1 else ""


def _memory(recipe: Recipe, shares: Sequence[Share]) -> Table:
    rows = []
    for method, of_method in _by_method(shares):
        most = max((share.memory for share in of_method), key=lambda memory: memory.total)
        parts = (most.weights, most.gradients, most.optimizer, most.activations, most.logits)
        rows.append([_marked(method, recipe), *map(size, parts), size(most.total)])
    head = ("method", "weights", "gradients", "optimiser", "activations", "logits", "in all")
    sequences = min(recipe.inner.sequences_per_pass, recipe.inner.batch_size)
    precision = "bf16 with fp32 weights" if trains_in_bf16(recipe) else "fp32"
    title = (
        f"memory of training in {precision}, {sequences} x {recipe.sequence_tokens} tokens at "
        "once, of the silo that needs most"
    )
    return table(head, rows, title)


def _by_silo(recipe: Recipe, own: Sequence[Share]) -> Table:
    rows = [
        [
            share.silo,
            f"{share.vocabulary.tokens:,}",
            share.vocabulary.source,
            _count(share.parameters.total),
            size(share.memory.total),
            size(share.up_bytes),
        ]
        for share in own
    ]
    head = ("silo", "vocabulary", "known from", "parameters", "memory", "up/round")
    return table(head, rows, f"{recipe.label}, silo by silo")


def _notes(recipe: Recipe, known: Vocabularies) -> list[str]:
    notes = [f"* this recipe. STD sends a gradient in each of {recipe.inner.local_steps} steps."]
    if any(size.source == "at most" for size in known.used.values()):
        notes.append(
            "<= V_k of TRIM and SPEC is not known before the text is tokenised, and at most V; "
            "give it (tokenizer=shared --vocabulary NAME=SIZE), or run once with tokenizer=shared"
        )
    return notes


def _by_method(shares: Sequence[Share]) -> list[tuple[str, list[Share]]]:
    return [(method, [s for s in shares if s.method == method]) for method in METHODS]


def _marked(method: str, recipe: Recipe) -> str:
    return f"{method} *" if method == recipe.label else method


def _mean_size(sizes: Sequence[Size]) -> str:
    bound = "<= " if any(size.source == "at most" for size in sizes) else ""
    return f"{bound}{mean(size.tokens for size in sizes):,.0f}"


def _count(number: float) -> str:
    """Parameters as people say them: 88.6 k, 1.77 M, 1.725 B."""
    if number < 1e6:
        return f"{number / 1e3:.1f} k" if number else "0"
    return f"{number / 1e6:.2f} M" if number < 1e9 else f"{number / 1e9:.3f} B"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


# ---- the paper ----------------------------------------------------------------------------------


def of_paper() -> Shown:
    """Every cost figure of the paper beside ours."""
    readings = [Reading(LEARNED), Reading(ALIBI)]
    comparisons = compare(readings)
    tables = [_figures(*group) for group in groupby(comparisons, lambda c: c.figure.group)]
    view = Group(_PAPER_HEAD, _formulas(readings), *tables, _sum(comparisons))
    return Shown(view, [_comparison_facts(comparison) for comparison in comparisons])


_PAPER_HEAD = (
    f"The paper's cost figures beside counts of empty models: {LEARNED} has {SEQUENCE_TOKENS} "
    f"learned positions,\n{ALIBI} (ALiBi) none; N_local is {LOCAL_STEPS}. "
    "Difference: ours over the print, less 1.\n"
)


def _sum(comparisons: Sequence[Comparison]) -> str:
    counted = [c for c in comparisons if c.ours]
    printed = {
        reading: sum(c.figure.agrees(c.ours[reading]) != "" for c in counted)
        for reading in (LEARNED, ALIBI)
    }
    differ, missing = len(counted) - printed[LEARNED], len(comparisons) - len(counted)
    return (
        f"{len(comparisons)} figures: {printed[LEARNED]} come out as printed with {LEARNED} "
        f"({printed[ALIBI]} with {ALIBI}), {differ} differ for the reason given,\n"
        f"{missing} are taken as given or not derivable."
    )


def _formulas(readings: Sequence[Reading]) -> Table:
    rows = []
    for formula in FORMULAS:
        memory, sent = off_formula(formula, readings)
        rows.append(
            [
                formula.method.upper(),
                formula.memory_text,
                f"{memory:g}",
                formula.sent_text,
                f"{sent:g}",
                "yes" if formula.own_vocabulary else "no",
            ]
        )
    head = ("method", "memory", "off by", "sent a step", "off by", "own vocabulary")
    title = "Table 1: formulas; off by: the most that our counts differ, in parameters"
    return table(head, rows, title)


def _figures(group: str, comparisons: Iterable[Comparison]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, title=group, title_justify="left", title_style="")
    made.add_column("figure", overflow="fold", max_width=24)
    for name in ("paper", LEARNED, "diff", ALIBI, "diff"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("why", overflow="fold")
    for comparison in comparisons:
        figure = comparison.figure
        cells = [
            cell
            for reading in (LEARNED, ALIBI)
            for cell in (
                (figure.written(comparison.ours[reading]), _percent(comparison.difference(reading)))
                if comparison.ours
                else ("-", "-")
            )
        ]
        made.add_row(figure.name, figure.printed, *cells, comparison.why)
    return made


def _percent(difference: float) -> str:
    return f"{round(100 * difference, 1) + 0.0:+.1f} %"  # 0.0 takes the sign off a -0.0


def _comparison_facts(comparison: Comparison) -> dict[str, Any]:
    return {
        "group": comparison.figure.group,
        "name": comparison.figure.name,
        "printed": comparison.figure.printed,
        "value": comparison.figure.value,
        "ours": comparison.ours,
        "difference": {name: comparison.difference(name) for name in comparison.ours},
        "why": comparison.why,
    }


# ---- a run --------------------------------------------------------------------------------------


def of_run(run_dir: Path) -> Shown:
    """A run's measured bytes beside the formula's."""
    found = traffic(run_dir)
    rows = [
        [
            each.silo,
            _ranges(each.rounds),
            f"{each.formula_up:,}",
            f"{each.up_bytes:,}",
            f"{each.up_ratio:.4f}",
            f"{each.formula_down:,}",
            f"{each.down_bytes:,}",
            f"{each.down_ratio:.4f}",
        ]
        for each in found
    ]
    head = ("silo", "rounds", "formula up", "up", "ratio", "formula down", "down", "ratio")
    facts = [
        {**asdict(each), "up_ratio": each.up_ratio, "down_ratio": each.down_ratio} for each in found
    ]
    line = "bytes of a round's arrays: by the formula (with 128 an array), and measured"
    return Shown(Group(line, table(head, rows)), facts)


def _ranges(rounds: Sequence[int]) -> str:
    """1-12; or 1-3, 5."""
    ranges: list[list[int]] = []
    for number in rounds:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ", ".join("-".join(map(str, each)) for each in ranges)
