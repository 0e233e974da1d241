"""Where documents come from: files, hub data sets, and the files of installed packages."""

from __future__ import annotations

import ast
import bz2
import codecs
import csv
import fnmatch
import glob
import gzip
import hashlib
import inspect
import io
import json
import lzma
import math
import os
import platform
import re
import shutil
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from dept_fl.config import CONDITION, DataConfig, Recipe, SiloConfig, is_number
from dept_fl.errors import DeptError

_FORMATS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_MANY_FILES = 20
_SMALL_FILE_BYTES = 8 << 20
_PARAGRAPH_CHARACTERS = 64 << 20  # a longer one means a file without blank lines
_MOST_FIELD_CHARACTERS = 64 << 20  # of .csv; a longer one means a quote that is never closed
_HEAD_ROWS = 100  # that tell which columns hold text
_NOT_STANDARD_LIBRARY = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # an escape in a string literal can write one

_LEADING_COMMENTS = re.compile(
    r"\A(?:\s*(?:#(?!include|pragma|if|define|undef|error)[^\n]*|//[^\n]*|/\*.*?\*/))*", re.DOTALL
)

Found = tuple[str, str]  # where a document lies, for errors, and its text


def documents(silo: str, source: DataConfig, left_out: Counter[str] | None = None) -> Iterator[str]:
    """The source's documents, unchanged but for empty ones, which are left out.

    Line ends of .txt and package files come as "\\n", whatever they were.

    Args:
        silo: named in errors; of several sources SILO.sources.NAME.
        left_out: counts rows and documents that are not taken, for `where` or for their `length`.

    Raises:
        DeptError: naming the silo and the mend, for data that is missing or unreadable.
    """
    left_out = Counter() if left_out is None else left_out
    found = ((place, text, "") for place, text in _found(silo, source, left_out))
    yield from (text for text, _ in _taken(silo, source, found, left_out))


def _found(silo: str, source: DataConfig, left_out: Counter[str]) -> Iterator[Found]:
    if source.packages:
        yield from _from_packages(silo, source)
    elif source.files:
        yield from _from_files(silo, source, left_out)
    else:
        yield from _from_rows(silo, source, _hub_rows(silo, source), left_out)


def labelled_documents(silo: str, source: DataConfig, labels: str) -> Iterator[tuple[str, str]]:
    """The documents of JSON and Parquet files, each with what its row has in column `labels`.

    Raises:
        DeptError: as `documents`; or the data has no such column, or a row nothing in it.
    """
    yield from _taken(silo, source, _with_labels(silo, source, labels), Counter())


def _with_labels(silo: str, source: DataConfig, labels: str) -> Iterator[tuple[str, str, str]]:
    for place, row in _labelled_rows(silo, source, [source.column, labels]):
        for _, text in _in_column(silo, source, place, _with_column(silo, place, row, labels)):
            if row[labels] is None:
                raise DeptError(f"silo {silo}: {place}: null in column {labels!r}; mend the data")
            yield place, text, str(row[labels])


def _with_column(silo: str, place: str, row: Any, column: str) -> Any:
    """The row, which has such a column if it has columns at all."""
    if isinstance(row, Mapping) and column not in row:
        columns = ", ".join(map(str, row))
        raise DeptError(f"silo {silo}: {place}: no column {column!r}; columns: {columns}")
    return row


def _taken(
    silo: str,
    source: DataConfig,
    found: Iterable[tuple[str, str, str]],
    left_out: Counter[str],
) -> Iterator[tuple[str, str]]:
    """Of places, texts and labels the texts of the right length, up to the source's max_bytes."""
    most = source.max_characters or math.inf
    taken_bytes = 0
    for place, text, label in found:
        if not text.strip():
            continue
        if not source.min_characters <= len(text) <= most:
            left_out["length"] += 1
            continue
        taken_bytes += _utf8_bytes(silo, place, text)
        yield text, label
        if source.max_bytes and taken_bytes >= source.max_bytes:
            return


