"""A silo's documents on disk, split, and their memory-mapped stream of tokens."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dept_fl.checkpoint import whole_folder
from dept_fl.config import DataConfig, Recipe, SiloConfig
from dept_fl.errors import DeptError
from dept_fl.near import NearCopies
from dept_fl.sources import (
    documents,
    has_own_validation,
    short_digest,
    source_key,
    validation_documents,
)
from dept_fl.tokenizer import Tokenizer, Vocabulary

T = TypeVar("T")
U = TypeVar("U")
Watch = Callable[[Iterator[str]], Iterator[str]]  # passes on what it is given, and may count it
Batch = tuple[list[str], list[bool]]  # parts of documents, and whether each is its last one

_PART_CHARACTERS = 1 << 16  # longer documents are tokenised in parts
_BATCH_CHARACTERS = 1 << 18  # two batches a thread are in memory
# Up to the last place where the pieces of our tokenizers, and of the usual byte-level ones, end.
_TO_SAFE_CUT = re.compile(r".*(?:\S\n(?=\S)|\S(?= \S))", re.DOTALL)
_JSON = json.JSONEncoder(ensure_ascii=False)
_MOST_PASSES = 100  # over a source; more of them mean a weight that nobody meant


def unwatched(texts: Iterator[str]) -> Iterator[str]:
    return texts


# ---- the corpus: documents on disk, split into train and validation ---------------------------


@dataclass(frozen=True)
class Corpus:
    """A silo's cleaned documents in `folder`, as train.jsonl and validation.jsonl.

    Attributes:
        duplicates: documents dropped as copies of others; near_duplicates: those among them that
            were only nearly the same.
        left_out: rows and documents that its settings do not take: `where`, `length`.
        sources: of several, by name; each with its `documents` and `bytes` of training text, the
            `passes` over them, and its `validation_documents` and `validation_bytes`.
    """

    folder: Path
    digest: str
    train_documents: int
    train_bytes: int
    validation_documents: int
    validation_bytes: int
    duplicates: int
    near_duplicates: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    sources: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        return self.train_documents + self.validation_documents

    @property
    def text_bytes(self) -> int:
        return self.train_bytes + self.validation_bytes

    @property
    def unvalidated(self) -> list[str]:
        """Sources of which no document is kept for validation."""
        return [name for name, own in self.sources.items() if not own["validation_documents"]]

    def texts(self, split: str) -> Iterator[str]:
        with (self.folder / f"{split}.jsonl").open(encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)

    def glimpses(self, count: int) -> Iterator[str]:
        """Up to so many training documents, from places spread evenly over all of them."""
        file = self.folder / "train.jsonl"
        with file.open("rb") as stream:
            for i in range(count):
                stream.seek(file.stat().st_size * i // count)
                if i:
                    stream.readline()  # the rest of the line in which that place lies
                if line := stream.readline():
                    yield json.loads(line)

    def training_sample(self, at_most_bytes: int) -> Iterator[str]:
        """A sample spread over all training documents, of about this much, and no more."""
        return spread(self.texts("train"), self.train_bytes, at_most_bytes)


def spread(texts: Iterable[str], text_bytes: int, at_most_bytes: int) -> Iterator[str]:
    """Every n-th of texts of so many bytes, so many that they hold about this much, and no more."""
    stride = -(-text_bytes // at_most_bytes)
    left = at_most_bytes
    for i, text in enumerate(texts):
        if i % stride == 0:
            head = text.encode()[:left].decode(errors="ignore")
            left -= len(text.encode())
            yield head
        if left <= 0:
            return


def load_corpus(
    silo: str, config: SiloConfig, recipe: Recipe, parent: Path, watch: Watch = unwatched
) -> Corpus:
    """The silo's corpus from its cache, made at first use.

    The documents and their order alone decide the split, so that every variant, seed and
    tokenizer is validated on the same text. Where the source names documents for validation,
    all others are for training but those that are in validation too.

    Several sources are read into a corpus each, and these are mixed: so another weight, or one
    more source, does not cost the reading of those that are there.

    Args:
        watch: sees the documents as they are read.
    """
    folder = corpus_folder(config, recipe, parent)
    if not folder.is_dir():
        parts = _corpora(silo, config, recipe, parent / "sources", watch)
        with whole_folder(folder) as draft:
            if parts:
                facts = _write_mixture(silo, config, parts, recipe, draft)
            else:
                facts = _write_corpus(silo, config, recipe, draft, watch)
            _check_splits(silo, config, facts, recipe)
            _write_facts(draft, facts)
    return _corpus_in(folder)


def _corpora(
    silo: str, config: SiloConfig, recipe: Recipe, parent: Path, watch: Watch
) -> dict[str, Corpus]:
    """A corpus of each source, by their names, sorted."""
    shares = config.shares
    exact = replace(recipe, near_duplicates=0.0)  # what is nearly the same is found in the mixture
    parts = {}
    for name, source in sorted(config.sources.items()):
        if config.max_bytes:
            share_bytes = math.ceil(shares[name] * config.max_bytes)
            source = replace(source, max_bytes=min(source.max_bytes or share_bytes, share_bytes))
        folder = corpus_folder(source, exact, parent)
        if not folder.is_dir():
            with whole_folder(folder) as draft:
                owner = f"{silo}.sources.{name}"
                _write_facts(draft, _write_corpus(owner, source, exact, draft, watch))
        parts[name] = _corpus_in(folder)
    return parts


def _write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _corpus_in(folder: Path) -> Corpus:
    facts = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    return Corpus(folder=folder, **facts)


def corpus_folder(source: DataConfig, recipe: Recipe, parent: Path) -> Path:
    """Where the corpus of these documents, split this way, is kept once it is made."""
    return parent / source_key(source, recipe)


def _write_corpus(
    owner: str, source: DataConfig, recipe: Recipe, folder: Path, watch: Watch
) -> dict[str, Any]:
    left_out: Counter[str] = Counter()
    with _CorpusWriter(folder, recipe) as writer:
        texts = watch(documents(owner, source, left_out))
        if has_own_validation(source):
            validation = watch(validation_documents(owner, source, left_out))
            _split_as_given(validation, texts, recipe, writer)
        else:
            _split_by_digest(texts, recipe, writer)
    facts = {**writer.facts(), "left_out": dict(left_out)}
    if not facts["train_documents"] + facts["validation_documents"]:
        raise DeptError(f"silo {owner}: {_why_no_text(owner, left_out)}")
    return facts


def _split_by_digest(texts: Iterator[str], recipe: Recipe, writer: _CorpusWriter) -> None:
    for text in texts:
        key = _identity(text)
        if writer.is_copy(key, text):
            continue
        chosen = int.from_bytes(key) < recipe.validation_fraction * 2**64
        if recipe.deduplicate or chosen:  # a copy must never be on the other side
            writer.remember(key, text)
        writer.add("validation" if chosen and writer.fits(text) else "train", text)


def _split_as_given(
    validation: Iterable[str], train: Iterable[str], recipe: Recipe, writer: _CorpusWriter
) -> None:
    for text in validation:
        key = _identity(text)
        if not writer.is_copy(key, text) and writer.fits(text):
            writer.remember(key, text)
            writer.add("validation", text)
    for text in train:
        key = _identity(text)
        if not writer.is_copy(key, text):  # of a training document, or of one kept for validation
            if recipe.deduplicate:
                writer.remember(key, text)
            writer.add("train", text)


def _identity(text: str) -> bytes:
    return short_digest(" ".join(text.split()))


# ---- several sources ----------------------------------------------------------------------


def _write_mixture(
    silo: str, config: SiloConfig, parts: Mapping[str, Corpus], recipe: Recipe, folder: Path
) -> dict[str, Any]:
    """One corpus of several, of which each has its share of the bytes of either split.

    A source's validation documents that are not kept are for training, unless it names those for
    validation.
    """
    all_bytes = sum(part.text_bytes for part in parts.values())
    shares = config.shares or {n: part.text_bytes / all_bytes for n, part in parts.items()}
    kept = _kept(parts, shares, recipe.validation_max_bytes)
    facts: dict[str, dict[str, float]] = {name: {} for name in parts}
    spans = {}
    with _CorpusWriter(folder, recipe) as writer:
        for name, part in parts.items():
            before = dict(writer.counts)
            _split_as_given(_at(part, kept[name]), (), recipe, writer)
            for key in ("validation_documents", "validation_bytes"):
                facts[name][key] = writer.counts[key] - before[key]
        for name, part in parts.items():
            before, start = dict(writer.counts), writer.place
            own = has_own_validation(config.sources[name])
            rest = () if own else _at(part, kept[name], others=True)
            _split_as_given((), chain(rest, part.texts("train")), recipe, writer)
            for key in ("documents", "bytes"):
                facts[name][key] = writer.counts[f"train_{key}"] - before[f"train_{key}"]
            facts[name]["passes"] = 1.0
            spans[name] = (start, writer.place)
        if config.shares:
            for name, more_bytes in _to_shares(silo, config.shares, facts).items():
                added = writer.again(*spans[name], more_bytes)
                facts[name]["passes"] += added / facts[name]["bytes"]
    left_out = sum((Counter(part.left_out) for part in parts.values()), Counter())
    written = writer.facts()
    written["duplicates"] += sum(part.duplicates for part in parts.values())
    return {**written, "left_out": dict(left_out), "sources": facts}


def _kept(
    parts: Mapping[str, Corpus], shares: Mapping[str, float], most_bytes: int
) -> dict[str, set[int]]:
    """Of each source the places of the validation documents that it keeps.

    Each has its first one that fits into its share, or else its smallest; then, in order, all
    that still fit. A source has none where there is no room for one of each, or where it is a
    single document, which is trained on.
    """
    found = {n: list(_candidates(part)) if part.documents > 1 else [] for n, part in parts.items()}
    rooms = {name: int(shares[name] * most_bytes) for name in parts}
    choice = _Choice(most_bytes, {name: set() for name in parts})
    for name, own in found.items():  # before any that is larger than its source's share
        choice.take_one(name, (each for each in own if each.size_bytes <= rooms[name]))
    for name, own in found.items():
        choice.take_one(name, sorted(own, key=lambda each: each.size_bytes))
    for name, own in found.items():
        left_bytes = rooms[name] - sum(own[place].size_bytes for place in choice.places[name])
        for each in own:
            if each.size_bytes <= left_bytes and choice.take(name, each):
                left_bytes -= each.size_bytes
    return choice.places


class _Candidate(NamedTuple):
    place: int
    size_bytes: int
    identity: bytes


def _candidates(part: Corpus) -> Iterator[_Candidate]:
    for place, text in enumerate(part.texts("validation")):
        yield _Candidate(place, len(text.encode()), _identity(text))


@dataclass
class _Choice:
    """The documents kept for validation so far, by source; none of them is a copy of another."""

    left_bytes: int
    places: dict[str, set[int]]
    known: set[bytes] = field(default_factory=set)

    def take(self, name: str, each: _Candidate) -> bool:
        if each.identity in self.known or each.size_bytes > self.left_bytes:
            return False
        self.known.add(each.identity)
        self.places[name].add(each.place)
        self.left_bytes -= each.size_bytes
        return True

    def take_one(self, name: str, candidates: Iterable[_Candidate]) -> None:
        """The first that can be taken, where the source has none yet."""
        if not self.places[name]:
            next((each for each in candidates if self.take(name, each)), None)


def _at(part: Corpus, places: set[int], others: bool = False) -> Iterator[str]:
    """Its validation documents at these places, or all others, in order."""
    texts = enumerate(part.texts("validation"))
    return (text for place, text in texts if (place in places) != others)


def _to_shares(
    silo: str, shares: Mapping[str, float], facts: Mapping[str, Mapping[str, float]]
) -> dict[str, int]:
    """How many more bytes each source needs, for its share beside one that is read just once."""
    for name, own in facts.items():
        if not own["bytes"]:
            raise DeptError(
                f"silo {silo}.sources.{name}: no text for training that no other source has; "
                "remove this source"
            )
    total = max(facts[name]["bytes"] / share for name, share in shares.items())
    for name, share in shares.items():
        passes = share * total / facts[name]["bytes"]
        if passes > _MOST_PASSES:
            raise DeptError(
                f"silo {silo}.sources.{name}: its {facts[name]['bytes']:,} bytes would be read "
                f"{passes:,.0f} times for a share of {share:.1%}; at most {_MOST_PASSES} do: lower "
                f"silos.{silo}.sources.{name}.weight, or set silos.{silo}.max_bytes"
            )
    return {
        name: round(share * total) - int(facts[name]["bytes"]) for name, share in shares.items()
    }


class _CorpusWriter:
    """Writes both splits, counts what is in them, and knows what to drop as a copy."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self._folder, self._validation_max_bytes = folder, recipe.validation_max_bytes
        self._known: set[bytes] = set()
        self._near = NearCopies(recipe.near_duplicates) if recipe.near_duplicates else None
        self._digest = hashlib.sha256()
        self._duplicates = self._near_duplicates = 0
        self.counts = dict.fromkeys(
            ("train_documents", "train_bytes", "validation_documents", "validation_bytes"), 0
        )

    def __enter__(self) -> _CorpusWriter:
        self._train = (self._folder / "train.jsonl").open("wb")
        self._validation = (self._folder / "validation.jsonl").open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._train.close()
        self._validation.close()

    def is_copy(self, key: bytes, text: str) -> bool:
        """Whether this is a document to drop, which is then counted."""
        same = key in self._known
        near = not same and self._near is not None and self._near.has(text)
        self._duplicates += same or near
        self._near_duplicates += near
        return same or near

    def remember(self, key: bytes, text: str) -> None:
        self._known.add(key)
        if self._near is not None:
            self._near.add(text)

    def fits(self, text: str) -> bool:
        """Whether the validation split has room for it."""
        return self.counts["validation_bytes"] + len(text.encode()) <= self._validation_max_bytes

    def add(self, split: str, text: str) -> None:
        line = f"{_JSON.encode(text)}\n".encode()
        (self._validation if split == "validation" else self._train).write(line)
        self._digest.update(f"{split} ".encode())
        self._digest.update(line)
        self.counts[f"{split}_documents"] += 1
        self.counts[f"{split}_bytes"] += len(text.encode())

    @property
    def place(self) -> int:
        """Bytes of the training split's file so far."""
        return self._train.tell()

    def again(self, start: int, end: int, more_bytes: int) -> int:
        """Add the training documents between two places again, in order, for so many bytes more.

        Returns:
            how many they are, to the end of a document.
        """
        self._train.flush()
        before = self.counts["train_bytes"]
        with (self._folder / "train.jsonl").open("rb") as stream:
            stream.seek(start)
            while self.counts["train_bytes"] - before < more_bytes:
                if stream.tell() == end:
                    stream.seek(start)
                self.add("train", json.loads(stream.readline()))
        return self.counts["train_bytes"] - before

    def facts(self) -> dict[str, Any]:
        return {
            **self.counts,
            "duplicates": self._duplicates,
            "near_duplicates": self._near_duplicates,
            "digest": self._digest.hexdigest(),
        }


