"""What the commands share: how they end, how they are grouped, how words become settings."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from dept_fl.config import home_dir
from dept_fl.errors import DeptError, Failed
from dept_fl.interrupt import interrupted_by

RECIPE = "conf/demo.yaml"

# The panels of `dept --help`, in the order in which it shows them.
PRETRAIN, USE, COMPARE, JOIN = "Pre-train", "Use a model", "Compare", "Silos and federations"

FAILED, BAD_INPUT, STOPPED = 1, 2, 130
EXIT_CODES = f"""Exit codes: 0 all went well; {FAILED} it failed, or whoever read the output left; \
{BAD_INPUT} bad input; {STOPPED} stopped by Ctrl-C or a signal to end, and all files are whole. \
What runs until Ctrl-C (silo start, federation start, status --watch) ends with 0."""

# What is wrong with a disk, its rights or a path is told in a line, not by a traceback. ENOENT is
# not among them: a file that is not there and that nobody looked for first is a slip of ours.
_OF_THE_MACHINE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}

# Options that several commands have.
Home = Annotated[str, typer.Option(help="default: $DEPT_HOME, else ~/.dept-fl")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON value; all else on stderr")]
Column = Annotated[str, typer.Option(help="that holds the text")]
ReadSettings = Annotated[
    list[str] | None, typer.Option("--set", help="sample_by, encoding, max_bytes: KEY=VALUE")
]


class Commands(TyperGroup):
    """All commands, each of which ends as `EXIT_CODES` says."""

    def invoke(self, ctx: click.Context) -> Any:
        with _told_how_it_ends(), interrupted_by((signal.SIGTERM, signal.SIGHUP)):
            return super().invoke(ctx)


@contextmanager
def _told_how_it_ends() -> Iterator[None]:
    try:
        yield
    except DeptError as error:
        told(f"error: {error}")
        raise typer.Exit(FAILED if isinstance(error, Failed) else BAD_INPUT) from None
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        told(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt as stop:
        told("; ".join(["stopped", *map(str, stop.args)]))
        raise typer.Exit(STOPPED) from None


@contextmanager
def if_stopped(words: str) -> Iterator[None]:
    """What is told of a Ctrl-C in the block: how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(words) from None


def told(line: str) -> None:
    typer.echo(line, err=True)


def tell_failures(failures: list[str], jobs: int) -> None:
    """Name the jobs that failed, and exit with 1 if any did."""
    if failures:
        told("\n".join([f"error: {len(failures)} of {jobs} jobs failed:", *failures]))
        raise typer.Exit(FAILED)


def home_of(home: str) -> Path:
    return home_dir(str(expanded(home).absolute()) if home else "")


def expanded(path: str | Path) -> Path:
    """A path of the command line, `~` and `~user` as the folders that they stand for."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise DeptError(f"{path}: {user} is no user's home here; write it in full") from None


def expanded_name(name: str) -> str:
    """As `expanded`, of what may be a name on the hub as well, which stays as it is."""
    return str(expanded(name)) if name.startswith("~") else name


def folder_for(out: Path) -> Path:
    """The absolute path of the folder of --out, looked at before all work.

    Raises:
        DeptError: it cannot be made: a file is in its way, or nobody may write there.
    """
    folder = expanded(out).absolute()
    there = _deepest(folder)
    if not there.is_dir():
        raise DeptError(f"--out {out}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise DeptError(f"--out {out}: you may not write to {there}; name another folder")
    return folder


def _deepest(path: Path) -> Path:
    """The path itself or, of the folders that it is to lie in, the deepest one there is."""
    for each in (path, *path.parents):
        with suppress(FileNotFoundError, NotADirectoryError):  # not that a name is too long
            each.lstat()
            break
    return each


def require_utf8(text: str, option: str) -> None:
    """Raise DeptError for other bytes, of which Python makes surrogates that nothing can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DeptError(f"{option} {text!r}: is not UTF-8; write it in that encoding") from None


def as_text(overrides: list[str] | None) -> str:
    """Overrides as `load_recipe` takes them, whatever is in them."""
    return " ".join(map(shlex.quote, overrides or []))


def recipe_path(recipe: str) -> str:
    """Absolute if the file is here; else as given, to be looked up beside conf/."""
    path = expanded(recipe)
    return str(path.resolve()) if path.is_file() else recipe


def text_columns() -> int:
    """How wide text is to be: no wider than is easily read."""
    return min(shutil.get_terminal_size().columns, 96)
