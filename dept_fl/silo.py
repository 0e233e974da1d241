"""A silo is a place: its text, tokenizer, embeddings and training state, on its own disk."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from dept_fl.checkpoint import (
    Tensors,
    digest,
    drop_rounds_before,
    load_meta,
    load_state,
    make_durable,
    mapped,
    remove_whole,
    round_folder,
    rounds_on_disk,
    save_state,
    under_prefix,
    whole_folder,
    with_prefix,
    write_whole,
)
from dept_fl.codec import Encoded, encode, encoded, is_exact
from dept_fl.config import InnerConfig, Recipe, SiloConfig
from dept_fl.data import (
    Batches,
    Corpus,
    TokenStream,
    Watch,
    check_enough,
    corpus_folder,
    load_corpus,
    load_tokens,
    tokens_folder,
    unwatched,
)
from dept_fl.errors import DamagedState, DeptError, NeedsWhole
from dept_fl.evaluate import Evaluation, bits_per_byte, evaluate, sample
from dept_fl.model import (
    Layout,
    assemble,
    build,
    layout,
    norm,
    parameters,
    seed_of,
)
from dept_fl.parallel import Workers
from dept_fl.start import first_embeddings, open_model
from dept_fl.tokenizer import (
    MODEL_FILE,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    sentencepiece,
    train_sentencepiece,
)
from dept_fl.train import Schedule, Sequences, Training, pick_device
from dept_fl.transfer import Target
from dept_fl.variants import variant

FINAL, BEST = "final", "best"  # folders of the models that a silo keeps
_PARTS = ("load_s", "settle_s", "evaluate_s", "encode_s", "save_s")  # of a round, beside training


@dataclass(frozen=True)
class Registration:
    """What a silo tells the server about itself: sizes and counts, no text and no pieces.

    Attributes:
        fingerprint: of a shared tokenizer; empty where the silo's own, which nobody need know.
        rows: [|V_k|] the ids it holds of a shared tokenizer, in TRIM alone.
        step_s: seconds of one optimiser step, measured.
        lossy_documents: validation documents that the tokenizer does not give back whole, so
            that the silo's bits per byte are too low.
    """

    silo: str
    vocabulary: int
    tokenizer_size: int
    fingerprint: str
    train_tokens: int
    train_bytes: int
    validation_bytes: int
    train_documents: int
    duplicates: int
    lossy_documents: int
    unigram_bits_per_byte: float
    step_s: float
    prepare_s: float
    on_gpu: bool
    rows: torch.Tensor | None = None


@dataclass(frozen=True)
class Change:
    """What travels in place of a task's body and embeddings: their change (`wire.down`,
    `wire.fragments`).

    Attributes:
        digest: of the body and embeddings that come of it.
    """

    body: Encoded
    embeddings: Encoded
    digest: str


@dataclass(frozen=True)
class Task:
    """What the server asks of a silo in one round.

    Attributes:
        round: t, from 1; the final evaluation has T + 1.
        start_round: the silo's last merged round, whose state it starts from; 0 for none.
        keep_from: the oldest of the silo's rounds that the server may still resume from.
        body: theta.
        embeddings: phi and psi as far as the variant sends them.
        change: stands for body and embeddings, which are empty then; it is added to those that
            arrived in the round before.
    """

    silo: str
    round: int
    start_round: int
    keep_from: int
    body: Tensors
    embeddings: Tensors
    change: Change | None = None


@dataclass(frozen=True)
class Update:
    """What a silo sends back: deltas of the body and, in GLOB and TRIM, of the embeddings."""

    silo: str
    round: int
    body: Mapping[str, torch.Tensor]
    embeddings: Mapping[str, torch.Tensor]
    metrics: dict[str, float]
    warning: str = ""


@dataclass(frozen=True)
class _State:
    """A silo's state behind one round.

    Attributes:
        position: sequences taken from its stream.
        lost: of its deltas by the codec (error feedback); in bf16, which is exact enough for what
            is less than a rounding step.
        body: its own, trained, of the fragments that were not synchronised in that round.
        arrived: by name, the digest of what the server had of `body` in that round.
    """

    position: int = 0
    embeddings: Tensors = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)
    lost: Tensors = field(default_factory=dict)
    body: Tensors = field(default_factory=dict)
    arrived: Mapping[str, str] = field(default_factory=dict)
    warning: str = ""


class _Seconds(dict[str, float]):
    """How long the parts of a round took."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(_PARTS, 0.0))

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self[part] += time.perf_counter() - began


