"""Near copies among documents: how many are found, at what price in seconds and memory.

python -m benchmarks.near [--documents 100000] [--quick]

Documents of 300 words; every tenth is an earlier one with some words changed, a different share
of its five words in a row each time. Each row is one process that reads them into a corpus.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from dept_fl.config import Recipe, SiloConfig
from dept_fl.data import load_corpus
from dept_fl.near import shingles
from dept_fl.report import Event
from dept_fl.trial import peak_bytes

WORDS = 300
THRESHOLD = 0.8
_EVERY = 10
_MOST_CHANGES = 20  # words, each of which is in five shingles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="2,000 documents")
    options = parser.parse_args()
    count = 2000 if options.quick else options.documents
    with tempfile.TemporaryDirectory() as name:
        truth = write_texts(Path(name) / "text.jsonl", count)
        rows = [_in_fresh_process(Path(name), threshold) for threshold in (0.0, THRESHOLD)]
    print(f"{count:,} documents of {WORDS} words, {truth:,} of them at least {THRESHOLD} similar\n")
    print(as_table(rows))


def write_texts(file: Path, count: int) -> int:
    """Write the documents; returns how many are really so similar to the one they were made of."""
    draw = random.Random(1)
    similar = 0
    with file.open("w", encoding="utf-8") as stream:
        for text, of in _texts(draw, count):
            stream.write(json.dumps({"text": text}) + "\n")
            similar += bool(of) and jaccard(text, of) >= THRESHOLD
    return similar


def _texts(draw: random.Random, count: int) -> Iterator[tuple[str, str]]:
    kept: list[list[str]] = []
    for i in range(count):
        words = [f"w{draw.randrange(50_000)}" for _ in range(WORDS)]
        of: list[str] = []
        if i % _EVERY == _EVERY - 1:
            of = draw.choice(kept)
            words = list(of)
            for place in draw.sample(range(WORDS), draw.randint(1, _MOST_CHANGES)):
                words[place] = "changed"
        elif len(kept) < 1000:
            kept.append(words)
        yield " ".join(words), " ".join(of)


def jaccard(text: str, other: str) -> float:
    one, two = set(shingles(text)), set(shingles(other))
    return len(one & two) / len(one | two)


def _in_fresh_process(folder: Path, threshold: float) -> Event:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(read, folder, threshold).result()


def read(folder: Path, threshold: float) -> Event:
    source = SiloConfig(files=[str(folder / "text.jsonl")])
    recipe = Recipe(near_duplicates=threshold)
    before, began = peak_bytes(), time.perf_counter()
    corpus = load_corpus("near", source, recipe, folder / f"cache-{threshold}")
    seconds = time.perf_counter() - began
    return {
        "threshold": threshold,
        "seconds": seconds,
        "mb_per_s": (folder / "text.jsonl").stat().st_size / 1e6 / seconds,
        "dropped": corpus.near_duplicates,
        "bytes_each": (peak_bytes() - before) / corpus.documents,
    }


def as_table(rows: list[Event]) -> str:
    head = ("near_duplicates", "seconds", "MB/s", "dropped as near copies", "memory a document")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [
        f"| {row['threshold']:g} | {row['seconds']:.1f} | {row['mb_per_s']:.1f} | "
        f"{row['dropped']:,} | {row['bytes_each'] / 1e3:.2f} kB |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
