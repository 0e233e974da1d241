"""A fault campaign: processes of real federations are killed at random, and nothing may get lost.

python -m benchmarks.faults [--runs 10] [--kills-per-run 12] [--seed 1] [--parallel 2]
                            [--minutes M] [--json benchmarks/results/faults.json] [--out FOLDER]

Each run is a small SPEC-OPT federation of two or three silos with real SuperNodes, whose
processes get SIGKILL at moments that hit all phases of a round. A keeper does what operators and
partners are told to do: start again what died, submit the run again with resume=true. At the end
the server's and the silos' tensors must be those of an unbroken run, bit for bit, no round may have
been trained twice, and no half-written folder may stand under a final name. Runs are added to the
JSON file, so that a campaign can be carried out in parts; the table is over all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from dept_fl.checkpoint import Tensors, load_state, round_folder, rounds_on_disk, with_prefix
from dept_fl.config import load_recipe
from dept_fl.errors import DeptError
from dept_fl.jobs import about
from dept_fl.local import COMPLETED, end_tree
from dept_fl.report import Ledger
from dept_fl.rounds import Server, has_checkpoint, pretrain
from dept_fl.silo import Silo
from dept_fl.silo_file import load_silo_file
from tests.conftest import SETTINGS, WORDS, write_text
from tests.deployment import CONNECTION, Component, Federation, free_port

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 6
RUN_LIMIT_S = 3600.0
# Enough steps for a kill to hit the training. The quorum is the default: every silo, every round.
OVERRIDES = f"rounds={ROUNDS} round_attempts=6 round_timeout_s=150 inner.local_steps=150"

# By kind of process: its program, and whether it is the SuperLink's or a SuperNode's.
KINDS = {
    "SuperLink": ("flower-superlink", True),
    "SuperLink's SuperExec": ("flower-superexec", True),
    "ServerApp": ("flwr-serverapp", True),
    "SuperNode": ("flower-supernode", False),
    "SuperNode's SuperExec": ("flower-superexec", False),
    "ClientApp": ("flwr-clientapp", False),
}
_KIND_OF = {facts: kind for kind, facts in KINDS.items()}
_PROGRAMS = {program for program, _ in KINDS.values()}

# By moment of a kill: what appears in a run's folder then, and how long at most the kill waits.
# A ClientApp is a process, not a file; it needs some seconds before it trains.
_ANY = "any time"
MOMENTS = {
    _ANY: ("", 15.0),
    "ClientApp at work": ("", 12.0),
    "silo saves": ("*/home/silos/*/state/*/.*", 0.0),
    "silo answers": ("*/home/silos/*/state/*/round-*", 1.5),
    "update arrives": ("run/spool/*", 1.0),
    "server saves": ("run/checkpoints/.*", 0.0),
    "round whole": ("run/checkpoints/round-*", 4.0),
}
_START_S = 60.0
_STATUS_S = 5.0  # between two looks at the run's status, each of which costs seconds of CPU
_MOMENT_LIMIT_S = 60.0  # then the kill comes all the same, at any time
_VICTIM_S = 10.0  # that a kill waits for a process of its kind; then another kind will do
_FAST_S, _SLOW_S = 0.004, 0.5  # a folder is in the writing for some milliseconds only

Row = dict[str, Any]


# ---- one federation's folder ---------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where one federation keeps its things, all of them under one folder."""

    folder: Path
    silos: list[str]

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def overrides(self) -> str:
        return f"{OVERRIDES} min_silos={len(self.silos)}"

    def silo_file(self, silo: str) -> Path:
        return self.folder / silo / "silo.yaml"

    def states(self, silo: str) -> Path:
        return self.folder / silo / "home" / "silos" / silo / "state"


def make_place(folder: Path, silos: list[str]) -> Place:
    """A recipe, and for each silo its own text and file; vocabularies differ in size, too."""
    place = Place(folder, silos)
    folder.mkdir(parents=True)
    place.recipe.write_text(SETTINGS)
    for i, silo in enumerate(silos):
        place.silo_file(silo).parent.mkdir()
        write_text(place.silo_file(silo).parent, silo)
        place.silo_file(silo).write_text(
            f"name: {silo}\nfiles: [{silo}.jsonl]\nvocab_size: {320 + 10 * i}\n"
            "validation_fraction: 0.2\ndevice: cpu\nhome: home\n"
        )
    return place


