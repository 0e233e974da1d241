"""Peak memory and time of making a large silo ready: documents, tokenizer, token stream.

python -m benchmarks.prepare_memory [--mb 1000]
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data import topics

LIMIT_GB = 1.5
WORDS_IN_PARAGRAPH = 80


def write_text(file: Path, megabytes: int) -> None:
    """Paragraphs of words drawn from Python's own manual, all different."""
    words = re.findall(r"\S+", " ".join(topics.topics.values()))
    draw = random.Random(1)
    left = megabytes * 1_000_000
    with file.open("w", encoding="utf-8") as stream:
        while left > 0:
            left -= stream.write(" ".join(draw.choices(words, k=WORDS_IN_PARAGRAPH)) + "\n\n")


def prepare(folder: Path) -> None:
    """What a silo does with its text before its first step."""
    from dept_fl.config import Recipe, SiloConfig
    from dept_fl.data import load_corpus, load_tokens
    from dept_fl.tokenizer import SentencePieceTokenizer, train_sentencepiece

    recipe = Recipe()
    began = time.perf_counter()
    source = SiloConfig(files=[str(folder / "text.txt")])
    corpus = load_corpus("big", source, recipe, folder / "text")
    print(f"documents {time.perf_counter() - began:7.1f} s, {corpus.train_documents:,} of them")
    sample = corpus.training_sample(recipe.tokenizer_train_bytes)
    model = train_sentencepiece("big", sample, recipe.vocab_size)
    print(f"tokenizer {time.perf_counter() - began:7.1f} s")
    tokenizer = SentencePieceTokenizer(model)
    stream = load_tokens("big", corpus, tokenizer, restrict=True, parent=folder / "tokens")
    print(f"tokens    {time.perf_counter() - began:7.1f} s, {len(stream.train):,} of them")


def peak_gb_of_children() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=1000, help="size of the text")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare)
        return 0
    with tempfile.TemporaryDirectory() as name:
        write_text(Path(name) / "text.txt", arguments.mb)
        began = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.prepare_memory", "--prepare", name]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
    peak = peak_gb_of_children()
    print(f"{arguments.mb} MB of text: {seconds:.0f} s, peak {peak:.2f} GB (limit {LIMIT_GB} GB)")
    return 0 if peak <= LIMIT_GB else 1


if __name__ == "__main__":
    sys.exit(main())
