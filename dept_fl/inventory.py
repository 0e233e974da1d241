"""What lies in a home: its silos with their text, tokens and experiments, found without PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from dept_fl.checkpoint import load_meta, round_folder, rounds_on_disk
from dept_fl.config import Recipe, SiloConfig
from dept_fl.errors import DeptError
from dept_fl.report import harmless, size, table
from dept_fl.sources import source_key


@dataclass(frozen=True)
class TextOnDisk:
    """A silo's cleaned text, for training and validation together."""

    documents: int
    duplicates: int
    bytes: int


@dataclass(frozen=True)
class Stream:
    """A token stream.

    Attributes:
        tokenizer: the beginning of its fingerprint.
        tokens: of the training split.
        vocabulary: ids that it may hold: all of the tokenizer's, or V_k.
    """

    tokenizer: str
    tokens: int
    vocabulary: int


@dataclass(frozen=True)
class Experiment:
    """What a silo keeps of one experiment.

    Attributes:
        rounds: whose state is whole, oldest first; none once it is tidied up.
        final: whether its final model is there.
        bits_per_byte: of the final model.
    """

    experiment: str
    variant: str
    rounds: list[int]
    final: bool
    bits_per_byte: float | None
    bytes: int


@dataclass(frozen=True)
class OnDisk:
    """A silo.

    Attributes:
        source: of its text, as the recipe, or else its newest final model, tells.
        text: None where it is not read yet.
        streams: of this text, newest first.
        bytes: on disk, of text, tokens and state.
    """

    silo: str
    source: str
    text: TextOnDisk | None
    streams: list[Stream]
    experiments: list[Experiment]
    bytes: int


@dataclass(frozen=True)
class Inventory:
    """The silos of a home, or those of a recipe in it."""

    home: Path
    silos: list[OnDisk]

    def to_json(self) -> str:
        facts = {"home": str(self.home), "silos": [asdict(silo) for silo in self.silos]}
        return json.dumps(facts, ensure_ascii=False)

    def view(self) -> RenderableType:
        """For a terminal."""
        head = ("silo", "documents", "text", "tokens", "vocabulary", "on disk")
        parts: list[RenderableType] = [table(head, map(_row, self.silos))]
        parts += [_source_line(silo) for silo in self.silos if silo.source]
        kept = [_kept(silo, each) for silo in self.silos for each in silo.experiments]
        if kept:
            head = ("silo", "experiment", "variant", "rounds", "final bits/byte", "on disk")
            parts += ["", table(head, kept)]
        return Group(Text(f"home {self.home}"), *parts)


def inventory(home: Path, recipe: Recipe | None) -> Inventory:
    """What is there of the recipe's silos, or of all that the home has."""
    if recipe:
        sources = {name: recipe.silos[name] for name in recipe.silo_names}
        silos = [_on_disk(home, name, source, recipe) for name, source in sources.items()]
    else:
        names = sorted(each.name for each in (home / "silos").glob("[!.]*/"))
        silos = [_on_disk(home, name, None, None) for name in names]
    return Inventory(home, silos)


def _on_disk(home: Path, name: str, source: SiloConfig | None, recipe: Recipe | None) -> OnDisk:
    folder = home / "silos" / name
    key = source_key(source, recipe) if source and recipe else "*"
    corpus = _corpus(folder, key)
    return OnDisk(
        silo=name,
        source=_words(asdict(source)) if source else _source_of_newest(folder, name),
        text=_text(corpus) if corpus else None,
        streams=list(_streams(folder, corpus["digest"])) if corpus else [],
        experiments=[_experiment(each) for each in sorted(folder.glob("state/[!.]*/"))],
        bytes=_bytes(folder),
    )


def _corpus(folder: Path, key: str) -> dict[str, Any] | None:
    """The facts of the text that this source gave, or with `*` of the newest."""
    files = _newest_first(folder.glob(f"text/{key}/corpus.json"))
    return json.loads(files[0].read_text(encoding="utf-8")) if files else None


def _text(corpus: dict[str, Any]) -> TextOnDisk:
    documents, text_bytes = (
        corpus[f"train_{what}"] + corpus[f"validation_{what}"] for what in ("documents", "bytes")
    )
    return TextOnDisk(documents, corpus["duplicates"], text_bytes)


def _streams(folder: Path, digest: str) -> Iterator[Stream]:
    for each in _newest_first(folder.glob(f"tokens/{digest[:16]}-*")):
        arrays = [each / f"{part}.npy" for part in ("train", "vocabulary")]
        with suppress(OSError, ValueError):  # just being removed, or not whole
            tokens, ids = (len(np.load(file, "r", allow_pickle=False)) for file in arrays)
            yield Stream(each.name.split("-")[1], tokens, ids)


def _experiment(folder: Path) -> Experiment:
    rounds = rounds_on_disk(folder)
    final = _meta(folder / "final")
    newest = final or (_meta(round_folder(folder, rounds[-1])) if rounds else {})
    return Experiment(
        experiment=folder.name,
        variant=str(newest.get("variant", "")),
        rounds=rounds,
        final=bool(final),
        bits_per_byte=final.get("metrics", {}).get("bits_per_byte"),
        bytes=_bytes(folder),
    )


def _meta(folder: Path) -> dict[str, Any]:
    """The facts of a saved state; none where it is missing or damaged."""
    try:
        return load_meta(folder)
    except (DeptError, OSError, ValueError):
        return {}


def _source_of_newest(folder: Path, name: str) -> str:
    for file in _newest_first(folder.glob("state/*/final/state.json")):
        silos = _meta(file.parent).get("recipe", {}).get("silos", {})
        return _words(silos.get(name, {}))
    return ""


def _words(source: dict[str, Any]) -> str:
    """Where documents come from, in a line; of several sources each with its name."""
    if parts := source.get("sources"):
        return "; ".join(f"{name}: {_words(part)}" for name, part in sorted(parts.items()))
    for kind in ("files", "hub", "packages"):
        if value := source.get(kind):
            return f"{kind} {value if isinstance(value, str) else ', '.join(value)}"
    return ""


def _newest_first(paths: Iterator[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a run is at work there
            total += path.stat().st_size if path.is_file() else 0
    return total


# ---- for a terminal --------------------------------------------------------------------------


def _row(silo: OnDisk) -> list[str]:
    stream = silo.streams[0] if silo.streams else None  # the newest
    return [
        silo.silo,
        f"{silo.text.documents:,}" if silo.text else "-",
        size(silo.text.bytes) if silo.text else "-",
        f"{stream.tokens:,}" if stream else "-",
        f"{stream.vocabulary:,}" if stream else "-",
        size(silo.bytes),
    ]


def _source_line(silo: OnDisk) -> Text:
    """One line, cut where the terminal ends."""
    return Text(f"  {silo.silo}: {harmless(silo.source)}", no_wrap=True, overflow="ellipsis")


def _kept(silo: OnDisk, kept: Experiment) -> list[str]:
    first_and_last = dict.fromkeys([*kept.rounds[:1], *kept.rounds[-1:]])
    bits = "yes" if kept.bits_per_byte is None else f"{kept.bits_per_byte:.3f}"
    return [
        silo.silo,
        kept.experiment,
        kept.variant or "-",
        "-".join(map(str, first_and_last)) or "-",
        bits if kept.final else "-",
        size(kept.bytes),
    ]
