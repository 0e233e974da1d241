"""What a run's page shows, from its ledger and checkpoint."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from dept_fl.config import Recipe
from dept_fl.errors import DeptError
from dept_fl.page.bounds import NAME, REASON, clip, near, number, within_bounds
from dept_fl.report import Event
from dept_fl.status import SiloStatus, Status, of_job, read, summary
from dept_fl.traffic import Traffic, measured, recipe_of

Curve = dict[int, float]  # by round

_INCIDENTS = 200
_SAMPLES = 60
_CONFIG = 100_000  # characters
_EVERYONE = "all"  # who trains where one model learns from all silos' text

_TRAINED = (
    "loss",
    "body_delta_norm",
    "embedding_delta_norm",
    "gradient_norm",
    "body_norm",
    "embedding_norm",
)
_EVALUATED = ("bits_per_byte", "perplexity", "activation_norm")

# Parts by what people call them, and the fields of the ledger that they come from.
_BYTES = {
    "up, body": "bytes_up_body",
    "up, embeddings": "bytes_up_embeddings",
    "down, body": "bytes_down_body",
    "down, embeddings": "bytes_down_embeddings",
}
_SILO_S = {
    "load": "load_s",
    "settle in": "settle_s",
    "evaluate": "evaluate_s",
    "train": "train_s",
    "encode": "encode_s",
    "save": "save_s",
    "transfer": "transfer_s",
    "check": "merge_s",
}
_REST, _SAVE = "take in replies", "save"
_ROUND_S = {
    "send": "push_s", "wait for silos": "wait_s", "merge, outer step": "outer_s", _SAVE: "save_s"
}  # fmt: skip
_SERVER_S = ("send", "wait for silos", _REST, "merge, outer step", _SAVE)  # as they come


@dataclass(frozen=True)
class SiloRow:
    """A silo of the table; None is not known."""

    status: SiloStatus
    device: str
    vocabulary: float | None
    train_bytes: float | None
    train_tokens: float | None
    held_parameters: float | None
    sent_parameters: float | None
    rounds: int
    loss: float | None
    perplexity: float | None
    bytes_up: float | None
    bytes_down: float | None


@dataclass(frozen=True)
class Trouble:
    """What went wrong. kind: failure, warning, absent or late."""

    kind: str
    time: float
    round: int
    silo: str  # empty where a node was refused
    reason: str


@dataclass(frozen=True)
class Sample:
    """What a silo's model wrote behind a round."""

    silo: str
    round: int
    text: str


@dataclass(frozen=True)
class Facts:
    """Of one run, at one moment.

    Attributes:
        status: as `dept status` has it.
        plan: the newest one's numbers and words; empty for a comparison's job.
        began: in seconds since 1970.
        resumed: behind which rounds.
        curves: by measure and silo.
        bytes: by part, over all silos.
        silo_s: seconds by part, mean over the silos of a round.
        server_s: seconds of the server by part.
        as_one: one model learned from all silos' text; it stands among them as `all`.
        troubles: the newest, and of each kind how many there were.
        formula: measured bytes beside the formula's, or why there are none.
        local_steps: of a round.
        words: the plan as people say it.
        recipe: as YAML; empty where no checkpoint has it.
        left_out: silos that are too many for a page.
    """

    status: Status
    plan: Event
    began: float
    resumed: list[int]
    curves: dict[str, dict[str, Curve]]
    bytes: dict[str, Curve]
    silo_s: dict[str, Curve]
    server_s: dict[str, Curve]
    silos: list[SiloRow]
    as_one: bool
    troubles: list[Trouble]
    counts: dict[str, int]
    samples: list[Sample]
    formula: list[Traffic] | str
    local_steps: int | None
    words: dict[str, str]
    recipe: str
    left_out: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False)

    @property
    def bits_per_byte(self) -> float | None:
        """Mean over the silos of the last that each measured, but for what is far off."""
        return _mean(row.status.bits_per_byte for row in self.silos)

    @property
    def unigram_bits_per_byte(self) -> float | None:
        return _mean(row.status.unigram_bits_per_byte for row in self.silos)


