"""A kept model on text that it is shown: what `dept evaluate` says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
from torch import nn

from dept_fl.config import InnerConfig
from dept_fl.data import TokenStream, tokens_folder
from dept_fl.errors import DeptError
from dept_fl.evaluate import Evaluation, evaluate
from dept_fl.final import Final, open_final, read_final
from dept_fl.named_files import NamedFiles
from dept_fl.pretrained import Encoder, Pretrained, load_pretrained, of_final
from dept_fl.progress import Progress
from dept_fl.report import size
from dept_fl.train import pick_device

Ints = npt.NDArray[np.int64]

_PASS_TOKENS = 8192  # in one pass of the model
_MOST_TOKENS = 2048  # of a window that nobody asked for
_COLUMN = "text"  # where nobody names another


@dataclass(frozen=True)
class Question:
    """Which model, and which text.

    Attributes:
        folder: a silo's final folder, or a Hugging Face folder.
        files: none for the silo's own validation split.
        column, settings: see `NamedFiles`.
        window: tokens that the model sees at once; 0: as many as it takes, up to 2,048.

    Raises:
        DeptError: for how to read files where none are named.
    """

    folder: Path
    files: list[str]
    column: str
    settings: list[str]
    window: int
    device: str

    def __post_init__(self) -> None:
        idle = {"--set": self.settings, "--column": self.column != _COLUMN}
        if not self.files and any(idle.values()):
            named = ", ".join(option for option, given in idle.items() if given)
            raise DeptError(f"{named}: goes with --data FILES; none is given")


@dataclass(frozen=True)
class Assessment:
    """How well a model predicts a text.

    Attributes:
        unigram_of: whose token frequencies the unigram floor is made of: the model's `training`
            text, or `this` text where that is not at hand.
    """

    model: str
    text: str
    documents: int
    bytes: int
    lossy_documents: int
    window_tokens: int
    unigram_of: str
    evaluation: Evaluation

    def to_json(self) -> str:
        facts = asdict(self)
        found = facts.pop("evaluation")
        tokens, loss = found.pop("validation_tokens"), found.pop("validation_loss")
        whole = {**facts, "tokens": tokens, "nats_per_token": loss, **found}
        return json.dumps(whole, ensure_ascii=False, allow_nan=False)

    def lines(self) -> Iterator[str]:
        found = self.evaluation
        yield f"model           {self.model}"
        yield (
            f"text            {self.text}: {self.documents:,} documents, {size(self.bytes)}, "
            f"{found.validation_tokens:,} tokens in windows of {self.window_tokens:,}"
        )
        yield f"bits per byte   {found.bits_per_byte:.3f}"
        yield (
            f"unigram floor   {found.unigram_bits_per_byte:.3f}, from the token frequencies of "
            f"{self.unigram_of} text"
        )
        yield f"perplexity      {found.perplexity:,.1f}; unigram {found.unigram_perplexity:,.1f}"
        if self.lossy_documents:
            yield (
                f"warning: {self.lossy_documents:,} documents do not come back whole from the "
                "tokenizer, so that bits per byte are too low"
            )


def assess(question: Question, progress: Progress) -> Assessment:
    """Evaluate the model on the text.

    Raises:
        DeptError: naming what is wrong and the mend.
    """
    device = pick_device(question.device)
    final, model = progress.during("loading the model", lambda: _load(question))
    window = _window(question.window, model)
    text, documents, stream, unigram_of = _text(question, final, model, progress)
    cast(nn.Module, model.model).to(device)
    precision = final.silo.recipe.inner.precision if final else "auto"
    inner = InnerConfig(batch_size=max(1, _PASS_TOKENS // window), precision=precision)
    with progress.stage("evaluating"):
        found = evaluate(model.model, stream, window, inner, progress.at)
    return Assessment(
        model=str(question.folder),
        text=text,
        documents=documents,
        bytes=stream.validation_bytes,
        lossy_documents=stream.lossy_documents,
        window_tokens=window,
        unigram_of=unigram_of,
        evaluation=found,
    )


def _load(question: Question) -> tuple[Final | None, Pretrained]:
    folder = question.folder
    if not (folder / "state.json").is_file():
        return None, load_pretrained(folder)
    final = (open_final if question.files else read_final)(folder.resolve())
    return final, of_final(final)


def _window(asked: int, model: Pretrained) -> int:
    longest = model.sequence_tokens
    if asked > longest:
        raise DeptError(f"--window {asked}: the model takes {longest:,} tokens at most")
    return asked or min(longest, _MOST_TOKENS)


def _text(
    question: Question, final: Final | None, model: Pretrained, progress: Progress
) -> tuple[str, int, TokenStream, str]:
    """Its name, how many documents it has, its tokens, and whose the unigram is."""
    if not question.files:
        if final is None:
            raise DeptError("a Hugging Face folder brings no text: name some with --data FILES")
        stream = progress.during("making tokens", lambda: final.silo.stream)
        documents = final.silo.corpus.validation_documents
        return f"validation split of silo {final.silo.name}", documents, stream, "training"
    files = NamedFiles(question.files, question.column, question.settings)
    with progress.stage("reading the text"):
        texts = list(progress.watch(files.documents()))
    if not texts:
        raise DeptError(f"--data {' '.join(question.files)}: no text in it")
    counts = _training_counts(final, model) if final else None
    with progress.stage("making tokens"):
        stream = _stream(texts, model, counts, progress)
    unigram_of = "this" if counts is None else "training"
    return " ".join(question.files), len(texts), stream, unigram_of


def _stream(
    texts: Sequence[str], model: Pretrained, counts: Ints | None, progress: Progress
) -> TokenStream:
    """The texts as a silo would have them in its validation split.

    Args:
        counts: [V] of the training tokens; None takes those of these texts, which no other
            unigram distribution can undercut by much.
    """
    tokenizer, vocabulary = model.tokenizer, model.vocabulary
    encoder = Encoder(tokenizer, vocabulary)
    local, lossy = [encoder.end], 0
    for done, text in enumerate(texts):
        progress.at(done, len(texts), "documents")
        (ids,) = encoder([text])
        local += [*ids, encoder.end]
        lossy += tokenizer.decode([int(vocabulary.ids[i]) for i in ids]) != text
    ids_of_all = vocabulary.ids[local]
    found = np.bincount(ids_of_all, minlength=tokenizer.size) if counts is None else counts
    smoothed = found[vocabulary.ids] + 1.0
    return TokenStream(
        train=ids_of_all[:0],
        validation=ids_of_all,
        vocabulary=vocabulary,
        unigram=smoothed / smoothed.sum(),
        validation_bytes=sum(len(text.encode()) for text in texts),
        train_bytes=0,
        lossy_documents=lossy,
    )


def _training_counts(final: Final, model: Pretrained) -> Ints | None:
    """[V] how often each id is in the silo's training split, where that still lies in its home."""
    restricted = model.vocabulary.size < model.tokenizer.size
    parent = final.silo.folder / "tokens"
    folder = tokens_folder(final.meta["text"], model.tokenizer, restricted, parent)
    file = folder / "counts.npy"
    return np.load(file, allow_pickle=False) if file.is_file() else None
