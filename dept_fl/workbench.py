"""A tokenizer on the workbench: trained on files, looked at, compared with others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from dept_fl.checkpoint import whole_folder
from dept_fl.data import Batch, in_order, spread, text_batches
from dept_fl.errors import DeptError
from dept_fl.export import ODD
from dept_fl.named_files import NamedFiles
from dept_fl.progress import Progress
from dept_fl.surface import surfaces
from dept_fl.tokenizer import (
    MODEL_FILE,
    Tokenizer,
    byte_ids,
    load_tokenizer,
    sentencepiece,
    train_sentencepiece,
)

_WRITES = ("text", "byte")  # the surfaces of pieces that write something


# ---- how it writes -------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A text as a tokenizer writes it; documents' ends are not counted.

    Attributes:
        unknown: tokens that stand for text which no piece writes.
        byte_tokens: tokens of the pieces that write single bytes where no other piece does;
            byte-level tokenizers have none, since each of their pieces is of bytes.
        lossy_documents: that do not come back whole from their ids.
    """

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    unknown: int = 0
    byte_tokens: int = 0
    lossy_documents: int = 0

    def __add__(self, other: Written) -> Written:
        names = [field.name for field in fields(self)]
        return Written(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / self.tokens

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes_per_token": self.bytes_per_token}


def written(tokenizer: Tokenizer, texts: Iterable[str]) -> Written:
    """How a tokenizer writes these documents.

    Raises:
        DeptError: there is no text.
    """
    kinds = np.asarray([surface.kind for surface in surfaces(tokenizer)])

    def of_batch(batch: Batch) -> Written:
        documents, _ = batch
        encoded = tokenizer.arrays(documents)
        found = kinds[np.concatenate(encoded)]
        return Written(
            documents=len(documents),
            text_bytes=sum(len(text.encode()) for text in documents),
            tokens=len(found),
            unknown=int((found == "special").sum()),
            byte_tokens=int((found == "byte").sum()),
            lossy_documents=sum(
                tokenizer.decode(ids.tolist()) != text
                for ids, text in zip(encoded, documents, strict=True)
            ),
        )

    total = reduce(Written.__add__, in_order(of_batch, text_batches(texts)), Written())
    if not total.tokens:
        raise DeptError("no text in the data; give files with some")
    return total


def common_pieces(tokenizers: Sequence[Tokenizer]) -> list[list[int]]:
    """[n][n] how many different strings of bytes both of two vocabularies have a piece for."""
    held = [{s.value for s in surfaces(t) if s.kind in _WRITES} for t in tokenizers]
    return [[len(a & b) for b in held] for a in held]


# ---- what it is ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """What a tokenizer is.

    Attributes:
        end: the piece that separates documents.
        specials: other pieces that no text is written with.
        writes_bytes: whether it has a piece for each byte, so that it can write any text.
        lost: of the strings at which tokenizers differ those that do not come back from their ids.
    """

    name: str
    kind: str
    pieces: int
    end: str
    specials: list[str]
    writes_bytes: bool
    lost: list[str]
    fingerprint: str

    @property
    def lossless(self) -> bool:
        return not self.lost


def card(name: str, tokenizer: Tokenizer) -> Card:
    pieces = tokenizer.pieces()
    decoded = [tokenizer.decode(ids) for ids in tokenizer.encode(ODD)]
    return Card(
        name=name,
        kind=tokenizer.kind,
        pieces=tokenizer.size,
        end=pieces[tokenizer.end_id],
        specials=sorted(pieces[i] for i in tokenizer.specials() - {tokenizer.end_id}),
        writes_bytes=_writes_bytes(tokenizer),
        lost=[text for text, back in zip(ODD, decoded, strict=True) if text != back],
        fingerprint=tokenizer.fingerprint,
    )


def _writes_bytes(tokenizer: Tokenizer) -> bool:
    try:
        return bool(byte_ids(tokenizer, ""))
    except DeptError:
        return False


def pieces_of(tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, str]]:
    """The ids of a text, each with its piece."""
    pieces = tokenizer.pieces()
    yield from ((i, pieces[i]) for i in tokenizer.encode([text])[0])


# ---- how it is made, how several compare -----------------------------------------------------


def train(files: NamedFiles, pieces: int, sample_bytes: int, out: Path, progress: Progress) -> Card:
    """A folder with a lossless SentencePiece tokenizer, as silos train theirs.

    Args:
        sample_bytes: of text that is looked at, spread over all documents.

    Raises:
        DeptError: with the mend.
    """
    if out.exists():
        raise DeptError(f"--out {out}: is there already; name a new folder")
    with progress.stage("reading the text"):
        text_bytes = sum(len(text.encode()) for text in progress.watch(files.documents()))
    if not text_bytes:
        raise DeptError("no text in the data; give files with some")
    with progress.stage("training the tokenizer"):
        sample = spread(files.documents(), text_bytes, sample_bytes)
        try:
            model = train_sentencepiece("corpus", progress.watch(sample), pieces)
        except DeptError as error:
            words = str(error).removeprefix("silo corpus: ").replace("vocab_size", "--vocab-size")
            raise DeptError(words) from error
    with whole_folder(out) as draft:
        (draft / MODEL_FILE).write_bytes(model)
    return card(str(out), sentencepiece(model))


@dataclass(frozen=True)
class Comparison:
    """Several tokenizers on one text.

    Attributes:
        common: [n][n] of `common_pieces`.
    """

    names: list[str]
    pieces: list[int]
    written: list[Written]
    common: list[list[int]]

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokenizers": [
                {"name": name, "pieces": pieces, **each.as_dict()}
                for name, pieces, each in zip(self.names, self.pieces, self.written, strict=True)
            ],
            "common_pieces": self.common,
        }


def compare(names: Sequence[str], files: NamedFiles, progress: Progress) -> Comparison:
    """Load tokenizers and let each write all of the text."""
    with progress.stage("loading the tokenizers"):
        tokenizers = [load_tokenizer(name) for name in names]
        common = common_pieces(tokenizers)
    found = []
    for name, tokenizer in zip(names, tokenizers, strict=True):
        with progress.stage(f"making tokens with {name}"):
            found.append(written(tokenizer, progress.watch(files.documents())))
    return Comparison(list(names), [t.size for t in tokenizers], found, common)