def gather(run_dir: Path, now: float) -> Facts:
    """What is known of the run in this folder at the time `now`.

    Raises:
        DeptError: no ledger is there, or it is damaged.
    """
    events, left_out = within_bounds(read(run_dir))
    if not events:
        raise DeptError(f"{run_dir}/metrics.jsonl: no event in it can be shown")
    recipe = _recipe(run_dir)
    plan = next((e for e in reversed(events) if e["event"] == "plan"), {})
    status = summary(events, now)
    if not plan:
        status = _of_job(of_job(status, run_dir), run_dir, recipe)
    as_one = not plan and any(e["silo"] == _EVERYONE for e in _of(events, "silo_train"))
    troubles = _troubles(events)
    return Facts(
        status=status,
        plan={key: value for key, value in plan.items() if key not in ("silos", "event")},
        began=min(e["time"] for e in events),
        resumed=[e["round"] for e in _of(events, "resume") if "round" in e],
        curves=_curves(events),
        bytes=_by_round(events, _BYTES, sum),
        silo_s=_by_round(events, _SILO_S, fmean),
        server_s=_server_s(events),
        silos=_silos(events, plan, status),
        as_one=as_one,
        troubles=troubles[-_INCIDENTS:],
        counts={kind: sum(t.kind == kind for t in troubles) for kind in _KINDS},
        samples=_samples(events),
        formula=_formula(events, recipe, run_dir),
        local_steps=recipe.inner.local_steps if recipe else None,
        words=_words(recipe, as_one) if recipe else {},
        recipe=clip(OmegaConf.to_yaml(asdict(recipe)), _CONFIG) if recipe else "",
        left_out=left_out,
    )


def _recipe(run_dir: Path) -> Recipe | None:
    try:
        return recipe_of(run_dir)
    except DeptError:  # none yet, or a ledger that was copied alone
        return None


def _formula(events: list[Event], recipe: Recipe | None, run_dir: Path) -> list[Traffic] | str:
    if recipe is None:
        return "no checkpoint lies beside the ledger, and so no recipe to count with"
    try:
        return measured(events, recipe, run_dir)
    except (DeptError, TypeError) as error:  # nothing is measured, or sizes are no numbers
        return clip(str(error), REASON)


def _of_job(status: Status, run_dir: Path, recipe: Recipe | None) -> Status:
    """A comparison's jobs write no plan."""
    name = clip(run_dir.resolve().name, NAME)
    if recipe is None:
        return replace(status, name=name)
    return replace(status, name=name, variant=recipe.label, rounds=recipe.rounds)


def _words(recipe: Recipe, as_one: bool) -> dict[str, str]:
    """as_one: one model learns from all silos' text, and nothing travels."""
    inner, outer, wire = recipe.inner, recipe.outer, recipe.wire
    model = {"preset": recipe.model.preset, **recipe.model.config}
    rate = f"{inner.learning_rate:g}, {inner.warmup_steps} steps of warm-up, cosine"
    words = {
        "Model": ", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in model.items() if value != ""
        ),
        "A round": f"{inner.local_steps} local steps of {inner.batch_size} × "
        f"{recipe.sequence_tokens} tokens",
        "Inner optimiser": f"{inner.optimizer}, {rate}, state: {inner.state}",
    }
    if as_one:
        words["Trained"] = "one model, on a mixture of all silos' text"
    else:
        words |= {
            "Outer optimiser": f"{outer.optimizer}, {outer.merge} of the deltas",
            "On the wire": f"{wire.up} up, {wire.down} down, "
            + ("the whole body" if wire.fragments == 1 else f"{wire.fragments} fragments in turn"),
            "Tokenizers": "each silo's own" if recipe.own_tokenizers else "one for all silos",
        }
    return {key: clip(text, REASON) for key, text in words.items()}


# ---- from events to facts -----------------------------------------------------------------------


def _curves(events: list[Event]) -> dict[str, dict[str, Curve]]:
    curves: dict[str, dict[str, Curve]] = defaultdict(lambda: defaultdict(dict))
    for event in events:
        for measure, round_, value in _measures(event):
            curves[measure][event["silo"]][round_] = value
    return {measure: dict(of_silos) for measure, of_silos in curves.items()}


def _measures(event: Event) -> Iterable[tuple[str, int, float]]:
    """Measure, round and value. A body is evaluated in the round behind the one that made it."""
    kind, round_ = event["event"], event.get("round")
    if not isinstance(round_, int) or kind not in ("silo_train", "silo_eval"):
        return
    behind = round_ if kind == "silo_eval" else round_ - 1  # in a comparison's federations
    taken = [(key, behind) for key in _EVALUATED]
    if kind == "silo_train":
        taken += [(key, round_) for key in _TRAINED]
    for key, at in taken:
        value = number(event, key)
        if value is not None:
            yield key, at, value


