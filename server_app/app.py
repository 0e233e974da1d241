"""The ServerApp: read the run config, build the strategy, start it."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from dept_fl.checkpoint import only_writer
from dept_fl.config import CONF_DIR, home_dir, load_recipe
from dept_fl.errors import DeptError
from dept_fl.model import layout
from dept_fl.run_dir import open_run_dir
from dept_fl.strategy import DeptStrategy
from dept_fl.trackers import require_packages

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the recipe named in the run config."""
    config = context.run_config
    try:
        # The working directory is that of whoever first started this SuperLink.
        recipe = load_recipe(str(config["recipe"]), str(config["overrides"]), CONF_DIR.parent)
        require_packages(recipe)
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