def unbroken(place: Place) -> Tensors:
    """The tensors of the same run by the plain algorithm, which nothing disturbs."""
    recipe = load_recipe(place.recipe, place.overrides)
    server, silos = Server(recipe, "unbroken", None), {}
    for name in place.silos:
        file = load_silo_file(place.silo_file(name))
        silos[name] = Silo(name, file.over(recipe), file.home, "unbroken")
        server.register(silos[name].register())
    pretrain(server, silos)
    server.save(place.run_dir)
    for name, silo in silos.items():
        silo.finish(server.task(name))
    return tensors_of(place)


def tensors_of(place: Place) -> Tensors:
    """All that a whole run leaves: the server's last checkpoint, each silo's state and final body.

    Raises:
        DeptError: something of it is missing or damaged.
    """
    tensors, meta = load_state(round_folder(place.run_dir / "checkpoints", ROUNDS))
    found = with_prefix("server", tensors)
    for silo in place.silos:
        states = place.states(silo) / meta["experiment"]
        for part in (round_folder(states, ROUNDS), states / "final"):
            found |= with_prefix(f"{silo}/{part.name}", load_state(part)[0])
    return found


def wrong_tensors(place: Place, expected: Tensors) -> list[str]:
    """The names of tensors that are not, bit for bit, those of the unbroken run."""
    try:
        found = tensors_of(place)
    except DeptError as error:
        return [str(error)]
    same = {n for n in expected.keys() & found.keys() if torch.equal(expected[n], found[n])}
    return sorted((expected.keys() | found.keys()) - same)


def broken_folders(place: Place) -> list[str]:
    """What stands under a final name, on the server or at a silo, and is not whole."""
    folders = list(place.run_dir.glob("checkpoints/round-*"))
    for silo in place.silos:
        folders += [*place.states(silo).glob("*/round-*"), *place.states(silo).glob("*/final")]
    broken = []
    for folder in folders:
        try:
            load_state(folder)
        except DeptError as error:
            broken.append(str(error))
    return broken


# ---- processes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Living:
    """A process of one of the kinds; `owner` is the component that it belongs to."""

    kind: str
    owner: str
    process: psutil.Process