def _by_round(
    events: list[Event],
    parts: Mapping[str, str],
    over_silos: Callable[[list[float]], float],
) -> dict[str, Curve]:
    values: dict[str, dict[int, list[float]]] = {part: defaultdict(list) for part in parts}
    for event in _of(events, "silo_train"):
        for part, key in parts.items():
            value = number(event, key)
            if value is not None:
                values[part][event["round"]].append(value)
    made = {
        part: {round_: over_silos(each) for round_, each in sorted(of_rounds.items())}
        for part, of_rounds in values.items()
    }
    return _without_nothing(made)


def _server_s(events: list[Event]) -> dict[str, Curve]:
    seconds: dict[str, Curve] = {part: {} for part in _SERVER_S}
    for event in _of(events, "round"):
        parts = {part: number(event, key) for part, key in _ROUND_S.items()}
        known = {part: value for part, value in parts.items() if value is not None}
        for part, value in known.items():
            seconds[part][event["round"]] = value
        if known:
            rest = event["seconds"] - sum(known.values())
            seconds[_REST][event["round"]] = max(0.0, rest)
    if not seconds[_SAVE]:  # of a version that saved behind each round
        for event in _of(events, "checkpoint"):
            saved = number(event, "save_s")
            if saved is not None and "round" in event:
                seconds[_SAVE][event["round"]] = saved
    return _without_nothing(seconds)


def _without_nothing(parts: dict[str, Curve]) -> dict[str, Curve]:
    return {part: curve for part, curve in parts.items() if any(curve.values())}


def _silos(events: list[Event], plan: Event, status: Status) -> list[SiloRow]:
    registered: dict[str, dict[str, Any]] = defaultdict(dict)
    trained: dict[str, dict[int, Event]] = defaultdict(dict)
    perplexity: dict[str, float | None] = {}
    for event in events:
        match event["event"]:
            case "join":
                registered[event["silo"]] |= event
            case "silo_train":
                trained[event["silo"]][event["round"]] = event
        if event["event"] in ("silo_eval", "silo_train") and "perplexity" in event:
            perplexity[event["silo"]] = number(event, "perplexity")
    for name, facts in plan.get("silos", {}).items():
        registered[name] |= facts
    return [
        _row(each, registered[each.silo], trained[each.silo], perplexity.get(each.silo))
        for each in status.silos
    ]


def _row(
    status: SiloStatus,
    registered: Mapping[str, Any],
    trained: dict[int, Event],
    perplexity: float | None,
) -> SiloRow:
    newest = trained[max(trained)] if trained else {}
    return SiloRow(
        status=status,
        device=clip(str(registered.get("device", "")), NAME),
        vocabulary=number(registered, "vocabulary"),
        train_bytes=number(registered, "train_bytes"),
        train_tokens=number(registered, "train_tokens"),
        held_parameters=number(registered, "held_parameters"),
        sent_parameters=number(registered, "up_parameters"),
        rounds=len(trained),
        loss=number(newest, "loss"),
        perplexity=perplexity,
        bytes_up=_sum(trained, "up"),
        bytes_down=_sum(trained, "down"),
    )


def _sum(trained: Mapping[int, Event], way: str) -> float | None:
    parts = [
        number(event, f"bytes_{way}_{part}")
        for event in trained.values()
        for part in ("body", "embeddings")
    ]
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


_KINDS = ("failure", "warning", "absent", "late")


def _troubles(events: list[Event]) -> list[Trouble]:
    """Oldest first."""
    return [
        Trouble(
            kind=e["event"],
            time=e["time"],
            round=e.get("round", 0),
            silo=e.get("silo", ""),
            reason=e.get("reason") or f"its answer of round {e.get('of_round', '?')} came late",
        )
        for e in events
        if e["event"] in _KINDS
    ]


def _samples(events: list[Event]) -> list[Sample]:
    """The newest, by round and silo; a round that was done again has its last."""
    found = {
        (e["round"], e["silo"]): Sample(e["silo"], e["round"], e["text"])
        for e in _of(events, "sample")
        if {"round", "silo", "text"} <= e.keys()
    }
    return [found[key] for key in sorted(found)][-_SAMPLES:]


def _of(events: Iterable[Event], kind: str) -> list[Event]:
    return [e for e in events if e["event"] == kind]


def _mean(values: Iterable[float | None]) -> float | None:
    known = near(values)
    return fmean(known) if known else None
