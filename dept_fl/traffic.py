"""The bytes that a run really sent, beside what the formula says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dept_fl.checkpoint import load_meta, round_folder, rounds_on_disk
from dept_fl.config import Recipe, recipe_from_json
from dept_fl.cost import Cost, cost
from dept_fl.errors import DeptError
from dept_fl.model import layout
from dept_fl.report import Event
from dept_fl.status import read


@dataclass(frozen=True)
class Traffic:
    """Of one silo, in rounds that are alike.

    Attributes:
        rounds: those in which its update was merged.
        formula_up, formula_down: bytes in each of these rounds. up_bytes, down_bytes: the arrays
            as they were on the wire.
    """

    silo: str
    rounds: list[int]
    formula_up: int
    formula_down: int
    up_bytes: int
    down_bytes: int

    @property
    def up_ratio(self) -> float:
        return self.up_bytes / self.formula_up

    @property
    def down_ratio(self) -> float:
        return self.down_bytes / self.formula_down


def traffic(run_dir: Path) -> list[Traffic]:
    """Silo by silo, from a run's checkpoint and ledger.

    Raises:
        DeptError: the folder holds none of them, they cannot be read, or no update was merged.
    """
    return measured(read(run_dir), recipe_of(run_dir), run_dir)


def measured(events: list[Event], recipe: Recipe, run_dir: Path) -> list[Traffic]:
    """The same of events that were read.

    Raises:
        DeptError: the events lack what is measured.
    """
    found = layout(recipe.model, recipe.sequence_tokens)
    trained = [event for event in events if event["event"] == "silo_train"]
    if not trained:
        raise DeptError(f"{run_dir}: no update was merged in this run, so that nothing is measured")
    try:
        sizes = _vocabularies(events)
        alike: dict[tuple[str, int, int, int, int], list[int]] = {}
        for event in sorted(trained, key=lambda event: (event["silo"], event["round"])):
            formula = cost(recipe, found, sizes[event["silo"]], event["round"])
            alike.setdefault((event["silo"], *_bytes(event, formula)), []).append(event["round"])
        return [Traffic(silo, rounds, *sent) for (silo, *sent), rounds in alike.items()]
    except KeyError as error:
        raise DeptError(
            f"{run_dir}/metrics.jsonl: has no {error}, which a run through Flower (`dept run`, "
            "`flwr run`) measures; name such a run's folder"
        ) from error


def recipe_of(run_dir: Path) -> Recipe:
    """The recipe in a run's newest checkpoint.

    Raises:
        DeptError: there is no checkpoint, or it cannot be read.
    """
    folder = run_dir / "checkpoints"
    found = rounds_on_disk(folder)
    if not found:
        raise DeptError(
            f"{folder}: holds no checkpoint, and so no recipe; name another run's folder"
        )
    newest = round_folder(folder, found[-1])
    try:
        return recipe_from_json(json.dumps(load_meta(newest)["recipe"]))
    except (OSError, ValueError, KeyError) as error:
        raise DeptError(f"{newest}: not readable as saved state: {error}") from error


def _vocabularies(events: list[Event]) -> dict[str, int]:
    """By silo, as each registered."""
    sizes: dict[str, int] = {}
    for event in events:
        if event["event"] == "plan":
            sizes |= {silo: facts["vocabulary"] for silo, facts in event["silos"].items()}
        elif event["event"] == "join":
            sizes[event["silo"]] = event["vocabulary"]
    return sizes


def _bytes(event: Event, formula: Cost) -> tuple[int, int, int, int]:
    """By the formula up and down, and measured; body and embeddings together."""
    up, down = (
        event[f"bytes_{way}_body"] + event[f"bytes_{way}_embeddings"] for way in ("up", "down")
    )
    whole = event.get("down_whole", True)
    return formula.up_bytes, formula.whole_bytes if whole else formula.down_bytes, up, down