def has_own_validation(source: DataConfig) -> bool:
    """Whether the source names documents for validation, so that none is taken from the rest."""
    return bool(source.validation_files or source.hub_validation_split)


def validation_documents(
    silo: str, source: DataConfig, left_out: Counter[str] | None = None
) -> Iterator[str]:
    """The documents of a source's own files or split for validation, read as the others are.

    Raises:
        DeptError: as `documents`.
    """
    own = replace(
        source,
        files=source.validation_files,
        sample_by=_sample_by(source, [f for f in _expand(source.files) if _format(f) == "text"]),
        hub_split=source.hub_validation_split,
        max_bytes=0,
    )
    try:
        yield from documents(silo, own, left_out)
    except DeptError as error:
        words = str(error).replace(f"silos.{silo}.files", f"silos.{silo}.validation_files")
        raise DeptError(words.replace("hub_split", "hub_validation_split")) from error


def _utf8_bytes(silo: str, place: str, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise DeptError(
            f"silo {silo}: {place}: text with a lone surrogate ({text[error.start]!r}), which is "
            "not Unicode text; clean the data"
        ) from error


def text_columns(silo: str, source: DataConfig) -> dict[str, bool]:
    """The columns of the source's first rows, and whether each of them holds text.

    Of its first JSON or Parquet file, or of its hub data set; empty where it has no rows.

    Raises:
        DeptError: naming the silo and the mend, for data that is missing or unreadable.
    """
    found = islice(_head(silo, source), _HEAD_ROWS)
    rows = [row for row in found if isinstance(row, Mapping)]
    names = dict.fromkeys(str(name) for row in rows for name in row)
    return {name: _is_text([row.get(name) for row in rows]) for name in names}


def _labelled_rows(
    silo: str, source: DataConfig, columns: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    for file in _supported(silo, source):
        with _named(silo, source, file):
            if _format(file) == "text":
                raise DeptError(
                    f"silo {silo}: {file}: has no columns, so that none can tell a document's "
                    "source; give .jsonl or .parquet"
                )
            yield from _rows(silo, source, file, columns)


def _rows(
    silo: str, source: DataConfig, file: Path, columns: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Rows of a file that has columns, with their places; of Parquet only these columns.

    Where the file has a line of names, or a schema, and one of these columns is missing there,
    its `_Names` come first.
    """
    if _format(file) == "parquet":
        yield from _parquet_rows(file, columns)
        return
    with _text_stream(silo, source, file) as stream:
        if _format(file) == "csv":
            yield from _csv_rows(silo, file, stream, columns)
        else:
            yield from _json_rows(silo, file, stream)


def _head(silo: str, source: DataConfig) -> Iterator[Any]:
    if source.hub:
        yield from (row for _, row in _hub_rows(silo, source))
        return
    for file in _supported(silo, source):
        if _format(file) == "text":
            continue
        with _named(silo, source, file):
            if _format(file) == "parquet":
                yield from _parquet_head(file)
            else:
                yield from (row for _, row in _rows(silo, source, file, []))
        return


def _is_text(values: list[Any]) -> bool:
    given = [value for value in values if value is not None]
    return bool(given) and all(isinstance(value, str) for value in given)


_REVISION = 2  # of what `where`, near copies and several sources take; other text is then read anew
_NEW_SETTINGS = (
    "validation_files",
    "hub_validation_split",
    "hub_files",
    "hub_where",
    "columns",
    "where",
    "min_characters",
    "max_characters",
)


def source_key(source: DataConfig, recipe: Recipe) -> str:
    """A digest that changes whenever the documents or their split may have changed."""
    own = asdict(source)
    for setting in ("tokenizer", "vocab_size", "weight", "sources"):
        own.pop(setting, None)
    for setting in _NEW_SETTINGS:
        if not own[setting]:
            del own[setting]  # so that text cached before there was this setting keeps its key
    near = [recipe.near_duplicates] if recipe.near_duplicates else []
    facts: dict[str, Any] = {
        **own,
        "split": [
            recipe.validation_fraction,
            recipe.validation_max_bytes,
            recipe.deduplicate,
            *near,
        ],
        "files": [
            (str(path), path.stat().st_size, path.stat().st_mtime_ns)
            for path in [
                *_expand(source.files),
                *_expand(source.validation_files),
                *_below(source.hub),
            ]
        ],
        "versions": [_version(name) for name in source.packages],
    }
    if isinstance(source, SiloConfig) and source.sources:
        facts["sources"] = {
            name: [part.weight, source_key(part, recipe)] for name, part in source.sources.items()
        }
    if near or source.where or "sources" in facts:
        facts["revision"] = _REVISION
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return platform.python_version() if package == "stdlib" else metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _below(hub: str) -> list[Path]:
    """The files of a hub data set that is a local folder."""
    return sorted(p for p in Path(hub).rglob("*") if p.is_file()) if hub else []


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
            matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path has no absolute ones)
            found |= {Path(match) for match in matches if Path(match).is_file()}
    return sorted(found)


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1], "") if suffixes else ""


def _from_files(silo: str, source: DataConfig, left_out: Counter[str]) -> Iterator[Found]:
    files = _supported(silo, source)
    sample_by = _sample_by(source, [file for file in files if _format(file) == "text"])
    for file in files:
        with _named(silo, source, file):
            if _format(file) == "text":
                yield from _from_text(silo, source, file, sample_by)
            else:
                rows = _rows(silo, source, file, _columns_to_read(source))
                yield from _from_rows(silo, source, rows, left_out)


def _supported(silo: str, source: DataConfig) -> list[Path]:
    """The source's files: at least one, and all of a format that can be read."""
    files = _expand(source.files)
    if not files:
        raise DeptError(f"silo {silo}: no file matches {source.files}; check silos.{silo}.files")
    for file in files:
        if not _format(file):
            raise DeptError(
                f"silo {silo}: {file}: cannot be read; supported are "
                f"{', '.join(sorted(_FORMATS))}, each also as {', '.join(sorted(_COMPRESSED))}; "
                f"convert it or leave it out of silos.{silo}.files"
            )
    return files


def _sample_by(source: DataConfig, files: list[Path]) -> str:
    if source.sample_by != "auto":
        return source.sample_by
    small = all(file.stat().st_size <= _SMALL_FILE_BYTES for file in files)
    return "document" if small and len(files) >= _MANY_FILES else "paragraph"


def _from_text(silo: str, source: DataConfig, file: Path, sample_by: str) -> Iterator[Found]:
    if source.where or source.columns:
        setting = "where" if source.where else "columns"
        raise DeptError(
            f"silo {silo}: {file}: has no columns, which silos.{silo}.{setting} needs; leave the "
            "file out, or that setting"
        )
    with _text_stream(silo, source, file) as stream:
        yield from ((str(file), text) for text in _SAMPLERS[sample_by](silo, file, stream))


@contextmanager
def _named(silo: str, source: DataConfig, file: Path) -> Iterator[None]:
    """What goes wrong while a file is read names it, and the mend."""
    try:
        yield
    except DeptError:
        raise
    except UnicodeDecodeError as error:
        raise DeptError(
            f"silo {silo}: {file}: not {source.encoding} text (byte "
            f"0x{error.object[error.start]:02x}: {error.reason}); convert the file, or set "
            f"silos.{silo}.encoding"
        ) from error
    except Exception as error:  # of the file system, four decompressors and Parquet
        raise DeptError(
            f"silo {silo}: {file}: cannot be read: {_first_line(error)}; mend it or leave it out "
            f"of silos.{silo}.files"
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _text_stream(silo: str, source: DataConfig, file: Path) -> IO[str]:
    try:
        encoding = codecs.lookup(source.encoding).name
    except LookupError as error:
        raise DeptError(
            f"silo {silo}: {source.encoding!r} is no encoding that Python knows; "
            f"set silos.{silo}.encoding"
        ) from error
    # A byte order mark is not part of the text.
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    return io.TextIOWrapper(_byte_stream(file), encoding=encoding)


def _byte_stream(file: Path) -> Any:
    suffix = file.suffix.lower()
    if suffix == ".zst":  # Python itself reads it only from 3.14 on
        import pyarrow  # type: ignore[import-untyped]

        return pyarrow.input_stream(str(file), compression="zstd")
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(suffix, open)(file, "rb")


def _whole(silo: str, file: Path, stream: IO[str]) -> Iterator[str]:
    yield stream.read()


def _lines(silo: str, file: Path, stream: IO[str]) -> Iterator[str]:
    return (line.removesuffix("\n") for line in stream)


def _paragraphs(silo: str, file: Path, stream: IO[str]) -> Iterator[str]:
    lines: list[str] = []
    characters = 0
    for line in stream:
        if line.strip():
            lines.append(line)
            characters += len(line)
        elif lines:
            yield "".join(lines).removesuffix("\n")
            lines, characters = [], 0
        if characters > _PARAGRAPH_CHARACTERS:
            raise DeptError(
                f"silo {silo}: {file}: no blank line in {characters:,} characters, so that it "
                f"would be one document; set silos.{silo}.sample_by=line"
            )
    yield "".join(lines).removesuffix("\n")


_SAMPLERS = {"document": _whole, "paragraph": _paragraphs, "line": _lines}


def _json_rows(silo: str, file: Path, stream: IO[str]) -> Iterator[tuple[str, Any]]:
    """Rows of JSON Lines, or of one array of objects, each with its place."""
    blank = 0
    while (first := stream.readline()).isspace():
        blank += 1
    if first.lstrip().startswith("["):
        rows = _parsed(silo, str(file), first + stream.read())
        yield from ((f"{file}, item {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(chain([first], stream), start=blank + 1):
        if line.strip():
            place = f"{file}, line {number}"
            yield place, _parsed(silo, place, line)


def _parsed(silo: str, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DeptError(
            f"silo {silo}: {place}: not JSON: {error.msg} at character {error.pos}; "
            "mend it or leave it out"
        ) from error


class _Names(dict[str, None]):
    """The names of a file's columns in place of a row, which every row would be refused with."""


def _csv_rows(
    silo: str, file: Path, stream: IO[str], columns: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Rows below the line of names, quoted as spreadsheets do, each with its place."""
    csv.field_size_limit(_MOST_FIELD_CHARACTERS)
    dialect = "excel-tab" if ".tsv" in file.name.lower() else "excel"
    reader = csv.reader(stream, dialect, strict=True)
    records = _csv_records(silo, file, reader)
    names = next(records, [])
    if names and set(columns) - set(names):
        yield f"{file}, line 1", _Names.fromkeys(names)
    for row in records:
        place = f"{file}, line {reader.line_num}"
        if row and len(row) != len(names):
            raise DeptError(
                f"silo {silo}: {place}: {len(row)} fields, where the first line names "
                f"{len(names)} columns; quote fields that hold commas, tabs or line ends"
            )
        if row:
            yield place, dict(zip(names, row, strict=True))


def _csv_records(silo: str, file: Path, reader: Any) -> Iterator[list[str]]:
    """What the reader finds; its errors with the lines of the record that it cannot read."""
    while True:
        first = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            last = reader.line_num
            lines = f"lines {first} to {last}" if last > first else f"line {first}"
            raise DeptError(
                f"silo {silo}: {file}, {lines}: cannot be read: {error}; close quotes, and double "
                f"those within them, or leave it out of silos.{silo}.files"
            ) from error
        yield record


def _parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Rows of these columns; where one is missing, of all, behind their names."""
    from pyarrow import parquet

    with _seekable(file) as stream:
        table = parquet.ParquetFile(stream, buffer_size=1 << 20)
        names = _Names.fromkeys(table.schema_arrow.names)
        missing = set(columns) - names.keys()
        if missing:
            yield str(file), names
        number = 0
        for batch in table.iter_batches(
            batch_size=1000, columns=None if missing else list(columns)
        ):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row


def _parquet_head(file: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with _seekable(file) as stream:
        for batch in parquet.ParquetFile(stream).iter_batches(batch_size=_HEAD_ROWS):
            yield from batch.to_pylist()


@contextmanager
def _seekable(file: Path) -> Iterator[Any]:
    with _byte_stream(file) as stream:
        if file.suffix.lower() not in _COMPRESSED:
            yield stream
            return
        with tempfile.TemporaryFile() as plain:
            shutil.copyfileobj(stream, plain)
            plain.seek(0)
            yield plain


def _columns_to_read(source: DataConfig) -> list[str]:
    conditions = _conditions("", source)
    fields = [condition.field.partition(".")[0] for condition in conditions]
    return list(dict.fromkeys([*(source.columns or [source.column]), *fields]))


def _from_rows(
    silo: str,
    source: DataConfig,
    rows: Iterable[tuple[str, Any]],
    left_out: Counter[str],
) -> Iterator[Found]:
    """The texts of the rows that meet all conditions."""
    conditions = _conditions(silo, source)
    for place, row in rows:
        if isinstance(row, _Names):  # no condition may hide that the text's column is not there
            list(_in_column(silo, source, place, row))
        met = [condition.met(silo, place, row) for condition in conditions]
        if not all(met):
            left_out["where"] += 1
        elif texts := [text for _, text in _in_column(silo, source, place, row)]:
            yield place, "\n\n".join(texts)


def _in_column(silo: str, source: DataConfig, place: str, row: Any) -> Iterator[Found]:
    """The row's texts with their place, one for each column; nothing where it is null."""
    setting = "columns" if source.columns else "column"
    if not isinstance(row, Mapping):
        raise DeptError(
            f"silo {silo}: {place}: {type(row).__name__} instead of an object such as "
            f'{{"{source.column}": "..."}}; mend the data'
        )
    for column in source.columns or [source.column]:
        if column not in row:
            raise DeptError(
                f"silo {silo}: {place}: no column {column!r}; columns: {', '.join(map(str, row))}; "
                f"set silos.{silo}.{setting}"
            )
        value = row[column]
        if isinstance(value, str):
            yield place, value
        elif value is not None:
            raise DeptError(
                f"silo {silo}: {place}: column {column!r} holds {type(value).__name__}, not text; "
                f"set silos.{silo}.{setting}"
            )


_OF_JSON = (bool, int, float, list, dict, type(None))  # all else is compared as it is written


class _Condition(NamedTuple):
    """One of `where`, or of `hub_where`, which names it in errors."""

    field: str
    sign: str
    value: str
    setting: str

    def met(self, silo: str, place: str, row: Any) -> bool:
        found = self._found(silo, place, row)
        if self.sign in ("=", "!="):
            text = json.dumps(found, default=str) if isinstance(found, _OF_JSON) else str(found)
            return (text == self.value) == (self.sign == "=")
        if found is None or str(found).strip().lower() in ("", "nan"):
            return False
        if isinstance(found, bool) or not is_number(str(found)):
            raise DeptError(
                f"silo {silo}: {place}: field {self.field!r} holds {found!r}, no number that is "
                f"more or less than another; set {self.setting}"
            )
        limit, number = float(self.value), float(found)
        return number >= limit if self.sign == ">=" else number <= limit

    def _found(self, silo: str, place: str, row: Any) -> Any:
        """The field of the row, or of a row within it."""
        found = row
        for name in self.field.split("."):
            if found is None:
                break
            if not isinstance(found, Mapping) or name not in found:
                there = ", ".join(map(str, found)) if isinstance(found, Mapping) else repr(found)
                raise DeptError(
                    f"silo {silo}: {place}: no field {self.field!r}; where {name!r} should be: "
                    f"{there}; set {self.setting}"
                )
            found = found[name]
        return found


def _conditions(silo: str, source: DataConfig) -> list[_Condition]:
    found = []
    for each in source.hub_where:
        field, _, value = each.partition("=")
        found.append(_Condition(field, "=", value, f"silos.{silo}.hub_where"))
    for each in source.where:
        parts = CONDITION.fullmatch(each)
        assert parts is not None, each  # `source_problems` refuses others
        field, sign, value = parts.group("field", "sign", "value")
        found.append(_Condition(field, sign, value, f"silos.{silo}.where"))
    return found


def _hub_rows(silo: str, source: DataConfig) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    _have_zst_read()
    try:
        stream = load_dataset(
            source.hub,
            source.hub_config or None,
            data_files=_hub_files(source),
            split=source.hub_split,
            streaming=True,
        )
        for number, row in enumerate(stream, start=1):
            yield f"{source.hub}, row {number}", row
    except Exception as error:  # network, hub and reader errors of several libraries
        raise DeptError(
            f"silo {silo}: hub data set {source.hub!r} (config {source.hub_config!r}, split "
            f"{source.hub_split!r}) cannot be read: {_first_line(error)}; check "
            f"silos.{silo}.hub, hub_config and hub_split"
        ) from error


def _hub_files(source: DataConfig) -> dict[str, list[str]] | None:
    """Patterns by split; None leaves it to the data set."""
    patterns: dict[str, list[str]] = {}
    for split, _, pattern in (each.partition("=") for each in source.hub_files):
        patterns.setdefault(split, []).append(pattern)
    return patterns or None


def _have_zst_read() -> None:
    """Let data sets on the hub be .zst, which `datasets` reads only with a package of its own."""
    import pyarrow
    from fsspec.compression import (  # type: ignore[import-untyped]
        compr,
        register_compression,
    )

    def unpacked(stream: Any, **_: Any) -> Any:
        return pyarrow.CompressedInputStream(stream, "zstd")

    if "zstd" not in compr:
        register_compression("zstd", unpacked, "zst")


def _from_packages(silo: str, source: DataConfig) -> Iterator[Found]:
    """Package files in an order mixed by a digest of their path, so that a cut is a sample."""
    found = [pair for name in source.packages for pair in _package_files(silo, name)]
    chosen = [
        (label, path)
        for label, path in found
        if _matches(label, source.include) and not _matches(label, source.exclude)
    ]
    if not chosen:
        raise DeptError(
            f"silo {silo}: no file of {source.packages} matches {source.include}; "
            f"check silos.{silo}.include and exclude"
        )
    for label, path in sorted(chosen, key=lambda pair: short_digest(pair[0])):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # packages ship a few files that are wrong on purpose
        if source.content == "docstrings":
            yield label, docstrings(text)
        else:
            yield label, without_licence(text) if source.content == "code" else text


def _matches(label: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(label, pattern) for pattern in patterns)


def _package_files(silo: str, name: str) -> list[tuple[str, Path]]:
    """Files with their paths below the standard library or below site-packages."""
    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return [(path.relative_to(root).as_posix(), path) for path in _standard_library(root)]
    try:
        listed = metadata.files(name)
    except metadata.PackageNotFoundError as error:
        raise DeptError(
            f"silo {silo}: package {name!r} is not installed; install it or change "
            f"silos.{silo}.packages"
        ) from error
    return [(f.as_posix(), Path(str(f.locate()))) for f in listed or [] if ".." not in f.parts]


def _standard_library(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_STANDARD_LIBRARY]
        yield from (Path(folder, name) for name in names)


def without_licence(text: str) -> str:
    """Source text without its leading comments, which repeat a licence in every file."""
    return _LEADING_COMMENTS.sub("", text).lstrip("\n")


def docstrings(source_text: str, at_least_characters: int = 200) -> str:
    """The longer docstrings of a Python file, in order, as one document."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in others' strings
            tree = ast.parse(source_text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners)]
    long = (inspect.cleandoc(d) for d in found if d and len(d) >= at_least_characters)
    return "\n\n".join(d for d in long if not _SURROGATE.search(d))


def short_digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
