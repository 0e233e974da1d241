"""The `dept` command."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dept_fl.config import home_dir, load_recipe, require_silos
from dept_fl.errors import DeptError
from dept_fl.local import COMPLETED, end_superlink, simulate
from dept_fl.progress import Progress
from dept_fl.report import harmless
from dept_fl.status import look, view, watch

_RECIPE = "conf/demo.yaml"

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
    recipe: Annotated[str, typer.Argument(help="recipe file")] = _RECIPE,
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
        path, words = _recipe_path(recipe), _as_text(overrides)
        made = load_recipe(path, words)  # every mistake shows before any process starts
        require_silos(made)
        layout(made.model, made.sequence_tokens)
        config = {
            "recipe": path,
            "overrides": words,
            "home": str(_home(home)),
            "run-dir": str(Path(run_dir).expanduser().absolute()) if run_dir else "",
            "resume": resume,
        }
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGHUP, _interrupt)
        status = simulate(config, nodes, cpus, len(made.silo_names), made.processes)
    except KeyboardInterrupt:
        typer.echo("stopped; go on with --resume and the same --run-dir", err=True)
        raise typer.Exit(130) from None
    if status != COMPLETED:
        typer.echo(f"error: the run ended as {status}", err=True)
        raise typer.Exit(1)


def _home(home: str) -> Path:
    return home_dir(str(Path(home).expanduser().absolute()) if home else "")


def _as_text(overrides: list[str] | None) -> str:
    """Overrides as `load_recipe` takes them, whatever is in them."""
    return " ".join(map(shlex.quote, overrides or []))


def _recipe_path(recipe: str) -> str:
    """Absolute if the file is here; else as given, to be looked up beside conf/."""
    path = Path(recipe).expanduser()
    return str(path.resolve()) if path.is_file() else recipe


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt  # so that SIGTERM and a closed terminal end the SuperLink too


@app.command()
@_mistakes_told()
def compare(
    recipe: Annotated[str, typer.Argument(help="recipe file")],
    out: Annotated[Path, typer.Option(help="folder of the results; one with some is gone on with")],
    overrides: Annotated[list[str] | None, typer.Argument(help="such as rounds=8")] = None,
    arms: Annotated[str, typer.Option(help="all, or names with commas between")] = "all",
    seeds: Annotated[int, typer.Option(help="how many, from the recipe's on", min=1)] = 1,
    equal: Annotated[
        str, typer.Option(help="what all arms see as much of: tokens, bytes, both")
    ] = "tokens",
    parallel: Annotated[
        int, typer.Option(help="jobs side by side", min=0, show_default="one a core, or GPU")
    ] = 0,
    home: Annotated[str, typer.Option(help="default: $DEPT_HOME, else ~/.dept-fl")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Compare DEPT's variants with their baselines and controls, on the same text and model.

    Example: dept compare conf/handbook.yaml --arms std-1,alone,spec-opt --seeds 3 --out results
    """
    made = load_recipe(_recipe_path(recipe), _as_text(overrides))
    require_silos(made)
    signal.signal(signal.SIGTERM, _interrupt)
    progress = Progress()
    with progress.stage("starting"):
        from dept_fl.arms import chosen_arms
        from dept_fl.compare import Comparison
        from dept_fl.jobs import about, run_jobs
        from dept_fl.standings import markdown, write

    folder = out.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    place = _home(home)
    comparison = Comparison(made, chosen_arms(arms), seeds, folder, place, equal)
    progress.during("making text, tokenizers and tokens ready", comparison.prepare)
    with _interrupt_told():
        jobs = progress.during("planning", comparison.jobs)
        results, failures = run_jobs(jobs, folder / "runs", place, parallel, _told)
    facts = {"recipe": asdict(made), "arms": {arm.name: arm.words for arm in comparison.arms}}
    if results:
        rows = write(results, {**about(), **facts}, folder)
        typer.echo(json.dumps([asdict(row) for row in rows]) if as_json else markdown(rows))
        _told(f"tables and plots are in {folder}")
    _tell_failures(failures, len(jobs))


