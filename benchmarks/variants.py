"""All variants on one recipe at equal tokens, beside each silo alone: one table.

python -m benchmarks.variants [--recipe conf/demo.yaml] [--json FILE] [--quick]

Each row is a real `dept run`; the table is read from the runs' metrics.jsonl. Runs that
are in --out already are not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dept_fl.config import Recipe, load_recipe
from dept_fl.jobs import about
from dept_fl.report import Event, Ledger
from dept_fl.rounds import has_checkpoint

VARIANTS = {
    "glob": ["variant=glob", "tokenizer=shared"],
    "trim": ["variant=trim", "tokenizer=shared"],
    "spec": ["variant=spec", "tokenizer=shared"],
    "spec-opt": ["variant=spec", "tokenizer=own"],
}
QUICK = ["rounds=2", "inner.local_steps=2", "inner.warmup_steps=2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="conf/demo.yaml")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two rounds of two steps")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    out = options.out or Path(tempfile.mkdtemp(prefix="dept-variants-"))
    rows = [measure(out, options, name, words) for name, words in arms(recipe).items()]
    print(table(recipe, rows))
    if options.json:
        facts = {"machine": about("python -m benchmarks.variants"), "rows": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


def arms(recipe: Recipe) -> dict[str, list[str]]:
    """The variants, then each silo alone: as many steps of its own, nobody to average with."""
    alone = {
        f"alone: {name}": [f"only=[{name}]", "silos_per_round=0"] for name in recipe.silo_names
    }
    return {**VARIANTS, **alone}


def measure(out: Path, options: argparse.Namespace, name: str, words: list[str]) -> dict[str, Any]:
    run_dir = (out / name.replace(": ", "-")).absolute()
    events = Ledger(run_dir).read()
    if not any(e["event"] == "end" for e in events):
        began = time.perf_counter()
        command = [str(Path(sys.executable).parent / "dept"), "run", options.recipe, *words]
        command += [*(QUICK if options.quick else []), "--run-dir", str(run_dir)]
        if has_checkpoint(run_dir):
            command.append("--resume")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        events = Ledger(run_dir).read()
    return {"arm": name, **summary(events)}


def summary(events: list[Event]) -> dict[str, Any]:
    """What the table shows of one run; per silo where silos differ."""
    plan = next(e for e in events if e["event"] == "plan")
    final = {e["silo"]: e for e in events if e.get("final")}
    trained = [e for e in events if e["event"] == "silo_train"]
    last = {e["silo"]: e for e in trained}
    tokens = {s: sum(e["tokens"] for e in trained if e["silo"] == s) for s in last}
    return {
        "bits_per_byte": {silo: e["bits_per_byte"] for silo, e in final.items()},
        "unigram_bits_per_byte": {silo: e["unigram_bits_per_byte"] for silo, e in final.items()},
        "held_parameters": {s: facts["held_parameters"] for s, facts in plan["silos"].items()},
        "bytes_up": {s: e["bytes_up_body"] + e["bytes_up_embeddings"] for s, e in last.items()},
        "bytes_down": {
            s: e["bytes_down_body"] + e["bytes_down_embeddings"] for s, e in last.items()
        },
        "tokens": tokens,
        "seconds": next(e["seconds"] for e in events if e["event"] == "end"),
    }


def table(recipe: Recipe, rows: list[dict[str, Any]]) -> str:
    """Markdown: bits per byte by silo and on average, parameters and bytes as means."""
    silos = recipe.silo_names
    head = ["arm", *silos, "mean", "M parameters", "MB up", "MB down", "M tokens"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    together = [row for row in rows if len(row["bits_per_byte"]) == len(silos)]
    for row in together:
        bits = [row["bits_per_byte"][s] for s in silos]
        keys = ("held_parameters", "bytes_up", "bytes_down", "tokens")
        costs = [mean(row[key]) / 1e6 for key in keys]
        figures = [f"{b:.3f}" for b in (*bits, sum(bits) / len(bits))]
        lines.append("| " + " | ".join([row["arm"], *figures, *(f"{c:.2f}" for c in costs)]) + " |")
    alone = {s: b for row in rows if row not in together for s, b in row["bits_per_byte"].items()}
    floor = together[-1]["unigram_bits_per_byte"]
    for name, bits_of in (("each silo alone", alone), ("unigram floor (own tokenizer)", floor)):
        bits = [bits_of[s] for s in silos]
        figures = [f"{b:.3f}" for b in (*bits, sum(bits) / len(bits))]
        lines.append("| " + " | ".join([name, *figures, "", "", "", ""]) + " |")
    return "\n".join(lines)


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


if __name__ == "__main__":
    main()
