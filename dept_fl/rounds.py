"""DEPT's algorithm (paper, Algorithm 1) in plain Python: no Flower, no messages.

`pretrain` below is the whole of it. The Flower strategy takes the same steps with messages
between them, and a test shows that both give the same tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from dept_fl.checkpoint import (
    Tensors,
    digest,
    drop_rounds_before,
    load_state,
    round_folder,
    rounds_on_disk,
    save_state,
    under_prefix,
    with_prefix,
)
from dept_fl.codec import Encoded, encoded
from dept_fl.config import FREE_ON_RESUME, Recipe, differences, recipe_from_json
from dept_fl.downlink import Downlink
from dept_fl.errors import BadUpdate, ConfigError, DeptError
from dept_fl.merge import Delta, Norms, Spool, holders, merged
from dept_fl.model import Layout, initial_embeddings, layout, seed_of
from dept_fl.outer import OuterOptimizer
from dept_fl.silo import Change, Registration, Task, Update
from dept_fl.start import first_body, first_embeddings
from dept_fl.tokenizer import Vocabulary, load_tokenizer
from dept_fl.transfer import Target
from dept_fl.variants import variant

Shapes = Mapping[str, tuple[int, ...]]

_CHECKPOINTS_KEPT = 2
_EMBEDDINGS = "embeddings"
_LARGEST_FIRST = 10.0  # times what a delta changes, while there is no delta to compare with


class TrainsRounds(Protocol):
    """A silo, or whatever stands for one."""

    def train(self, task: Task) -> Update: ...


def pretrain(
    server: Server,
    silos: Mapping[str, TrainsRounds],
    behind_round: Callable[[], None] | None = None,
) -> None:
    """Train all rounds that are left.

    for t = 1..T: a random subset of the silos trains N_local steps each; the outer optimiser
    steps along what their deltas merge into.
    """
    while server.round < server.recipe.rounds:
        with TemporaryDirectory() as folder:
            merge = server.open_round(Path(folder))
            for name in merge.sampled:
                server.add(merge, silos[name].train(server.task(name)))
            server.close_round(merge)
        if behind_round:
            behind_round()


@dataclass(frozen=True)
class SharedTokenizer:
    """What the server knows of the tokenizer that all silos share."""

    size: int
    fingerprint: str


def shared_tokenizer(recipe: Recipe) -> SharedTokenizer | None:
    """None where each silo has one of its own."""
    if recipe.own_tokenizers:
        return None
    found = load_tokenizer(recipe.shared_tokenizer)
    return SharedTokenizer(found.size, found.fingerprint)


@dataclass
class Merge:
    """A round in the making: the accepted updates, on disk.

    Attributes:
        norms: of each accepted update, by silo and part (`Server.parts`); its keys are the silos
            merged.
    """

    round: int
    sampled: list[str]
    spool: Spool
    norms: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def merged(self) -> list[str]:
        return sorted(self.norms)

    @property
    def missing(self) -> list[str]:
        return sorted(set(self.sampled) - set(self.norms))

    @property
    def parts(self) -> list[str]:
        """What each accepted update has a norm of."""
        return list(next(iter(self.norms.values())))

    def body_norm(self, silo: str) -> float:
        """Of a silo's delta."""
        return math.hypot(*(n for part, n in self.norms[silo].items() if part != _EMBEDDINGS))


@dataclass
class Member:
    """A silo that takes part, or took part.

    Attributes:
        joined: it is sampled in the rounds behind this one.
        facts: what of its registration must never change.
        named: its node's key is registered under the silo's name, so nobody else may be it.
        merged: the rounds in which its update was merged.
    """

    joined: int
    facts: dict[str, Any]
    named: bool = False
    merged: list[int] = field(default_factory=list)

    def last_merged(self, up_to: int) -> int:
        return max((r for r in self.merged if r <= up_to), default=0)