def _why_no_text(owner: str, left_out: Mapping[str, int]) -> str:
    if not left_out:
        return f"no text in its data; check silos.{owner}"
    counts = ", ".join(f"{count:,} by {name}" for name, count in sorted(left_out.items()))
    return (
        f"its conditions leave out all of its documents ({counts}); change where, or "
        f"min_characters and max_characters, of silos.{owner}"
    )


def _check_splits(silo: str, source: DataConfig, counts: Mapping[str, Any], recipe: Recipe) -> None:
    empty = [split for split in ("train", "validation") if not counts[f"{split}_documents"]]
    if not empty:
        return
    if has_own_validation(source):
        own = "validation_files" if source.validation_files else "hub_validation_split"
        raise DeptError(f"silo {silo}: {_why_empty(empty[0], f'silos.{silo}.{own}', recipe)}")
    total = counts["train_documents"] + counts["validation_documents"]
    raise DeptError(
        f"silo {silo}: none of its {total} documents fell into the {empty[0]} split; give "
        f"more or smaller documents (for .txt, silos.{silo}.sample_by=paragraph or line), "
        f"or change validation_fraction={recipe.validation_fraction} or "
        f"validation_max_bytes={recipe.validation_max_bytes}"
    )


def _why_empty(split: str, setting: str, recipe: Recipe) -> str:
    if split == "train":
        return f"each of its documents is in {setting} too, so that none is left for training"
    return (
        f"no document of {setting} is kept for validation: it has none, or none that fits "
        f"validation_max_bytes={recipe.validation_max_bytes}; give smaller documents or raise that"
    )


