"""From a data source to documents, from documents to a memory-mapped stream of tokens."""

from __future__ import annotations

import ast
import fnmatch
import glob
import hashlib
import inspect
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dept_fl.checkpoint import whole_folder
from dept_fl.config import DataSource, Recipe
from dept_fl.errors import DeptError
from dept_fl.tokenizer import Tokenizer, Vocabulary

_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_SMALL_FILE_BYTES = 8 << 20
_PART_CHARACTERS = 1 << 16  # longer documents are tokenised in parts, cut behind a line end
_BATCH_CHARACTERS = 1 << 20


# ---- documents ---------------------------------------------------------------------------


def documents(silo: str, source: DataSource) -> Iterator[str]:
    """The source's documents, unchanged but for empty ones, which are left out.

    Raises:
        DeptError: naming the silo and the mend, for data that is missing or unreadable.
    """
    readers = {"files": _from_files, "hub": _from_hub, "packages": _from_packages}
    kind = next(key for key in readers if getattr(source, key))
    taken_bytes = 0
    for text in readers[kind](silo, source):
        if not text.strip():
            continue
        taken_bytes += len(_utf8(silo, text))
        yield text
        if source.max_bytes and taken_bytes >= source.max_bytes:
            return


def _utf8(silo: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DeptError(
            f"silo {silo}: text with a lone surrogate ({text[error.start]!r}), which is not "
            "Unicode text; clean the data"
        ) from error


def source_key(source: DataSource, recipe: Recipe) -> str:
    """A digest that changes whenever the documents or their split may have changed."""
    facts: dict[str, Any] = {
        **asdict(source),
        "split": [recipe.validation_fraction, recipe.validation_max_bytes, recipe.deduplicate],
        "files": [
            (str(path), path.stat().st_size, path.stat().st_mtime_ns)
            for path in (_expand(source.files) if source.files else [])
        ],
        "versions": [_version(name) for name in source.packages],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return sysconfig.get_python_version() if package == "stdlib" else metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _expand(patterns: list[str]) -> list[Path]:
    """Files of paths, folders (all supported files below) and globs; sorted, each once."""
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found |= {p for p in path.rglob("*") if p.is_file() and _format(p)}
        elif path.is_file():
            found.add(path)
        else:
            found |= {Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()}
    return sorted(found)


def _format(path: Path) -> str:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes = suffixes[:-1]
    return _FORMATS.get(suffixes[-1], "") if suffixes else ""


def _from_files(silo: str, source: DataSource) -> Iterator[str]:
    files = _expand(source.files)
    if not files:
        raise DeptError(f"silo {silo}: no file matches {source.files}; check silos.{silo}.files")
    unknown = [str(path) for path in files if not _format(path)]
    if unknown:
        raise DeptError(
            f"silo {silo}: {unknown[0]}: cannot be read; supported are "
            f"{', '.join(sorted(_FORMATS))}, each also as {', '.join(sorted(_COMPRESSED))}"
        )
    for format_ in sorted({_format(path) for path in files}):
        group = [path for path in files if _format(path) == format_]
        yield from _from_datasets(silo, source, format_, group)


def _from_datasets(
    silo: str, source: DataSource, format_: str, files: list[Path]
) -> Iterator[str]:
    from datasets import load_dataset

    options: dict[str, Any] = {}
    if format_ == "text":
        options = {"sample_by": _sample_by(source, files), "encoding": source.encoding}
    column = "text" if format_ == "text" else source.column
    try:
        stream = load_dataset(
            format_, data_files=[str(f) for f in files], split="train", streaming=True, **options
        )
        yield from _column(silo, stream, column)
    except (DeptError, GeneratorExit):
        raise
    except Exception as error:  # `datasets` wraps errors of many libraries
        raise DeptError(_unreadable(silo, source, files, error)) from error


def _unreadable(silo: str, source: DataSource, files: list[Path], error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UnicodeDecodeError):
            culprit = _first_undecodable(files, source.encoding)
            return (
                f"silo {silo}: {culprit}: not {source.encoding} text ({cause}); convert the file, "
                f"or set silos.{silo}.encoding"
            )
        cause = cause.__cause__ or cause.__context__
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return f"silo {silo}: {where}: not readable: {reason}; mend or leave out the file"


def _first_undecodable(files: list[Path], encoding: str) -> Path:
    for file in files:
        try:
            with file.open(encoding=encoding) as stream:
                for _ in stream:
                    pass
        except (UnicodeDecodeError, OSError):
            return file
    return files[0]


def _sample_by(source: DataSource, files: list[Path]) -> str:
    if source.sample_by != "auto":
        return source.sample_by
    many = len(files) >= 20
    small = all(file.stat().st_size <= _SMALL_FILE_BYTES for file in files)
    return "document" if many and small else "paragraph"


def _from_hub(silo: str, source: DataSource) -> Iterator[str]:
    from datasets import load_dataset

    try:
        stream = load_dataset(
            source.hub, source.hub_config or None, split=source.hub_split, streaming=True
        )
        yield from _column(silo, stream, source.column)
    except (DeptError, GeneratorExit):
        raise
    except Exception as error:  # network, hub and reader errors of several libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DeptError(
            f"silo {silo}: hub data set {source.hub!r} (config {source.hub_config!r}, split "
            f"{source.hub_split!r}) cannot be read: {reason}"
        ) from error


def _column(silo: str, stream: Iterable[Mapping[str, Any]], column: str) -> Iterator[str]:
    for row in stream:
        if column not in row:
            raise DeptError(
                f"silo {silo}: no column {column!r}; columns: {', '.join(map(str, row))}; "
                f"set silos.{silo}.column"
            )
        value = row[column]
        if value is None:
            continue
        if not isinstance(value, str):
            raise DeptError(
                f"silo {silo}: column {column!r} holds {type(value).__name__}, not text; "
                f"set silos.{silo}.column"
            )
        yield value


def _from_packages(silo: str, source: DataSource) -> Iterator[str]:
    """Package files in an order mixed by a digest of their path, so that a cut is a sample."""
    found = [pair for name in source.packages for pair in _package_files(silo, name)]
    chosen = [
        (label, path)
        for label, path in found
        if any(fnmatch.fnmatch(label, pattern) for pattern in source.include)
    ]
    if not chosen:
        raise DeptError(
            f"silo {silo}: no file of {source.packages} matches {source.include}; "
            f"check silos.{silo}.include"
        )
    for _, path in sorted(chosen, key=lambda pair: _digest(pair[0])):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # packages ship a few files that are wrong on purpose
        if source.content == "docstrings":
            yield docstrings(text)
        else:
            yield without_licence(text) if source.content == "code" else text


def _package_files(silo: str, name: str) -> list[tuple[str, Path]]:
    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = (p for p in root.rglob("*") if p.is_file())
        pairs = [(f"stdlib/{p.relative_to(root).as_posix()}", p) for p in paths]
        skip = ("/site-packages/", "/test/", "/tests/", "/idle_test/", "/__pycache__/")
        return [pair for pair in pairs if not any(part in pair[0] for part in skip)]
    try:
        listed = metadata.files(name)
    except metadata.PackageNotFoundError as error:
        raise DeptError(
            f"silo {silo}: package {name!r} is not installed; install it or change "
            f"silos.{silo}.packages"
        ) from error
    return [(f.as_posix(), Path(str(f.locate()))) for f in listed or [] if ".." not in f.parts]


def without_licence(text: str) -> str:
    """Source text without its leading comments, which repeat a licence in every file."""
    return re.sub(r"\A(?:\s*(?:#(?!include|pragma|ifn?def)[^\n]*|//[^\n]*|/\*.*?\*/))*", "", text,
                  flags=re.DOTALL).lstrip("\n")  # fmt: skip


def docstrings(source_text: str, at_least_characters: int = 200) -> str:
    """The longer docstrings of a Python file, in order, as one document."""
    try:
        tree = ast.parse(source_text)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners)]
    return "\n\n".join(inspect.cleandoc(d) for d in found if d and len(d) >= at_least_characters)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


