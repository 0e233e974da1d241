"""How a run stands: the facts that its ledger gives, and how `dept status` shows them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from dept_fl.checkpoint import rounds_on_disk
from dept_fl.errors import DeptError
from dept_fl.report import Event, Ledger, duration, figure, harmless, table

State = Literal["running", "silent", "ended"]

_REFRESH_S = 2.0
_RECENT_ROUNDS = 5  # what a round takes now, not what the first ones took
_RECENT_FAILURES = 5
_LARGEST = 1e300  # number; JSON's may be infinite, or too long for a float
_SILENT_ROUNDS, _SILENT_S = 3, 120.0  # no event for longer than either: stopped or stalled


@dataclass(frozen=True)
class SiloStatus:
    """What is known of one silo; None is not known yet."""

    silo: str
    seen: float | None = None  # when its last answer was written, in seconds since 1970
    absent: bool = False
    merged_round: int | None = None
    bits_per_byte: float | None = None
    unigram_bits_per_byte: float | None = None
    tokens_per_s: float | None = None
    failures: int = 0


@dataclass(frozen=True)
class Incident:
    """A reply that was refused or did not come, or a silo that is away."""

    event: str  # failure or absent
    time: float
    round: int
    silo: str  # empty where a node was refused
    reason: str


@dataclass(frozen=True)
class Status:
    """A run at one moment; times are in seconds since 1970."""

    time: float
    name: str
    variant: str
    experiment: str
    round: int  # whole rounds
    rounds: int  # 0 until there is a plan
    state: State
    last_event: float
    left_s: float | None
    silos: list[SiloStatus]
    incidents: list[Incident]  # the last few, oldest first

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False)


def look(run_dir: Path) -> Status:
    """How the run of this folder stands now.

    Raises:
        DeptError: no ledger is there, or it is damaged.
    """
    return of_job(summary(read(run_dir), time.time()), run_dir)


def watch(run_dir: Path, console: Console) -> None:
    """Show the run in place, afresh every two seconds, until its end or Ctrl-C."""
    status = look(run_dir)
    with (
        suppress(KeyboardInterrupt),
        Live(view(status), console=console, auto_refresh=False) as live,
    ):
        while status.state != "ended":
            time.sleep(_REFRESH_S)
            status = look(run_dir)
            live.update(view(status), refresh=True)


# ---- the ledger ---------------------------------------------------------------------------------

_FIELDS: dict[str, dict[str, type]] = {
    "plan": {"experiment": str, "recipe": str, "rounds": int, "estimate_s": float, "silos": dict},
    "join": {"silo": str},
    "silo_train": {"silo": str, "round": int},
    "silo_eval": {"silo": str, "bits_per_byte": float, "unigram_bits_per_byte": float},
    "round": {"round": int, "seconds": float},
    "absent": {"silo": str, "round": int, "reason": str},
    "failure": {"silo": str, "round": int, "reason": str},
}
# Numbers, but a comparison's jobs have no speed, and others none that was evaluated.
_MEASURED = {"silo_train": ["tokens_per_s", "bits_per_byte", "unigram_bits_per_byte"]}


def read(run_dir: Path) -> list[Event]:
    """The events of a run, at least one, each with the fields that `summary` takes.

    Raises:
        DeptError: no ledger is there, or one of its lines is damaged; a last line that is just
            being written, or that a kill cut off, is left out.
    """
    file = Ledger(run_dir).file
    if not run_dir.is_dir():
        raise DeptError(f"{run_dir}: no such folder; give the run-dir that the run printed")
    try:
        *lines, _ = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise DeptError(
            f"{file}: {error.strerror}; a run writes it once its silos are ready; wait, or name "
            "another run's folder"
        ) from error
    if not lines:
        raise DeptError(f"{file}: holds no event yet; ask again in a moment")
    return [_event(line, f"{file}, line {i}") for i, line in enumerate(lines, 1)]


def _event(line: str, where: str) -> Event:
    try:
        event: Event = json.loads(line)
        fields = {"time": float} | _FIELDS.get(event["event"], {})
        fields |= {name: float for name in _MEASURED.get(event["event"], []) if name in event}
        wrong = [name for name, kind in fields.items() if not _is(event.get(name), kind)]
    except (ValueError, TypeError, KeyError, RecursionError):
        wrong = ["event"]
    if wrong:
        raise DeptError(f"{where}: no right {wrong[0]!r} in {line[:60]!r}; remove this line")
    return event


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and abs(value) < _LARGEST
    return isinstance(value, kind)


# ---- from events to facts -----------------------------------------------------------------------

_NO_PLAN: Event = {"recipe": "", "experiment": "", "rounds": 0, "estimate_s": 0.0}


def summary(events: list[Event], now: float) -> Status:
    """What the events of a run, oldest first and at least one, tell at the time `now`."""
    plan = next(_of(reversed(events), "plan"), _NO_PLAN)  # the newest: each resume writes one
    rounds = list(_of(events, "round"))
    last_event = max(e["time"] for e in events)
    state = _state(events, now - last_event, _round_s(plan, rounds))
    silos = _silos(events)
    return Status(
        time=now,
        name=str(plan.get("name", "")),
        variant=plan["recipe"],
        experiment=plan["experiment"],
        round=_whole_rounds(events),
        rounds=plan["rounds"],
        state=state,
        last_event=last_event,
        left_s=_left_s(plan, rounds, now) if state == "running" else None,
        silos=silos,
        incidents=_incidents(events, silos),
    )


def of_job(status: Status, run_dir: Path) -> Status:
    """The same with what a comparison's job, which writes neither plan nor end, has in its folder.

    Of other runs, and of a ledger that was copied alone, the status as it is.
    """
    if status.rounds:
        return status
    whole = [status.round, *rounds_on_disk(run_dir / "checkpoints")]
    ended = (run_dir / "result.json").is_file()
    return replace(status, round=max(whole), state="ended" if ended else status.state)


def _of(events: Iterable[Event], kind: str) -> Iterator[Event]:
    return (e for e in events if e["event"] == kind)


def _state(events: list[Event], silence_s: float, round_s: float) -> State:
    if any(_of(events, "end")):
        return "ended"
    return "silent" if silence_s > max(_SILENT_S, _SILENT_ROUNDS * round_s) else "running"


def _whole_rounds(events: list[Event]) -> int:
    """A comparison's jobs write none, but evaluate what a whole one made, or train on it."""
    if rounds := list(_of(events, "round")):
        return _last_round(rounds)
    trained = _last_round(_of(events, "silo_train")) - 1
    evaluated: list[int] = [
        e["round"] for e in _of(events, "silo_eval") if _is(e.get("round"), int)
    ]
    return max(0, trained, *evaluated)