# ---- the token stream ---------------------------------------------------------------------


@dataclass(frozen=True)
class TokenStream:
    """A silo's tokens in local ids, memory-mapped, with what evaluation needs of the text.

    Each split is documents joined by the end id, which also stands first, so that every
    token of the text is predicted.

    Attributes:
        train, validation: [n] the tokenizer's ids (local only through `vocabulary`).
        unigram: [|V_k|] float64, the share of each local id in the training split, add-one.
        validation_bytes: UTF-8 bytes of the validation text, every byte counted.
        lossy_documents: validation documents that do not come back whole from their ids.
    """

    train: npt.NDArray[Any]
    validation: npt.NDArray[Any]
    vocabulary: Vocabulary
    unigram: npt.NDArray[np.float64]
    validation_bytes: int
    train_bytes: int
    lossy_documents: int = 0

    @property
    def bytes_per_token(self) -> float:
        """Of the training split, document ends included."""
        return self.train_bytes / len(self.train)

    def unigram_nats(self) -> float:
        """Mean cross-entropy of the validation tokens under the training unigram (UNIGRAM-CE)."""
        local = self.vocabulary.local_ids()[self.validation[1:]]
        return float(-np.log(self.unigram[local]).mean())


def load_tokens(
    silo: str,
    corpus: Corpus,
    tokenizer: Tokenizer,
    restrict: bool,
    parent: Path,
    watch: Watch = unwatched,
) -> TokenStream:
    """The silo's token stream from its cache, made at first use.

    Args:
        restrict: take V_k, the training split's own ids, instead of the whole vocabulary.
        watch: sees the training documents as they are tokenised.
    """
    folder = tokens_folder(corpus.digest, tokenizer, restrict, parent)
    if not folder.is_dir():
        with whole_folder(folder) as draft:
            _write_tokens(silo, corpus, tokenizer, restrict, draft, watch)
    counts = np.load(folder / "counts.npy", allow_pickle=False)
    vocabulary = Vocabulary(np.load(folder / "vocabulary.npy", allow_pickle=False), tokenizer.size)
    smoothed = counts[vocabulary.ids] + 1.0
    return TokenStream(
        train=np.load(folder / "train.npy", mmap_mode="r", allow_pickle=False),
        validation=np.load(folder / "validation.npy", mmap_mode="r", allow_pickle=False),
        vocabulary=vocabulary,
        unigram=smoothed / smoothed.sum(),
        validation_bytes=corpus.validation_bytes,
        train_bytes=corpus.train_bytes,
        lossy_documents=int(np.load(folder / "lossy.npy", allow_pickle=False)),
    )


