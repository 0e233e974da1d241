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
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.trials import QUICK, Trial, bits, trials
from dept_fl.arms import chosen_arms
from dept_fl.config import Recipe, home_dir, load_recipe, with_settings
from dept_fl.jobs import about, run_jobs
from dept_fl.report import Event

_MOST_SILOS = 5
# Where the search began; what it found stands in the recipe.
_BEGAN_WITH = {
    "inner.optimizer": "adamw",
    "inner.learning_rate": 3e-3,
    "inner.betas": [0.9, 0.95],
}
_MUON = "inner.optimizer=muon"
BOTH = [
    "",
    "inner.learning_rate=1.5e-3",
    "inner.learning_rate=6e-3",
    "inner.learning_rate=1e-2",
    "inner.embedding_learning_rate=1.5e-3",
    "inner.embedding_learning_rate=6e-3",
    "inner.embedding_learning_rate=1e-2",
    _MUON,
    f"{_MUON} inner.learning_rate=6e-3",
    f"{_MUON} inner.learning_rate=1e-2",
    f"{_MUON} inner.learning_rate=6e-3 inner.embedding_learning_rate=1e-2",
    "inner.betas=[0.9,0.99]",
    "inner.weight_decay=0.1",
    # Around what won among those above.
    f"{_MUON} inner.learning_rate=1e-2 inner.embedding_learning_rate=2e-2",
    f"{_MUON} inner.learning_rate=2e-2 inner.embedding_learning_rate=2e-2",
    f"{_MUON} inner.learning_rate=1e-2 inner.final_learning_rate_fraction=0.01",
    f"{_MUON} inner.learning_rate=1e-2 inner.betas=[0.9,0.99]",
]
OF_AN_ARM = {
    "spec-opt": [
        "inner.state=reset",
        "rounds=64 inner.local_steps=6",
        "rounds=4 inner.local_steps=96",
        "inner.rewarm_steps=4",
        "outer.optimizer=nesterov outer.learning_rate=0.7 outer.momentum=0.5",
        "outer.optimizer=nesterov outer.learning_rate=1.0 outer.momentum=0.3",
        f"{_MUON} inner.learning_rate=1e-2 rounds=64 inner.local_steps=6",
        f"{_MUON} inner.learning_rate=1e-2 rounds=32 inner.local_steps=12",
        f"{_MUON} inner.learning_rate=1e-2 outer.optimizer=nesterov outer.momentum=0.5",
    ],
    "std-0": [
        "inner.warmup_steps=20",
        "inner.warmup_steps=80",
        "inner.final_learning_rate_fraction=0.01",
        "inner.clip_norm=0.5",
        "inner.learning_rate=4.5e-3",
        "inner.learning_rate=2e-3",
        f"{_MUON} inner.learning_rate=6e-3 inner.embedding_learning_rate=2e-2",
        f"{_MUON} inner.learning_rate=4.5e-3 inner.embedding_learning_rate=1e-2",
        f"{_MUON} inner.learning_rate=6e-3 inner.embedding_learning_rate=1e-2 "
        "inner.warmup_steps=20",
    ],
}


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
    recipe = with_settings(replace(recipe, arms=[]), {"only": silos, **_BEGAN_WITH})
    out = options.out or Path(tempfile.mkdtemp(prefix="dept-search-"))
    trials = trials_of(recipe, arms, options.quick, out)
    results, failures = run_jobs(
        trials, out, home_dir(""), 0, lambda line: print(line, file=sys.stderr)
    )
    print(table(results))
    print("\n".join(failures), file=sys.stderr)
    if options.json:
        facts = {**about("python -m benchmarks.search"), "silos": silos}
        options.json.write_text(json.dumps({"machine": facts, "rows": results}, indent=1) + "\n")


def trials_of(recipe: Recipe, arms: list[str], quick: bool, out: Path) -> list[Trial]:
    more = f" {QUICK}" if quick else ""
    words = {arm: [*BOTH, *OF_AN_ARM.get(arm, [])] for arm in arms}
    return trials(recipe, {a: {w: f"{w}{more}" for w in own} for a, own in words.items()}, 1, out)


def table(results: list[Event]) -> str:
    """Markdown: each arm's trials, the best first."""
    lines = ["| arm | changed | bits per byte |", "|---|---|---|"]
    for arm in dict.fromkeys(result["arm"] for result in results):
        own = [(bits(r), r["words"]) for r in results if r["arm"] == arm]
        lines += [f"| {arm} | {words or 'nothing'} | {b:.3f} |" for b, words in sorted(own)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
