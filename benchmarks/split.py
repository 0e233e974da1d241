"""Clusters against true sources: the sources' text is mixed, then `dept silo split` is run on it.

python -m benchmarks.split [--recipe conf/demo.yaml] [--seeds 3] [--json FILE]
python -m benchmarks.split --data data/handbook [--silos N] [--seeds 3] [--json FILE]

The sources are the recipe's silos, or with --data DIR the files DIR/<source>/train.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dept_fl.clusters import Labelled, Split, split
from dept_fl.config import SiloConfig, load_recipe
from dept_fl.errors import DeptError
from dept_fl.jobs import about
from dept_fl.progress import Progress
from dept_fl.sources import documents

MEASURES = ("adjusted_rand_index", "normalised_mutual_information", "purity")


@dataclass(frozen=True)
class Measured:
    """One split and how long it took."""

    seed: int
    split: Split
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        facts = json.loads(self.split.to_json())
        kept = ("seed", "fitted_documents", "silos", "agreement")
        return {"seconds": round(self.seconds, 1), **{key: facts[key] for key in kept}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="conf/demo.yaml")
    parser.add_argument("--data", type=Path, nargs="+", help="folders of <source>/train.jsonl")
    parser.add_argument("--silos", type=int, help="clusters; default: as many as sources")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sources = in_folders(options.data) if options.data else load_recipe(options.recipe).silos
    silos = options.silos or len(sources)
    measured = [measure(sources, silos, seed) for seed in range(1, options.seeds + 1)]
    print(table(measured))
    if options.json:
        runs = [each.as_dict() for each in measured]
        facts = {"machine": about("python -m benchmarks.split"), "runs": runs}
        options.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def in_folders(folders: list[Path]) -> dict[str, SiloConfig]:
    """Sources by name, one for each subfolder with a train.jsonl."""
    files = sorted(file for folder in folders for file in folder.glob("*/train.jsonl"))
    if not files:
        raise DeptError(f"{', '.join(map(str, folders))}: no <source>/train.jsonl in there")
    return {file.parent.name: SiloConfig(files=[str(file)]) for file in files}


def measure(sources: dict[str, SiloConfig], silos: int, seed: int) -> Measured:
    def corpus() -> Iterator[Labelled]:
        for name in sorted(sources):
            yield from ((text, name) for text in documents(name, sources[name]))

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = split(corpus, Path(folder) / "silos", silos, seed, Progress())
    return Measured(seed, found, time.perf_counter() - began)


def table(measured: list[Measured]) -> str:
    """Markdown: a row a seed with mean and spread, then the first seed's confusion."""
    agreements = [each.split.agreement for each in measured if each.split.agreement]
    lines = ["| seed | adjusted Rand | mutual information | purity |", "|---|---|---|---|"]
    figures = [[getattr(each, measure) for measure in MEASURES] for each in agreements]
    rows = [(str(each.seed), row) for each, row in zip(measured, figures, strict=True)]
    columns = list(zip(*figures, strict=True))
    rows.append(("mean", [statistics.mean(column) for column in columns]))
    if len(measured) > 1:
        rows.append(("standard deviation", [statistics.stdev(column) for column in columns]))
    lines += [f"| {name} | {' | '.join(f'{x:.3f}' for x in row)} |" for name, row in rows]
    first = measured[0].split
    names = [part.name for part in first.parts]
    lines += ["", "| documents | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for source, row in zip(agreements[0].sources, agreements[0].confusion.tolist(), strict=True):
        lines.append(f"| {source} | " + " | ".join(f"{n:,}" for n in row) + " |")
    lines.append("| marked by | " + " | ".join(" ".join(p.terms[:5]) for p in first.parts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
