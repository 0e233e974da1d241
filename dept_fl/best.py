"""The best body of a run beside its last: which round it is of, and its checkpoint (GLOB, TRIM)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from dept_fl.checkpoint import load_meta, round_folder, whole_folder
from dept_fl.errors import DeptError
from dept_fl.report import Event


def best_round(events: Iterable[Event], first: int = 1) -> int | None:
    """The round whose body predicts best of those that silos have evaluated; the earlier of equals.

    What counts is the median over silos of bits per byte over the silo's unigram floor: the floor,
    so that it matters less which silos were sampled in a round; the median, so that no silo alone
    chooses the round by what it writes.

    Args:
        events: of the run's ledger.
        first: the first round that counts; the body of round 0 is an untrained one.
    """
    shares: dict[int, list[float]] = {}
    for event in events:
        if event["event"] == "silo_eval" and event["round"] >= first:
            floor = event["unigram_bits_per_byte"]
            if floor > 0:
                shares.setdefault(event["round"], []).append(event["bits_per_byte"] / floor)
    return min(shares, key=lambda round_: (median(shares[round_]), round_), default=None)


def best_folder(run_dir: Path) -> Path:
    """Where the best round's checkpoint is kept."""
    return run_dir / "best"


def keep_checkpoint(run_dir: Path, round_: int) -> None:
    """Keep a round's checkpoint as the best, also when the round's own folder is dropped.

    Nothing is copied where the disk has hard links: saved files are never written again.
    """
    with whole_folder(best_folder(run_dir), overwrite=True) as draft:
        for file in round_folder(run_dir / "checkpoints", round_).iterdir():
            try:
                os.link(file, draft / file.name)
            except OSError:
                shutil.copyfile(file, draft / file.name)


def best_checkpoint(run_dir: Path, events: Iterable[Event], first: int = 1) -> Path | None:
    """The folder of the best round's checkpoint, of a run that has ended; None if it is the last.

    Raises:
        DeptError: it was not kept.
    """
    known = list(events)
    best = best_round(known, first)
    last = max(
        (e["round"] for e in known if e["event"] == "silo_eval" and e.get("final")), default=0
    )
    if best is None or best == last:
        return None
    folder = best_folder(run_dir)
    try:
        kept = load_meta(folder)["round"]
    except (DeptError, OSError, ValueError):
        kept = None
    if kept != best:
        raise DeptError(
            f"{folder}: round {best} was the best, and is not kept there; only --round last can "
            "be exported"
        )
    return folder
