"""A small federation of three silos with different text, made in a temporary folder."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import sentencepiece as spm
import torch

from dept_fl.config import Recipe, load_recipe

torch.set_num_threads(1)

SETTINGS = """
name: tiny
seed: 3
vocab_size: 320
sequence_tokens: 16
rounds: 4
validation_fraction: 0.2
sample_tokens: 8
model:
  config:
    {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2,
     num_attention_heads: 2, num_key_value_heads: 2, tie_word_embeddings: true}
inner: {local_steps: 2, batch_size: 4, learning_rate: 0.01, warmup_steps: 2}
silos:
  ant: {files: [ant.jsonl]}
  bee: {files: [bee.jsonl]}
  cat: {files: [cat.jsonl]}
"""

WORDS = {
    "ant": "the leaf is under a small green tree and the ants carry it home".split(),
    "bee": "el campo tiene flores rojas donde vuelan abejas por la mañana".split(),
    "cat": "кот спит на тёплой крыше и смотрит во двор весь день".split(),
}


def write_text(
    folder: Path, silo: str, documents: int = 60, words: list[str] | None = None
) -> None:
    """documents lines of JSONL, drawn from a silo's words."""
    draw = random.Random(silo)
    # Compounds, since a dozen words alone have too few pieces for a vocabulary.
    vocabulary = words or [a + b for a in WORDS[silo] for b in WORDS[silo]]
    lines = [
        json.dumps({"text": " ".join(draw.choices(vocabulary, k=40)) + "\n"})
        for _ in range(documents)
    ]
    (folder / f"{silo}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def sentencepiece_model(texts: Iterable[str], vocab_size: int = 290, **options: object) -> bytes:
    """A tokenizer as others train theirs, with options that ours never has."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        minloglevel=3,
        **{"byte_fallback": True, **options},
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe as a file, with its silos' text beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    for silo in WORDS:
        write_text(folder, silo)
    file = folder / "tiny.yaml"
    file.write_text(SETTINGS)
    return file


@pytest.fixture
def recipe(tiny_file: Path) -> Callable[..., Recipe]:
    """recipe("variant=trim tokenizer=shared"): the small recipe with overrides."""

    def make(overrides: str = "") -> Recipe:
        return load_recipe(tiny_file, overrides)

    return make


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for all tests: tokenizers and tokens are made once, states are kept apart."""
    return tmp_path_factory.mktemp("home")
