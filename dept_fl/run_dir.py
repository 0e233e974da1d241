"""The folder of a run: found or made before the run, so that a wrong one is told at once."""

from __future__ import annotations

import time
from pathlib import Path

from dept_fl.config import Recipe
from dept_fl.errors import DeptError
from dept_fl.rounds import has_checkpoint


def open_run_dir(run_dir: str, home: Path, recipe: Recipe, resume: bool) -> Path:
    """The absolute folder of the run, made if it is new.

    Raises:
        DeptError: a relative path, a run already in it, or nothing to resume.
    """
    if not run_dir:
        if resume:
            raise DeptError("resume=true: give the run-dir of the stopped run as well (--run-dir)")
        return _new_run_dir(home / "runs", f"{recipe.name}-{recipe.label}")
    folder = Path(run_dir)
    if not folder.is_absolute():
        raise DeptError(
            f"run-dir={run_dir!r}: must be absolute, since Flower runs the app in another folder"
        )
    if has_checkpoint(folder) and not resume:
        raise DeptError(
            f"run-dir={str(folder)!r}: holds a run already; go on with it by resume=true "
            "(--resume), or name another folder"
        )
    if resume and not has_checkpoint(folder):
        raise DeptError(f"resume=true: no checkpoint in {folder}/checkpoints")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeptError(f"run-dir={run_dir!r}: cannot be made: {error}") from error
    return folder


def _new_run_dir(parent: Path, name: str) -> Path:
    """A folder that no other run has, also if two start in the same second."""
    parent.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        folder = parent / f"{name}-{stamp}{suffix}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise DeptError(f"{parent}: a thousand runs started in one second; name a run-dir")