def tokens_folder(digest: str, tokenizer: Tokenizer, restrict: bool, parent: Path) -> Path:
    """Where the token stream of the text of this digest is kept once it is made."""
    kind = "used" if restrict else "whole"
    return parent / f"{digest[:16]}-{tokenizer.fingerprint[:16]}-{kind}"


def _write_tokens(
    silo: str, corpus: Corpus, tokenizer: Tokenizer, restrict: bool, folder: Path, watch: Watch
) -> None:
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    counts = np.zeros(tokenizer.size, dtype=np.int64)
    with _NpyWriter(folder / "train.npy", dtype) as train:
        for ids in _packed(watch(corpus.texts("train")), tokenizer):
            counts += np.bincount(ids, minlength=tokenizer.size)
            train.append(ids)
    if restrict:
        vocabulary = Vocabulary.of_training_split(tokenizer, counts.nonzero()[0], silo)
    else:
        vocabulary = Vocabulary.whole(tokenizer)
    rewrite = vocabulary.rewriter(tokenizer)
    with _NpyWriter(folder / "validation.npy", dtype) as validation:
        for ids in _packed(corpus.texts("validation"), tokenizer):
            validation.append(np.asarray(rewrite(ids.tolist()), dtype=np.int64))
    np.save(folder / "vocabulary.npy", vocabulary.ids)
    np.save(folder / "lossy.npy", np.asarray(lossy_documents(corpus, tokenizer)))
    np.save(folder / "counts.npy", counts)


