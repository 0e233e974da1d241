"""Which settings win: SPEC-OPT and STD over learning rates, optimisers and rounds, one by one.

python -m benchmarks.search [--recipe conf/handbook.yaml] [--silos fr,ru,ja] [--arms spec-opt,std-0]
                            [--out FOLDER] [--json benchmarks/results/search.json] [--quick]

Each trial changes some settings of the recipe and keeps tokens and steps. Both arms get as many
trials: the same ones, and some on what only a federation has, or only one model is left with. Few
silos, one seed, judged on validation text that reports use too: what wins here is to be compared on
all silos and several seeds by `dept compare`. Trials done before are not done again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.variants import machine
from dept_fl.arms import ARMS, chosen_arms
from dept_fl.compare import Comparison, Job
from dept_fl.config import Recipe, home_dir, load_recipe, with_settings
from dept_fl.jobs import run_jobs
from dept_fl.report import Event
from dept_fl.standings import mean

_MOST_SILOS = 5
BOTH = [
    "",
    "inner.learning_rate=1.5e-3",
    "inner.learning_rate=6e-3",
    "inner.learning_rate=1e-2",
    "inner.embedding_learning_rate=1.5e-3",
    "inner.embedding_learning_rate=6e-3",
    "inner.embedding_learning_rate=1e-2",
    "inner.optimizer=muon",
    "inner.optimizer=muon inner.learning_rate=6e-3",
    "inner.optimizer=muon inner.learning_rate=1e-2",
    "inner.optimizer=muon inner.learning_rate=6e-3 inner.embedding_learning_rate=1e-2",
    "inner.betas=[0.9,0.99]",
    "inner.weight_decay=0.1",
]
OF_AN_ARM = {
    "spec-opt": [
        "inner.state=reset",
        "rounds=64 inner.local_steps=6",
        "rounds=4 inner.local_steps=96",
        "inner.rewarm_steps=4",
        "outer.optimizer=nesterov outer.learning_rate=0.7 outer.momentum=0.5",
        "outer.optimizer=nesterov outer.learning_rate=1.0 outer.momentum=0.3",
    ],
    "std-0": [
        "inner.warmup_steps=20",
        "inner.warmup_steps=80",
        "inner.final_learning_rate_fraction=0.01",
        "inner.clip_norm=0.5",
        "inner.learning_rate=4.5e-3",
        "inner.learning_rate=2e-3",
    ],
}


@dataclass(frozen=True)
class Trial(Job):
    """One arm with some settings changed."""

    words: str = ""

    @property
    def name(self) -> str:
        return re.sub(r"[^\w.=,-]+", "_", f"{self.arm.name} {self.words}".strip())

    def run(self, folder: Path, home: Path) -> Event:
        return {**super().run(folder, home), "words": self.words}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="conf/handbook.yaml")
    parser.add_argument("--silos", default="", help="at most five of the recipe's; default: three")
    parser.add_argument("--arms", default=",".join(OF_AN_ARM))
    parser.add_argument("--out", type=Path, help="folder of the runs; default: a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two rounds of two steps")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    arms = [arm.name for arm in chosen_arms(options.arms)]
    silos = options.silos.split(",") if options.silos else recipe.silo_names[:3]
    if len(silos) > _MOST_SILOS:
        parser.error(f"--silos {options.silos}: at most {_MOST_SILOS}, so that others stay unseen")
    recipe = with_settings(replace(recipe, arms=[]), {"only": silos})
    out = options.out or Path(tempfile.mkdtemp(prefix="dept-search-"))
    trials = trials_of(recipe, arms, options.quick, out)
    results, failures = run_jobs(
        trials, out, home_dir(""), 0, lambda line: print(line, file=sys.stderr)
    )
    print(table(results))
    print("\n".join(failures), file=sys.stderr)
    if options.json:
        facts = {**machine(), "silos": silos, "command": " ".join(["python", *sys.argv])}
        options.json.write_text(json.dumps({"machine": facts, "rows": results}, indent=1) + "\n")


def trials_of(recipe: Recipe, arms: list[str], quick: bool, out: Path) -> list[Trial]:
    made = []
    Comparison(recipe, [ARMS[arm] for arm in arms], 1, out, home_dir("")).prepare()
    for arm in arms:
        for words in [*BOTH, *OF_AN_ARM.get(arm, [])]:
            more = " rounds=2 inner.local_steps=2 inner.warmup_steps=1" if quick else ""
            changed = replace(recipe, arms=[f"{arm} {words}{more}"])
            comparison = Comparison(changed, [ARMS[arm]], 1, out, home_dir(""))
            made += [Trial(**vars(job), words=words) for job in comparison.jobs()]
    return made


def table(results: list[Event]) -> str:
    """Markdown: each arm's trials, the best first."""
    lines = ["| arm | changed | bits per byte |", "|---|---|---|"]
    for arm in dict.fromkeys(result["arm"] for result in results):
        own = [(bits(r), r["words"]) for r in results if r["arm"] == arm]
        lines += [f"| {arm} | {words or 'nothing'} | {b:.3f} |" for b, words in sorted(own)]
    return "\n".join(lines)


def bits(result: Event) -> float:
    return mean([silo["bits_per_byte"] for silo in result["silos"].values()])


if __name__ == "__main__":
    main()
