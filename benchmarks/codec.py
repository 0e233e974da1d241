"""Codecs and fragments: bytes, speed, error of one delta, and what they do to a run's end.

python -m benchmarks.codec [--recipe conf/handbook.yaml] [--silos de,ja,ru] [--seeds 1]
                           [--numbers 25000000] [--out FOLDER] [--json FILE] [--quick]

The runs are SPEC-OPT's by the plain algorithm, which gives the tensors of a run through Flower, bit
for bit (tests/test_wire.py). Runs in --out that are done are not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.timing import fastest
from benchmarks.trials import QUICK, bits, trials
from dept_fl.codec import decode, encode, form
from dept_fl.config import CODECS, Recipe, home_dir, load_recipe, with_settings
from dept_fl.jobs import about, run_jobs
from dept_fl.report import Event
from dept_fl.standings import deviation, mean

_WIDTH = 2048
WIRES = {
    "fp32": "",
    "up bf16": "wire.up=bf16",
    "up int8": "wire.up=int8",
    "up int4": "wire.up=int4",
    "up int8, no feedback": "wire.up=int8 wire.error_feedback=false",
    "up int4, no feedback": "wire.up=int4 wire.error_feedback=false",
    "up int4, down int8": "wire.up=int4 wire.down=int8",
    "up int4, down int4": "wire.up=int4 wire.down=int4",
    "2 fragments": "wire.fragments=2",
    "4 fragments": "wire.fragments=4",
    "2 fragments, up int4, down int8": "wire.fragments=2 wire.up=int4 wire.down=int8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="conf/handbook.yaml")
    parser.add_argument("--silos", default="", help="of the recipe's; default: all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--numbers", type=int, default=25_000_000, help="of the matrix encoded")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a small matrix, short runs")
    options = parser.parse_args()
    speeds = [speed(codec, 1_000_000 if options.quick else options.numbers) for codec in CODECS]
    print(speed_table(speeds))
    recipe = replace(load_recipe(options.recipe), arms=[])
    if options.silos:
        recipe = with_settings(recipe, {"only": options.silos.split(",")})
    out = options.out or Path(tempfile.mkdtemp(prefix="dept-codec-"))
    rows = quality(recipe, options.seeds, options.quick, out)
    print(quality_table(rows))
    if options.json:
        facts = {"machine": about("python -m benchmarks.codec"), "speed": speeds, "runs": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


# ---- one matrix --------------------------------------------------------------------------------


def speed(codec: str, numbers: int) -> Event:
    """Encoding and decoding beside a copy of the same matrix, best of some repeats."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(max(1, numbers // _WIDTH), _WIDTH, generator=generator)
    shape = tuple(matrix.shape)
    encoded = encode(codec, matrix)
    copy_s = fastest(matrix.clone)
    return {
        "codec": codec,
        "bits": 8 * form(codec, shape).bytes / matrix.numel(),
        "error": float((decode(codec, encoded, shape) - matrix).norm() / matrix.norm()),
        "encode_copies": fastest(lambda: encode(codec, matrix)) / copy_s,
        "decode_copies": fastest(lambda: decode(codec, encoded, shape)) / copy_s,
        "copy_gb_per_s": matrix.numel() * 4 / copy_s / 1e9,
    }


def speed_table(rows: Sequence[Event]) -> str:
    """Markdown; times in those of one copy of the matrix."""
    lines = ["| codec | bits a number | error | encode | decode |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['codec']} | {r['bits']:.2f} | {r['error']:.4f} | {r['encode_copies']:.1f} | "
        f"{r['decode_copies']:.1f} |"
        for r in rows
    ]
    note = "error: of a normal matrix, relative; encode, decode: times the time of a copy"
    return "\n".join([*lines, "", note, ""])


# ---- whole runs --------------------------------------------------------------------------------


def quality(recipe: Recipe, seeds: int, quick: bool, out: Path) -> list[Event]:
    """SPEC-OPT's end with each codec, over seeds."""
    more = f" {QUICK}" if quick else ""
    changes = {"spec-opt": {words: f"{wire}{more}" for words, wire in WIRES.items()}}
    made = trials(recipe, changes, seeds, out)
    results, failures = run_jobs(
        made, out, home_dir(""), 0, lambda line: print(line, file=sys.stderr)
    )
    print("\n".join(failures), file=sys.stderr)
    rows = []
    for words in WIRES:
        own = [result for result in results if result["words"] == words]
        if own:
            found = [bits(result) for result in own]
            sent = [silo["bytes_up"] for silo in own[0]["silos"].values()]
            rows.append(
                {
                    "wire": words,
                    "seeds": [result["seed"] for result in own],
                    "bits_per_byte": found,
                    "bytes_up": mean(sent),
                }
            )
    return rows


def quality_table(rows: Sequence[Event]) -> str:
    """Markdown: the end of the runs, beside that with fp32 of the same seeds."""
    plain = next(row for row in rows if row["wire"] == "fp32")
    lines = [
        "| wire | MB up a silo | of fp32 | bits/byte | against fp32 |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        against = [
            b / a - 1 for a, b in zip(plain["bits_per_byte"], row["bits_per_byte"], strict=True)
        ]
        spread = deviation(against)
        lines.append(
            f"| {row['wire']} | {row['bytes_up'] / 1e6:.2f} | "
            f"1/{plain['bytes_up'] / row['bytes_up']:.2f} | {mean(row['bits_per_byte']):.4f} | "
            f"{mean(against):+.2%}{'' if spread is None else f' ± {spread:.2%}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
