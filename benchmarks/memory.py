"""Peak memory of a training step beside the cost model's formula, by variant and vocabulary.

python -m benchmarks.memory [--model gpt2-125m] [--sequences 4] [--length 512] [--json FILE]
                            [--quick]

Each case is a process of its own that trains two steps. On a CPU the peak is that of the process
(VmHWM) less what it held before there was a model, on a GPU that of PyTorch's allocator. Whole
logits are those of a model whose head is not used by itself. The last row is the case of least
memory with as many sequences at once as should fit in that of most.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RandomSequences, alone, keep, markdown
from dept_fl import loss
from dept_fl.config import Recipe, load_recipe
from dept_fl.cost import memory, trains_in_bf16
from dept_fl.model import blocks, build, layout
from dept_fl.report import Event, size
from dept_fl.train import Schedule, pick_device, train
from dept_fl.trial import peak_bytes

_WARM_UP = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2}
# Variant and vocabulary, the paper's: one multilingual, each silo's rows or own tokenizer, and a
# silo's own of our recipes.
CASES = [("glob", 250_112), ("trim", 50_257), ("spec-opt", 4_096)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-125m", help="a preset, of 12 blocks")
    parser.add_argument("--sequences", type=int, default=4, help="at once")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a small model, few tokens")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    if options.quick:
        options.model, options.sequences, options.length = "llama-nano", 4, 128
    rows = [
        alone(
            "benchmarks.memory",
            {
                "model": options.model,
                "variant": variant,
                "vocabulary": vocabulary,
                "sequences": options.sequences,
                "length": options.length,
                "whole": whole,
            },
        )
        for variant, vocabulary in CASES
        for whole in (True, False)
    ]
    least, most = (by(rows, key=lambda row: row["measured"]) for by in (min, max))
    asked = {key: least[key] for key in ("model", "variant", "vocabulary", "length", "whole")}
    rows.append(alone("benchmarks.memory", {**asked, "sequences": fitting(least, most)}))
    print(table(rows))
    keep(options.json, "benchmarks.memory", rows)


def fitting(least: Event, most: Event) -> int:
    """How many sequences of one case should fit in the memory of another.

    Beside weights, gradients and moments a case's memory is taken to grow with its sequences.
    """
    free, taken = (row["measured"] - least["formula_parameters"] for row in (most, least))
    return int(least["sequences"] * free / taken)


def measure(case: Event) -> Event:
    """Two steps, the second of which has an optimiser's state from the start."""
    recipe = recipe_of(case)
    kind = blocks(recipe.model, recipe.sequence_tokens)
    if case["whole"]:
        loss.plain_head = lambda model: None
        kind = replace(kind, slices_logits=False)
    found = layout(recipe.model, recipe.sequence_tokens)
    counted = memory(recipe, found, kind, case["vocabulary"])
    device = pick_device("auto")
    warm_up(recipe, device)
    before = held(device)
    model = build(recipe.model, case["vocabulary"], recipe.sequence_tokens, 0).to(device)
    batches = RandomSequences(case["vocabulary"], recipe.sequence_tokens)
    train(model, batches, recipe.inner, Schedule(0, 2), 0, {})
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes()
    return {
        **case,
        "bf16": trains_in_bf16(recipe),
        "measured": peak - before,
        "formula": counted.total,
        "formula_logits": counted.logits,
        "formula_parameters": counted.weights + counted.gradients + counted.optimizer,
    }


def recipe_of(case: Event) -> Recipe:
    words: dict[str, Any] = {
        "model.preset": case["model"],
        "sequence_tokens": case["length"],
        "inner.batch_size": case["sequences"],
        "inner.local_steps": 2,
    }
    return load_recipe("conf/demo.yaml", " ".join(f"{k}={v}" for k, v in words.items()))


def warm_up(recipe: Recipe, device: torch.device) -> None:
    """What the first step ever loads and keeps is not the model's."""
    inner = replace(recipe.inner, batch_size=1, local_steps=1)
    small = replace(recipe.model, preset="", config=_WARM_UP)
    model = build(small, 64, 16, 0).to(device)
    train(model, RandomSequences(64, 16), inner, Schedule(0, 1), 0, {})


def held(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS:"))


def table(rows: list[Event]) -> str:
    """Markdown: measured and counted, and what slices of the logits save."""
    head = ["variant", "vocabulary", "sequences", "logits"]
    head += ["measured", "formula", "measured / formula"]
    return markdown(
        head,
        [
            [
                row["variant"],
                f"{row['vocabulary']:,}",
                str(row["sequences"]),
                "whole" if row["whole"] else "a slice at a time",
                size(row["measured"]),
                size(row["formula"]),
                f"{row['measured'] / row['formula']:.2f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