def lossy_documents(corpus: Corpus, tokenizer: Tokenizer) -> int:
    """How many validation documents do not come back whole from their ids."""

    def lossy(batch: Batch) -> int:
        texts, _ = batch
        encoded = tokenizer.encode(texts)
        return sum(tokenizer.decode(i) != t for i, t in zip(encoded, texts, strict=True))

    return sum(in_order(lossy, text_batches(corpus.texts("validation"))))


def _packed(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[npt.NDArray[np.int32]]:
    """The token stream in pieces: the end id, then each document and the end id behind it."""
    end = np.asarray([tokenizer.end_id], dtype=np.int32)

    def encode(batch: Batch) -> npt.NDArray[np.int32]:
        parts, ends = batch
        encoded = zip(tokenizer.arrays(parts), ends, strict=True)
        return np.concatenate([ids for part, last in encoded for ids in (part, end)[: 1 + last]])

    yield end
    yield from in_order(encode, text_batches(texts, _separable(tokenizer)))


def in_order(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """The results of threads, in the items' order; few items are taken before theirs are due.

    As many threads as PyTorch would take: OMP_NUM_THREADS, which Ray sets to a simulated silo's
    share of the cores, else all of them. They pay where the work is in C++ or Rust, while the
    caller's own thread reads the next items.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[U]] = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) == 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def text_batches(texts: Iterable[str], separable: bool = False) -> Iterator[Batch]:
    """Texts in batches of bounded length; `separable` ones in parts, each with its own ids."""
    batch: list[str] = []
    ends: list[bool] = []
    characters = 0
    for text in texts:
        for part, last in _parts(text) if separable else [(text, True)]:
            batch.append(part)
            ends.append(last)
            characters += len(part)
            if characters >= _BATCH_CHARACTERS:
                yield batch, ends
                batch, ends, characters = [], [], 0
    if batch:
        yield batch, ends


def _separable(tokenizer: Tokenizer) -> bool:
    """Whether a document's `_parts` give the ids of the whole: not so with a prefix space."""
    whole, *parts = tokenizer.encode(["a\nb c", "a\n", "b", " c"])
    return whole == list(chain.from_iterable(parts))


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """A document in parts of bounded length, with a flag on the last.

    A part ends where no piece goes on; only an unbroken run longer than a part is cut within.
    """
    start = 0
    while len(text) - start > _PART_CHARACTERS:
        limit = start + _PART_CHARACTERS
        safe = _TO_SAFE_CUT.match(text, start, limit)
        cut = safe.end() if safe else limit
        yield text[start:cut], False
        start = cut
    yield text[start:], True


class _NpyWriter:
    """Writes a one-dimensional .npy of a length not known before."""

    _HEADER_BYTES = 128

    def __init__(self, file: Path, dtype: type[np.unsignedinteger[Any]]) -> None:
        self._file, self._dtype, self._length = file, np.dtype(dtype), 0

    def __enter__(self) -> _NpyWriter:
        self._stream = self._file.open("wb")
        self._stream.write(b"\0" * self._HEADER_BYTES)
        return self

    def append(self, ids: npt.NDArray[np.integer[Any]]) -> None:
        self._stream.write(ids.astype(self._dtype).data)
        self._length += len(ids)

    def __exit__(self, *_: object) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._length,),
        }
        text = repr(header)
        body = f"{text:<{self._HEADER_BYTES - 11}}\n".encode()
        self._stream.seek(0)
        self._stream.write(b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body)
        self._stream.close()


