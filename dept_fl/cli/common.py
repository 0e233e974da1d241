"""What the commands share."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from dept_fl.config import home_dir
from dept_fl.errors import DeptError

RECIPE = "conf/demo.yaml"


@contextmanager
def mistakes_told() -> Iterator[None]:
    """A mistake costs one clear line and exit code 2."""
    try:
        yield
    except DeptError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def interrupt_told() -> Iterator[None]:
    """Ctrl-C in the midst of jobs costs one line and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        told("stopped; the same command goes on where it was")
        raise typer.Exit(130) from None


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt  # so that SIGTERM and a closed terminal end the SuperLink too


def told(line: str) -> None:
    typer.echo(line, err=True)


def tell_failures(failures: list[str], jobs: int) -> None:
    """Name the jobs that failed, and exit with 1 if any did."""
    if failures:
        told("\n".join([f"error: {len(failures)} of {jobs} jobs failed:", *failures]))
        raise typer.Exit(1)


def home_of(home: str) -> Path:
    return home_dir(str(Path(home).expanduser().absolute()) if home else "")


def as_text(overrides: list[str] | None) -> str:
    """Overrides as `load_recipe` takes them, whatever is in them."""
    return " ".join(map(shlex.quote, overrides or []))


def recipe_path(recipe: str) -> str:
    """Absolute if the file is here; else as given, to be looked up beside conf/."""
    path = Path(recipe).expanduser()
    return str(path.resolve()) if path.is_file() else recipe


def text_columns() -> int:
    """How wide text is to be: no wider than is easily read."""
    return min(shutil.get_terminal_size().columns, 96)
