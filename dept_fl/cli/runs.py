"""Commands about runs: `dept run`, `status`, `stop`, `compare`, `adapt`, `cost`, `report`."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dept_fl.cli import complete
from dept_fl.cli.common import (
    COMPARE,
    FAILED,
    PRETRAIN,
    RECIPE,
    AsJson,
    Home,
    as_text,
    expanded,
    folder_for,
    home_of,
    if_stopped,
    recipe_path,
    tell_failures,
    told,
)
from dept_fl.config import Recipe, load_recipe, require_silos
from dept_fl.errors import DeptError
from dept_fl.interrupt import ENDING, interrupted_by
from dept_fl.local import COMPLETED, end_superlink, simulate
from dept_fl.progress import Progress
from dept_fl.status import look, view, watch

app = typer.Typer()

_GOES_ON = "the same command goes on where it was"


@app.command(rich_help_panel=PRETRAIN)
def run(
    recipe: Annotated[str, typer.Argument(help="recipe file")] = RECIPE,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="such as variant=trim", autocompletion=complete.settings),
    ] = None,
    run_dir: Annotated[str, typer.Option(help="folder of the run; default: a new one")] = "",
    home: Home = "",
    resume: Annotated[bool, typer.Option("--resume", help="go on with a stopped run")] = False,
    nodes: Annotated[int, typer.Option(help="virtual nodes of the simulation", min=1)] = 2,
    cpus: Annotated[int, typer.Option(help="CPU cores of one silo at work", min=1)] = 2,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="read data, make tokenizers and tokens, and tell")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe in simulation: `flwr run` with the right environment and exit code.

    Starts a SuperLink of its own on a free port and ends it with the run.

    Example: dept run conf/demo.yaml variant=trim tokenizer=shared rounds=4
    """
    path, words = recipe_path(recipe), as_text(overrides)
    made = load_recipe(path, words)  # every mistake shows before any process starts
    require_silos(made)
    if dry_run and (resume or run_dir):
        raise DeptError("--dry-run makes no run: give it without --resume and --run-dir")
    place = home_of(home)
    progress = Progress()
    with progress.stage("starting"):  # PyTorch takes seconds
        from dept_fl.model import layout
        from dept_fl.rounds import has_checkpoint
        from dept_fl.run_dir import open_run_dir
        from dept_fl.trackers import require_packages

        require_packages(made)
        layout(made.model, made.sequence_tokens)
    if dry_run:
        _look_ahead(made, place, progress, as_json)
        return
    given = str(expanded(run_dir).absolute()) if run_dir else ""
    folder = open_run_dir(given, place, made, resume)
    config = {
        "recipe": path,
        "overrides": words,
        "home": str(place),
        "run-dir": str(folder),
        "resume": resume,
    }
    try:
        # Once: a second signal must not leave Flower's processes behind.
        with interrupted_by(ENDING, once=True):
            silos, output = len(made.silo_names), sys.stderr if as_json else sys.stdout
            status = simulate(config, nodes, cpus, silos, made.processes, progress, output)
    except KeyboardInterrupt:
        go_on = f"go on with --resume --run-dir {folder}"
        words = go_on if has_checkpoint(folder) else "before its first whole round"
        raise KeyboardInterrupt(words) from None
    finally:
        with suppress(OSError):  # there is something in it
            folder.rmdir()
    if as_json:
        ledger = folder / "metrics.jsonl"
        facts = asdict(look(folder)) if ledger.is_file() else None
        typer.echo(json.dumps({"run_dir": str(folder), "flower": status, "run": facts}))
    if status != COMPLETED:
        told(f"error: the run ended as {status}")
        raise typer.Exit(FAILED)


def _look_ahead(recipe: Recipe, home: Path, progress: Progress, as_json: bool) -> None:
    from dept_fl.outlook import look_ahead, show

    found = look_ahead(recipe, home, progress)
    if as_json:
        typer.echo(found.to_json())
    else:
        show(found)


