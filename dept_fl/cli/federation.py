"""`dept federation`: what the operator does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dept_fl.cli.common import AsJson, expanded
from dept_fl.errors import DeptError
from dept_fl.progress import Progress

app = typer.Typer(
    no_args_is_help=True,
    help="""Open a federation to partners.

    Example: dept federation init ~/federation --host fl.example.org
    """,
)


@app.command("init")
def federation_init(
    folder: Annotated[Path, typer.Argument(help="new folder for keys, settings and logs")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="name or IP address under which partners reach this machine; repeatable"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="where partners connect", min=1, max=65535, show_default="443"),
    ] = None,
    superlink_port: Annotated[
        int | None,
        typer.Option(help="on this machine alone", min=1, max=65535, show_default="8443"),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="of the connection, as in `flwr run . NAME`", show_default="partners"),
    ] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="make a new server certificate in an old folder")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make certificates, a reverse proxy's configuration and Flower's connection to it.

    Example: dept federation init ~/federation --host fl.example.org
    """
    with Progress().stage("starting"):
        from dept_fl.federation import Settings, init, instructions, renew_certificate

    folder, hosts = expanded(folder), host or []
    if renew:
        if port or superlink_port or name:
            raise DeptError("--renew changes the certificate, with --host its hosts; nothing else")
        made = renew_certificate(folder, hosts)
        words = f"new certificate until {made.ends:%Y-%m-%d}; used from the next start on"
    elif not hosts:
        raise DeptError("--host is missing: the name under which partners reach this machine")
    else:
        settings = Settings(hosts, port or 443, superlink_port or 8443, name or "partners")
        made = init(folder, settings)
        words = instructions(made)
    typer.echo(made.to_json() if as_json else words)


@app.command("start", context_settings={"ignore_unknown_options": True})
def federation_start(
    folder: Annotated[Path, typer.Argument(help="made by `dept federation init`")],
    words: Annotated[
        list[str] | None, typer.Argument(help="more arguments for flower-superlink")
    ] = None,
) -> None:
    """Run the SuperLink with the reverse proxy in front of it until Ctrl-C; both end together.

    Example: dept federation start ~/federation
    """
    from dept_fl.federation import start

    try:
        start(expanded(folder), words or [], typer.echo)
    except KeyboardInterrupt:
        typer.echo("ended")
