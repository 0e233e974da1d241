"""Commands about models: `dept export`, `generate`, `evaluate`, `finetune`."""

from __future__ import annotations

import json
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dept_fl.cli import complete
from dept_fl.cli.common import (
    USE,
    AsJson,
    Column,
    Home,
    ReadSettings,
    expanded,
    expanded_name,
    folder_for,
    home_of,
    require_utf8,
)
from dept_fl.errors import DeptError
from dept_fl.progress import Progress
from dept_fl.report import harmless

app = typer.Typer()


class Which(StrEnum):
    """Of the models of a run."""

    last = "last"
    best = "best"


@app.command(rich_help_panel=USE)
def export(
    out: Annotated[Path, typer.Option(help="new folder for the model")],
    run_dir: Annotated[
        Path | None, typer.Argument(help="folder of a run, or of a job of `dept adapt`")
    ] = None,
    silo: Annotated[
        str, typer.Option(help="whose model, such as fr", autocompletion=complete.silos)
    ] = "",
    shared: Annotated[
        bool, typer.Option("--global", help="the server's model, of GLOB or TRIM")
    ] = False,
    silo_file: Annotated[
        Path | None, typer.Option(help="a partner's own fr.yaml, instead of a run")
    ] = None,
    experiment: Annotated[
        str, typer.Option(help="of a partner's models", show_default="the newest")
    ] = "",
    which: Annotated[
        Which, typer.Option("--round", help="the last, or the best that was evaluated")
    ] = Which.last,
    home: Home = "",
    as_json: AsJson = False,
) -> None:
    """Write a model of a run as an ordinary Hugging Face folder, with tokenizer and model card.

    Example: dept export runs/demo-spec-opt-20261121-065532 --silo fr --out model
    """
    if (bool(silo), shared, silo_file is not None).count(True) != 1 or (
        (run_dir is None) == (silo_file is None)
    ):
        raise DeptError("give RUN_DIR with --silo NAME or --global, or --silo-file FILE alone")
    if experiment and silo_file is None:
        raise DeptError("--experiment: goes with --silo-file; a run has but one")
    target, progress, best = folder_for(out), Progress(), which is Which.best
    with progress.stage("starting"):
        from dept_fl import export as exporting
        from dept_fl.silo_file import load_silo_file

    def subject() -> exporting.Subject:
        if silo_file is not None:
            file = load_silo_file(expanded(silo_file).absolute())
            return exporting.silo_at_home(file, experiment, best)
        assert run_dir is not None
        folder, place = expanded(run_dir).absolute(), home_of(home)
        if shared:
            return exporting.global_model(folder, place, best)
        return exporting.silo_of_run(folder, silo, place, best)

    found = progress.during("loading the model", subject)
    made = progress.during("writing the folder", lambda: exporting.export(found, target))
    typer.echo(made.to_json() if as_json else "\n".join(made.lines()))


@app.command(rich_help_panel=USE)
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
    as_json: AsJson = False,
) -> None:
    """Let a model go on with a text, until it ends the document.

    Example: dept generate python-model --prompt 'def main(' --tokens 40
    """
    require_utf8(prompt, "--prompt")
    progress = Progress()
    with progress.stage("starting"):  # PyTorch takes seconds
        from dept_fl.evaluate import write_on
        from dept_fl.pretrained import Encoder, load_pretrained

    model = progress.during("loading the model", lambda: load_pretrained(expanded(folder)))
    encoder = Encoder(model.tokenizer, model.vocabulary)
    start = [encoder.end, *encoder([prompt])[0]]
    window, tell = model.sequence_tokens, partial(progress.at, unit="tokens")
    work = partial(write_on, model.model, start, tokens, window, seed, tell=tell)
    written = progress.during("writing", lambda: work(temperature, top_k, encoder.end))
    text = model.tokenizer.decode([int(model.vocabulary.ids[i]) for i in written])
    if as_json:
        facts = {"prompt": prompt, "text": text, "tokens": len(written), "seed": seed}
        typer.echo(json.dumps(facts))
    else:
        typer.echo(harmless(prompt + text))


@app.command(rich_help_panel=USE)
def evaluate(
    folder: Annotated[
        Path, typer.Argument(help="an exported folder, or a silo's SILO/state/EXPERIMENT/final")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="files, folder or quoted pattern, as for a silo; repeatable",
            metavar="FILES",
            show_default="the silo's own validation text",
        ),
    ] = None,
    column: Column = "text",
    settings: ReadSettings = None,
    window: Annotated[
        int, typer.Option(help="tokens that it sees at once", min=0, show_default="the model's")
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Say how well a model predicts text: bits per byte, perplexity, unigram floor.

    Example: dept evaluate model --data letters.txt
    """
    progress = Progress()
    with progress.stage("starting"):  # PyTorch takes seconds
        from dept_fl.assess import Question, assess

    question = Question(expanded(folder), data or [], column, settings or [], window, device)
    found = assess(question, progress)
    typer.echo(found.to_json() if as_json else "\n".join(found.lines()))


@app.command(rich_help_panel=USE)
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
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on RACE, MNLI, STS-B or SST-2: accuracy, or Pearson's r for STS-B.

    Example: dept finetune silos/prose/state/c91962f035dd/final --task sst2
    """
    target, progress = folder_for(out) if out else None, Progress()
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
    data = expanded_name(data)
    result = tuning.finetune(expanded(folder), task, data, settings, seeds, progress)
    if as_json:
        typer.echo(result.to_json())
    else:
        console = Console(width=100, highlight=False, markup=False, emoji=False)
        console.print(tuning.rendered(result))
    if target:
        typer.echo(f"result  {tuning.keep(result, target)}", err=as_json)
