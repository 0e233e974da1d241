"""`dept silo`: what a partner does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dept_fl.cli import complete
from dept_fl.cli.common import (
    FAILED,
    AsJson,
    Column,
    Home,
    ReadSettings,
    as_text,
    expanded,
    folder_for,
    home_of,
    recipe_path,
    text_columns,
)
from dept_fl.config import load_recipe
from dept_fl.errors import DeptError
from dept_fl.progress import Progress

app = typer.Typer(
    no_args_is_help=True,
    help="""Make silos, see what lies in them, join a federation as a partner.

    Example: dept silo new fr --data 'texts/*.jsonl'
    """,
)


@app.command("new", context_settings={"allow_extra_args": True})
def silo_new(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="of the silo in the federation, such as fr")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="files, folder or quoted pattern: .txt, .jsonl, .parquet, .csv; repeatable"
        ),
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
    home: Home = "",
    folder: Annotated[Path, typer.Option(help="where NAME.yaml and the keys will lie")] = Path(),
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="another setting of NAME.yaml: KEY=VALUE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a silo of your text: its settings, key pair, tokenizer and tokens.

    Example: dept silo new fr --data 'texts/*.jsonl'
    """
    if context.args:  # a shell put the names of files in place of a pattern
        raise DeptError(f"{context.args[0]}: quote a pattern (--data 'texts/*'), or repeat --data")
    for each in (hub, tokenizer):  # they stand in the file as they are given
        expanded(each)
    progress = Progress()
    with progress.stage("starting"):  # PyTorch takes seconds
        from dept_fl.partner import Order, new_silo, read_settings
        from dept_fl.story import as_json_text, story

    order = Order(
        name=name,
        folder=expanded(folder),
        data=data or [],
        hub=hub,
        hub_config=hub_config,
        hub_split=hub_split,
        column=column,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        home=str(expanded(home)) if home else "",
        more=read_settings(settings or []),
    )
    made = new_silo(order, progress)
    typer.echo(as_json_text(made) if as_json else story(made, text_columns()))


@app.command("list")
def silo_list(
    recipe: Annotated[
        str, typer.Argument(help="recipe that names them", show_default="all in the home")
    ] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="such as validation_fraction=0.1", autocompletion=complete.settings),
    ] = None,
    home: Home = "",
    as_json: AsJson = False,
) -> None:
    """List silos with their text, tokens and experiments, as they lie on this machine's disk.

    Example: dept silo list conf/demo.yaml
    """
    from dept_fl.inventory import inventory

    asked = load_recipe(recipe_path(recipe), as_text(overrides)) if recipe else None
    place = home_of(home)
    found = Progress().during("looking", lambda: inventory(place, asked))
    if as_json:
        typer.echo(found.to_json())
    elif not found.silos:
        typer.echo(f"no silos in {found.home}")
    else:
        Console(highlight=False, markup=False, emoji=False).print(found.view())


@app.command("check")
def silo_check(
    file: Annotated[Path, typer.Argument(help="of the silo, made by `dept silo new`")],
    recipe: Annotated[
        str, typer.Option(help="the federation's", show_default="conf/partners.yaml")
    ] = "",
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the federation")] = "",
    root_certificates: Annotated[
        Path | None, typer.Option(help="ca.crt, which the operator gives you")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """See whether a silo can join: data, tokenizer, a step of training, memory, time, network.

    Example: dept silo check fr.yaml --superlink fl.example.org:443 \\
        --root-certificates ca.crt
    """
    progress = Progress()
    with progress.stage("starting"):
        from dept_fl.checkup import Checkup, Subject, as_json_text, line

    path, ca_file = expanded(file).absolute(), root_certificates
    subject = Subject(path, recipe_path(recipe), superlink, ca_file and expanded(ca_file))
    columns = text_columns() if sys.stdout.isatty() else 10_000  # else one line a check, for grep
    findings = {}
    for name, finding in Checkup(subject, progress).run():
        findings[name] = finding
        if not as_json:
            typer.echo(line(name, finding, columns))
    if as_json:
        typer.echo(as_json_text(findings))
    if any(finding.state == "FAILED" for finding in findings.values()):
        raise typer.Exit(FAILED)


@app.command("start", context_settings={"ignore_unknown_options": True})
def silo_start(
    file: Annotated[Path, typer.Argument(help="of the silo, made by `dept silo new`")],
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the operator")],
    root_certificates: Annotated[Path, typer.Option(help="the operator's ca.crt")],
    key: Annotated[
        Path | None, typer.Option(help="private key", show_default="beside the silo's file")
    ] = None,
    fork_server: Annotated[
        bool,
        typer.Option(help="keep what a message imports in memory, 0.5 GB, between messages"),
    ] = True,
    words: Annotated[
        list[str] | None, typer.Argument(help="more arguments for flower-supernode")
    ] = None,
) -> None:
    """Run the silo's SuperNode, and start it again whenever it ends, until Ctrl-C.

    Example: dept silo start fr.yaml --superlink fl.example.org:443 \\
        --root-certificates ca.crt
    """
    from dept_fl.silo_file import load_silo_file
    from dept_fl.supernode import SuperNode, keep_up

    path = expanded(file).absolute()
    own_key = expanded(key or path.with_suffix(".key")).absolute()
    ca = expanded(root_certificates).absolute()
    try:
        silo = load_silo_file(path)
        node = SuperNode(silo, own_key, superlink, ca, words or [], fork_server)
        keep_up(node, typer.echo)
    except KeyboardInterrupt:
        typer.echo("ended")


@app.command("split")
def silo_split(
    files: Annotated[
        list[str], typer.Argument(help="one corpus: .txt, .jsonl, .parquet, compressed too")
    ],
    silos: Annotated[int, typer.Option(help="how many to make of it")],
    out: Annotated[Path, typer.Option(help="new folder for them and their recipe")] = Path("split"),
    column: Column = "text",
    labels: Annotated[
        str, typer.Option(help="column that names a document's true source, to compare with")
    ] = "",
    seed: Annotated[int, typer.Option(help="of the clustering", min=0)] = 1,
    settings: ReadSettings = None,
    as_json: AsJson = False,
) -> None:
    """Make silos of a corpus whose sources nobody noted: cluster its documents.

    Example: dept silo split corpus.jsonl --silos 8 --out parts
    """
    folder_for(out)
    progress = Progress()
    with progress.stage("starting"):  # scikit-learn takes seconds
        from dept_fl.clusters import Request, show, split_files

    request = Request(files, expanded(out), silos, seed, column, labels, settings or [])
    found = split_files(request, progress)
    if as_json:
        typer.echo(found.to_json())
    else:
        show(found)
