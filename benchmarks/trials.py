"""Arms of a comparison with some settings changed: what searches and benchmarks train."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dept_fl.arms import ARMS
from dept_fl.compare import Comparison, Job
from dept_fl.config import Recipe, home_dir
from dept_fl.report import Event
from dept_fl.standings import mean

QUICK = "rounds=2 inner.local_steps=2 inner.warmup_steps=1"


@dataclass(frozen=True)
class Trial(Job):
    """One arm with some settings changed.

    Attributes:
        words: what people see of it.
    """

    words: str = ""

    @property
    def name(self) -> str:
        seed = f" seed-{self.seed}" if self.seed != 1 else ""
        return re.sub(r"[^\w.=,-]+", "_", f"{self.arm.name} {self.words}{seed}".strip())

    def run(self, folder: Path, home: Path) -> Event:
        return {**super().run(folder, home), "words": self.words}


def trials(
    recipe: Recipe, changes: Mapping[str, Mapping[str, str]], seeds: int, out: Path
) -> list[Trial]:
    """By arm and words, with these settings changed; text and tokenizers are made ready.

    Args:
        changes: overrides, such as ``"wire.up=int4"``.
    """
    made = []
    Comparison(recipe, [ARMS[arm] for arm in changes], 1, out, home_dir("")).prepare()
    for arm, own in changes.items():
        for words, overrides in own.items():
            changed = replace(recipe, arms=[f"{arm} {overrides}"])
            comparison = Comparison(changed, [ARMS[arm]], seeds, out, home_dir(""))
            made += [Trial(**vars(job), words=words) for job in comparison.jobs()]
    return made


def bits(result: Event) -> float:
    """Mean over silos of a result's bits per byte."""
    return mean([silo["bits_per_byte"] for silo in result["silos"].values()])
