"""What of a ledger may be on a page: bounded, and no character that steers.

Silos choose their names, numbers and texts, so all of these are taken for hostile. Markup is left
to the template, which escapes whatever it is given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from statistics import median_low
from typing import Any

from dept_fl.report import Event, harmless

NAME, REASON, _SAMPLE = 80, 500, 2_000  # characters
_SILOS = 500
_FACTS = 20  # of a silo, or versions
_LARGEST = 1e15
_FAR = 1e3  # times the middle value; what is below it itself is far from nothing


def within_bounds(events: Iterable[Event]) -> tuple[list[Event], int]:
    """Events as `status.read` gives them, without what is too long, too large or of a wrong kind.

    Of a silo's figures that are too large tells a warning among them.

    Returns:
        the events, and how many silos were too many.
    """
    found = [kept for event in events for kept in _tame(event)]
    plans = [event for event in found if event["event"] == "plan"]
    names = {e["silo"] for e in found if e.get("silo")}
    names |= {silo for plan in plans for silo in plan["silos"]}
    shown = {*sorted(names)[:_SILOS], ""}
    for plan in plans:
        plan["silos"] = {k: v for k, v in plan["silos"].items() if k in shown}
    return [e for e in found if e.get("silo", "") in shown], max(0, len(names) - _SILOS)


def number(facts: Mapping[str, Any], key: str) -> float | None:
    """None where there is none that can be shown."""
    value = facts.get(key)
    return value if isinstance(value, int | float) and abs(value) < _LARGEST else None


def reach(values: Collection[float]) -> float:
    """What is larger than this is far off, such as the figures of a silo that diverged, or lies.

    Beside it, nothing could be told of the others' lines and means.
    """
    sizes = [abs(value) for value in values if value]
    return max(_FAR, _FAR * median_low(sizes)) if sizes else _FAR


def near(values: Iterable[float | None]) -> list[float]:
    """Those that are known and not far off."""
    known = [value for value in values if value is not None]
    most = reach(known)
    return [value for value in known if abs(value) <= most]


def clip(text: str, longest: int) -> str:
    """Without control characters, and cut."""
    cut = harmless(text[:longest])
    return f"{cut}…" if len(text) > longest else cut


def _tame(event: Event) -> Iterator[Event]:
    """The event without what is too long or too large, if then something is left to show."""
    kept = {clip(key, NAME): _tamed(key, value) for key, value in event.items()}
    made = {key: value for key, value in kept.items() if value is not None}
    large = _too_large(event)
    made |= dict.fromkeys(large.keys() & _LAST)
    if made.keys() >= _needed(event):
        yield made
        if large:
            said = ", ".join(f"{key}={_power(value)}" for key, value in large.items())
            reason = f"too large to be shown: {said}"
            yield {**made, "event": "warning", "reason": clip(reason, REASON)}


_LAST = {"bits_per_byte", "unigram_bits_per_byte", "perplexity"}  # no older one stands for it
_WHEN = {"time", "round", "during_round"}


def _too_large(event: Event) -> dict[str, float]:
    """What a silo measured, or says so, that cannot be shown."""
    if event["event"] not in ("silo_train", "silo_eval"):
        return {}
    numbers = {k: v for k, v in event.items() if isinstance(v, int | float) and k not in _WHEN}
    return {clip(k, NAME): v for k, v in numbers.items() if number(event, k) is None}


def _power(value: float) -> str:
    """Of JSON, whose whole numbers may be too long for a float."""
    return f"{float(max(-1e300, min(1e300, value))):.3g}"


_LENGTHS = {"reason": REASON, "text": _SAMPLE}
_KINDS_OF = {
    "event": str, "silo": str, "reason": str, "text": str, "name": str,
    "round": int, "of_round": int, "silos": dict, "versions": dict,
}  # fmt: skip


def _tamed(key: str, value: Any) -> Any:
    """None: not to be shown."""
    if not isinstance(value, _KINDS_OF.get(key, object)):
        return None
    if isinstance(value, str):
        return clip(value, _LENGTHS.get(key, NAME))
    if isinstance(value, int | float):
        return number({key: value}, key)
    if key == "silos" and isinstance(value, dict):
        return {clip(silo, NAME): _tame_flat(facts) for silo, facts in value.items()}
    return _tame_flat(value) if key == "versions" else None


def _tame_flat(facts: Any) -> dict[str, Any]:
    if not isinstance(facts, dict):
        return {}
    flat = {k: v for k, v in list(facts.items())[:_FACTS] if isinstance(v, str | int | float)}
    return {clip(key, NAME): _tamed("", value) for key, value in flat.items()}


def _needed(event: Event) -> set[str]:
    """The fields that `status.read` found in it; they may be absurd all the same."""
    return event.keys() & {
        "event", "time", "silo", "round", "rounds", "seconds", "estimate_s", "recipe",
        "experiment", "bits_per_byte", "unigram_bits_per_byte", "reason", "silos", "text",
    }  # fmt: skip
