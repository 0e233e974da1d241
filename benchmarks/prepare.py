"""Making a large silo ready: seconds by stage, beside the tokenizer library's own pace, and memory.

python -m benchmarks.prepare [--mb 1000] [--json FILE] [--quick]

Each row is one process that does what a silo does with its text before its first step. As many
threads encode as PyTorch would take, in the rows and in the library's own pace; that is the
library called directly with whole lists of the same text, which it divides among its own threads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from pydoc_data import topics

import sentencepiece as spm
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.timing import fastest
from dept_fl.config import Recipe, SiloConfig
from dept_fl.data import Corpus, load_corpus, load_tokens
from dept_fl.jobs import about
from dept_fl.report import Event
from dept_fl.tokenizer import load_tokenizer, train_sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LIMIT_GB = 1.5
WORDS_IN_PARAGRAPH = 80
_PARAGRAPHS_IN_CALL = 8000  # of the library alone: 4 MB of text, whose pieces take far more memory
_CALLS = 8
_SHORT = {"tokenizer_train_bytes": 400_000, "vocab_size": 1024}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=1000, help="size of the text")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="10 MB, small tokenizers")
    options = parser.parse_args()
    megabytes = 10 if options.quick else options.mb
    recipe = replace(Recipe(), **_SHORT) if options.quick else Recipe()
    with tempfile.TemporaryDirectory() as name:
        write_text(Path(name) / "text.txt", megabytes)
        rows = [measured(kind, Path(name), recipe) for kind in _TRAINERS]
    print(f"{megabytes} MB of text, {torch.get_num_threads()} threads\n\n{as_table(rows)}")
    if options.json:
        facts = {"machine": about("python -m benchmarks.prepare"), "mb": megabytes, "rows": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if max(row["peak_gb"] for row in rows) <= LIMIT_GB else 1


def write_text(file: Path, megabytes: int) -> None:
    """Paragraphs of words drawn from Python's own manual, all different."""
    words = re.findall(r"\S+", " ".join(topics.topics.values()))
    draw = random.Random(1)
    left = megabytes * 1_000_000
    with file.open("w", encoding="utf-8") as stream:
        while left > 0:
            left -= stream.write(" ".join(draw.choices(words, k=WORDS_IN_PARAGRAPH)) + "\n\n")


def measured(kind: str, folder: Path, recipe: Recipe) -> Event:
    """One row: a silo made ready, and its library alone, each in a process of its own."""
    made = _in_fresh_process(prepare, kind, folder, recipe)
    return made | _in_fresh_process(library_alone, kind, folder, recipe)


def _in_fresh_process(work: Callable[..., Event], *arguments: object) -> Event:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


# ---- what a silo does ----------------------------------------------------------------------------


def prepare(kind: str, folder: Path, recipe: Recipe) -> Event:
    """Documents, tokenizer and token stream, with the seconds of each and the peak of memory."""
    home = folder / kind
    at = [time.perf_counter()]
    corpus = _corpus(folder, home, recipe)
    at.append(time.perf_counter())
    _TRAINERS[kind](corpus, recipe, home)
    at.append(time.perf_counter())
    tokenizer = load_tokenizer(home / _FILES[kind])
    stream = load_tokens(kind, corpus, tokenizer, restrict=True, parent=home / "tokens")
    at.append(time.perf_counter())
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "tokenizer": kind,
        "documents": corpus.documents,
        "text_bytes": corpus.text_bytes,
        "train_tokens": len(stream.train),
        "documents_s": at[1] - at[0],
        "training_s": at[2] - at[1],
        "tokens_s": at[3] - at[2],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
    }


def _corpus(folder: Path, home: Path, recipe: Recipe) -> Corpus:
    return load_corpus("big", SiloConfig(files=[str(folder / "text.txt")]), recipe, home / "text")


def _train_sentencepiece(corpus: Corpus, recipe: Recipe, home: Path) -> None:
    sample = corpus.training_sample(recipe.tokenizer_train_bytes)
    model = train_sentencepiece("big", sample, recipe.vocab_size)
    (home / _FILES["SentencePiece"]).write_bytes(model)


def _train_hugging_face(corpus: Corpus, recipe: Recipe, home: Path) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus.training_sample(recipe.tokenizer_train_bytes), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    fast.save_pretrained(home / _FILES["Hugging Face"])


_TRAINERS = {"SentencePiece": _train_sentencepiece, "Hugging Face": _train_hugging_face}
_FILES = {"SentencePiece": "tokenizer.model", "Hugging Face": "bpe"}


# ---- what the library does alone -----------------------------------------------------------------


def library_alone(kind: str, folder: Path, recipe: Recipe) -> Event:
    """Bytes a second of the library on the start of the same text, best of some repeats."""
    threads = torch.get_num_threads()
    home = folder / kind
    texts = list(islice(_corpus(folder, home, recipe).texts("train"), _CALLS * _PARAGRAPHS_IN_CALL))
    calls = [texts[i : i + _PARAGRAPHS_IN_CALL] for i in range(0, len(texts), _PARAGRAPHS_IN_CALL)]
    if kind == "SentencePiece":
        processor = spm.SentencePieceProcessor(model_file=str(home / _FILES[kind]))

        def encode(call: list[str]) -> object:
            return processor.encode(call, num_threads=threads, return_type="numpy")
    else:
        os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(threads)}
        backend = Tokenizer.from_file(str(home / _FILES[kind] / "tokenizer.json"))

        def encode(call: list[str]) -> object:
            return backend.encode_batch_fast(call, add_special_tokens=False)

    seconds = fastest(lambda: [len(encode(call)) for call in calls])
    return {"library_bytes_per_s": sum(len(text.encode()) for text in texts) / seconds}


# ---- what is printed -----------------------------------------------------------------------------


def as_table(rows: Sequence[Event]) -> str:
    """Markdown; the pace in megabytes of text a second."""
    lines = [
        "| tokenizer | documents s | training s | tokens s | all s | tokens MB/s | "
        "library alone MB/s | time of its own | peak GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        pace = r["text_bytes"] / r["tokens_s"]
        whole = r["documents_s"] + r["training_s"] + r["tokens_s"]
        lines.append(
            f"| {r['tokenizer']} | {r['documents_s']:.1f} | {r['training_s']:.1f} | "
            f"{r['tokens_s']:.1f} | {whole:.1f} | {pace / 1e6:.1f} | "
            f"{r['library_bytes_per_s'] / 1e6:.1f} | {r['library_bytes_per_s'] / pace:.2f} | "
            f"{r['peak_gb']:.2f} |"
        )
    counts = ", ".join(f"{r['train_tokens']:,} ({r['tokenizer']})" for r in rows)
    note = (
        f"{rows[0]['documents']:,} documents; tokens: {counts}; time of its own: of `tokens`, in "
        f"times of the library alone; limit of memory: {LIMIT_GB} GB"
    )
    return "\n".join([*lines, "", note])


if __name__ == "__main__":
    sys.exit(main())
