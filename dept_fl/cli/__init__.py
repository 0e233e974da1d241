"""The `dept` command."""

from __future__ import annotations

import typer

from dept_fl.cli import federation, models, runs, silo

app = typer.Typer(no_args_is_help=True, add_completion=False, help="DEPT pre-training on Flower.")
app.add_typer(runs.app)
app.add_typer(models.app)
app.add_typer(silo.app, name="silo")
app.add_typer(federation.app, name="federation")


@app.callback()
def main() -> None:
    """DEPT pre-training on Flower."""