def _last_round(rounds: Iterable[Event]) -> int:
    return max((e["round"] for e in rounds), default=0)


def _round_s(plan: Event, rounds: list[Event]) -> float:
    """Seconds of one round: the mean of the last few, before the first one the plan's guess."""
    if rounds:
        return float(mean(e["seconds"] for e in rounds[-_RECENT_ROUNDS:]))
    return float(plan["estimate_s"] / max(1, plan["rounds"]))


def _left_s(plan: Event, rounds: list[Event], now: float) -> float:
    """Seconds to the last round's end; a round that takes longer than others adds none."""
    remaining: int = plan["rounds"] - _last_round(rounds)
    if remaining <= 0:
        return 0.0
    round_s = _round_s(plan, rounds)
    elapsed_s: float = now - max(e["time"] for e in (plan, *rounds))
    return (remaining - 1) * round_s + max(0.0, round_s - elapsed_s)


def _silos(events: list[Event]) -> list[SiloStatus]:
    silos: dict[str, SiloStatus] = {}
    for event in events:
        for name in _named(event):
            silos[name] = _after(silos.get(name, SiloStatus(name)), event)
    return [silos[name] for name in sorted(silos)]


def _named(event: Event) -> Iterable[str]:
    if event["event"] == "plan":
        return list(event["silos"])
    named = "silo" in _FIELDS.get(event["event"], {})
    return [event["silo"]] if named and event["silo"] else []  # a refused node has no silo