def living(folder: Path) -> list[Living]:
    """The processes of a federation, told by the FLWR_HOME that each component has of its own."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            programs = {Path(word).name for word in process.cmdline()[:2]} & _PROGRAMS
            if not programs:
                continue
            component = Path(process.environ().get("FLWR_HOME", "/")).parent
            if component.parent == folder:
                is_superlink = component.name == "superlink"
                kind = _KIND_OF[programs.pop(), is_superlink]
                found.append(Living(kind, component.name, process))
    return found


class Keeper:
    """The operator and the partners: keeps all components alive and the run going.

    Attributes:
        restarts: of components that died or had lost their SuperExec.
        submissions: of the run.
    """

    def __init__(self, place: Place) -> None:
        self.restarts = self.submissions = 0
        self._place = place
        self._federation = Federation(place.folder, secure=False)
        self._ports = {silo: free_port() for silo in place.silos}
        self._components: dict[str, Component] = {}
        self._complete: set[int] = set()  # pids of components whose SuperExec was seen
        self._ready: dict[str, float] = {}  # when, at the latest, each must have its SuperExec
        self._submission: Component | None = None
        self._next_status = 0.0

    def tend(self) -> bool:
        """Put right what is wrong now; returns True once the run has ended well."""
        family = living(self._place.folder)
        for name in ("superlink", *self._place.silos):
            if not self._is_well(name, family):
                self._start(name)
        streams = self._submission is not None and self._submission.lives
        if streams or time.monotonic() < self._next_status:
            return False
        self._next_status = time.monotonic() + _STATUS_S
        status = self._status()
        if status == COMPLETED and self._all_have_the_final_body():
            return True
        if status.startswith("finished") or status == "none":
            self._submit()
        return False

    def _is_well(self, name: str, family: list[Living]) -> bool:
        component = self._components.get(name)
        if component is None or not component.lives:
            return False
        own = {each.kind for each in family if each.owner == name}
        if any("SuperExec" in kind for kind in own):
            self._complete.add(component.process.pid)
            return True
        # A SuperLink without it still serves the run that has begun, but starts no other.
        starts = (
            component.process.pid not in self._complete and time.monotonic() < self._ready[name]
        )
        return starts or "ServerApp" in own

    def _start(self, name: str) -> None:
        before = self._components.get(name)
        if before is not None:
            self.restarts += 1
            end_tree(before.process.pid)
            before.process.wait()
        self._ready[name] = time.monotonic() + _START_S
        if name == "superlink":
            self._end_submission()  # a SuperLink without a database has forgotten the run
            with suppress(AssertionError):  # killed again before it served: see `tend`
                self._components[name] = self._federation.superlink()
            return
        words = ("--port", str(self._ports[name]))
        config = f'silo="{self._place.silo_file(name)}"'
        self._components[name] = self._federation.supernode(name, config, *words)

    def _submit(self) -> None:
        self._end_submission()
        self.submissions += 1
        place = self._place
        settings = {
            "recipe": str(place.recipe),
            "overrides": place.overrides,
            "run-dir": str(place.run_dir),
            "home": str(place.folder / "server-home"),
            "resume": has_checkpoint(place.run_dir),
        }
        file = place.folder / "run-config.toml"
        file.write_text("".join(f"{key} = {json.dumps(v)}\n" for key, v in settings.items()))
        self._submission = self._federation.start(
            "operator", "flwr", "run", str(ROOT), CONNECTION, "--stream", "--run-config", str(file)
        )

    def _end_submission(self) -> None:
        if self._submission is not None:
            end_tree(self._submission.process.pid)
            self._submission.process.wait()

    def _status(self) -> str:
        """Flower's status of the last run: "none" if there is none, "" if it cannot be told."""
        listed = self._federation.flwr("list", CONNECTION, "--format", "json", check=False)
        try:
            runs = json.loads(listed.stdout)["runs"]
        except (ValueError, KeyError):
            return ""
        return str(runs[0]["status"]) if runs else "none"

    def _all_have_the_final_body(self) -> bool:
        """A silo that was away at the end gets it once the run is submitted again."""
        _, meta = load_state(round_folder(self._place.run_dir / "checkpoints", ROUNDS))
        finals = [self._place.states(s) / meta["experiment"] / "final" for s in self._place.silos]
        return all(final.is_dir() for final in finals)

    def close(self) -> None:
        """End everything, orphans of killed processes first: they outlive their component."""
        for each in living(self._place.folder):
            end_tree(each.process.pid)
        self._federation.close()


@dataclass
class Rounds:
    """Watches the server's checkpoints: what was whole once must never be trained again."""

    run_dir: Path
    newest: int = -1
    lost: int = 0
    _resumed: float = field(default=0.0, repr=False)

    def look(self) -> None:
        on_disk = max(rounds_on_disk(self.run_dir / "checkpoints"), default=-1)
        resumes = [e for e in Ledger(self.run_dir).read() if e["event"] == "resume"]
        last = max(resumes, key=lambda event: float(event["time"]), default=None)
        if last and last["time"] > self._resumed:
            self._resumed = last["time"]
            self.lost += max(0, self.newest - last["round"])
        self.lost += max(0, self.newest - on_disk)  # a checkpoint that is gone
        self.newest = on_disk


