"""Where the time of a round goes, and how much of it is not training.

python -m benchmarks.round_overhead [--rounds 5] [--home FOLDER] [--json FILE] [--quick]

The demo through Flower's simulation, one silo at a time on all cores; and two of its silos as a
deployment on this machine's loopback, side by side on half of the cores each. All figures are
those of the runs' metrics.jsonl, means over the rounds behind the first, which pays for starting.
A round is from its first message to the merged body; its checkpoint is written while the silos are
at the next.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from benchmarks.processes import partners_own
from dept_fl.jobs import about
from dept_fl.report import Event, Ledger
from dept_fl.silo_file import KEYS
from tests.conftest import SETTINGS, write_text
from tests.deployment import CONNECTION, SCRIPTS, Federation

ROOT = Path(__file__).resolve().parents[1]
DEPLOYED = 2
_REST = "transfer, queueing, start of processes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--home", type=Path, help="where the silos' text is; default: made anew")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="the tests' tiny text and model")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dept-overhead-")))
        home = (options.home or folder / "home").absolute()
        recipe = tiny_recipe(folder) if options.quick else ROOT / "conf/demo.yaml"
        found = {
            "simulation": parts(simulated(folder, recipe, home, options.rounds), 1),
            "deployment": parts(deployed(folder, recipe, home, options.rounds), DEPLOYED),
        }
    imports_s = import_seconds()
    print(table(found))
    print(f"\nimports of one ClientApp process: {imports_s:.1f} s")
    if options.json:
        facts = {"machine": about("python -m benchmarks.round_overhead"), "parts_s": found}
        options.json.write_text(json.dumps({**facts, "imports_s": imports_s}, indent=1) + "\n")


def tiny_recipe(folder: Path) -> Path:
    settings = yaml.safe_load(SETTINGS)
    for silo in settings["silos"]:
        write_text(folder, silo)
    file = folder / "tiny.yaml"
    file.write_text(SETTINGS)
    return file


def simulated(folder: Path, recipe: Path, home: Path, rounds: int) -> list[Event]:
    """The events of a `dept run`."""
    run_dir = folder / "simulation"
    command = [str(SCRIPTS / "dept"), "run", str(recipe), f"rounds={rounds}"]
    command += ["--run-dir", str(run_dir), "--home", str(home), "--cpus", str(cores())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Ledger(run_dir).read()


def deployed(folder: Path, recipe: Path, home: Path, rounds: int) -> list[Event]:
    """The events of a run with a SuperLink and SuperNodes of its own."""
    settings = yaml.safe_load(recipe.read_text())
    silos = dict(list(settings.pop("silos").items())[:DEPLOYED])
    settings |= {"rounds": rounds, "min_silos": DEPLOYED}
    served = folder / "deployed.yaml"
    served.write_text(yaml.safe_dump(settings))
    run_dir, threads = folder / "deployment", str(max(1, cores() // DEPLOYED))
    with Federation(folder / "federation", secure=False) as federation, ExitStack() as ended:
        federation.superlink()
        for name, source in silos.items():
            file = silo_file(folder, home, settings, name, source)
            own = partners_own(federation, name, ended, OMP_NUM_THREADS=threads)
            federation.supernode(name, f'silo="{file}"', **own)
        words = f'recipe="{served}" run-dir="{run_dir}" home="{home}"'
        federation.flwr("run", str(ROOT), CONNECTION, "--stream", "--run-config", words)
    return Ledger(run_dir).read()


def silo_file(
    folder: Path, home: Path, settings: dict[str, Any], name: str, source: dict[str, Any]
) -> Path:
    """A partner's file for a silo of the recipe."""
    decides = set(KEYS) - {"tokenizer"}  # which in a recipe says whether it is shared
    own = {key: value for key, value in settings.items() if key in decides}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**own, **source, "name": name, "home": str(home)}))
    return file


def cores() -> int:
    return len(os.sched_getaffinity(0))


def parts(events: list[Event], side_by_side: int) -> dict[str, float]:
    """Seconds of a round by part, mean over the rounds behind the first.

    Args:
        side_by_side: silos at work at a time; of what silos do, the mean over them counts.
    """
    rounds = [e for e in events if e["event"] == "round" and e["round"] > 1]
    if not rounds:
        raise SystemExit("no round behind the first was done; see the run's output")
    by_round = [_parts_of(events, each, side_by_side) for each in rounds]
    return {part: sum(each[part] for each in by_round) / len(by_round) for part in by_round[0]}


def _parts_of(events: list[Event], round_: Event, side_by_side: int) -> dict[str, float]:
    this = [e for e in events if e.get("round") == round_["round"]]
    silos = [e for e in this if e["event"] == "silo_train"]

    def of_silos(key: str) -> float:
        return sum(float(silo[key]) for silo in silos) / side_by_side

    found = {
        "train": of_silos("train_s") + of_silos("settle_s"),
        "evaluate": of_silos("evaluate_s"),
        "load state, build model": of_silos("load_s"),
        "encode": of_silos("encode_s"),
        "save state": of_silos("save_s"),
        "check and merge": sum(silo["merge_s"] for silo in silos) + round_["outer_s"],
    }
    return {**found, _REST: round_["seconds"] - sum(found.values())}


def import_seconds() -> float:
    """What a fresh process, of which a deployment has one for each message, takes to start."""
    fastest = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import client_app.app"], check=True, cwd=ROOT)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: seconds and share of the round for each part, in each kind of run."""
    head = ["part of a round", *(f"{kind}, s | share" for kind in found)]
    lines = ["| " + " | ".join(head) + " |", "|---" * (1 + 2 * len(found)) + "|"]
    whole = {kind: sum(seconds.values()) for kind, seconds in found.items()}
    for part in next(iter(found.values())):
        lines.append(_row(part, {kind: found[kind][part] for kind in found}, whole))
    outside = {kind: whole[kind] - found[kind]["train"] for kind in found}
    return "\n".join(
        [*lines, _row("**all but train**", outside, whole), _row("round", whole, whole)]
    )


def _row(name: str, seconds: dict[str, float], whole: dict[str, float]) -> str:
    cells = [f"{s:.3f} | {100 * s / whole[kind]:.1f} %" for kind, s in seconds.items()]
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
