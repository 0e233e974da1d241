"""From facts to the page: figures as text, charts, and the template around them."""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dept_fl.checkpoint import write_whole
from dept_fl.errors import DeptError
from dept_fl.page import chart
from dept_fl.page.bounds import near
from dept_fl.page.facts import Curve, Facts, gather
from dept_fl.report import duration, figure, size
from dept_fl.status import Status
from dept_fl.traffic import Traffic

_HERE = Path(__file__).parent
_NAMES = 6  # of silos that are alike, before the rest is counted

_WHAT_TRAVELS = {
    "glob": "the body and all embeddings",
    "trim": "the body, and the embeddings of the ids that occur in a silo's text",
    "spec": "the body alone; a silo keeps its embeddings of the ids in its text",
    "spec-opt": "the body alone; a silo keeps its own embeddings and its own tokenizer",
}
_NORMS = {
    "body_delta_norm": "Body's delta",
    "body_norm": "Body",
    "embedding_delta_norm": "Embeddings' change",
    "embedding_norm": "Embeddings",
    "activation_norm": "Activations",
    "gradient_norm": "Gradient",
}


def write_page(run_dir: Path, out: Path | None = None) -> tuple[Facts, Path]:
    """The page of a run, put into its folder unless told otherwise; returns what it shows.

    Raises:
        DeptError: no ledger is there, it is damaged, or the page cannot be written.
    """
    facts, file = gather(run_dir, time.time()), out or run_dir / "report.html"
    try:
        if file.exists() and not file.is_file():
            raise DeptError(f"{file}: is not a regular file; name another file with --out")
        # Replaced is the file that a link leads to, never the link.
        write_whole(Path(os.path.realpath(file)), page(facts))
    except OSError as error:
        raise DeptError(
            f"{file}: cannot be written: {error.strerror}; name another file with --out"
        ) from error
    return facts, file


def page(facts: Facts) -> str:
    """One HTML text that refers to nothing outside itself."""
    templates = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"size": size, "moment": moment, "figure": figure, "count": count}
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return templates.get_template("page.html").render(
        facts=facts,
        status=facts.status,
        style=style,
        style_digest=digest,
        chart=chart,
        state=_state(facts.status),
        cards=_cards(facts),
        plan=_plan(facts),
        learning=_learning(facts),
        norms=_norms(facts),
        flows=_flows(facts),
        parts=_parts(facts),
        formula=_formula(facts.formula),
        paper=_paper(facts),
        about=_about(facts),
    )


# ---- figures as text ----------------------------------------------------------------------------


def count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def moment(seconds: float, form: str = "%Y-%m-%d %H:%M UTC") -> str:
    return time.strftime(form, time.gmtime(seconds))


def _seconds(value: float) -> str:
    """Of a part: 0 s, < 1 ms, 19 ms, 21.9 s, 1,234 s."""
    if 0 < value < 1e-3:
        return "< 1 ms"
    if 0 < value < 0.9995:
        return f"{value * 1e3:.0f} ms"
    return f"{value:.3g} s" if value < 999.5 else f"{value:,.0f} s"  # not 1e+03


def _bytes(value: float) -> str:
    return size(round(value))


# ---- the page's parts ---------------------------------------------------------------------------


def _state(status: Status) -> str:
    if status.state == "ended":
        return "ended"
    if status.state == "silent":
        return "stopped or stalled"
    left = f", about {duration(status.left_s)} left" if status.left_s else ""
    return f"running{left}"


def _cards(facts: Facts) -> list[tuple[str, str, str]]:
    """Name, figure and a word below it."""
    total, done = facts.status.rounds, facts.status.round
    cards = [("Rounds", f"{done} of {total}" if total else str(done), "")]
    if facts.bits_per_byte is not None:
        floor = f"unigram floor {figure(facts.unigram_bits_per_byte)}"
        found = [row.status.bits_per_byte for row in facts.silos]
        bits = [value for value in found if value is not None]
        averaged = len(near(bits))
        below = f"mean of {averaged} silos; {floor}" if averaged > 1 else floor
        if far := len(bits) - averaged:
            below += f"; left out as far off: {far}"
        cards.append(("Bits per byte", figure(facts.bits_per_byte), below))
    if seconds := _in_all(facts.server_s or facts.silo_s):
        where = "a round" if facts.server_s else "a round at a silo"
        below = f"{_seconds(seconds / max(1, done))} {where}"
        cards.append(("Time in rounds", duration(seconds), below))
    for way in ("up", "down"):
        if sent := _in_all({k: v for k, v in facts.bytes.items() if k.startswith(way)}):
            cards.append((f"Sent {way}", _bytes(sent), f"{_bytes(sent / max(1, done))} a round"))
    refused = facts.counts["failure"]
    others = sum(facts.counts.values()) - refused
    cards.append(("Refused or lost", f"{refused:,}", f"{others:,} other notes" if others else ""))
    return cards


