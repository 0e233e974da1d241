"""Training on the text of all silos at once, as no federation can: what DEPT is compared with.

One model with every sequence from a silo drawn at random (STD), the same with embeddings that are
drawn anew again and again (ACT), and silos that each see such mixed text (the control of GLOB).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

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
from dept_fl.config import Recipe
from dept_fl.data import Batches, TokenStream
from dept_fl.errors import DeptError
from dept_fl.evaluate import evaluate
from dept_fl.model import (
    assemble,
    initial_embeddings,
    join,
    layout,
    norm,
    parameters,
    seed_of,
)
from dept_fl.report import Ledger
from dept_fl.silo import Silo
from dept_fl.start import first_body, first_embeddings
from dept_fl.tokenizer import Vocabulary
from dept_fl.train import Schedule, Training, pick_device, train
from dept_fl.transfer import Target

_DRAWN_AT_ONCE = 4096


def probabilities(tokens: Mapping[str, int], tau: float) -> dict[str, float]:
    """p_i ~ n_i^tau: 0 is uniform over the silos, 1 proportional to their tokens (section 3)."""
    weights = {name: float(count) ** tau for name, count in tokens.items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


class Mixture:
    """Sequences of several silos that share a tokenizer; each one's silo is drawn at random.

    Like `Batches`, a function of seed and position alone. Within a silo, no sequence comes again
    before all others of it came.
    """

    def __init__(
        self, streams: Mapping[str, TokenStream], sequence_tokens: int, tau: float, seed: int
    ) -> None:
        shares = probabilities({name: len(s.train) for name, s in streams.items()}, tau)
        self.names = sorted(streams)
        self._shares = [shares[name] for name in self.names]
        self._own = [Batches(streams[n], sequence_tokens, seed_of(seed, n)) for n in self.names]
        self._seed = seed
        self._silos = np.empty(0, dtype=np.int64)  # by position: which silo, its how manieth
        self._within = np.empty(0, dtype=np.int64)

    def at(self, position: int, count: int) -> npt.NDArray[np.int64]:
        """[count, L + 1] ids: inputs are [:, :-1], targets [:, 1:]."""
        rows = []
        for silo, within in zip(*self._drawn(position, count), strict=True):
            rows.append(self._own[silo].at(int(within), 1))
        return np.concatenate(rows)

    def taken(self, position: int) -> dict[str, int]:
        """How many sequences of each silo are among the first so many."""
        silos, _ = self._drawn(0, position)
        counts = np.bincount(silos, minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def _drawn(
        self, position: int, count: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        while len(self._silos) < position + count:
            key = [self._seed, len(self._silos) // _DRAWN_AT_ONCE]
            generator = np.random.Generator(np.random.Philox(key=key))
            more = generator.choice(len(self.names), _DRAWN_AT_ONCE, p=self._shares)
            self._silos = np.concatenate([self._silos, more])
            within = np.zeros(_DRAWN_AT_ONCE, dtype=np.int64)
            for silo in range(len(self.names)):
                mine = more == silo
                before = int((self._silos[: -len(more)] == silo).sum())
                within[mine] = before + np.arange(mine.sum())
            self._within = np.concatenate([self._within, within])
        chosen = slice(position, position + count)
        return self._silos[chosen], self._within[chosen]


class MixedSilo(Silo):
    """A worker of local SGD on mixed text: a silo in all but where its sequences come from.

    Args:
        pool: all silos of the run, which share a tokenizer; the worker's own among them.
    """

    def __init__(self, own: Silo, home: Path, experiment: str, pool: Mapping[str, Silo]) -> None:
        super().__init__(own.name, own.recipe, home, experiment)
        self._pool = pool

    def taken(self, sequences: int) -> dict[str, int]:
        """How many of the worker's first so many sequences came from each silo."""
        return self._batches(self.batch_seed).taken(sequences)

    def _batches(self, seed: int) -> Mixture:
        streams = {name: silo.stream for name, silo in self._pool.items()}
        return Mixture(streams, self.recipe.sequence_tokens, 0.0, seed)