class Killer(threading.Thread):
    """Kills processes of one federation, spread over its rounds, at seeded moments.

    Attributes:
        kills: one row for each.
    """

    def __init__(self, place: Place, rounds: Rounds, seed: int, count: int) -> None:
        super().__init__(daemon=True)
        self.kills: list[Row] = []
        self._place, self._rounds, self._count = place, rounds, count
        self._draw = random.Random(seed)
        self._over = threading.Event()
        self._began = time.monotonic()

    def run(self) -> None:
        for number in range(self._count):
            kind, moment = self._draw.choice(list(KINDS)), self._draw.choice(list(MOMENTS))
            # One in each round, the final evaluation too, or more where there are more kills.
            if not self._wait_for_round(number * (ROUNDS + 1) // self._count):
                return
            self._kill_at(kind, moment)

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _wait_for_round(self, round_: int) -> bool:
        while self._rounds.newest < round_ and not self._over.wait(_SLOW_S):
            pass
        return not self._over.is_set()

    def _kill_at(self, kind: str, moment: str) -> None:
        pattern, spread_s = MOMENTS[moment]
        victims: list[Living] = []
        if moment != _ANY and not self._wait_for_moment(kind, pattern, victims):
            moment = _ANY
        self._over.wait(self._draw.uniform(0, spread_s))
        deadline = time.monotonic() + _VICTIM_S
        while not self._over.is_set():
            victims = victims or self._victims("" if time.monotonic() > deadline else kind)
            if victims and self._kill(self._draw.choice(victims), moment):
                return
            victims = []
            self._over.wait(_SLOW_S / 5)

    def _kill(self, victim: Living, moment: str) -> bool:
        try:
            if victim.process.status() == psutil.STATUS_ZOMBIE:
                return False
            victim.process.kill()
        except psutil.NoSuchProcess:
            return False
        at_s = round(time.monotonic() - self._began, 1)
        done = {"kind": victim.kind, "owner": victim.owner, "moment": moment}
        self.kills.append({**done, "behind_round": self._rounds.newest, "at_s": at_s})
        return True

    def _wait_for_moment(self, kind: str, pattern: str, victims: list[Living]) -> bool:
        """Wait until something new appears; `victims` are found beforehand, to be killed then."""
        seen, refresh = self._signs(pattern), 0.0
        deadline = time.monotonic() + _MOMENT_LIMIT_S
        while time.monotonic() < deadline and not self._over.wait(_FAST_S if pattern else _SLOW_S):
            now = self._signs(pattern)
            if now - seen:
                return True
            seen = now
            if time.monotonic() > refresh:
                victims[:] = self._victims(kind)
                refresh = time.monotonic() + _SLOW_S
        return False

    def _signs(self, pattern: str) -> set[str]:
        if pattern:
            return {str(path) for path in self._place.folder.glob(pattern)}
        return {str(each.process.pid) for each in self._victims("ClientApp")}

    def _victims(self, kind: str) -> list[Living]:
        """Who could be killed; of any kind where none is given."""
        return [each for each in living(self._place.folder) if kind in ("", each.kind)]


# ---- the campaign --------------------------------------------------------------------------------


class Stopped(Exception):
    """The campaign is to end now."""


@dataclass
class Campaign:
    """What all runs share."""

    options: argparse.Namespace
    out: Path
    expected: dict[int, Tensors]
    stop: threading.Event = field(default_factory=threading.Event)
    _file: threading.Lock = field(default_factory=threading.Lock)

    def run(self, number: int, is_late: Callable[[], bool]) -> None:
        """One run with its kills, and its row in the file."""
        if self.stop.is_set() or is_late():
            return
        seed = self.options.seed * 1000 + number
        place = make_place(self.out / f"run-{seed}", silos_of(number))
        with suppress(Stopped):
            row = self._measure(place, seed)
            self._add(row)
            print(line_of(row), flush=True)
            if is_well(row):
                shutil.rmtree(place.folder, ignore_errors=True)

    def _measure(self, place: Place, seed: int) -> Row:
        began, expected = time.monotonic(), self.expected[len(place.silos)]
        keeper, rounds = Keeper(place), Rounds(place.run_dir)
        killer = Killer(place, rounds, seed, self.options.kills_per_run)
        try:
            killer.start()
            ended_well = self._tend(keeper, rounds, began + RUN_LIMIT_S)
        finally:
            killer.stop()
            keeper.close()
        return {
            "seed": seed,
            "silos": place.silos,
            "kills": killer.kills,
            "restarts": keeper.restarts,
            "submissions": keeper.submissions,
            "ended_well": ended_well,
            "rounds_lost": rounds.lost,
            # A run that has not ended counts as such; it has nothing yet to be compared.
            "wrong_tensors": wrong_tensors(place, expected) if ended_well else [],
            "broken_folders": broken_folders(place),
            "seconds": round(time.monotonic() - began),
        }

    def _tend(self, keeper: Keeper, rounds: Rounds, deadline: float) -> bool:
        while time.monotonic() < deadline:
            if self.stop.is_set():
                raise Stopped
            rounds.look()
            if keeper.tend():
                return True
            time.sleep(_SLOW_S)
        return False

    def _add(self, row: Row) -> None:
        with self._file:
            rows = [*rows_in(self.options.json), row]
            facts = {**about(), "command": "python -m benchmarks.faults"}
            text = json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n"
            draft = self.options.json.with_suffix(".draft")
            draft.write_text(text)
            draft.replace(self.options.json)


def silos_of(number: int) -> list[str]:
    """Two silos; three in every third run."""
    return sorted(WORDS)[: 3 if number % 3 == 2 else 2]


def rows_in(file: Path) -> list[Row]:
    rows: list[Row] = json.loads(file.read_text())["rows"] if file.is_file() else []
    return rows


def is_well(row: Row) -> bool:
    faults = row["rounds_lost"] or row["wrong_tensors"] or row["broken_folders"]
    return bool(row["ended_well"] and not faults)


def line_of(row: Row) -> str:
    return (
        f"run {row['seed']}: {len(row['kills'])} kills, {row['submissions']} submissions, "
        f"{row['seconds']} s, {'well' if is_well(row) else 'NOT WELL'}"
    )


def table(rows: list[Row]) -> str:
    """Markdown: kills by kind of process and moment, then what they did."""
    kills = Counter((kill["kind"], kill["moment"]) for row in rows for kill in row["kills"])
    head = ["killed", *MOMENTS, "all"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind in KINDS:
        figures = [kills[kind, moment] for moment in MOMENTS]
        lines.append(f"| {kind} | " + " | ".join(map(str, [*figures, sum(figures)])) + " |")
    sums = [sum(kills[kind, moment] for kind in KINDS) for moment in MOMENTS]
    lines.append("| all | " + " | ".join(map(str, [*sums, sum(sums)])) + " |")
    count = {key: sum(len(row[key]) for row in rows) for key in ("wrong_tensors", "broken_folders")}
    well = sum(row["ended_well"] for row in rows)
    lines += [
        "",
        f"{len(rows)} runs of {ROUNDS} rounds, {well} ended well; {sum(sums)} kills, "
        f"{sum(row['restarts'] for row in rows)} restarts of components, "
        f"{sum(row['submissions'] for row in rows)} submissions",
        f"rounds lost: {sum(row['rounds_lost'] for row in rows)}; wrong tensors: "
        f"{count['wrong_tensors']}; broken folders: {count['broken_folders']}",
    ]
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # sums must not depend on how many cores are free
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = options.out or Path(tempfile.mkdtemp(prefix="dept-faults-"))
    print(f"runs in {out}; one that is not well stays there", file=sys.stderr, flush=True)
    sizes = {len(silos_of(number)): silos_of(number) for number in range(options.runs)}
    places = {size: make_place(out / f"unbroken-{size}", silos) for size, silos in sizes.items()}
    campaign = Campaign(options, out, {size: unbroken(place) for size, place in places.items()})
    try:
        carry_out(campaign)
    except KeyboardInterrupt:
        print("stopped; the runs that had not ended are not counted", file=sys.stderr)
    rows = rows_in(options.json)
    print(table(rows))
    if not all(map(is_well, rows)):
        raise SystemExit(1)


def carry_out(campaign: Campaign) -> None:
    """Some runs side by side, since most of a run is waiting for Flower's heartbeats."""
    options, began = campaign.options, time.monotonic()

    def is_late() -> bool:
        return bool(options.minutes and time.monotonic() - began > 60 * options.minutes)

    with ThreadPoolExecutor(options.parallel) as pool:
        runs = [pool.submit(campaign.run, number, is_late) for number in range(options.runs)]
        try:
            for run in runs:
                run.result()
        except BaseException:
            campaign.stop.set()
            raise


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills-per-run", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=2, help="runs side by side")
    parser.add_argument("--minutes", type=float, help="begin no run later than this")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/faults.json"))
    parser.add_argument("--out", type=Path, help="folder of the runs; default: a temporary one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