def _in_all(parts: Mapping[str, Curve]) -> float:
    return sum(sum(curve.values()) for curve in parts.values())


def _plan(facts: Facts) -> dict[str, str]:
    status, body = facts.status, facts.plan.get("body_parameters")
    travels = "" if facts.as_one else _WHAT_TRAVELS.get(status.variant, "")
    if travels and isinstance(body, int | float):
        travels += f"; the body has {body / 1e6:,.2f} M parameters"
    return {
        "Variant": "" if facts.as_one else status.variant.upper(),
        "What travels": travels,
        "Silos": f"{len(facts.silos) - facts.as_one + facts.left_out:,}",
        "Rounds": f"{status.rounds:,}" if status.rounds else "",
        **facts.words,
    }


def _learning(facts: Facts) -> list[chart.Chart]:
    floors = {
        row.status.silo: row.status.unigram_bits_per_byte
        for row in facts.silos
        if row.status.unigram_bits_per_byte is not None
    }
    made = []
    if bits := facts.curves.get("bits_per_byte"):
        title = "Bits per byte of validation text"
        made.append(chart.lines(title, "Bits per byte", bits, figure, floors))
    if loss := facts.curves.get("loss"):
        made.append(chart.lines("Training loss", "Nats per token", loss, figure))
    return made


def _norms(facts: Facts) -> list[chart.Chart]:
    return [
        chart.lines(title, "Euclidean norm", facts.curves[measure], figure)
        for measure, title in _NORMS.items()
        if measure in facts.curves
    ]


def _flows(facts: Facts) -> list[chart.Chart]:
    stacks = [
        ("Bytes of a round, all silos", facts.bytes, _bytes),
        ("Seconds of a round at the server", facts.server_s, _seconds),
        ("Seconds of a silo in a round, mean", facts.silo_s, _seconds),
    ]
    return [chart.bars(title, parts, form) for title, parts, form in stacks if parts]


def _parts(facts: Facts) -> list[tuple[str, str, str, str, str]]:
    """Where time went: who, part, a round, all rounds, share."""
    rows = []
    for who, parts in (("server", facts.server_s), ("a silo", facts.silo_s)):
        whole = _in_all(parts)
        for part, curve in parts.items():
            spent = sum(curve.values())
            share = f"{spent / whole:.1%}" if whole else "–"  # sums to 0 in a damaged ledger
            rows.append((who, part, _seconds(spent / len(curve)), _seconds(spent), share))
    return rows


def _formula(found: list[Traffic] | str) -> list[dict[str, str]] | str:
    """Measured bytes beside the formula's; silos with the same figures share a row."""
    if isinstance(found, str):
        return found
    rows = []
    for (up, down, sent_up, sent_down), each in groupby(sorted(found, key=_sizes), key=_sizes):
        alike = list(each)
        rows.append(
            {
                "silos": _some(sorted({one.silo for one in alike})),
                "updates": f"{sum(len(one.rounds) for one in alike):,}",
                "formula_up": f"{up:,}",
                "up": f"{sent_up:,}",
                "up_ratio": f"{alike[0].up_ratio:.4f}",
                "formula_down": f"{down:,}",
                "down": f"{sent_down:,}",
                "down_ratio": f"{alike[0].down_ratio:.4f}",
            }
        )
    return rows


def _sizes(each: Traffic) -> tuple[int, int, int, int]:
    return each.formula_up, each.formula_down, each.up_bytes, each.down_bytes


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + rest


def _paper(facts: Facts) -> dict[str, str]:
    """Parameters sent up by each step, beside a gradient in every step (paper, Table 1)."""
    known = [
        (row.held_parameters, row.sent_parameters)
        for row in facts.silos
        if row.held_parameters and row.sent_parameters
    ]
    if not facts.local_steps or not known:
        return {}
    std = fmean(held for held, _ in known)
    own = fmean(sent for _, sent in known) / facts.local_steps
    return {"std": count(std), "own": count(own), "ratio": f"{std / own:,.1f}"}


def _about(facts: Facts) -> dict[str, str]:
    plan, status = facts.plan, facts.status
    versions = plan.get("versions", {})
    devices = sorted({row.device for row in facts.silos if row.device})
    return {
        "Experiment": status.experiment,
        "Seed": str(plan.get("seed", "")),
        "First event": moment(facts.began),
        "Last event": moment(status.last_event),
        "Page made": moment(status.time),
        "Resumed behind rounds": ", ".join(map(str, facts.resumed[-20:])),
        "Silos train on": ", ".join(devices),
        "Server's versions": ", ".join(f"{name} {v}" for name, v in sorted(versions.items())),
    }