@app.command()
@_mistakes_told()
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
        list[str] | None, typer.Option("--set", help="such as only=[el] or shared_vocab_size=8000")
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
    home: Annotated[str, typer.Option(help="default: $DEPT_HOME, else ~/.dept-fl")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Pre-train on from a run's body, with other embeddings or on other text: one table.

    Example: dept adapt results/runs/spec-opt-seed-1 random --set only=[es] --out adapted
    """
    signal.signal(signal.SIGTERM, _interrupt)
    progress = Progress()
    with progress.stage("starting"):
        from dept_fl import adapt as adapting
        from dept_fl.jobs import about, run_jobs

    folder = out.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    place = _home(home)
    paths = [b if b == adapting.RANDOM else str(Path(b).expanduser().absolute()) for b in bodies]
    words = _as_text(settings)
    plan = adapting.Plan(paths, start.split(","), place, seeds, sampling, own)
    made = plan.recipe(_recipe_path(recipe) if recipe else "", words, steps, every)
    title = "making text, tokenizers and tokens ready"
    jobs = progress.during(title, lambda: plan.jobs(made))
    with _interrupt_told():
        results, failures = run_jobs(jobs, folder / "jobs", place, parallel, _told)
    if results:
        rows = adapting.write(results, about(), folder)
        text = json.dumps([asdict(row) for row in rows]) if as_json else adapting.markdown(rows)
        typer.echo(text)
        _told(f"table and plot are in {folder}")
    _tell_failures(failures, len(jobs))


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


@app.command()
@_mistakes_told()
def cost(
    recipe: Annotated[str, typer.Argument(help="recipe file", show_default=_RECIPE)] = "",
    overrides: Annotated[list[str] | None, typer.Argument(help="such as variant=trim")] = None,
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
    home: Annotated[str, typer.Option(help="default: $DEPT_HOME, else ~/.dept-fl")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON value")] = False,
) -> None:
    """Count parameters, memory and bytes sent of every method: for a recipe, the paper, a run.

    Example: dept cost conf/demo.yaml model.preset=gpt2-125m --vocabulary python=50257
    """
    if (bool(recipe or vocabulary) + paper + (measured is not None)) > 1:
        raise DeptError("give a recipe with --vocabulary, or --paper, or --measured: one of them")
    with Progress().stage("counting"):  # PyTorch takes seconds, and so do the largest models
        from dept_fl import cost_tables as tables

        if paper:
            made = tables.of_paper()
        elif measured:
            made = tables.of_run(measured.expanduser())
        else:
            words = _as_text(overrides)
            asked = load_recipe(_recipe_path(recipe or _RECIPE), words)
            made = tables.of_recipe(asked, _home(home), _sizes(vocabulary or []))
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


@app.command()
@_mistakes_told()
def finetune(
    folder: Annotated[
        Path, typer.Argument(help="a silo's SILO/state/EXPERIMENT/final, or a Hugging Face folder")
    ],
    task: Annotated[str, typer.Option(help="race, mnli, stsb or sst2")],
    data: Annotated[
        str, typer.Option(help="hub data set or folder of this form", show_default="the task's own")
    ] = "",
    seeds: Annotated[int, typer.Option(help="how often, each with its own seed", min=1)] = 3,
    learning_rate: Annotated[float, typer.Option(help="the highest, of AdamW")] = 2e-5,
    epochs: Annotated[int, typer.Option(help="0 evaluates an untrained head", min=0)] = 3,
    batch_size: Annotated[int, typer.Option(help="examples in one step", min=1)] = 32,
    micro_batch_size: Annotated[
        int, typer.Option(help="in one pass; fewer take less memory", min=0, show_default="all")
    ] = 0,
    max_tokens: Annotated[
        int, typer.Option(help="longer texts are cut", min=0, show_default="the model's")
    ] = 0,
    train_examples: Annotated[
        int, typer.Option(help="a random part of them", min=0, show_default="all")
    ] = 0,
    control: Annotated[
        str, typer.Option(help="random: fresh body under the embeddings; scratch: all fresh")
    ] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    out: Annotated[Path | None, typer.Option(help="folder for the result as TASK.json")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Fine-tune a model on RACE, MNLI, STS-B or SST-2: accuracy, or Pearson's r for STS-B.

    Example: dept finetune silos/prose/state/c91962f035dd/final --task sst2
    """
    progress = Progress()
    with progress.stage("starting"):  # PyTorch takes seconds
        from dept_fl import finetune as tuning

    settings = tuning.Settings(
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        max_tokens=max_tokens,
        train_examples=train_examples,
        control=control,
        device=device,
    )
    result = tuning.finetune(folder.expanduser(), task, data, settings, seeds, progress)
    if as_json:
        typer.echo(result.to_json())
    else:
        console = Console(width=100, highlight=False, markup=False, emoji=False)
        console.print(tuning.rendered(result))
    if out:
        typer.echo(f"result  {tuning.keep(result, out.expanduser())}", err=as_json)


@app.command()
@_mistakes_told()
def export(
    out: Annotated[Path, typer.Option(help="new folder for the model")],
    run_dir: Annotated[
        Path | None, typer.Argument(help="folder of a run, or of a job of `dept adapt`")
    ] = None,
    silo: Annotated[str, typer.Option(help="whose model, such as fr")] = "",
    shared: Annotated[
        bool, typer.Option("--global", help="the server's model, of GLOB or TRIM")
    ] = False,
    silo_file: Annotated[
        Path | None, typer.Option(help="a partner's own fr.yaml, instead of a run")
    ] = None,
    experiment: Annotated[
        str, typer.Option(help="of a partner's models", show_default="the newest")
    ] = "",
    home: Annotated[str, typer.Option(help="default: $DEPT_HOME, else ~/.dept-fl")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Write a final model as an ordinary Hugging Face folder, with tokenizer and model card.

    Example: dept export runs/demo-spec-opt-20261121-065532 --silo python --out python-model
    """
    if (bool(silo), shared, silo_file is not None).count(True) != 1 or (
        (run_dir is None) == (silo_file is None)
    ):
        raise DeptError("give RUN_DIR with --silo NAME or --global, or --silo-file FILE alone")
    if experiment and silo_file is None:
        raise DeptError("--experiment: goes with --silo-file; a run has but one")
    progress = Progress()
    with progress.stage("starting"):
        from dept_fl import export as exporting
        from dept_fl.silo_file import load_silo_file

    def subject() -> exporting.Subject:
        if silo_file is not None:
            file = load_silo_file(silo_file.expanduser().absolute())
            return exporting.silo_at_home(file, experiment)
        assert run_dir is not None
        folder, place = run_dir.expanduser().absolute(), _home(home)
        if shared:
            return exporting.global_model(folder, place)
        return exporting.silo_of_run(folder, silo, place)

    found = progress.during("loading the model", subject)
    target = out.expanduser().absolute()
    made = progress.during("writing the folder", lambda: exporting.export(found, target))
    typer.echo(made.to_json() if as_json else "\n".join(made.lines()))


@app.command()
@_mistakes_told()
def generate(
    folder: Annotated[
        Path, typer.Argument(help="an exported folder, or a silo's SILO/state/EXPERIMENT/final")
    ],
    prompt: Annotated[str, typer.Option(help="how the document begins")] = "",
    tokens: Annotated[int, typer.Option(help="at most so many more", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0: the likeliest each time", min=0.0)] = 0.8,
    top_k: Annotated[
        int, typer.Option(help="draw among so many likeliest", min=0, show_default="all")
    ] = 0,
    seed: Annotated[int, typer.Option(help="the same seed, the same text", min=0)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Let a model go on with a text, until it ends the document.

    Example: dept generate python-model --prompt 'def main(' --tokens 40
    """
    progress = Progress()
    with progress.stage("starting"):  # PyTorch takes seconds
        from dept_fl.evaluate import write_on
        from dept_fl.pretrained import Encoder, load_pretrained

    model = progress.during("loading the model", lambda: load_pretrained(folder.expanduser()))
    encoder = Encoder(model.tokenizer, model.vocabulary)
    start = [encoder.end, *encoder([prompt])[0]]
    work = partial(write_on, model.model, start, tokens, model.sequence_tokens, seed)
    written = progress.during("writing", lambda: work(temperature, top_k, encoder.end))
    text = model.tokenizer.decode([int(model.vocabulary.ids[i]) for i in written])
    if as_json:
        facts = {"prompt": prompt, "text": text, "tokens": len(written), "seed": seed}
        typer.echo(json.dumps(facts))
    else:
        typer.echo(harmless(prompt + text))


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


@silo.command("split")
@_mistakes_told()
def silo_split(
    files: Annotated[
        list[str], typer.Argument(help="one corpus: .txt, .jsonl, .parquet, compressed too")
    ],
    silos: Annotated[int, typer.Option(help="how many to make of it")],
    out: Annotated[Path, typer.Option(help="new folder for them and their recipe")] = Path("split"),
    column: Annotated[str, typer.Option(help="that holds the text")] = "text",
    labels: Annotated[
        str, typer.Option(help="column that names a document's true source, to compare with")
    ] = "",
    seed: Annotated[int, typer.Option(help="of the clustering", min=0)] = 1,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="sample_by, encoding, max_bytes: KEY=VALUE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Make silos of a corpus whose sources nobody noted: cluster its documents.

    Example: dept silo split corpus.jsonl --silos 8 --out parts && dept run parts/silos.yaml
    """
    progress = Progress()
    with progress.stage("starting"):  # scikit-learn takes seconds
        from dept_fl.clusters import Request, show, split_files

    out = out.expanduser()
    request = Request(files, out, silos, seed, column, labels, settings or [])
    found = split_files(request, progress)
    if as_json:
        typer.echo(found.to_json())
    else:
        show(found)


def _told(line: str) -> None:
    typer.echo(line, err=True)


@contextmanager
def _interrupt_told() -> Iterator[None]:
    """Ctrl-C in the midst of jobs costs one line and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        _told("stopped; the same command goes on where it was")
        raise typer.Exit(130) from None


def _tell_failures(failures: list[str], jobs: int) -> None:
    """Name the jobs that failed, and exit with 1 if any did."""
    if failures:
        _told("\n".join([f"error: {len(failures)} of {jobs} jobs failed:", *failures]))
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
