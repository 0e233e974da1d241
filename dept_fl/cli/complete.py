"""What the shell offers behind the Tab key, found without PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import click

from dept_fl.config import CONF_DIR, home_dir, setting_names
from dept_fl.errors import DeptError


def settings(context: click.Context, incomplete: str) -> Iterator[str]:
    """Overrides of a recipe: names with `=`, and the presets of models."""
    words = [f"{name}=" for name in setting_names()]
    words += [f"model.preset={file.stem}" for file in sorted(CONF_DIR.glob("models/*.yaml"))]
    before = list(context.params.get("overrides") or [])
    given = "".join(before[-2:]) if before[-1:] == ["="] else ""  # bash cuts a word at its `=`
    return (w.removeprefix(given) for w in words if w.startswith(given + incomplete))


def arms(incomplete: str) -> Iterator[str]:
    """Names of arms with commas between, the last of them being written."""
    from dept_fl.arms import ARMS

    done, comma, last = incomplete.rpartition(",")
    return (f"{done}{comma}{name}" for name in ["all", *ARMS] if name.startswith(last))


def silos(context: click.Context, incomplete: str) -> Iterator[str]:
    """The silos of the home that the command names, or of the usual one."""
    try:
        folders = sorted((home_dir(context.params.get("home") or "") / "silos").glob("*/"))
    except DeptError:
        return iter(())
    return (each.name for each in folders if each.name.startswith(incomplete))