class Central:
    """One model on the mixed text of silos that share a tokenizer; rounds are only its pauses.

    Args:
        tau: of the mixture, see `probabilities`.
        folder: where its checkpoints lie, as those of a server.
        forgets: at each round but the first the embeddings are drawn anew, and their learning
            rate goes through a whole cosine in each round (ACT: active forgetting).
        start: body and embeddings to start from; None: those a server starts from.

    Attributes:
        round: whole rounds done.
    """

    def __init__(
        self,
        recipe: Recipe,
        silos: Mapping[str, Silo],
        tau: float,
        folder: Path,
        forgets: bool = False,
        start: tuple[Tensors, Tensors] | None = None,
    ) -> None:
        self.recipe, self.round = recipe, 0
        self._forgets, self._folder = forgets, folder
        self.streams = {name: silo.stream for name, silo in silos.items()}
        self.layout = layout(recipe.model, recipe.sequence_tokens)
        tokenizer = next(iter(silos.values())).tokenizer
        self._size = tokenizer.size
        self.mixture = Mixture(
            self.streams, recipe.sequence_tokens, tau, seed_of(recipe.seed, "mixture")
        )
        own = Target("", tokenizer, Vocabulary.whole(tokenizer))
        body, embeddings = start or (first_body(recipe, self.layout), first_embeddings(recipe, own))
        model = assemble(recipe.model, recipe.sequence_tokens, body, embeddings, self._size)
        self.model = cast(PreTrainedModel, cast(nn.Module, model).to(pick_device(recipe.device)))
        self._moments: Tensors = {}
        self._position = 0

    @property
    def sequences(self) -> int:
        """Taken from the mixture so far."""
        return self._position

    def run(self, ledger: Ledger) -> None:
        """All rounds that are left, each written to the ledger, evaluated where due, then saved."""
        self._resume()
        ledger.rewind(self.round)
        if self.round == 0:
            self._write_evaluation(ledger)
        while self.round < self.recipe.rounds:
            metrics = self.train_round()
            ledger.write("silo_train", silo="all", round=self.round, **metrics)
            if self.recipe.evaluates(self.round):
                self._write_evaluation(ledger)
            self._save()

    def _write_evaluation(self, ledger: Ledger) -> None:
        recipe = self.recipe
        for name, stream in self.streams.items():
            found = evaluate(self.model, stream, recipe.sequence_tokens, recipe.inner)
            ledger.write("silo_eval", silo=name, round=self.round, **vars(found))

    def train_round(self) -> dict[str, float]:
        """N_local steps; returns the round's metrics."""
        if self._forgets and self.round:
            self._forget()
        body, embeddings = self.layout.split(parameters(self.model))
        norms = {"body_norm": norm(body), "embedding_norm": norm(embeddings)}
        inner = self.recipe.inner
        first = self.round * inner.local_steps
        forget_every = inner.local_steps if self._forgets else 0
        schedule = Schedule(first, self.recipe.total_steps, forget_every)
        done = self._train(schedule)
        self._moments = done.optimizer
        self._position += inner.local_steps * inner.batch_size
        self.round += 1
        return {
            "loss": done.loss,
            "gradient_norm": done.gradient_norm,
            "tokens": float(done.tokens),
            "train_s": done.seconds,
            **norms,
        }

    def _resume(self) -> None:
        """Go on from the newest checkpoint in the folder, if there is one."""
        on_disk = rounds_on_disk(self._folder / "checkpoints")
        if not on_disk:
            return
        tensors, meta = load_state(round_folder(self._folder / "checkpoints", on_disk[-1]))
        if meta["recipe"] != json.loads(self.recipe.to_json()):
            raise DeptError(f"{self._folder}: was made with other settings; choose another folder")
        join(self.model, under_prefix("body", tensors), under_prefix("embeddings", tensors))
        self._moments = under_prefix("optimizer", tensors)
        self.round, self._position = meta["round"], meta["position"]

    def _train(self, schedule: Schedule) -> Training:
        own = (*self.layout.tokens, *self.layout.positions)
        inner, model = self.recipe.inner, cast(nn.Module, self.model)
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # dropout
            torch.manual_seed(seed_of(self.recipe.seed, "central", schedule.first))
            return train(model, self.mixture, inner, schedule, self._position, self._moments, own)

    def _forget(self) -> None:
        body, old = self.layout.split(parameters(self.model))
        recipe, owner = self.recipe, f"round {self.round + 1}"
        drawn = initial_embeddings(
            recipe.model, self._size, recipe.sequence_tokens, self.layout, recipe.seed, owner
        )
        join(cast(nn.Module, self.model), body, drawn)
        self._moments = {k: v for k, v in self._moments.items() if k.split("/", 1)[1] not in old}

    def _save(self) -> None:
        body, embeddings = self.layout.split(parameters(self.model))
        tensors = {
            **with_prefix("body", body),
            **with_prefix("embeddings", embeddings),
            **with_prefix("optimizer", self._moments),
        }
        meta: dict[str, Any] = {"round": self.round, "position": self._position}
        meta |= {"recipe": json.loads(self.recipe.to_json()), "time": round(time.time(), 3)}
        save_state(round_folder(self._folder / "checkpoints", self.round), tensors, meta)
        drop_rounds_before(self._folder / "checkpoints", self.round)