# ---- batches ---------------------------------------------------------------------------------


class Batches:
    """Training sequences in an order that is a function of the seed and a position alone.

    Each epoch is a permutation of all sequences of its own; the position counts sequences
    taken since the silo's first step. So the position is the whole state of the stream, and
    no other random number in the program can move it.
    """

    def __init__(self, stream: TokenStream, sequence_tokens: int, seed: int) -> None:
        self._tokens, self._length, self._seed = stream.train, sequence_tokens, seed
        self._local = stream.vocabulary.local_ids()
        self.sequences = (len(stream.train) - 1) // sequence_tokens
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def at(self, position: int, count: int) -> npt.NDArray[np.int64]:
        """[count, L + 1] local ids: inputs are [:, :-1], targets [:, 1:]."""
        rows = np.stack([self._sequence(position + i) for i in range(count)])
        local: npt.NDArray[np.int64] = self._local[rows]
        return local

    def _sequence(self, position: int) -> npt.NDArray[Any]:
        epoch, within = divmod(position, self.sequences)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
            self._order, self._epoch = generator.permutation(self.sequences), epoch
        start = int(self._order[within]) * self._length
        return self._tokens[start : start + self._length + 1]


def check_enough(silo: str, stream: TokenStream, recipe: Recipe) -> None:
    """Raise unless the training split fills one batch."""
    needed = recipe.inner.batch_size * recipe.sequence_tokens + 1
    if len(stream.train) < needed:
        raise DeptError(
            f"silo {silo}: its training split has {len(stream.train):,} tokens, one batch takes "
            f"{needed:,} (inner.batch_size={recipe.inner.batch_size} x sequence_tokens="
            f"{recipe.sequence_tokens} + 1); give more text or make the batch smaller"
        )