class Silo:
    """One silo of an experiment.

    Args:
        home: where tokenizers, text, tokens and state lie.
        experiment: the server's id of the run; states of different runs never mix.
        watch: sees the documents as they are read, and as they are tokenised.
    """

    def __init__(
        self, name: str, recipe: Recipe, home: Path, experiment: str, watch: Watch = unwatched
    ) -> None:
        self.name = name
        self.recipe = recipe
        self._home = home
        self._watch = watch
        self._variant = variant(recipe.variant)
        self.folder = home / "silos" / name
        self._states = self.folder / "state" / experiment
        self._received = self._states / "received"

    # ---- what it owns ------------------------------------------------------------------

    @property
    def config(self) -> SiloConfig:
        found = self.recipe.silos.get(self.name)
        if found is None:
            raise DeptError(f"silo {self.name}: not in the recipe's silos")
        return found

    @cached_property
    def corpus(self) -> Corpus:
        return load_corpus(self.name, self.config, self.recipe, self.folder / "text", self._watch)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        recipe, own = self.recipe, self.config
        if own.tokenizer or not recipe.own_tokenizers:
            return load_tokenizer(own.tokenizer or recipe.shared_tokenizer)
        texts = self.corpus.training_sample(recipe.tokenizer_train_bytes)
        pieces = own.vocab_size or recipe.vocab_size
        key = _tokenizer_key([self.corpus], pieces, recipe)
        return _trained_tokenizer(self.name, texts, key, pieces, self._home)

    @cached_property
    def stream(self) -> TokenStream:
        corpus, tokenizer, parent = self.corpus, self.tokenizer, self.folder / "tokens"
        found = load_tokens(self.name, corpus, tokenizer, self._restricts, parent, self._watch)
        check_enough(self.name, found, self.recipe)
        return found

    @property
    def _restricts(self) -> bool:
        return self._variant.restricts_vocabulary and not self.recipe.own_tokenizers

    @property
    def is_read(self) -> bool:
        """Whether its documents lie in the home already."""
        return corpus_folder(self.config, self.recipe, self.folder / "text").is_dir()

    @property
    def is_tokenised(self) -> bool:
        """With a shared tokenizer, whether its token stream lies there too."""
        if not self.is_read:
            return False
        parent = self.folder / "tokens"
        return tokens_folder(self.corpus.digest, self.tokenizer, self._restricts, parent).is_dir()

    @property
    def unigram_bits_per_byte(self) -> float:
        """What token frequencies alone reach on the validation text."""
        nats = self.stream.unigram_nats() * (len(self.stream.validation) - 1)
        return bits_per_byte(nats, self.stream.validation_bytes)

    @cached_property
    def layout(self) -> Layout:
        return layout(self.recipe.model, self.recipe.sequence_tokens)

    @cached_property
    def _device(self) -> torch.device:
        return pick_device(self.recipe.device, self.recipe.processes)

    @property
    def _workers(self) -> Workers:
        return Workers(self.recipe.processes, self.recipe.parallel, self.folder)

    @property
    def received_embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the embeddings that the server sends: none in SPEC."""
        if not self._variant.embeddings_travel:
            return {}  # without reading the text
        return self._variant.shapes(self.layout, self.stream.vocabulary.size)

    # ---- what it does ------------------------------------------------------------------

    def register(self) -> Registration:
        """Make ready (tokenizer, token stream) and measure one step of training."""
        began = time.perf_counter()
        stream, tokenizer = self.stream, self.tokenizer
        self.check_start()
        unigram = self.unigram_bits_per_byte
        prepare_s = time.perf_counter() - began
        return Registration(
            silo=self.name,
            vocabulary=stream.vocabulary.size,
            tokenizer_size=tokenizer.size,
            fingerprint="" if self.recipe.own_tokenizers else tokenizer.fingerprint,
            train_tokens=len(stream.train),
            train_bytes=stream.train_bytes,
            validation_bytes=stream.validation_bytes,
            train_documents=self.corpus.train_documents,
            duplicates=self.corpus.duplicates,
            lossy_documents=stream.lossy_documents,
            unigram_bits_per_byte=unigram,
            step_s=self.try_step().step_s,
            prepare_s=prepare_s,
            on_gpu=self._device.type == "cuda",
            rows=torch.from_numpy(stream.vocabulary.ids) if self._variant.rows_known else None,
        )

    def check_start(self) -> None:
        """Raise DeptError where an open model whose embeddings it starts from does not do."""
        if self.recipe.model.gives_embeddings and not self._variant.embeddings_travel:
            open_model(self.recipe)

    def train(self, task: Task) -> Update:
        """One round: evaluate the body that arrives, train, keep the state, return the deltas."""
        parts = _Seconds()
        with parts.of("load_s"):
            state = self._state(task.start_round)
            task = self._whole(task)
        if self.recipe.wire.sends_changes:
            with parts.of("save_s"):
                task = self._through_disk(task)
        with parts.of("load_s"):
            embeddings = self._start_embeddings(task, state)
            model = self._model(task.body, embeddings)
        with parts.of("settle_s"):
            state = self._settle_in(model, task, state)
        arrived: dict[str, float] = {}
        if self.recipe.evaluates(task.round - 1):
            with parts.of("evaluate_s"):
                arrived = _evaluation_metrics(self._evaluate(model))
            with parts.of("save_s"):
                self._keep_if_best(model, task.round - 1, arrived)
        self._go_on_with_own(model, task, state)
        training = self._train(model, task, state)
        with parts.of("encode_s"):
            body, after = self.layout.split({n: p.cpu() for n, p in parameters(model).items()})
            delta = {name: after[name] - embeddings[name] for name in after}
            asked = self.layout.synchronised(self.recipe, task.round)
            # In the model's memory, which has done its work.
            body_delta = {name: body.pop(name).sub_(task.body[name]) for name in asked}
            norms = {"body_delta_norm": norm(body_delta), "embedding_delta_norm": norm(delta)}
            sent, lost = self._as_sent({**body_delta, **self._variant.sent(delta)}, state.lost)
        with parts.of("save_s"):
            self._save(task, replace(state, body=body, lost=lost), after, training)
        metrics = {
            **arrived,
            **_training_metrics(training),
            **parts,
            "body_norm": norm(task.body),
            "embedding_norm": norm(embeddings),
            **norms,
        }
        to_body, others = sent.only(asked), sent.only(n for n in sent if n not in asked)
        return Update(self.name, task.round, to_body, others, metrics, state.warning)

    def finish(self, task: Task) -> tuple[dict[str, float], str, str]:
        """Evaluate the final body and keep it beside the silo's embeddings, with a sample.

        Returns:
            the evaluation's metrics, the sample, and a warning or nothing.
        """
        if task.change is not None:
            raise DeptError(f"silo {self.name}: the final body came as a change, not whole")
        state = self._state(task.start_round)
        embeddings = self._start_embeddings(task, state)
        model = self._model(task.body, embeddings)
        metrics = _evaluation_metrics(self._evaluate(model))
        self._keep(self.final_folder, task.round - 1, task.body, embeddings, metrics)
        if self._best_before(task.round - 1) >= metrics["bits_per_byte"]:
            remove_whole(self.best_folder)  # the final model is the best
        remove_whole(self._received)  # no change comes behind the last round
        text = self._sample(model)
        write_whole(self.final_folder / "sample.txt", text)
        return metrics, text, state.warning

    def _keep_if_best(
        self, model: PreTrainedModel, round_: int, metrics: Mapping[str, float]
    ) -> None:
        """Keep a model that has just been evaluated, unless one of before was as good."""
        if round_ < self.recipe.first_model or not self.recipe.keep_best:
            return
        if metrics["bits_per_byte"] < self._best_before(round_):
            own = {n: p.detach().cpu() for n, p in parameters(model).items()}
            self._keep(self.best_folder, round_, *self.layout.split(own), metrics, durable=False)

    def _best_before(self, round_: int) -> float:
        """Bits per byte of the best model kept; infinity where there is none.

        One that a round behind this one has left is of rounds which are done again.
        """
        try:
            meta = load_meta(self.best_folder)
        except (DeptError, OSError, ValueError):
            return math.inf
        return float(meta["metrics"]["bits_per_byte"]) if meta["round"] < round_ else math.inf

    def _keep(
        self,
        folder: Path,
        round_: int,
        body: Tensors,
        embeddings: Tensors,
        metrics: Mapping[str, float],
        durable: bool = True,
    ) -> None:
        """Write a whole model of the silo's, with its evaluation."""
        tensors = {**with_prefix("body", body), **with_prefix("embeddings", embeddings)}
        facts = {"recipe": json.loads(self.recipe.to_json()), "data": self._data_facts()}
        save_state(folder, tensors, {**self._tags(round_), **facts, "metrics": metrics}, durable)

    def _data_facts(self) -> dict[str, int]:
        """Counts for whoever gets the model, and no text."""
        corpus, stream = self.corpus, self.stream
        return {
            "train_documents": corpus.train_documents,
            "train_bytes": corpus.train_bytes,
            "train_tokens": len(stream.train),
            "validation_documents": corpus.validation_documents,
            "validation_bytes": corpus.validation_bytes,
            "validation_tokens": len(stream.validation),
        }

    @property
    def final_folder(self) -> Path:
        """Where `finish` keeps the final body, the silo's embeddings and the sample."""
        return self._states / FINAL

    @property
    def best_folder(self) -> Path:
        """Likewise, the best model of those evaluated, where that is not the final one."""
        return self._states / BEST

    def drop_rounds(self) -> None:
        """Drop the state of all rounds, without which training cannot go on; models stay."""
        drop_rounds_before(self._states, self.recipe.rounds + 1)
        remove_whole(self._received)

    # ---- the steps of a round -------------------------------------------------------------

    def _state(self, round_: int) -> _State:
        """The state behind a round; where it is damaged, that of the round before, with a warning.

        Raises:
            DeptError: there is none, or it was made with other text, tokenizer or model.
        """
        if round_ == 0:
            return _State()
        try:
            return self._state_of(round_)
        except DamagedState as damage:
            older = [r for r in rounds_on_disk(self._states) if r < round_]
            if not older:
                raise DeptError(
                    f"silo {self.name}: {damage}; put its home back from a backup, or join under "
                    "another name"
                ) from damage
            found = self._state(older[-1])
            warning = f"{damage}; going on from its state of round {older[-1]}"
            # What its codec had lost was sent since, but of fragments whose turn did not come.
            since = range(older[-1] + 1, round_ + 1)
            sent = {n for r in since for n in self.layout.synchronised(self.recipe, r)}
            lost = {n: found.lost[n] for n in self.layout.body.keys() & found.lost.keys() - sent}
            return replace(found, lost=lost, warning=found.warning or warning)

    def _state_of(self, round_: int) -> _State:
        tensors, meta = load_state(round_folder(self._states, round_))
        for key, value in self._tags(round_).items():
            if meta.get(key) != value:
                raise DeptError(
                    f"silo {self.name}: its state of round {round_} has {key}={meta.get(key)!r}, "
                    f"it is {value!r} now; put the old {key} back, or start a new run"
                )
        moments = under_prefix("optimizer", tensors) if self.recipe.inner.state == "keep" else {}
        return _State(
            position=meta["position"],
            embeddings=under_prefix("embeddings", tensors),
            moments=moments,
            lost=under_prefix("lost", tensors),
            body=under_prefix("body", tensors),
            arrived=meta.get("arrived", {}),
        )

    def _whole(self, task: Task) -> Task:
        """The task with body and embeddings, where it came as a change.

        Raises:
            NeedsWhole: the silo has not what it changes.
        """
        change = task.change
        if change is None:
            return task
        try:
            whole, _ = load_state(round_folder(self._received, task.start_round))
        except DamagedState as damage:
            raise NeedsWhole(str(damage)) from damage
        if not whole.keys() >= {*self.layout.body, *change.body, *change.embeddings}:
            raise NeedsWhole(f"kept not all that arrived in round {task.start_round}")
        for part in (change.body, change.embeddings):
            for name, by in part.items():
                whole[name] = whole[name] + by
        body = {name: whole.pop(name) for name in self.layout.body}
        if digest(body) + digest(whole) != change.digest:
            raise NeedsWhole(
                f"what arrived in round {task.start_round}, with what has changed since, is not "
                "what the server has"
            )
        return replace(task, body=body, embeddings=whole, change=None)

    def _through_disk(self, task: Task) -> Task:
        """Keep what arrived for the next change, and have it from the disk from now on.

        So what a change was decoded into takes no memory while the silo trains. Only the next
        round's change builds on it, and where the disk has lost it the server sends all: nobody
        waits for the disk.
        """
        for round_ in rounds_on_disk(self._received):
            if round_ != task.start_round:  # which this task may be sent for once more
                remove_whole(round_folder(self._received, round_))
        folder = round_folder(self._received, task.round)
        save_state(folder, {**task.body, **task.embeddings}, {"round": task.round}, durable=False)
        tensors = mapped(folder)
        body = {name: tensors.pop(name) for name in task.body}
        return replace(task, body=body, embeddings=tensors)

    def _tags(self, round_: int) -> dict[str, Any]:
        model = json.dumps(self.recipe.model.config, sort_keys=True)
        return {
            "silo": self.name,
            "round": round_,
            "variant": self.recipe.label,
            "tokenizer": self.tokenizer.fingerprint,
            "text": self.corpus.digest,
            "model": hashlib.sha256(model.encode()).hexdigest(),
        }

    def _settle_in(self, model: PreTrainedModel, task: Task, state: _State) -> _State:
        """Fresh embeddings first learn beside a body that is trained already, which stays as it is.

        Else the body would be pulled towards random embeddings.
        """
        steps = self.recipe.inner.newcomer_steps
        if not steps or task.round == 1 or state.embeddings or self._variant.embeddings_travel:
            return state
        warmup = min(self.recipe.inner.warmup_steps, steps // 2)
        inner = replace(self.recipe.inner, local_steps=steps, warmup_steps=warmup)
        own = cast(nn.Module, model).named_parameters()
        body = [parameter for name, parameter in own if name in self.layout.body]
        for parameter in body:
            parameter.requires_grad_(False)
        self._train_steps(model, inner, 0, steps, state)
        for parameter in body:
            parameter.requires_grad_(True)
        return replace(state, position=state.position + steps * inner.batch_size)

    def _go_on_with_own(self, model: PreTrainedModel, task: Task, state: _State) -> None:
        """Put the silo's own body in place of what the server has not changed since."""
        into = dict(cast(nn.Module, model).named_parameters())
        with torch.no_grad():
            for name, tensor in state.body.items():
                if digest({name: task.body[name]}) == state.arrived.get(name):
                    into[name].copy_(tensor)

    def _start_embeddings(self, task: Task, state: _State) -> Tensors:
        if self._variant.embeddings_travel:
            return task.embeddings
        return state.embeddings or first_embeddings(self.recipe, Target.of(self))

    def _model(self, body: Tensors, embeddings: Tensors) -> PreTrainedModel:
        recipe, vocabulary = self.recipe, self.stream.vocabulary
        end_id = int(vocabulary.local_ids()[self.tokenizer.end_id])
        model = assemble(
            recipe.model, recipe.sequence_tokens, body, embeddings, vocabulary.size, end_id
        )
        return _on(model, self._device)

    def _evaluate(self, model: PreTrainedModel) -> Evaluation:
        return evaluate(model, self.stream, self.recipe.sequence_tokens, self.recipe.inner)

    def _sample(self, model: PreTrainedModel) -> str:
        recipe, seed = self.recipe, seed_of(self.recipe.seed, "generated text", self.name)
        window = recipe.sequence_tokens  # all that learned positions reach
        return sample(model, self.stream, self.tokenizer, recipe.sample_tokens, window, seed)

    def _train(self, model: PreTrainedModel, task: Task, state: _State) -> Training:
        inner = self.recipe.inner
        first_step = (task.round - 1) * inner.local_steps
        return self._train_steps(model, inner, first_step, self.recipe.total_steps, state)

    def _train_steps(
        self, model: PreTrainedModel, inner: InnerConfig, first: int, total: int, state: _State
    ) -> Training:
        batches = self._batches(seed := self.batch_seed)
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):  # dropout, where a model has it
            torch.manual_seed(seed_of(seed, first))
            try:
                schedule = Schedule(first, total)
                position, moments = state.position, state.moments
                own = (*self.layout.tokens, *self.layout.positions)
                return self._workers.train(model, batches, inner, schedule, position, moments, own)
            except DeptError as error:
                raise DeptError(f"silo {self.name}: {error}") from error

    @property
    def batch_seed(self) -> int:
        return seed_of(self.recipe.seed, "batches", self.name)

    def _batches(self, seed: int) -> Sequences:
        return Batches(self.stream, self.recipe.sequence_tokens, seed)

    def _as_sent(self, deltas: Tensors, lost: Tensors) -> tuple[Encoded, Tensors]:
        """The deltas as they travel, and what the codec loses of them.

        What it lost of the last ones is added first (error feedback). Takes the deltas' memory.
        """
        wire = self.recipe.wire
        if wire.up == "fp32":
            return encoded(deltas), {}
        sent, kept = {}, {}
        for name, delta in deltas.items():
            if name in lost:
                delta += lost[name]
            if is_exact(wire.up, tuple(delta.shape)):
                sent[name] = delta
                continue
            arrived = torch.empty(delta.shape)
            sent[name] = encode(wire.up, delta, arrived)
            if wire.error_feedback:
                kept[name] = delta.sub_(arrived).bfloat16()
        shapes = {name: tuple(delta.shape) for name, delta in deltas.items()}
        # Lost of fragments that are not sent now, too.
        return Encoded(wire.up, sent, shapes), {**lost, **kept}

    def _save(self, task: Task, state: _State, embeddings: Tensors, training: Training) -> None:
        tensors = {**with_prefix("lost", state.lost), **with_prefix("body", state.body)}
        if not self._variant.embeddings_travel:
            tensors |= with_prefix("embeddings", embeddings)
        if self.recipe.inner.state == "keep":
            tensors |= with_prefix("optimizer", training.optimizer)
        taken = self.recipe.inner.local_steps * self.recipe.inner.batch_size
        arrived = {name: digest({name: task.body[name]}) for name in state.body}
        position = state.position + taken
        meta = {**self._tags(task.round), "position": position, "arrived": arrived}
        before = round_folder(self._states, task.start_round)
        has_older = before.is_dir()
        # If the machine's power fails now, the state before takes this one's place (`_state`): that
        # one has had a round's time to reach the disk, so that waiting for it takes none.
        save_state(round_folder(self._states, task.round), tensors, meta, durable=not has_older)
        if has_older:
            make_durable(before)
        drop_rounds_before(self._states, min(task.keep_from, task.start_round))

    def try_step(self) -> Training:
        """Training of two steps, the first of which pays for warming up; the model is dropped."""
        recipe = self.recipe
        model = build(recipe.model, self.stream.vocabulary.size, recipe.sequence_tokens, 0)
        batches = Batches(self.stream, recipe.sequence_tokens, seed=0)
        steps, schedule = replace(recipe.inner, local_steps=2), Schedule(0, recipe.total_steps)
        return self._workers.train(_on(model, self._device), batches, steps, schedule, 0, {})


