"""The `dept` command."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dept_fl.config import home_dir, load_recipe, require_silos
from dept_fl.errors import DeptError
from dept_fl.local import COMPLETED, end_superlink, simulate
from dept_fl.progress import Progress
from dept_fl.status import look, view, watch

app = typer.Typer(no_args_is_help=True, add_completion=False, help="DEPT pre-training on Flower.")
federation = typer.Typer(no_args_is_help=True, help="Open a federation to partners.")
app.add_typer(federation, name="federation")
silo = typer.Typer(no_args_is_help=True, help="Join a federation as a partner.")
app.add_typer(silo, name="silo")


@contextmanager
def _mistakes_told() -> Iterator[None]:
    """A mistake costs one clear line and exit code 2."""
    try:
        yield
    except DeptError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@app.callback()
def main() -> None:
    """DEPT pre-training on Flower."""


@app.command()
@_mistakes_told()
def run(
    recipe: Annotated[str, typer.Argument(help="recipe file")] = "conf/demo.yaml",
    overrides: Annotated[list[str] | None, typer.Argument(help="such as variant=trim")] = None,
    run_dir: Annotated[str, typer.Option(help="folder of the run; default: a new one")] = "",
    home: Annotated[str, typer.Option(help="default: $DEPT_HOME, else ~/.dept-fl")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="go on with a stopped run")] = False,
    nodes: Annotated[int, typer.Option(help="virtual nodes of the simulation", min=1)] = 2,
    cpus: Annotated[int, typer.Option(help="CPU cores of one silo at work", min=1)] = 2,
) -> None:
    """Run a recipe in simulation: `flwr run` with the right environment and exit code.

    Starts a SuperLink of its own on a free port and ends it with the run.

    Example: dept run conf/demo.yaml variant=trim tokenizer=shared rounds=4
    """
    from dept_fl.model import layout  # takes seconds that the other commands need not wait

    try:
        path, words = _recipe_path(recipe), " ".join(map(shlex.quote, overrides or []))
        made = load_recipe(path, words)  # every mistake shows before any process starts
        require_silos(made)
        layout(made.model, made.sequence_tokens)
        config = {
            "recipe": path,
            "overrides": words,
            "home": str(home_dir(str(Path(home).expanduser().absolute()) if home else "")),
            "run-dir": str(Path(run_dir).expanduser().absolute()) if run_dir else "",
            "resume": resume,
        }
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGHUP, _interrupt)
        status = simulate(config, nodes, cpus, len(made.silo_names))
    except KeyboardInterrupt:
        typer.echo("stopped; go on with --resume and the same --run-dir", err=True)
        raise typer.Exit(130) from None
    if status != COMPLETED:
        typer.echo(f"error: the run ended as {status}", err=True)
        raise typer.Exit(1)


def _recipe_path(recipe: str) -> str:
    """Absolute if the file is here; else as given, to be looked up beside conf/."""
    path = Path(recipe).expanduser()
    return str(path.resolve()) if path.is_file() else recipe


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt  # so that SIGTERM and a closed terminal end the SuperLink too


@app.command()
def stop(
    port: Annotated[
        int, typer.Option(envvar="FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", help="where it listens")
    ] = 39091,
) -> None:
    """End the local SuperLink that a plain `flwr run .` leaves behind, with all it started."""
    ended = end_superlink(port)
    typer.echo(f"{'ended the' if ended else 'no local'} SuperLink on port {port}")


@app.command()
@_mistakes_told()
def status(
    run_dir: Annotated[Path, typer.Argument(help="folder of the run, as the run printed it")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, once")] = False,
    follow: Annotated[bool, typer.Option("--watch", "-w", help="until the run's end")] = False,
) -> None:
    """Show how a run stands: its round, each silo, the last failures.

    Example: dept status runs/demo-spec-opt-20261121-065532 --watch
    """
    console = Console(highlight=False, markup=False, emoji=False)
    if as_json:
        typer.echo(look(run_dir.expanduser()).to_json())
    elif follow and sys.stdout.isatty() and not console.is_dumb_terminal:
        watch(run_dir.expanduser(), console)
    else:
        console.print(view(look(run_dir.expanduser())))


@federation.command("init")
@_mistakes_told()
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
) -> None:
    """Make certificates, a reverse proxy's configuration and Flower's connection to it.

    Example: dept federation init ~/federation --host fl.example.org
    """
    from dept_fl.federation import Settings, init, instructions, renew_certificate

    folder, hosts = folder.expanduser(), host or []
    if renew:
        if port or superlink_port or name:
            raise DeptError("--renew changes the certificate, with --host its hosts; nothing else")
        made = renew_certificate(folder, hosts)
        typer.echo(f"new certificate until {made.ends:%Y-%m-%d}; used from the next start on")
        return
    if not hosts:
        raise DeptError("--host is missing: the name under which partners reach this machine")
    settings = Settings(hosts, port or 443, superlink_port or 8443, name or "partners")
    typer.echo(instructions(init(folder, settings)))


@federation.command("start", context_settings={"ignore_unknown_options": True})
@_mistakes_told()
def federation_start(
    folder: Annotated[Path, typer.Argument(help="made by `dept federation init`")],
    words: Annotated[
        list[str] | None, typer.Argument(help="more arguments for flower-superlink")
    ] = None,
) -> None:
    """Run the SuperLink with the reverse proxy in front of it until Ctrl-C; both end together."""
    from dept_fl.federation import start

    try:
        start(folder.expanduser(), words or [], typer.echo)
    except KeyboardInterrupt:
        typer.echo("ended")


@silo.command("new", context_settings={"allow_extra_args": True})
@_mistakes_told()
def silo_new(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="of the silo in the federation, such as fr")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="files, folder or quoted pattern of .txt, .jsonl, .parquet; repeatable"),
    ] = None,
    hub: Annotated[str, typer.Option(help="a hub data set instead, streamed")] = "",
    hub_config: Annotated[str, typer.Option(help="of the hub data set")] = "",
    hub_split: Annotated[str, typer.Option(help="of the hub data set", show_default="train")] = "",
    column: Annotated[str, typer.Option(help="that holds the text", show_default="found out")] = "",
    vocab_size: Annotated[
        int, typer.Option(help="pieces of the tokenizer", min=0, show_default="fits the text")
    ] = 0,
    tokenizer: Annotated[
        str, typer.Option(help="adopt one: SentencePiece .model, Hugging Face folder or name")
    ] = "",
    home: Annotated[str, typer.Option(help="default: $DEPT_HOME, else ~/.dept-fl")] = "",
    folder: Annotated[Path, typer.Option(help="where NAME.yaml and the keys will lie")] = Path(),
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="another setting of NAME.yaml: KEY=VALUE")
    ] = None,
) -> None:
    """Make a silo of your text: its settings, key pair, tokenizer and tokens.

    Example: dept silo new fr --data 'texts/*.jsonl'
    """
    if context.args:  # a shell put the names of files in place of a pattern
        raise DeptError(f"{context.args[0]}: quote a pattern (--data 'texts/*'), or repeat --data")
    progress = Progress()
    with progress.stage("starting"):  # PyTorch takes seconds
        from dept_fl.partner import Order, new_silo, read_settings
        from dept_fl.story import story

    order = Order(
        name=name,
        folder=folder.expanduser(),
        data=data or [],
        hub=hub,
        hub_config=hub_config,
        hub_split=hub_split,
        column=column,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        home=home,
        more=read_settings(settings or []),
    )
    made = new_silo(order, progress)
    typer.echo(story(made, _columns()))


@silo.command("check")
@_mistakes_told()
def silo_check(
    file: Annotated[Path, typer.Argument(help="of the silo, made by `dept silo new`")],
    recipe: Annotated[
        str, typer.Option(help="the federation's", show_default="conf/partners.yaml")
    ] = "",
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the federation")] = "",
    root_certificates: Annotated[
        Path | None, typer.Option(help="ca.crt, which the operator gives you")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """See whether a silo can join: data, tokenizer, a step of training, memory, time, network.

    Example: dept silo check fr.yaml --superlink fl.example.org:443 --root-certificates ca.crt
    """
    progress = Progress()
    with progress.stage("starting"):
        from dept_fl.checkup import Checkup, Subject, as_json_text, line

    path, ca_file = file.expanduser().absolute(), root_certificates
    subject = Subject(path, _recipe_path(recipe), superlink, ca_file and ca_file.expanduser())
    columns = _columns() if sys.stdout.isatty() else 10_000  # else one line a check, for grep
    findings = {}
    for name, finding in Checkup(subject, progress).run():
        findings[name] = finding
        if not as_json:
            typer.echo(line(name, finding, columns))
    if as_json:
        typer.echo(as_json_text(findings))
    if any(finding.state == "FAILED" for finding in findings.values()):
        raise typer.Exit(1)


def _columns() -> int:
    """How wide text is to be: no wider than is easily read."""
    return min(shutil.get_terminal_size().columns, 96)


@silo.command("start", context_settings={"ignore_unknown_options": True})
@_mistakes_told()
def silo_start(
    file: Annotated[Path, typer.Argument(help="of the silo, made by `dept silo new`")],
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the operator")],
    root_certificates: Annotated[Path, typer.Option(help="the operator's ca.crt")],
    key: Annotated[
        Path | None, typer.Option(help="private key", show_default="beside the silo's file")
    ] = None,
    words: Annotated[
        list[str] | None, typer.Argument(help="more arguments for flower-supernode")
    ] = None,
) -> None:
    """Run the silo's SuperNode, and start it again whenever it ends, until Ctrl-C.

    Example: dept silo start fr.yaml --superlink fl.example.org:443 --root-certificates ca.crt
    """
    from dept_fl.silo_file import load_silo_file
    from dept_fl.supernode import SuperNode, keep_up

    path = file.expanduser().absolute()
    own_key = (key or path.with_suffix(".key")).expanduser().absolute()
    ca = root_certificates.expanduser().absolute()
    try:
        keep_up(SuperNode(load_silo_file(path), own_key, superlink, ca, words or []), typer.echo)
    except KeyboardInterrupt:
        typer.echo("ended")
