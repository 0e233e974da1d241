"""`dept run --dry-run`: what a run would train on, silo by silo, before anything is started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dept_fl.config import Recipe
from dept_fl.errors import DeptError
from dept_fl.model import layout
from dept_fl.progress import Progress
from dept_fl.report import size, table
from dept_fl.silo import Silo, with_shared_tokenizer
from dept_fl.start import check_start
from dept_fl.story import dropped, glimpses
from dept_fl.tokenizer import Tokenizer, load_tokenizer
from dept_fl.workbench import Written, written

_WIDTH = 100
_SAMPLE_CHARACTERS = 400  # of a text that is shown
_COLUMNS = {
    "own": "own tokenizer",
    "global": "global tokenizer",
    "start": "tokenizer of model.start",
}


@dataclass(frozen=True)
class SiloOutlook:
    """What a run would train a silo on.

    Attributes:
        dropped: of its data what was not taken, in words.
        sources: as `Corpus` has them.
        vocabulary: pieces that it holds embeddings of.
        epoch_batches: whole batches in one pass over its training tokens.
        epochs: passes over them that the recipe's steps take; where silos are sampled, as many as
            are to be expected.
        written: its validation text by its `own` tokenizer, and by the `global` one of all silos'
            text, or the `start` one of the open model that the run starts from; where the run
            shares one, by that alone.
        samples: the beginning of some of its documents.
    """

    silo: str
    train_documents: int
    validation_documents: int
    duplicates: int
    near_duplicates: int
    left_out: Mapping[str, int]
    dropped: str
    train_bytes: int
    validation_bytes: int
    sources: Mapping[str, Mapping[str, float]]
    train_tokens: int
    vocabulary: int
    epoch_batches: int
    epochs: float
    written: Mapping[str, Written]
    samples: list[str]

    def as_dict(self) -> dict[str, Any]:
        by_tokenizer = {name: each.as_dict() for name, each in self.written.items()}
        return {**asdict(self), "written": by_tokenizer}


@dataclass(frozen=True)
class Outlook:
    """All silos of a run.

    Attributes:
        not_compared: why silos' own tokenizers are compared with none, if so.
    """

    recipe: Recipe
    home: Path
    silos: list[SiloOutlook]
    not_compared: str = ""

    def to_json(self) -> str:
        recipe = self.recipe
        facts = {
            "name": recipe.name,
            "variant": recipe.label,
            "rounds": recipe.rounds,
            "local_steps": recipe.inner.local_steps,
            "batch_size": recipe.inner.batch_size,
            "sequence_tokens": recipe.sequence_tokens,
            "home": str(self.home),
            "not_compared": self.not_compared,
        }
        silos = {silo.silo: silo.as_dict() for silo in self.silos}
        return json.dumps({**facts, "silos": silos}, ensure_ascii=False)


def look_ahead(recipe: Recipe, home: Path, progress: Progress) -> Outlook:
    """Read the text of all silos, and make their tokenizers and tokens: the run finds them made.

    Raises:
        DeptError: what the run would stumble over, with the mend.
    """
    with progress.stage("looking at the model"):
        layout(recipe.model, recipe.sequence_tokens)
        check_start(recipe)
    for name in recipe.silo_names:
        silo = Silo(name, recipe, home, "", progress.watch)
        progress.during(f"{name}: reading the data", lambda: silo.corpus)  # noqa: B023
    made, common, not_compared = progress.during(
        "making the tokenizer of all silos' text", lambda: _with_common(recipe, home)
    )
    silos = []
    for name in made.silo_names:
        silo = Silo(name, made, home, "", progress.watch)
        with progress.stage(f"{name}: making tokenizer and tokens"):
            silos.append(_of_silo(silo, common))
    return Outlook(recipe, home, silos, not_compared)


def _with_common(recipe: Recipe, home: Path) -> tuple[Recipe, dict[str, Tokenizer], str]:
    """The recipe of the run, and the tokenizer that all silos could share, by what it is.

    Where each has its own, the run does without that one: then it may be none, and why.
    """
    try:
        shared = with_shared_tokenizer(replace(recipe, tokenizer="shared"), home)
        tokenizer = load_tokenizer(shared.shared_tokenizer)
    except DeptError as error:
        if recipe.own_tokenizers:
            return recipe, {}, str(error).removeprefix("silo shared: ")
        raise
    if not recipe.own_tokenizers:
        return shared, {"global": tokenizer}, ""
    return recipe, {"start" if recipe.common_tokenizer else "global": tokenizer}, ""


def _of_silo(silo: Silo, common: Mapping[str, Tokenizer]) -> SiloOutlook:
    recipe, corpus, stream = silo.recipe, silo.corpus, silo.stream
    tokenizers = {"own": silo.tokenizer, **common} if recipe.own_tokenizers else common
    sequences = (len(stream.train) - 1) // recipe.sequence_tokens
    sampled = (recipe.silos_per_round or len(recipe.silo_names)) / len(recipe.silo_names)
    return SiloOutlook(
        silo=silo.name,
        train_documents=corpus.train_documents,
        validation_documents=corpus.validation_documents,
        duplicates=corpus.duplicates,
        near_duplicates=corpus.near_duplicates,
        left_out=corpus.left_out,
        dropped=dropped(corpus),
        train_bytes=corpus.train_bytes,
        validation_bytes=corpus.validation_bytes,
        sources=corpus.sources,
        train_tokens=len(stream.train),
        vocabulary=stream.vocabulary.size,
        epoch_batches=sequences // recipe.inner.batch_size,
        epochs=sampled * recipe.rounds * recipe.round_tokens / len(stream.train),
        written={
            name: written(tokenizer, corpus.texts("validation"))
            for name, tokenizer in tokenizers.items()
        },
        samples=glimpses(corpus, _SAMPLE_CHARACTERS),
    )


# ---- what people see -----------------------------------------------------------------------


def show(found: Outlook) -> None:
    recipe, inner = found.recipe, found.recipe.inner
    console = Console(width=_WIDTH, highlight=False, markup=False, emoji=False)
    console.print(
        f"{recipe.name}: {recipe.label}, {recipe.rounds} rounds of {inner.local_steps} steps of "
        f"{inner.batch_size} x {recipe.sequence_tokens} tokens"
    )
    head = ("silo", "documents", "train text", "tokens", "batches/epoch", "epochs", "validation")
    rows = [
        [
            silo.silo,
            f"{silo.train_documents:,}",
            size(silo.train_bytes),
            f"{silo.train_tokens:,}",
            f"{silo.epoch_batches:,}",
            f"{silo.epochs:.2f}",
            size(silo.validation_bytes),
        ]
        for silo in found.silos
    ]
    console.print(table(head, rows))
    for silo in found.silos:
        console.print(f"  {silo.silo}: {silo.dropped}")
    console.print()
    console.print(_bytes_per_token(found.silos))
    if found.not_compared:
        why = f"not compared with a tokenizer for all silos: {found.not_compared}"
        console.print(why, soft_wrap=True)
    for silo in found.silos:
        if silo.sources:
            console.print(_sources(silo))
        console.print(f"text of {silo.silo}, here and there:")
        for text in silo.samples:
            console.print(f"  | {text}", no_wrap=True, overflow="ellipsis", crop=True)
    console.print(f"\nall of it is in {found.home}, where the run will find it", soft_wrap=True)


def _bytes_per_token(silos: list[SiloOutlook]) -> Any:
    names = list(silos[0].written)
    rows = [
        [silo.silo, f"{silo.vocabulary:,}"]
        + [f"{silo.written[name].bytes_per_token:.3f}" for name in names]
        for silo in silos
    ]
    head = ["silo", "vocabulary", *(_COLUMNS[name] for name in names)]
    return table(head, rows, "bytes per token of validation text")


def _sources(silo: SiloOutlook) -> Any:
    rows = [
        [
            name,
            f"{own['documents']:,}",
            size(int(own["bytes"])),
            f"{own['passes']:.2f}",
            f"{own['bytes'] * own['passes'] / silo.train_bytes:.1%}",
            size(int(own["validation_bytes"])),
        ]
        for name, own in silo.sources.items()
    ]
    head = ("source", "documents", "text", "times", "share", "validation")
    return table(head, rows, f"sources of {silo.silo}")
