"""Many silos on one machine: how time and memory grow with silos, body and vocabulary.

python -m benchmarks.scale [--silos 10,30,100] [--json FILE] [--plot FILE] [--quick]

Each row is a real `dept run` of SPEC-OPT on made-up text: every silo has words and a tokenizer of
its own, ten silos are sampled a round, and two workers with a core each do what is asked of them.
Memory is the most that was held at one time (PSS: what processes share counts once): `server` is
Flower's process with the ServerApp in it, `worker` the largest of those that are silos in turn.
Seconds of a round are those of the fastest behind the first.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.processes import run_watched
from dept_fl.jobs import about
from dept_fl.report import Event, Ledger

SAMPLED, ROUNDS = 10, 4
WIDTH, PIECES = 64, 400  # of the cases that have other things to show
WIDTHS, VOCABULARIES = (256, 768), (2000, 8000)
_DEPT = Path(sys.executable).parent / "dept"
_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


@dataclass(frozen=True)
class Case:
    """One run: so many silos, with a body of this width and tokenizers of so many pieces."""

    silos: int
    width: int = WIDTH
    pieces: int = PIECES

    @property
    def settings(self) -> Event:
        names = [f"silo-{i:03}" for i in range(self.silos)]
        return {
            "name": "scale",
            "vocab_size": self.pieces,
            "sequence_tokens": 64,
            "rounds": ROUNDS,
            "silos_per_round": min(SAMPLED, self.silos),
            "validation_max_bytes": 5000,
            "sample_tokens": 8,
            "model": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": self.width,
                    "intermediate_size": 3 * self.width,
                    "num_hidden_layers": 4,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 4,
                    "tie_word_embeddings": True,
                }
            },
            "inner": {"local_steps": 2, "batch_size": 4, "warmup_steps": 2},
            "silos": {name: {"files": [f"{name}.jsonl"]} for name in names},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--silos", default="10,30,100")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG")
    parser.add_argument("--quick", action="store_true", help="one run of six silos")
    options = parser.parse_args()
    counts = [6] if options.quick else [int(word) for word in options.silos.split(",")]
    rows = []
    for case in cases(counts, options.quick):
        rows.append(measure(case))
        print(f"{case}: done", file=sys.stderr, flush=True)
    print(table(rows))
    if options.json:
        facts = {"machine": about("python -m benchmarks.scale"), "rows": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


def cases(counts: list[int], quick: bool) -> list[Case]:
    """More silos; then, with the fewest of them, wider bodies and larger vocabularies."""
    found = [Case(count) for count in counts]
    if not quick:
        found += [Case(min(counts), width=width) for width in WIDTHS]
        found += [Case(min(counts), pieces=pieces) for pieces in VOCABULARIES]
    return found


def measure(case: Case) -> Event:
    """One run of its own home, to its end."""
    with tempfile.TemporaryDirectory(prefix="dept-scale-") as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(case.settings))
        for i, silo in enumerate(case.settings["silos"]):
            write_text(folder / f"{silo}.jsonl", i, case.pieces)
        command = [str(_DEPT), "run", str(recipe), "--cpus", "1"]
        command += ["--run-dir", str(folder / "run"), "--home", str(folder / "home")]
        peaks = run_watched(command, folder / "log", kind_of)
        events = Ledger(folder / "run").read()
    return {**vars(case), **figures(events), "peaks": peaks.together, "peaks_of_one": peaks.one}


def write_text(file: Path, silo: int, pieces: int) -> None:
    """Documents from words of the silo's own, enough for a tokenizer of so many pieces."""
    draw = random.Random(silo)
    words = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 4))) for _ in range(3 * pieces)]
    lines = (" ".join(draw.choices(words, k=40)) for _ in range(max(200, pieces // 2)))
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def kind_of(command: str) -> str:
    if "ray::" in command:
        return "worker"
    return "server" if "flwr-simulation" in command else "Flower and Ray"


def figures(events: list[Event]) -> Event:
    """Seconds of a run by part, from its metrics.jsonl."""
    joined = [e["time"] for e in events if e["event"] == "join"]
    rounds = list(_rounds(events))
    fastest = min(rounds[1:], key=lambda each: float(each["seconds"]))
    plan = next(e for e in events if e["event"] == "plan")
    return {
        "body_parameters": plan["body_parameters"],
        "joining_s": max(joined) - min(joined),
        "round_s": fastest["seconds"],
        "silos_s": fastest["silos_s"],
        "server_s": fastest["server_s"],
    }


def _rounds(events: list[Event]) -> Iterator[Event]:
    """Of each round its seconds, those in which silos were at work, and those of the server."""
    for each in (e for e in events if e["event"] == "round"):
        this = [e for e in events if e.get("round") == each["round"]]
        silos = [e for e in this if e["event"] == "silo_train"]
        keys = ("load_s", "settle_s", "evaluate_s", "train_s", "encode_s", "save_s")
        saved = next(e["save_s"] for e in this if e["event"] == "checkpoint")
        merged = sum(silo["merge_s"] for silo in silos) + each["outer_s"]
        yield {
            "seconds": each["seconds"],
            "silos_s": sum(silo.get(key, 0.0) for silo in silos for key in keys),
            "server_s": each["push_s"] + merged + saved,
        }


def table(rows: list[Event]) -> str:
    """Markdown; of silos and server what one round takes."""
    head = ["silos", "M body parameters", "pieces", "joining, s", "round, s", "silos at work, s"]
    head += ["server at work, s", "server, MB", "worker, MB", "all, MB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        seconds = [row[key] for key in ("joining_s", "round_s", "silos_s", "server_s")]
        cells = [str(row["silos"]), f"{row['body_parameters'] / 1e6:.2f}", f"{row['pieces']:,}"]
        cells += [f"{each:.2f}" for each in seconds]
        cells += [f"{each:,.0f}" for each in megabytes(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def megabytes(row: Event) -> list[float]:
    """Peaks of the server, of the largest worker, and of all kinds of processes together."""
    one, together = row["peaks_of_one"], row["peaks"]
    return [each / 1e6 for each in (one["server"], one["worker"], sum(together.values()))]


def plot(rows: list[Event], file: Path) -> None:
    """Time and memory by silos, body and vocabulary, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6.5), layout="constrained", sharex="col")
    few = min(row["silos"] for row in rows)
    base = [row for row in rows if (row["width"], row["pieces"]) == (WIDTH, PIECES)]
    columns = {
        "silos": base,
        "body_parameters": [r for r in rows if r["pieces"] == PIECES and r["silos"] == few],
        "pieces": [r for r in rows if r["width"] == WIDTH and r["silos"] == few],
    }
    for (key, chosen), (upper, lower) in zip(columns.items(), axes.T, strict=True):
        x = [row[key] for row in chosen]
        for part, colour in (("round_s", "#0072B2"), ("server_s", "#D55E00")):
            label = "round" if part == "round_s" else "server at work"
            upper.plot(x, [row[part] for row in chosen], marker=".", color=colour, label=label)
        for i, (label, colour) in enumerate((("server", "#D55E00"), ("worker", "#009E73"))):
            y = [megabytes(row)[i] for row in chosen]
            lower.plot(x, y, marker=".", color=colour, label=label)
        lower.set_xscale("log")  # of both, which share it
        ticks = [f"{each / 1e6:.2g} M" if key == "body_parameters" else f"{each:,}" for each in x]
        lower.set_xticks(x, ticks)
        lower.set_xticks([], minor=True)
        lower.set(xlabel=key.replace("_", " "))
    axes[0, 0].set(ylabel="seconds a round")
    axes[1, 0].set(ylabel="peak MB of one process")
    for each in axes.flat:
        each.set_ylim(bottom=0)
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    axes[1, 0].legend(frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
