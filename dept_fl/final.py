"""What a silo keeps at a run's end: the final body beside its own embeddings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dept_fl.checkpoint import Tensors, load_state, under_prefix
from dept_fl.config import recipe_from_json
from dept_fl.errors import DeptError
from dept_fl.silo import Silo


@dataclass(frozen=True)
class Final:
    """A silo at the end of a run, whose recipe is `silo.recipe`.

    Attributes:
        folder: where it was read.
        home: of the silo's text and tokenizer.
        meta: the facts that `Silo.finish` wrote.
    """

    folder: Path
    home: Path
    silo: Silo
    body: Tensors
    embeddings: Tensors
    meta: dict[str, Any]


def open_final(folder: Path, home: Path | None = None) -> Final:
    """What `Silo.finish` kept, whether or not the silo's text is still there.

    Args:
        folder: <home>/silos/<silo>/state/<experiment>/final, or a copy of it elsewhere.
        home: of the silo's text and tokenizer; None for the one that `folder` lies in.

    Raises:
        DeptError: the folder is missing or damaged, is no final one, or lies in no home.
    """
    folder = folder.expanduser().absolute()
    tensors, meta = load_state(folder)
    if not {"silo", "tokenizer", "text", "recipe"} <= meta.keys():
        raise DeptError(
            f"{folder}: not the final state of a silo; give SILO/state/EXPERIMENT/final"
        )
    recipe, home = recipe_from_json(json.dumps(meta["recipe"])), home or home_of(folder)
    silo = Silo(str(meta["silo"]), recipe, home, folder.parent.name)
    body, embeddings = (under_prefix(part, tensors) for part in ("body", "embeddings"))
    return Final(folder, home, silo, body, embeddings, meta)


def read_final(folder: Path, home: Path | None = None) -> Final:
    """As `open_final`, with the silo as it was in the run.

    Raises:
        DeptError: the silo's text or tokenizer is not that of the run any more.
    """
    final = open_final(folder, home)
    silo = final.silo
    for key, now in (("tokenizer", silo.tokenizer.fingerprint), ("text", silo.corpus.digest)):
        if final.meta[key] != now:
            raise DeptError(
                f"{final.folder}: silo {silo.name} has {key}={now!r} now, it was "
                f"{final.meta[key]!r} in the run; put the old {key} back"
            )
    return final


def home_of(folder: Path) -> Path:
    """The home that a silo's final folder lies in; raise DeptError if it lies in none."""
    above = folder.parents
    if len(above) < 5 or (above[1].name, above[3].name) != ("state", "silos"):
        raise DeptError(
            f"{folder}: in no home; name <home>/silos/<silo>/state/<experiment>/final itself: a "
            "copy lacks the silo's tokenizer"
        )
    return above[4]


def common_body(finals: Sequence[Final]) -> Tensors:
    """The one body of these silos.

    Raises:
        DeptError: they have not the same.
    """
    first = finals[0]
    for other in finals[1:]:
        if other.body.keys() != first.body.keys() or not all(
            torch.equal(tensor, first.body[name]) for name, tensor in other.body.items()
        ):
            raise DeptError(
                f"silos {first.silo.name} and {other.silo.name} have different bodies; name the "
                "final folders of one run"
            )
    return first.body
