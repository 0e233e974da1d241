"""DEPT's algorithm (paper, Algorithm 1) in plain Python: no Flower, no messages.

`pretrain` below is the whole of it. The Flower strategy takes the same steps with messages
between them, and a test shows that both give the same tensors.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from dept_fl.checkpoint import (
    Tensors,
    drop_rounds_before,
    load_state,
    round_folder,
    rounds_on_disk,
    save_state,
    under_prefix,
    with_prefix,
)
from dept_fl.config import FREE_ON_RESUME, Recipe, differences, recipe_from_json
from dept_fl.errors import BadUpdate, ConfigError, DeptError
from dept_fl.model import Layout, initial_body, initial_embeddings, layout, seed_of
from dept_fl.outer import MeanDelta, OuterOptimizer
from dept_fl.silo import Registration, Task, Update
from dept_fl.variants import variant

_CHECKPOINTS_KEPT = 2


class TrainsRounds(Protocol):
    """A silo, or whatever stands for one."""

    def train(self, task: Task) -> Update: ...


def pretrain(server: Server, silos: Mapping[str, TrainsRounds]) -> None:
    """Train all rounds that are left.

    for t = 1..T: a random subset of the silos trains N_local steps each; the outer optimiser
    steps along the mean of their deltas.
    """
    while server.round < server.recipe.rounds:
        merge = server.open_round()
        for name in merge.sampled:
            server.add(merge, silos[name].train(server.task(name)))
        server.close_round(merge)


@dataclass
class Merge:
    """A round in the making: the running mean of what the silos sent so far."""

    round: int
    sampled: list[str]
    body: MeanDelta
    embeddings: MeanDelta
    merged: list[str] = field(default_factory=list)


class Server:
    """The server's state: theta (and phi, psi in GLOB and TRIM), outer optimiser, round.

    Attributes:
        round: whole rounds done.
        experiment: id of the run, under which silos keep its state.
        history: for each silo the rounds in which its update was merged.
    """

    def __init__(
        self, recipe: Recipe, registrations: Mapping[str, Registration], experiment: str
    ) -> None:
        self.recipe = recipe
        self.experiment = experiment
        self.registrations = dict(registrations)
        self.round = 0
        self.history: dict[str, list[int]] = {name: [] for name in recipe.silo_names}
        self.layout: Layout = layout(recipe.model, recipe.sequence_tokens)
        self._variant = variant(recipe.variant)
        self._check_registrations()
        body = initial_body(recipe.model, recipe.sequence_tokens, self.layout, recipe.seed)
        tokens = self.layout.tokens if self._variant.embeddings_travel else {}
        self._outer = OuterOptimizer(recipe.outer, {**body, **self._embeddings()}, tokens)

    # ---- the algorithm ---------------------------------------------------------------------

    @property
    def body(self) -> Tensors:
        """theta, sharing the optimiser's memory."""
        return {name: self._outer.parameters[name].data for name in self.layout.body}

    @property
    def embeddings(self) -> Tensors:
        """phi and psi in GLOB and TRIM, nothing in SPEC."""
        own = self._outer.parameters
        return {name: p.data for name, p in own.items() if name not in self.layout.body}

    def sample(self, round_: int) -> list[str]:
        """S_t: a subset that depends on the seed, the round and the silos' names alone."""
        names = self.recipe.silo_names
        count = self.recipe.silos_per_round or len(names)
        generator = random.Random(seed_of(self.recipe.seed, "sampled silos", round_))
        return sorted(generator.sample(names, count))

    def task(self, silo: str) -> Task:
        """What `silo` gets in the round after this one, or for the final evaluation."""
        rows = self.registrations[silo].rows
        oldest = max(0, self.round - _CHECKPOINTS_KEPT + 1)
        return Task(
            silo=silo,
            round=self.round + 1,
            start_round=self._last_merged(silo, self.round),
            keep_from=self._last_merged(silo, oldest),
            body=self.body,
            embeddings=self._variant.start(self.embeddings, self.layout, rows),
        )

    def open_round(self) -> Merge:
        shapes = {name: tuple(t.shape) for name, t in self.embeddings.items()}
        tokens = self.layout.tokens if shapes else {}
        return Merge(
            round=self.round + 1,
            sampled=self.sample(self.round + 1),
            body=MeanDelta(self.layout.body, ()),
            embeddings=MeanDelta(shapes, tokens),
        )

    def add(self, merge: Merge, update: Update) -> None:
        """Check one silo's update as a whole, then add it.

        Raises:
            BadUpdate: the update may not be merged; nothing of it was.
        """
        self.check(merge, update)
        merge.body.add(update.body)
        rows = self.registrations[update.silo].rows
        self._variant.merge(merge.embeddings, update.embeddings, rows)
        merge.merged.append(update.silo)

    def check(self, merge: Merge, update: Update) -> None:
        """Raise BadUpdate for an update of another round or silo, or of unusable tensors."""
        if update.round != merge.round:
            raise BadUpdate(f"is of round {update.round}, expected {merge.round}")
        if update.silo not in merge.sampled:
            raise BadUpdate(f"comes from silo {update.silo!r}, which was not sampled")
        if update.silo in merge.merged:
            raise BadUpdate("is a second one in the same round")
        largest = self.recipe.largest_delta
        _check_tensors("body", update.body, self.layout.body, self.body, largest)
        shapes = self.sent_embedding_shapes(update.silo)
        _check_tensors("embeddings", update.embeddings, shapes, self.embeddings, largest)

    def sent_embedding_shapes(self, silo: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the embeddings that travel between the server and this silo."""
        if not self._variant.embeddings_travel:
            return {}
        return self.layout.embeddings(self.registrations[silo].vocabulary)

    def has_quorum(self, merge: Merge) -> bool:
        needed = math.ceil(self.recipe.quorum * len(merge.sampled) - 1e-9)  # 0.28 * 25 is not 7
        return len(merge.merged) >= max(needed, 1)

    def close_round(self, merge: Merge) -> None:
        """The outer optimiser steps along the mean; the round is whole.

        Raises:
            DeptError: the merged updates are fewer than the quorum.
        """
        if not self.has_quorum(merge):
            missing = sorted(set(merge.sampled) - set(merge.merged))
            raise DeptError(
                f"round {merge.round}: only {len(merge.merged)} of {len(merge.sampled)} sampled "
                f"silos answered well (missing: {', '.join(missing)}), below "
                f"quorum={self.recipe.quorum}"
            )
        unheld = merge.embeddings.unheld()
        self._outer.step({**merge.body.mean(), **merge.embeddings.mean()}, unheld)
        self.round = merge.round
        for name in merge.merged:
            self.history[name].append(merge.round)

    def _last_merged(self, silo: str, up_to: int) -> int:
        return max((r for r in self.history[silo] if r <= up_to), default=0)

    # ---- start and checkpoint --------------------------------------------------------------

    def _embeddings(self) -> Tensors:
        if not self._variant.embeddings_travel:
            return {}
        recipe = self.recipe
        size = next(iter(self.registrations.values())).tokenizer_size
        return initial_embeddings(
            recipe.model, size, recipe.sequence_tokens, self.layout, recipe.seed, owner=""
        )

    def _check_registrations(self) -> None:
        missing = sorted(set(self.recipe.silo_names) - self.registrations.keys())
        if missing:
            raise DeptError(f"no node hosts the silos {', '.join(missing)}")
        if self.recipe.own_tokenizers:
            return
        by_print: dict[str, list[str]] = {}
        for name, registration in self.registrations.items():
            by_print.setdefault(registration.fingerprint, []).append(name)
        if len(by_print) > 1:
            held = "; ".join(f"{p[:12]}: {', '.join(sorted(n))}" for p, n in by_print.items())
            raise DeptError(
                f"the silos hold different tokenizers ({held}) but tokenizer=shared; "
                "give all the same file"
            )
        for registration in self.registrations.values():
            self._check_vocabulary(registration)
            _check_rows(registration, self._variant.rows_known)

    def _check_vocabulary(self, registration: Registration) -> None:
        sizes = {r.tokenizer_size for r in self.registrations.values()}
        whole = registration.vocabulary == registration.tokenizer_size
        if len(sizes) > 1 or not (whole or self._variant.restricts_vocabulary):
            raise DeptError(
                f"silo {registration.silo}: says it has {registration.vocabulary} of "
                f"{registration.tokenizer_size} tokens; the silos' tokenizers have {sorted(sizes)}"
            )

    def save(self, run_dir: Path) -> None:
        """Write the checkpoint of the round just done; older ones but one are dropped."""
        tensors = {
            **with_prefix("body", self.body),
            **with_prefix("embeddings", self.embeddings),
            **with_prefix("outer", self._outer.state()),
        }
        meta = {
            "round": self.round,
            "experiment": self.experiment,
            "history": self.history,
            "recipe": json.loads(self.recipe.to_json()),
        }
        folder = run_dir / "checkpoints"
        save_state(round_folder(folder, self.round), tensors, meta)
        drop_rounds_before(folder, self.round - _CHECKPOINTS_KEPT + 1)

    def load(self, tensors: Tensors, meta: Mapping[str, Any]) -> None:
        """Take over a checkpoint that `last_checkpoint` read."""
        for part, own in (("body", self.body), ("embeddings", self.embeddings)):
            saved = under_prefix(part, tensors)
            if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in own.items()}:
                raise DeptError(f"the checkpoint's {part} does not fit the recipe's model")
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        self._outer.load(under_prefix("outer", tensors))
        self.round = meta["round"]
        self.history = {name: list(rounds) for name, rounds in meta["history"].items()}


def has_checkpoint(run_dir: Path) -> bool:
    return bool(rounds_on_disk(run_dir / "checkpoints"))


def last_checkpoint(run_dir: Path, recipe: Recipe) -> tuple[Tensors, dict[str, Any]]:
    """The newest checkpoint of a run that can be read: where one is damaged, that before it.

    Raises:
        ConfigError: it was made with other settings. DeptError: none can be read.
    """
    tensors, meta = _newest_whole(run_dir / "checkpoints")
    changed = differences(recipe_from_json(json.dumps(meta["recipe"])), recipe)
    changed = [line for line in changed if line.split(":")[0] not in FREE_ON_RESUME]
    if changed:
        raise ConfigError([f"resume with another recipe: {line}" for line in changed])
    return tensors, meta


def _newest_whole(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    damaged = []
    for round_ in reversed(rounds_on_disk(folder)):
        try:
            return load_state(round_folder(folder, round_))
        except DeptError as error:
            damaged.append(str(error))
            warnings.warn(f"{error}; trying the round before", stacklevel=2)
    raise DeptError("\n".join([f"no checkpoint in {folder} can be read:", *damaged]))


def _check_rows(registration: Registration, known: bool) -> None:
    rows, size = registration.rows, registration.tokenizer_size
    if not known:
        return
    if rows is None or len(rows) == 0:
        raise DeptError(f"silo {registration.silo}: its token ids are missing")
    if not bool((rows[1:] > rows[:-1]).all()):
        raise DeptError(f"silo {registration.silo}: its token ids are not sorted")
    if int(rows[0]) < 0 or int(rows[-1]) >= size or len(rows) != registration.vocabulary:
        raise DeptError(f"silo {registration.silo}: its token ids do not fit {size} tokens")


def _check_tensors(
    part: str,
    given: Tensors,
    shapes: Mapping[str, tuple[int, ...]],
    own: Tensors,
    largest: float,
) -> None:
    if given.keys() != shapes.keys():
        names = sorted(given.keys() ^ shapes.keys())
        raise BadUpdate(f"{part}: parameters missing or not asked for: {', '.join(names[:3])}")
    square_sum = 0.0
    for name, tensor in given.items():
        if tensor.dtype != torch.float32:
            raise BadUpdate(f"{part}: {name} is {tensor.dtype}, expected torch.float32")
        if tuple(tensor.shape) != shapes[name]:
            raise BadUpdate(f"{part}: {name} is {tuple(tensor.shape)}, expected {shapes[name]}")
        square_sum += float(tensor.double().norm() ** 2)
    # One test for all: a NaN or an infinity anywhere makes the sum of squares one.
    if not square_sum < float("inf"):
        raise BadUpdate(f"{part}: holds NaN or infinity")
    reference = sum(float(tensor.norm() ** 2) for tensor in own.values()) ** 0.5
    if square_sum**0.5 > largest * reference:
        raise BadUpdate(
            f"{part}: its norm {square_sum**0.5:.3g} is over largest_delta={largest:g} times that "
            f"of what it changes ({reference:.3g})"
        )