def _after(silo: SiloStatus, event: Event) -> SiloStatus:
    seen = replace(silo, seen=event["time"], absent=False)
    match event["event"]:
        case "join":
            return seen
        case "silo_train":
            speed = event.get("tokens_per_s")
            trained = replace(seen, merged_round=event["round"], tokens_per_s=speed)
            return _evaluated(trained, event)
        case "silo_eval":
            return _evaluated(seen, event)
        case "absent":
            return replace(silo, absent=True)
        case "failure":
            return replace(silo, failures=silo.failures + 1)
    return silo


def _evaluated(silo: SiloStatus, event: Event) -> SiloStatus:
    """A comparison's federations evaluate as they train, and write one event of both."""
    return replace(
        silo,
        bits_per_byte=event.get("bits_per_byte", silo.bits_per_byte),
        unigram_bits_per_byte=event.get("unigram_bits_per_byte", silo.unigram_bits_per_byte),
    )


def _incidents(events: list[Event], silos: list[SiloStatus]) -> list[Incident]:
    """The last few failures, and for each silo that is away now the event that said so."""
    failures = list(_of(events, "failure"))[-_RECENT_FAILURES:]
    away = {e["silo"]: e for e in _of(events, "absent")}
    absences = [away[silo.silo] for silo in silos if silo.absent]
    return [
        Incident(e["event"], e["time"], e["round"], e["silo"], e["reason"])
        for e in sorted(failures + absences, key=lambda e: e["time"])
    ]


# ---- from facts to the terminal -----------------------------------------------------------------


def view(status: Status) -> RenderableType:
    """The status for a terminal; text from silos is shown as it is: no markup, nothing steers."""
    rows = [_row(silo, status.time) for silo in status.silos]
    head = ("silo", "last seen", "merged", "bits/byte", "unigram", "tokens/s", "failed")
    lines = [_line(incident, status.time) for incident in status.incidents]
    return Group(Text(_title(status)), Text(_progress(status)), table(head, rows), *lines)


def _title(status: Status) -> str:
    facts = (status.name, status.variant, f"experiment {status.experiment}")
    return _plain(", ".join(filter(None, facts))) if status.rounds else "no plan yet"


def _progress(status: Status) -> str:
    ago = _ago(status.last_event, status.time)
    state = {
        "running": f"running, last event {ago}",
        "silent": f"stopped or stalled, last event {ago}",
        "ended": f"ended {ago}",
    }[status.state]
    left = f"; left: about {duration(status.left_s)}" if status.left_s else ""
    rounds = f"round {status.round} of {status.rounds}: " if status.rounds else ""
    return f"{rounds}{state}{left}"


def _row(silo: SiloStatus, now: float) -> list[str]:
    return [
        _plain(silo.silo),
        "–" if silo.seen is None else _ago(silo.seen, now),
        "–" if silo.merged_round is None else str(silo.merged_round),
        figure(silo.bits_per_byte),
        figure(silo.unigram_bits_per_byte),
        figure(silo.tokens_per_s, 0),
        str(silo.failures),
    ]


def _plain(text: str) -> str:
    """On one line, and without control characters, which are in a ledger what silos wrote."""
    return harmless(" ".join(text.split()))


def _ago(then: float, now: float) -> str:
    return f"{duration(max(0.0, now - then))} ago"  # clocks differ, and are set back


def _line(incident: Incident, now: float) -> Text:
    """One line, cut where the terminal ends."""
    reason = _plain(incident.reason).removeprefix(f"silo {incident.silo}: ")
    who = f"{incident.silo} absent" if incident.event == "absent" else incident.silo
    where = filter(None, (_ago(incident.time, now), f"round {incident.round}", who))
    told = _plain(f"{', '.join(where)}: {reason}")
    return Text(f"  {told}", no_wrap=True, overflow="ellipsis")