# ---- the corpus: documents on disk, split into train and validation ---------------------------


@dataclass(frozen=True)
class Corpus:
    """A silo's cleaned documents in `folder`, as train.jsonl and validation.jsonl."""

    folder: Path
    digest: str
    train_documents: int
    train_bytes: int
    validation_documents: int
    validation_bytes: int
    duplicates: int

    def texts(self, split: str) -> Iterator[str]:
        with (self.folder / f"{split}.jsonl").open(encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)

    def training_sample(self, at_most_bytes: int) -> Iterator[str]:
        """Every n-th training document, so that all together hold at most about this much."""
        stride = -(-self.train_bytes // at_most_bytes)
        for i, text in enumerate(self.texts("train")):
            if i % stride == 0:
                yield text


def load_corpus(silo: str, source: DataSource, recipe: Recipe, parent: Path) -> Corpus:
    """The silo's corpus from its cache, made at first use.

    A document's digest alone decides its split, so that every variant, seed and tokenizer
    is validated on the same text.
    """
    folder = parent / source_key(source, recipe)
    if not folder.is_dir():
        with whole_folder(folder) as draft:
            facts = _write_corpus(silo, source, recipe, draft)
            (draft / "corpus.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    facts = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    return Corpus(folder=folder, **facts)


def _write_corpus(silo: str, source: DataSource, recipe: Recipe, folder: Path) -> dict[str, Any]:
    seen: set[bytes] = set()
    digest = hashlib.sha256()
    counts = dict.fromkeys(
        ("train_documents", "train_bytes", "validation_documents", "validation_bytes"), 0
    )
    duplicates = 0
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "validation.jsonl").open("w", encoding="utf-8") as validation,
    ):
        for text in documents(silo, source):
            key = _digest(" ".join(text.split()))
            if recipe.deduplicate and key in seen:
                duplicates += 1
                continue
            seen.add(key)
            # A keyed hash of the same text; "<" keeps the share in expectation.
            held_out = int.from_bytes(key) < recipe.validation_fraction * 2**64
            full = counts["validation_bytes"] >= recipe.validation_max_bytes
            split = "validation" if held_out and not full else "train"
            line = json.dumps(text, ensure_ascii=False) + "\n"
            (validation if split == "validation" else train).write(line)
            digest.update(f"{split} {line}".encode())
            counts[f"{split}_documents"] += 1
            counts[f"{split}_bytes"] += len(text.encode())
    _check_corpus(silo, counts, recipe)
    return {**counts, "duplicates": duplicates, "digest": digest.hexdigest()}