@app.command(rich_help_panel=PRETRAIN)
def status(
    run_dir: Annotated[Path, typer.Argument(help="folder of the run, as the run printed it")],
    as_json: AsJson = False,
    follow: Annotated[bool, typer.Option("--watch", "-w", help="until the run's end")] = False,
) -> None:
    """Show how a run stands: its round, each silo, the last failures.

    Example: dept status runs/demo-spec-opt-20261121-065532 --watch
    """
    console = Console(highlight=False, markup=False, emoji=False)
    if as_json:
        typer.echo(look(expanded(run_dir)).to_json())
    elif follow and sys.stdout.isatty() and not console.is_dumb_terminal:
        watch(expanded(run_dir), console)
    else:
        console.print(view(look(expanded(run_dir))))


@app.command(rich_help_panel=PRETRAIN)
def stop(
    port: Annotated[
        int, typer.Option(envvar="FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", help="where it listens")
    ] = 39091,
) -> None:
    """End the local SuperLink that a plain `flwr run .` leaves behind, with all it started.

    Example: dept stop
    """
    ended = Progress().during("ending it", lambda: end_superlink(port))
    typer.echo(f"{'ended the' if ended else 'no local'} SuperLink on port {port}")


@app.command(rich_help_panel=COMPARE)
def compare(
    recipe: Annotated[str, typer.Argument(help="recipe file")],
    out: Annotated[Path, typer.Option(help="folder of the results; one with some is gone on with")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="such as rounds=8", autocompletion=complete.settings),
    ] = None,
    arms: Annotated[
        str,
        typer.Option(help="all, or names with commas between", autocompletion=complete.arms),
    ] = "all",
    seeds: Annotated[int, typer.Option(help="how many, from the recipe's on", min=1)] = 1,
    equal: Annotated[
        str, typer.Option(help="what all arms see as much of: tokens, bytes, both")
    ] = "tokens",
    parallel: Annotated[
        int, typer.Option(help="jobs side by side", min=0, show_default="one a core, or GPU")
    ] = 0,
    home: Home = "",
    as_json: AsJson = False,
) -> None:
    """Compare DEPT's variants with their baselines and controls, on the same text and model.

    Example: dept compare conf/handbook.yaml --arms std-1,spec-opt --out results
    """
    made = load_recipe(recipe_path(recipe), as_text(overrides))
    require_silos(made)
    folder = folder_for(out)
    progress = Progress()
    with progress.stage("starting"):
        from dept_fl.arms import chosen_arms
        from dept_fl.compare import Comparison
        from dept_fl.jobs import about, run_jobs
        from dept_fl.standings import markdown, write

    place = home_of(home)
    comparison = Comparison(made, chosen_arms(arms), seeds, folder, place, equal)
    with if_stopped(_GOES_ON):
        title = "making text, tokenizers and tokens ready"
        progress.during(title, lambda: comparison.prepare(progress.watch))
        jobs = progress.during("planning", comparison.jobs)
        results, failures = run_jobs(jobs, folder / "runs", place, parallel, told, progress)
    facts = {"recipe": asdict(made), "arms": {arm.name: arm.words for arm in comparison.arms}}
    rows = write(results, {**about(), **facts}, folder) if results else []
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
    elif rows:
        typer.echo(markdown(rows))
    if rows:
        told(f"tables and plots are in {folder}")
    tell_failures(failures, len(jobs))


