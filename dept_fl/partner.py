"""A partner's new silo: its file, its key, and all that its SuperNode will need, made once."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from dept_fl.config import LEAST_PIECES, SILO_NAME, home_dir, yaml_value
from dept_fl.data import Corpus
from dept_fl.errors import DeptError
from dept_fl.node_key import make_key, public_file
from dept_fl.progress import Progress
from dept_fl.silo import Silo
from dept_fl.silo_file import SiloFile, as_yaml, silo_file
from dept_fl.sources import text_columns

_MOST_PIECES = 32_768
_PIECES_WITHOUT_TEXT = 258  # the bytes, the unknown piece and the document's end
_COVERAGE = 0.9995  # share of the characters that the trainer makes pieces of
_OPTIONS = {
    "files": "--data",
    "hub": "--hub",
    "hub_config": "--hub-config",
    "hub_split": "--hub-split",
    "column": "--column",
    "tokenizer": "--tokenizer",
    "vocab_size": "--vocab-size",
    "home": "--home",
    "name": "NAME",
}


@dataclass(frozen=True)
class Order:
    """What a partner asks for; what is left empty is found out.

    Attributes:
        folder: where the silo's file and keys will lie.
        data: files, folders and patterns, relative to the working directory.
        home: relative to the working directory too; empty: $DEPT_HOME, else ~/.dept-fl.
        more: other settings of a silo's file.
    """

    name: str
    folder: Path
    data: list[str] = field(default_factory=list)
    hub: str = ""
    hub_config: str = ""
    hub_split: str = ""
    column: str = ""
    tokenizer: str = ""
    vocab_size: int = 0
    home: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.folder.absolute() / f"{self.name}.yaml"

    @property
    def key_file(self) -> Path:
        return self.folder.absolute() / f"{self.name}.key"


@dataclass(frozen=True)
class NewSilo:
    """A silo that is ready to join.

    Attributes:
        settings: of its file.
        silo: with text, tokenizer and tokens in its home.
        pieces_chosen: whether the size of the vocabulary was found out, not given.
    """

    order: Order
    home: Path
    settings: Mapping[str, Any]
    silo: Silo
    pieces_chosen: bool


def new_silo(order: Order, progress: Progress) -> NewSilo:
    """Make a silo's text, tokenizer and tokens ready, then write its file and its key pair.

    Raises:
        DeptError: with the mend; then there is neither file nor key. What was whole in the home by
            then stays there for the next try.
    """
    _check(order)
    _check_free(order)
    try:
        with _folder(order.file.parent):
            made = _prepared(order, progress)
            _write(made)
    except OSError as error:
        raise DeptError(f"{error.filename or order.folder}: {error.strerror or error}") from error
    except DeptError as error:
        raise DeptError(_in_options(str(error), order)) from error
    return made


def _prepared(order: Order, progress: Progress) -> NewSilo:
    settings = _settings(order)
    if not order.column and not order.more.get("sources"):
        file = _opened(order, settings)
        settings |= progress.during("looking at the data", lambda: _text_column(file))
    silo = _silo(_opened(order, settings), progress)
    if order.tokenizer:  # what is wrong with it shows before hours of reading
        progress.during("loading the tokenizer", lambda: silo.tokenizer)
    with _folder(silo.folder / "text"):
        corpus = progress.during("reading the data", lambda: silo.corpus)
    pieces_chosen = not order.tokenizer and not order.vocab_size
    if pieces_chosen:
        sample_bytes = silo.recipe.tokenizer_train_bytes
        settings["vocab_size"] = progress.during(
            "counting characters", lambda: fitting_pieces(corpus, sample_bytes)
        )
    file = _opened(order, settings)
    silo = _silo(file, progress)
    if not order.tokenizer:
        progress.during("training the tokenizer", lambda: silo.tokenizer)
    progress.during("making tokens", lambda: silo.stream)
    return NewSilo(order, file.home, settings, silo, pieces_chosen)


def _opened(order: Order, settings: Mapping[str, Any]) -> SiloFile:
    return silo_file(order.file, {"vocab_size": _MOST_PIECES, **settings})


def _silo(file: SiloFile, progress: Progress) -> Silo:
    return Silo(file.name, file.alone(), file.home, "", progress.watch)


# ---- what is asked for -------------------------------------------------------------------


def read_settings(words: Iterable[str]) -> dict[str, Any]:
    """Settings of a silo's file from words such as sample_by=line.

    Raises:
        DeptError: a word is not of this form.
    """
    pairs = [(word, *word.partition("=")) for word in words]
    for word, key, equals, _ in pairs:
        if not key or not equals:
            raise DeptError(f"--set {word!r}: expected KEY=VALUE, such as sample_by=line")
    return {key: yaml_value(value) for _, key, _, value in pairs}


def _check(order: Order) -> None:
    if not SILO_NAME.fullmatch(order.name):
        raise DeptError(
            f"NAME={order.name!r}: must be lower-case letters, digits, '-' and '_', at most 64, "
            "and start with a letter or digit"
        )
    others = [bool(order.more.get(key)) for key in ("packages", "sources")]
    if sum([bool(order.data), bool(order.hub), *others]) != 1:
        raise DeptError(
            "give the silo's text in one way: either --data 'texts/*.jsonl' (repeatable), or "
            "--hub NAME"
        )
    if order.tokenizer and order.vocab_size:
        raise DeptError(
            f"--tokenizer {order.tokenizer} has a vocabulary already: drop --vocab-size="
            f"{order.vocab_size}, or drop --tokenizer to train one of that size"
        )
    for key in order.more.keys() & _OPTIONS.keys():
        raise DeptError(f"--set {key}: give it as {_OPTIONS[key]}")
    if set(str(order.file)) & set("\"'\\\n"):
        raise DeptError(
            f"{str(order.folder)!r}: Flower's --node-config cannot name a path with quotes or "
            "backslashes; choose another --folder"
        )


def _check_free(order: Order) -> None:
    for file in (order.file, order.key_file, public_file(order.key_file)):
        if file.exists():
            raise DeptError(
                f"{file} is there already and is never overwritten; choose another NAME or "
                "--folder, or move it away"
            )
    there = next(folder for folder in order.file.parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise DeptError(f"{there}: no folder that you may write to; choose another --folder")


def _settings(order: Order) -> dict[str, Any]:
    """The settings of the silo's file, with paths as they are to stand in it."""
    folder = order.file.parent
    given = {
        "name": order.name,
        "home": str(home_dir(str(Path(order.home).expanduser().absolute()) if order.home else "")),
        "files": [_beside(pattern, folder) if pattern else "" for pattern in order.data],
        "hub": _beside_if_there(order.hub, folder),
        "hub_config": order.hub_config,
        "hub_split": order.hub_split,
        "column": order.column,
        "tokenizer": _beside_if_there(order.tokenizer, folder),
        "vocab_size": order.vocab_size,
    }
    return {key: value for key, value in given.items() if value} | dict(order.more)