def _check_corpus(silo: str, counts: Mapping[str, int], recipe: Recipe) -> None:
    total = counts["train_documents"] + counts["validation_documents"]
    if total == 0:
        raise DeptError(f"silo {silo}: no text in its data; check silos.{silo}")
    for split in ("train", "validation"):
        if not counts[f"{split}_documents"]:
            raise DeptError(
                f"silo {silo}: none of its {total} documents fell into the {split} split; give "
                f"more or smaller documents (silos.{silo}.sample_by=paragraph for .txt), or "
                f"change validation_fraction={recipe.validation_fraction}"
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
    """

    train: npt.NDArray[Any]
    validation: npt.NDArray[Any]
    vocabulary: Vocabulary
    unigram: npt.NDArray[np.float64]
    validation_bytes: int
    train_bytes: int

    def unigram_nats(self) -> float:
        """Mean cross-entropy of the validation tokens under the training unigram (UNIGRAM-CE)."""
        local = self.vocabulary.local_ids()[self.validation[1:]]
        return float(-np.log(self.unigram[local]).mean())


def load_tokens(
    silo: str, corpus: Corpus, tokenizer: Tokenizer, restrict: bool, parent: Path
) -> TokenStream:
    """The silo's token stream from its cache, made at first use.

    Args:
        restrict: take V_k, the training split's own ids, instead of the whole vocabulary.
    """
    kind = "used" if restrict else "whole"
    folder = parent / f"{corpus.digest[:16]}-{tokenizer.fingerprint[:16]}-{kind}"
    if not folder.is_dir():
        with whole_folder(folder) as draft:
            _write_tokens(silo, corpus, tokenizer, restrict, draft)
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
    )


def _write_tokens(
    silo: str, corpus: Corpus, tokenizer: Tokenizer, restrict: bool, folder: Path
) -> None:
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    counts = np.zeros(tokenizer.size, dtype=np.int64)
    with _NpyWriter(folder / "train.npy", dtype) as train:
        for ids in _packed(corpus.texts("train"), tokenizer):
            np.add.at(counts, ids, 1)
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
    np.save(folder / "counts.npy", counts)


def _packed(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[npt.NDArray[np.int64]]:
    """The token stream in pieces: the end id, then each document and the end id behind it."""
    yield np.asarray([tokenizer.end_id], dtype=np.int64)
    batch: list[str] = []
    ends: list[bool] = []
    characters = 0
    for text in texts:
        parts = _parts(text)
        batch += parts
        ends += [False] * (len(parts) - 1) + [True]
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield _encode(batch, ends, tokenizer)
            batch, ends, characters = [], [], 0
    if batch:
        yield _encode(batch, ends, tokenizer)


def _encode(batch: list[str], ends: list[bool], tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    ids: list[int] = []
    for encoded, last in zip(tokenizer.encode(batch), ends, strict=True):
        ids += encoded
        if last:
            ids.append(tokenizer.end_id)
    return np.asarray(ids, dtype=np.int64)


def _parts(text: str) -> list[str]:
    """A document in parts of bounded length; no piece of ours spans a line end, so ids agree."""
    parts: list[str] = []
    while len(text) > _PART_CHARACTERS:
        cut = text.rfind("\n", 0, _PART_CHARACTERS) + 1 or _PART_CHARACTERS
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]


class _NpyWriter:
    """Writes a one-dimensional .npy of a length not known before."""

    _HEADER_BYTES = 128

    def __init__(self, file: Path, dtype: type[np.unsignedinteger[Any]]) -> None:
        self._file, self._dtype, self._length = file, np.dtype(dtype), 0

    def __enter__(self) -> _NpyWriter:
        self._stream = self._file.open("wb")
        self._stream.write(b"\0" * self._HEADER_BYTES)
        return self

    def append(self, ids: npt.NDArray[np.int64]) -> None:
        self._stream.write(ids.astype(self._dtype).tobytes())
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
        rows = [self._sequence(position + i) for i in range(count)]
        return self._local[np.stack(rows)]

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