@app.command(rich_help_panel=COMPARE)
def adapt(
    bodies: Annotated[
        list[str], typer.Argument(help="folders of runs or of a comparison's jobs, or: random")
    ],
    out: Annotated[Path, typer.Option(help="folder of the results; one with some is gone on with")],
    start: Annotated[
        str, typer.Option(help="of the embeddings: random, trained, copy, mix, matched, stitch")
    ] = "random",
    recipe: Annotated[
        str, typer.Option(help="names the silos", show_default="the first run's")
    ] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="such as shared_vocab_size=8000")
    ] = None,
    sampling: Annotated[str, typer.Option(help="of the silos: uniform, proportional")] = "uniform",
    steps: Annotated[int, typer.Option(min=0, show_default="17 % of the run's")] = 0,
    every: Annotated[
        int, typer.Option(help="steps between evaluations", min=0, show_default="an eighth")
    ] = 0,
    seeds: Annotated[int, typer.Option(help="how many, from the recipe's on", min=1)] = 1,
    own: Annotated[str, typer.Option(help="for stitch: a silo's `final` folder")] = "",
    parallel: Annotated[
        int, typer.Option(help="jobs side by side", min=0, show_default="one a core, or GPU")
    ] = 0,
    home: Home = "",
    as_json: AsJson = False,
) -> None:
    """Pre-train on from a run's body, with other embeddings or on other text: one table.

    Example: dept adapt results/runs/spec-opt-seed-1 random --out adapted
    """
    folder, place = folder_for(out), home_of(home)
    progress = Progress()
    with progress.stage("starting"):
        from dept_fl import adapt as adapting
        from dept_fl.jobs import about, run_jobs

    paths = [b if b == adapting.RANDOM else str(expanded(b).absolute()) for b in bodies]
    own = str(expanded(own).absolute()) if own else ""
    if own and not (Path(own) / "state.json").is_file():
        raise DeptError(f"--own {own}: no model of a silo; name its `final` folder")
    words = as_text(settings)
    plan = adapting.Plan(paths, start.split(","), place, seeds, sampling, own)
    made = plan.recipe(recipe_path(recipe) if recipe else "", words, steps, every)
    with if_stopped(_GOES_ON):
        title = "making text, tokenizers and tokens ready"
        jobs = progress.during(title, lambda: plan.jobs(made, progress.watch))
        results, failures = run_jobs(jobs, folder / "jobs", place, parallel, told, progress)
    rows = adapting.write(results, about(), folder) if results else []
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
    elif rows:
        typer.echo(adapting.markdown(rows))
    if rows:
        told(f"table and plot are in {folder}")
    tell_failures(failures, len(jobs))


@app.command(rich_help_panel=COMPARE)
def cost(
    recipe: Annotated[str, typer.Argument(help="recipe file", show_default=RECIPE)] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="such as variant=trim", autocompletion=complete.settings),
    ] = None,
    vocabulary: Annotated[
        list[str] | None,
        typer.Option(help="NAME=SIZE of a silo's vocabulary, or shared=SIZE; repeatable"),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="the paper's own figures beside ours")
    ] = False,
    measured: Annotated[
        Path | None, typer.Option(help="folder of a run: its measured bytes beside the formula's")
    ] = None,
    home: Home = "",
    as_json: AsJson = False,
) -> None:
    """Count parameters, memory and bytes sent of every method: for a recipe, the paper, a run.

    Example: dept cost conf/demo.yaml model.preset=gpt2-125m
    """
    if (bool(recipe or vocabulary) + paper + (measured is not None)) > 1:
        raise DeptError("give a recipe with --vocabulary, or --paper, or --measured: one of them")
    with Progress().stage("counting"):  # PyTorch takes seconds, and so do the largest models
        from dept_fl import cost_tables as tables

        if paper:
            made = tables.of_paper()
        elif measured:
            made = tables.of_run(expanded(measured))
        else:
            words = as_text(overrides)
            asked = load_recipe(recipe_path(recipe or RECIPE), words)
            made = tables.of_recipe(asked, home_of(home), _sizes(vocabulary or []))
    if as_json:
        typer.echo(made.to_json())
    else:
        Console(width=tables.WIDTH, highlight=False, markup=False).print(made.view)


def _sizes(words: list[str]) -> dict[str, int]:
    """NAME=SIZE, as numbers by name."""
    sizes = {}
    for word in words:
        name, _, size = word.partition("=")
        if not name or not size.isdecimal() or int(size) < 1:
            raise DeptError(f"--vocabulary {word}: expected NAME=SIZE, such as fr=50257")
        sizes[name] = int(size)
    return sizes


@app.command(rich_help_panel=PRETRAIN)
def report(
    run_dir: Annotated[Path, typer.Argument(help="folder of the run, as the run printed it")],
    out: Annotated[
        Path | None, typer.Option(help="file of the page", show_default="RUN_DIR/report.html")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page of what happened in a run; it needs no network, and no script.

    Of a run that goes on it shows how it stands now. Also for a job's folder of `dept compare`.

    Example: dept report runs/demo-spec-opt-20261121-204243 --out demo.html
    """
    with Progress().stage("making the page"):  # PyTorch takes seconds
        from dept_fl.page.render import write_page

        facts, file = write_page(expanded(run_dir), expanded(out) if out else None)
    typer.echo(facts.to_json() if as_json else file)