def _beside(path: str, folder: Path) -> str:
    """A path relative to the working directory as one relative to `folder`; others stay."""
    if path.startswith("~") or Path(path).is_absolute():
        return path
    return os.path.relpath(Path.cwd() / path, folder.resolve())


def _beside_if_there(name: str, folder: Path) -> str:
    return _beside(name, folder) if name and Path(name).expanduser().exists() else name


def _in_options(problem: str, order: Order) -> str:
    """A problem of settings, as a recipe or a file names them, in options of `dept silo new`."""

    def option(match: re.Match[str]) -> str:
        return _OPTIONS.get(match[1], f"--set {match[1]}")

    problem = problem.replace(f"{order.file}: ", "")
    problem = re.sub(rf"\bsilos\.{re.escape(order.name)}\.(\w+)", option, problem)
    problem = re.sub(r"(?<!--set )\b(validation_\w+)=", r"--set \1=", problem)
    return problem.replace(f"silos.{order.name}", "--data").replace("set --set", "give --set")


# ---- what is found out -------------------------------------------------------------------


def _text_column(file: SiloFile) -> dict[str, str]:
    """The setting of the text's column; none where the data has no columns."""
    columns = text_columns(file.name, file.alone().silos[file.name])
    texts = [name for name, is_text in columns.items() if is_text]
    if not columns:
        return {}
    if "text" in columns:
        return {"column": "text"}
    if len(texts) != 1:
        found = f"text is in {', '.join(texts)}" if texts else "none holds text"
        raise DeptError(
            f"which column is the text? of {', '.join(columns)}: {found}; name it with --column"
        )
    return {"column": texts[0]}


def fitting_pieces(corpus: Corpus, sample_bytes: int) -> int:
    """How many pieces suit so much text: twice as many for four times the text.

    The power of two below 2 sqrt(bytes), such as 4,096 for 6 MB, up to 32,768; but never less
    than the text's characters need, which are pieces too, with as many for words.
    """
    by_size = 1 << int(math.log2(2 * math.sqrt(corpus.train_bytes)))
    characters = _frequent_characters(corpus.training_sample(sample_bytes))
    return max(min(by_size, _MOST_PIECES), _PIECES_WITHOUT_TEXT + 2 * characters, LEAST_PIECES)


def _frequent_characters(texts: Iterable[str]) -> int:
    counts = sorted(Counter(chain.from_iterable(texts)).values(), reverse=True)
    enough = _COVERAGE * sum(counts)
    return sum(1 for seen in accumulate(counts, initial=0) if seen < enough)


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Have a folder for the block; where that fails, what had to be made for it goes again."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):  # where something else lies in it by now
                each.rmdir()
        raise


# ---- what is written ---------------------------------------------------------------------


def _write(made: NewSilo) -> None:
    order = made.order
    _check_free(order)  # reading took its time
    try:
        make_key(order.key_file)
        order.file.write_text(as_yaml(made.settings), encoding="utf-8")
    except BaseException:
        for file in (order.file, order.key_file, public_file(order.key_file)):
            file.unlink(missing_ok=True)
        raise