class Server:
    """The server's state: theta (and phi, psi in GLOB and TRIM), outer optimiser, round, members.

    Args:
        shared: the silos' common tokenizer, if they have one.

    Attributes:
        round: whole rounds done.
        experiment: id of the run, under which silos keep its state.
        registrations: of the silos that answered since the server started.
        members: every silo that ever joined the run.
    """

    def __init__(self, recipe: Recipe, experiment: str, shared: SharedTokenizer | None) -> None:
        self.recipe = recipe
        self.experiment = experiment
        self.round = 0
        self.registrations: dict[str, Registration] = {}
        self.members: dict[str, Member] = {}
        self.layout: Layout = layout(recipe.model, recipe.sequence_tokens)
        self.shared = shared
        self._variant = variant(recipe.variant)
        self._norms = Norms()
        self._fragments = self.layout.fragments(recipe.wire.fragments)
        body = first_body(recipe, self.layout)
        tokens = self.layout.tokens if self._variant.embeddings_travel else {}
        self._outer = OuterOptimizer(recipe.outer, {**body, **self._embeddings()}, tokens)
        self._body_digest: str | None = None  # of what is published
        self._downlink: Downlink | None = None
        if recipe.wire.sends_changes:
            self._downlink = Downlink(recipe.wire.down, {**self.body, **self.embeddings})

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
        names = [n for n in self.silo_names if self.members[n].joined < round_]
        count = min(self.recipe.silos_per_round or len(names), len(names))
        generator = random.Random(seed_of(self.recipe.seed, "sampled silos", round_))
        return sorted(generator.sample(names, count))

    @property
    def silo_names(self) -> list[str]:
        """The members that take part, sorted."""
        return sorted(self.members.keys() - set(self.recipe.without))

    @property
    def final_names(self) -> list[str]:
        """Who gets the final body: with embeddings that were never trained it is no model."""
        travel = self._variant.embeddings_travel
        return [name for name in self.silo_names if travel or self.members[name].merged]

    def task(self, silo: str) -> Task:
        """What `silo` gets in the round after this one, or for the final evaluation."""
        member = self.members[silo]
        oldest = max(0, self.round - _CHECKPOINTS_KEPT + 1)
        body, embeddings = self._split(self.outgoing)
        return Task(
            silo=silo,
            round=self.round + 1,
            start_round=member.last_merged(self.round),
            keep_from=member.last_merged(oldest),
            body=body,
            embeddings=self._start(silo, embeddings),
        )

    def as_change(self, task: Task) -> Task:
        """The task as it travels: with a change, where the silo has what arrived before."""
        downlink = self._downlink if self.round < self.recipe.rounds else None
        if downlink is None or downlink.change is None or task.start_round != self.round:
            return task
        if self._body_digest is None:
            self._body_digest = digest(task.body)  # one for all silos
        changed = downlink.change
        body, embeddings = self._split(changed.tensors)
        change = Change(
            changed.only(body),
            # Some rows of what is encoded are the encoded form of those rows.
            Encoded(changed.codec, self._start(task.silo, embeddings), self.shapes(task.silo)),
            self._body_digest + digest(task.embeddings),
        )
        return replace(task, body={}, embeddings={}, change=change)

    def _start(self, silo: str, embeddings: Tensors) -> Tensors:
        return self._variant.start(embeddings, self.layout, self.registrations[silo].rows)

    @property
    def outgoing(self) -> Tensors:
        """Body and embeddings that silos train from, or in the end evaluate."""
        if self._downlink and self.round < self.recipe.rounds:
            return self._downlink.published
        return {**self.body, **self.embeddings}

    def _split(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, Tensors]:
        body = {name: t for name, t in tensors.items() if name in self.layout.body}
        return body, {name: t for name, t in tensors.items() if name not in body}

    def open_round(self, folder: Path) -> Merge:
        """Begin the next round; what silos send is kept in the empty `folder` until its end."""
        return Merge(self.round + 1, self.sample(self.round + 1), Spool(folder))

    def add(self, merge: Merge, update: Update) -> None:
        """Check one silo's update as a whole, then keep it for the merge.

        Raises:
            BadUpdate: the update may not be merged; nothing of it was kept.
        """
        norms = self.check(merge, update)
        for part, shapes in self.parts(update.silo, merge.round).items():
            of_part = update.embeddings if part == _EMBEDDINGS else update.body
            merge.spool.put(update.silo, part, encoded(of_part).only(shapes))
        merge.norms[update.silo] = norms

    def check(self, merge: Merge, update: Update) -> dict[str, float]:
        """The norms of an update's parts.

        Raises:
            BadUpdate: it is of another round or silo, or its tensors are not usable.
        """
        if update.round != merge.round:
            raise BadUpdate(f"is of round {update.round}, expected {merge.round}")
        if update.silo not in merge.sampled:
            raise BadUpdate(f"comes from silo {update.silo!r}, which was not sampled")
        if update.silo in merge.norms:
            raise BadUpdate("is a second one in the same round")
        _check_names("body", update.body, self.layout.synchronised(self.recipe, merge.round))
        _check_names(_EMBEDDINGS, update.embeddings, self.shapes(update.silo))
        own = {**self.body, **self.embeddings}
        norms = {}
        for part, shapes in self.parts(update.silo, merge.round).items():
            given = update.embeddings if part == _EMBEDDINGS else update.body
            norms[part] = _norm(part, given, shapes)
            self._check_norm(part, norms[part], {name: own[name] for name in shapes})
        return norms

    def _check_norm(self, part: str, norm: float, own: Tensors) -> None:
        usual = self._norms.median(part)
        if usual:
            largest = self.recipe.largest_delta
            if norm > largest * usual:
                raise BadUpdate(
                    f"{part}: its norm {norm:.3g} is over largest_delta={largest:g} times what is "
                    f"usual ({usual:.3g})"
                )
            return
        changed = sum(float(tensor.norm() ** 2) for tensor in own.values()) ** 0.5
        if norm > _LARGEST_FIRST * changed:
            raise BadUpdate(
                f"{part}: its norm {norm:.3g} is over {_LARGEST_FIRST:g} times that of what it "
                f"changes ({changed:.3g})"
            )

    def shapes(self, silo: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the embeddings that travel between the server and this silo."""
        return self._variant.shapes(self.layout, self.registrations[silo].vocabulary)

    def parts(self, silo: str, round_: int) -> dict[str, dict[str, tuple[int, ...]]]:
        """What is merged of a silo's update, in parts that each have a norm of their own."""
        if len(self._fragments) == 1:
            body = {"body": self._fragments[0]}
        else:
            due = self.recipe.fragments_due(round_)
            body = {f"body {i + 1}": self._fragments[i] for i in due}
        return {**body, _EMBEDDINGS: self.shapes(silo)}

    def has_quorum(self, merge: Merge) -> bool:
        needed = math.ceil(self.recipe.quorum * len(merge.sampled) - 1e-9)  # 0.28 * 25 is not 7
        return len(merge.norms) >= max(needed, 1)

    def close_round(self, merge: Merge) -> dict[str, float]:
        """The outer optimiser steps along the merged delta; the round is whole.

        Returns:
            by silo, the factor to which its body delta was scaled down, where it was.

        Raises:
            DeptError: the accepted updates are fewer than the quorum.
        """
        if not self.has_quorum(merge):
            raise DeptError(
                f"round {merge.round}: only {len(merge.norms)} of {len(merge.sampled)} sampled "
                f"silos answered well (missing: {', '.join(merge.missing)}), below "
                f"quorum={self.recipe.quorum}"
            )
        scales = {part: self._scales(merge, part) for part in merge.parts}
        for part in scales:
            self._step(merge, part, scales[part])
        self.round = merge.round
        if self._downlink and self.round < self.recipe.rounds:
            due = self.layout.synchronised(self.recipe, self.round)
            self._downlink.follow({**self.body, **self.embeddings}, [*due, *self.embeddings])
            self._body_digest = None
        for name in merge.merged:
            self.members[name].merged.append(merge.round)
        of_body = [by_silo for part, by_silo in scales.items() if part != _EMBEDDINGS]
        least = {name: min(by_silo[name] for by_silo in of_body) for name in merge.merged}
        return {name: scale for name, scale in least.items() if scale < 1.0}

    def _scales(self, merge: Merge, part: str) -> dict[str, float]:
        """What each delta is multiplied with, so that no norm is over the limit."""
        norms = {name: merge.norms[name][part] for name in merge.merged}
        limit = self._norms.limit(part, self.recipe.outer.clip_delta, list(norms.values()))
        # A fragment's first delta is of fewer rounds than those to come.
        count = 1 if part == _EMBEDDINGS else len(self._fragments)
        grows = count / min(merge.round, count)
        self._norms.add(part, [min(norm, limit) * grows for norm in norms.values()])
        return {name: 1.0 if norm <= limit else limit / norm for name, norm in norms.items()}

    def _step(self, merge: Merge, part: str, scales: Mapping[str, float]) -> None:
        """The outer optimiser takes its step on one part, tensor by tensor as they are merged."""
        deltas = []
        for name in merge.merged:  # sorted: the sum must not depend on who answered first
            shapes = self.parts(name, merge.round)[part]
            rows = self.registrations[name].rows if part == _EMBEDDINGS else None
            deltas.append(Delta(merge.spool.get(name, part, shapes), rows, scales[name]))
        own = self.embeddings if part == _EMBEDDINGS else self.body
        shapes = {name: tuple(own[name].shape) for name in shapes}
        tokens = self.layout.tokens if part == _EMBEDDINGS and own else {}
        held = holders(deltas, next((shapes[name][0] for name in tokens), 0))
        unheld = (held == 0).nonzero().flatten()
        self._outer.step(merged(deltas, shapes, tokens, held, self.recipe.outer), unheld)

    # ---- members ---------------------------------------------------------------------------

    def register(self, registration: Registration, during: int = 0, named: bool = False) -> bool:
        """Take a silo in, or back; one that is new takes part behind round `during`.

        Returns:
            whether it is new.

        Raises:
            BadUpdate: it may not take part, with the reason.
        """
        name = registration.silo
        self.check_invited(name)
        self._check_vocabulary(registration)
        facts = {
            "vocabulary": registration.vocabulary,
            "tokenizer_size": registration.tokenizer_size,
            "fingerprint": registration.fingerprint,
            "rows": _digest_of(registration.rows),
        }
        member = self.members.get(name)
        if member is None:
            self.members[name] = Member(during, facts, named)
        elif member.facts != facts:
            changed = ", ".join(
                f"{k}={facts[k]!r} (it joined with {old!r})"
                for k, old in member.facts.items()
                if facts[k] != old
            )
            raise BadUpdate(
                f"comes back with {changed}; put its text and tokenizer back, or let it join "
                "under another name"
            )
        else:
            member.named |= named
        self.registrations[name] = registration
        return member is None

    def check_invited(self, silo: str) -> None:
        """Raise BadUpdate if the recipe leaves the silo out."""
        if self.recipe.only and silo not in self.recipe.only:
            raise BadUpdate(f"silo {silo} is not one of the run's (only={list(self.recipe.only)})")
        if silo in self.recipe.without:
            raise BadUpdate(f"silo {silo} takes no part (without={list(self.recipe.without)})")

    def _check_vocabulary(self, registration: Registration) -> None:
        shared = self.shared
        if shared is None:
            if registration.rows is not None:
                raise BadUpdate("sends token ids that nobody asked for")
            return
        if registration.fingerprint != shared.fingerprint:
            raise BadUpdate(
                f"its tokenizer ({registration.fingerprint[:12]}) is not the federation's "
                f"({shared.fingerprint[:12]}), which all must share; give it the same file"
            )
        whole = registration.vocabulary == shared.size
        if registration.tokenizer_size != shared.size or not (
            whole or self._variant.restricts_vocabulary
        ):
            raise BadUpdate(
                f"says it has {registration.vocabulary} of {registration.tokenizer_size} tokens; "
                f"the tokenizer has {shared.size}"
            )
        _check_rows(registration, self._variant.rows_known)

    def _embeddings(self) -> Tensors:
        if self.shared is None or not self._variant.embeddings_travel:
            return {}
        recipe, size = self.recipe, self.shared.size
        if not recipe.model.gives_embeddings:
            return initial_embeddings(
                recipe.model, size, recipe.sequence_tokens, self.layout, recipe.seed, owner=""
            )
        tokenizer = load_tokenizer(recipe.shared_tokenizer)
        return first_embeddings(recipe, Target("", tokenizer, Vocabulary.whole(tokenizer)))

    # ---- checkpoint ------------------------------------------------------------------------

    def save(self, run_dir: Path) -> None:
        """Write the checkpoint of the round just done; older ones but one are dropped."""
        tensors = {
            **with_prefix("body", self.body),
            **with_prefix("embeddings", self.embeddings),
            **with_prefix("outer", self._outer.state()),
            **(self._downlink.state() if self._downlink else {}),
        }
        meta = {
            "round": self.round,
            "experiment": self.experiment,
            "members": {name: asdict(member) for name, member in self.members.items()},
            "norms": self._norms.rounds,
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
        if self._downlink:
            self._downlink.load(tensors)
        self.round = meta["round"]
        self.members = {name: Member(**facts) for name, facts in meta["members"].items()}
        self._norms = Norms(meta["norms"])


def has_checkpoint(run_dir: Path) -> bool:
    return bool(rounds_on_disk(run_dir / "checkpoints"))


def last_checkpoint(run_dir: Path, recipe: Recipe) -> tuple[Tensors, dict[str, Any]]:
    """The newest checkpoint of a run that can be read: where one is damaged, that before it.

    Raises:
        ConfigError: it was made with other settings. DeptError: none can be read.
    """
    tensors, meta = _newest_whole(run_dir / "checkpoints")
    old = recipe_from_json(json.dumps(meta["recipe"]))
    free = set(FREE_ON_RESUME)
    if all(each.shared_tokenizer == each.model.start for each in (old, recipe)):
        free.add("shared_tokenizer")  # the open model's, known by its fingerprint
    changed = [line for line in differences(old, recipe) if line.split(":")[0] not in free]
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
        if rows is not None:
            raise BadUpdate("sends token ids that nobody asked for")
        return
    if rows is None or len(rows) == 0:
        raise BadUpdate("its token ids are missing")
    if not bool((rows[1:] > rows[:-1]).all()):
        raise BadUpdate("its token ids are not sorted")
    if int(rows[0]) < 0 or int(rows[-1]) >= size or len(rows) != registration.vocabulary:
        raise BadUpdate(f"its token ids do not fit {size} tokens")


def _digest_of(rows: torch.Tensor | None) -> str:
    return "" if rows is None else hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def _check_names(what: str, given: Mapping[str, torch.Tensor], shapes: Shapes) -> None:
    if given.keys() != shapes.keys():
        names = sorted(given.keys() ^ shapes.keys())
        raise BadUpdate(f"{what}: parameters missing or not asked for: {', '.join(names[:3])}")


def _norm(part: str, given: Mapping[str, torch.Tensor], shapes: Shapes) -> float:
    """L2 norm over the tensors of a part, which must be of these shapes."""
    square_sum = 0.0
    for name in shapes:
        tensor = given[name]
        if tensor.dtype != torch.float32:
            raise BadUpdate(f"{part}: {name} is {tensor.dtype}, expected torch.float32")
        if tuple(tensor.shape) != shapes[name]:
            raise BadUpdate(f"{part}: {name} is {tuple(tensor.shape)}, expected {shapes[name]}")
        # In fp32, which is 30 times faster than in fp64 and as good to six digits.
        square_sum += float(tensor.norm()) ** 2
    # One test for all: a NaN or an infinity anywhere makes the sum of squares one, as does a
    # number over 2^63, whose square is.
    if not square_sum < float("inf"):
        raise BadUpdate(f"{part}: holds NaN or infinity, or numbers as large")
    return float(square_sum**0.5)
