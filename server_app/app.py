"""The ServerApp: read the run config, build the strategy, start it."""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from dept_fl.checkpoint import only_writer
from dept_fl.config import CONF_DIR, Recipe, home_dir, load_recipe
from dept_fl.errors import DeptError
from dept_fl.model import layout
from dept_fl.rounds import has_checkpoint
from dept_fl.strategy import DeptStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the recipe named in the run config."""
    config = context.run_config
    try:
        # The working directory is that of whoever first started this SuperLink.
        recipe = load_recipe(str(config["recipe"]), str(config["overrides"]), CONF_DIR.parent)
        layout(recipe.model, recipe.sequence_tokens)  # a model that cannot be ends the run here
        home = home_dir(str(config["home"]))
        resume = config["resume"]
        if not isinstance(resume, bool):
            raise DeptError(f"resume={resume!r}: must be true or false, without quotes")
        run_dir = open_run_dir(str(config["run-dir"]), home, recipe, resume)
        with only_writer(run_dir):
            simulated = isinstance(grid, InMemoryGrid)
            DeptStrategy(recipe, home, run_dir, resume, simulated).start(grid)
    except DeptError as error:
        print(f"error: {error}", flush=True)
        raise


def open_run_dir(run_dir: str, home: Path, recipe: Recipe, resume: bool) -> Path:
    """The absolute folder of the run, made if it is new.

    Raises:
        DeptError: a relative path, a run already in it, or nothing to resume.
    """
    if not run_dir:
        if resume:
            raise DeptError("resume=true: give the run-dir of the stopped run as well")
        return _new_run_dir(home / "runs", f"{recipe.name}-{recipe.label}")
    folder = Path(run_dir)
    if not folder.is_absolute():
        raise DeptError(
            f"run-dir={run_dir!r}: must be absolute, since Flower runs the app in another folder"
        )
    if has_checkpoint(folder) and not resume:
        raise DeptError(
            f"run-dir={str(folder)!r}: holds a run already; add resume=true to go on with it, or "
            "name another folder"
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
