"""The `dept` command."""

from __future__ import annotations

from typing import Annotated

import typer

from dept_fl import __version__
from dept_fl.cli import federation, models, runs, silo, tokenizer
from dept_fl.cli.common import EXIT_CODES, JOIN, Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # they show local variables, in which a silo's text may be
    epilog=EXIT_CODES,
)
app.add_typer(runs.app)
app.add_typer(models.app)
app.add_typer(silo.app, name="silo", rich_help_panel=JOIN)
app.add_typer(tokenizer.app, name="tokenizer", rich_help_panel=JOIN)
app.add_typer(federation.app, name="federation", rich_help_panel=JOIN)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"dept-fl {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and end")
    ] = False,
) -> None:
    """DEPT: federated pre-training of language models with decoupled embeddings.

    Example: dept run conf/demo.yaml
    """