def has_shared_tokenizer(recipe: Recipe, home: Path) -> bool:
    """Whether `with_shared_tokenizer` finds its tokenizer there, and neither reads nor trains."""
    if recipe.own_tokenizers or recipe.common_tokenizer:
        return True
    silos = [Silo(name, recipe, home, "") for name in recipe.silo_names]
    if not all(silo.is_read for silo in silos):
        return False
    pieces = recipe.shared_vocab_size or recipe.vocab_size
    key = _tokenizer_key([silo.corpus for silo in silos], pieces, recipe)
    return _tokenizer_file("shared", key, home).is_file()


def with_shared_tokenizer(recipe: Recipe, home: Path) -> Recipe:
    """The recipe with a shared tokenizer named: where it tells none, trained over all silos' text.

    Only a simulation can do this: it reads every silo's text.
    """
    if recipe.own_tokenizers:
        return recipe
    if recipe.common_tokenizer:
        return replace(recipe, shared_tokenizer=recipe.common_tokenizer)
    corpora = [Silo(name, recipe, home, "").corpus for name in recipe.silo_names]
    share = recipe.tokenizer_train_bytes // len(corpora)
    texts = chain.from_iterable(corpus.training_sample(share) for corpus in corpora)
    pieces = recipe.shared_vocab_size or recipe.vocab_size
    key = _tokenizer_key(corpora, pieces, recipe)
    _trained_tokenizer("shared", texts, key, pieces, home)
    return replace(recipe, shared_tokenizer=str(_tokenizer_file("shared", key, home)))


def _tokenizer_key(corpora: list[Corpus], pieces: int, recipe: Recipe) -> str:
    facts = [pieces, recipe.tokenizer_train_bytes, *(c.digest for c in corpora)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _tokenizer_file(owner: str, key: str, home: Path) -> Path:
    return home / "tokenizers" / owner / key / MODEL_FILE


def _trained_tokenizer(
    owner: str, texts: Iterator[str], key: str, pieces: int, home: Path
) -> SentencePieceTokenizer:
    file = _tokenizer_file(owner, key, home)
    if not file.is_file():
        model = train_sentencepiece(owner, texts, pieces)
        with whole_folder(file.parent) as draft:
            (draft / file.name).write_bytes(model)
    return sentencepiece(file.read_bytes())


def _on(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    cast(nn.Module, model).to(device)  # in place; transformers' own signature is too narrow
    return model


def _evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    return {name: float(value) for name, value in vars(evaluation).items()}


def _training_metrics(training: Training) -> dict[str, float]:
    return {
        "loss": training.loss,
        "last_loss": training.last_loss,
        "gradient_norm": training.gradient_norm,
        "tokens": float(training.tokens),
        "train_s": training.seconds,
    }
