"""`dept compare`: arms over seeds, on the same text, tokens and model."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from dept_fl.arms import ARMS, Arm
from dept_fl.central import Central, MixedSilo, probabilities
from dept_fl.checkpoint import write_whole
from dept_fl.config import Recipe, with_settings
from dept_fl.cost import cost
from dept_fl.data import TokenStream, Watch, unwatched
from dept_fl.errors import ConfigError
from dept_fl.report import Event, Ledger
from dept_fl.rounds import Server, has_checkpoint, last_checkpoint, pretrain, shared_tokenizer
from dept_fl.silo import Silo, Task, Update, with_shared_tokenizer
from dept_fl.standings import mean

EQUAL = ("tokens", "bytes")  # what all arms of a table have seen the same number of
_REFERENCE = ARMS["spec-opt"]  # whose bytes the others take where bytes are to be equal


@dataclass(frozen=True)
class Job:
    """One model, or one federation, to be trained.

    Attributes:
        equal: whether the arm takes as many tokens or as many bytes as SPEC-OPT.
        text: a digest of all silos' text.
        silo: of the arm `alone`; else empty.
    """

    arm: Arm
    seed: int
    equal: str
    recipe: Recipe
    text: str
    silo: str = ""

    @property
    def name(self) -> str:
        parts = [self.arm.name, self.silo, f"seed-{self.seed}"]
        return "-".join([p for p in parts if p] + ([] if self.equal == "tokens" else ["bytes"]))

    @property
    def key(self) -> str:
        """Changes whenever the result could."""
        arm = f"{self.arm.kind} {self.arm.tau} {self.arm.forgets}"
        facts = f"{arm} {self.text} {self.recipe.to_json()}"
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    @property
    def work(self) -> int:
        """Tokens it trains on, by which the time left is told."""
        silos = 1 if self.arm.kind == "central" else len(self.recipe.silo_names)
        return self.recipe.rounds * self.recipe.round_tokens * silos

    def run(self, folder: Path, home: Path) -> Event:
        train = _central if self.arm.kind == "central" else _federation
        return {
            "arm": self.arm.name,
            "seed": self.seed,
            "equal": self.equal,
            "silo": self.silo,
            "rounds": self.recipe.rounds,
            "local_steps": self.recipe.inner.local_steps,
            "batch_size": self.recipe.inner.batch_size,
            **train(self, folder, home),
        }

    def line(self, result: Event) -> str:
        bits = mean([silo["bits_per_byte"] for silo in result["silos"].values()])
        return f"{self.name}: {bits:.3f} bits per byte"

    def tidy(self, folder: Path, home: Path) -> None:
        if self.arm.kind != "central":
            for name in self.recipe.silo_names:
                Silo(name, self.recipe, home, experiment_of(folder)).drop_rounds()


@dataclass(frozen=True)
class Comparison:
    """What is to be compared, and where."""

    recipe: Recipe
    arms: list[Arm]
    seeds: int
    out: Path
    home: Path
    equal: str = "tokens"

    def __post_init__(self) -> None:
        if self.equal not in (*EQUAL, "both"):
            raise ConfigError([f"--equal {self.equal!r}: must be tokens, bytes or both"])
        if self.recipe.silos_per_round not in (0, len(self.recipe.silo_names)):
            raise ConfigError(
                [
                    f"silos_per_round={self.recipe.silos_per_round}: arms that take a sample and "
                    "arms that take all would not see as much text; set it to 0"
                ]
            )

    def jobs(self) -> list[Job]:
        """In the order in which they are run: all arms of a seed before the next seed."""
        made = []
        for seed in range(self.recipe.seed, self.recipe.seed + self.seeds):
            base = replace(self.recipe, seed=seed)
            for equal in EQUAL if self.equal == "both" else [self.equal]:
                for arm in self.arms:
                    made += list(self._jobs_of(arm, base, equal))
        return made

    def _jobs_of(self, arm: Arm, base: Recipe, equal: str) -> Iterator[Job]:
        recipe = with_shared_tokenizer(arm.recipe(base), self.home)
        if equal == "bytes":
            steps = self._steps_of_equal_bytes(arm, recipe, base)
            if steps == recipe.inner.local_steps and self.equal == "both":
                return  # the job of equal tokens has them already
            recipe = with_settings(recipe, {"inner.local_steps": steps})
        if arm.kind != "alone":
            yield Job(arm, base.seed, equal, recipe, self._text)
            return
        for silo in recipe.silo_names:
            only = with_settings(recipe, {"only": [silo]})
            yield Job(arm, base.seed, equal, only, self._text, silo)

    @cached_property
    def _text(self) -> str:
        names = self.recipe.silo_names
        digests = [Silo(name, self.recipe, self.home, "").corpus.digest for name in names]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def _steps_of_equal_bytes(self, arm: Arm, recipe: Recipe, base: Recipe) -> int:
        """N_local with which this tokenizer passes over as many bytes as the silos' own do."""
        reference = _bytes_per_token(_REFERENCE, _REFERENCE.recipe(base), self.home)
        own = _bytes_per_token(arm, recipe, self.home)
        return max(1, round(recipe.inner.local_steps * reference / own))

    def prepare(self, watch: Watch = unwatched) -> None:
        """Tokenizers and token streams, before jobs run side by side and would make them twice.

        Args:
            watch: sees the documents as they are read, and as they are tokenised.
        """
        for name in self.recipe.silo_names:
            _ = Silo(name, self.recipe, self.home, "", watch).corpus
        arms = self.arms if self.equal == "tokens" else [*self.arms, _REFERENCE]
        recipes = [with_shared_tokenizer(arm.recipe(self.recipe), self.home) for arm in arms]
        distinct = {(r.variant, r.tokenizer, r.shared_tokenizer): r for r in recipes}
        for recipe in distinct.values():
            for name in recipe.silo_names:
                _ = Silo(name, recipe, self.home, "", watch).stream


def _bytes_per_token(arm: Arm, recipe: Recipe, home: Path) -> float:
    """Mean over the silos, weighted by how often the arm takes a sequence of each."""
    streams = {name: Silo(name, recipe, home, "").stream for name in recipe.silo_names}
    tau = arm.tau if arm.kind == "central" else 0.0
    shares = probabilities({name: len(stream.train) for name, stream in streams.items()}, tau)
    return sum(shares[name] * stream.bytes_per_token for name, stream in streams.items())


# ---- one job ---------------------------------------------------------------------------------


class _Recorded:
    """A silo whose every round goes into the ledger."""

    def __init__(self, silo: Silo, ledger: Ledger) -> None:
        self._silo, self._ledger = silo, ledger

    def train(self, task: Task) -> Update:
        update = self._silo.train(task)
        self._ledger.write("silo_train", silo=task.silo, round=task.round, **update.metrics)
        return update


def _federation(job: Job, folder: Path, home: Path) -> Event:
    recipe, ledger = job.recipe, Ledger(folder)
    experiment = experiment_of(folder)
    silos = {name: Silo(name, recipe, home, experiment) for name in recipe.silo_names}
    if job.arm.kind == "mixed":
        silos = {n: MixedSilo(silo, home, experiment, silos) for n, silo in silos.items()}
    server = Server(recipe, experiment, shared_tokenizer(recipe))
    for silo in silos.values():
        server.register(silo.register())
    if has_checkpoint(folder):
        server.load(*last_checkpoint(folder, recipe))
    ledger.rewind(server.round)
    watched = {name: _Recorded(silo, ledger) for name, silo in silos.items()}
    pretrain(server, watched, lambda: server.save(folder))
    for name, silo in silos.items():
        metrics, _, _ = silo.finish(server.task(name))
        ledger.write("silo_eval", silo=name, round=server.round, **metrics)
    costs = {
        name: [cost(recipe, server.layout, r.vocabulary, t + 1) for t in range(recipe.rounds)]
        for name, r in server.registrations.items()
    }
    sequences = _sequences_seen(silos, {n: len(m.merged) for n, m in server.members.items()})
    return _facts(
        ledger,
        recipe,
        {
            name: Share(
                stream=silo.stream,
                tokens=sequences[name] * recipe.sequence_tokens,
                parameters=costs[name][0].held_parameters,
                bytes_up=0 if job.silo else sum(made.up_bytes for made in costs[name]),
            )
            for name, silo in silos.items()
        },
    )


def experiment_of(folder: Path) -> str:
    """The id under which silos keep a job's state: its own, whatever else trains in the home."""
    file = folder / "experiment"
    if not file.is_file():
        write_whole(file, f"compare-{secrets.token_hex(6)}")
    return file.read_text(encoding="utf-8")


def _sequences_seen(silos: Mapping[str, Silo], rounds: Mapping[str, int]) -> dict[str, int]:
    """How many sequences of each silo's text were trained on, by that silo or by others."""
    seen = dict.fromkeys(silos, 0)
    for name, silo in silos.items():
        inner = silo.recipe.inner
        taken = rounds[name] * inner.local_steps * inner.batch_size
        sources = silo.taken(taken) if isinstance(silo, MixedSilo) else {name: taken}
        for source, count in sources.items():
            seen[source] += count
    return seen


def _central(job: Job, folder: Path, home: Path) -> Event:
    recipe, ledger = job.recipe, Ledger(folder)
    silos = {name: Silo(name, recipe, home, "") for name in recipe.silo_names}
    central = Central(recipe, silos, job.arm.tau, folder, job.arm.forgets)
    central.run(ledger)
    taken = central.mixture.taken(central.sequences)
    return _facts(
        ledger,
        recipe,
        {
            name: Share(
                stream=stream,
                tokens=taken[name] * recipe.sequence_tokens,
                parameters=sum(p.numel() for p in central.model.parameters()),
                bytes_up=0,
            )
            for name, stream in central.streams.items()
        },
    )


@dataclass(frozen=True)
class Share:
    """A silo's part in a job.

    Attributes:
        tokens: of its text that were trained on, by whomever.
        parameters: of the model that is evaluated on its text.
        bytes_up: what it sent in all rounds.
    """

    stream: TokenStream
    tokens: int
    parameters: int
    bytes_up: int


def _facts(ledger: Ledger, recipe: Recipe, shares: Mapping[str, Share]) -> Event:
    events = ledger.read()
    sizes = {share.stream.vocabulary.size for share in shares.values()}
    flops = {size: flops_per_token(recipe, size) for size in sizes}
    return {
        "silos": {
            name: {
                **_last(events, name),
                "tokens": share.tokens,
                "text_bytes": round(share.tokens * share.stream.bytes_per_token),
                "epochs": share.tokens / len(share.stream.train),
                "parameters": share.parameters,
                "bytes_up": share.bytes_up,
                "flops": share.tokens * flops[share.stream.vocabulary.size],
            }
            for name, share in shares.items()
        },
        "train_s": sum(e["train_s"] for e in events if e["event"] == "silo_train"),
        "curve": _curve(events, recipe),
    }


_FIGURES = ("bits_per_byte", "perplexity", "unigram_bits_per_byte", "activation_norm")


def _last(events: list[Event], silo: str) -> Event:
    last = [e for e in events if e["event"] == "silo_eval" and e["silo"] == silo][-1]
    return {key: last[key] for key in _FIGURES}


def _curve(events: list[Event], recipe: Recipe) -> list[Event]:
    """By whole rounds done: bits per byte of each silo, norms of body and activations (Fig. 2).

    What a training event of round t tells of the body is that of t - 1, which it started from.
    """
    rows: dict[int, dict[str, dict[str, float]]] = {}
    for event in events:
        if "bits_per_byte" in event:
            done = event["round"] - (event["event"] == "silo_train")
            row = rows.setdefault(done, {"bits_per_byte": {}, "activation_norm": {}})
            for key, values in row.items():
                values[event["silo"]] = event[key]
    norms: dict[int, list[float]] = {}
    for event in events:
        if event["event"] == "silo_train":
            norms.setdefault(event["round"] - 1, []).append(event["body_norm"])
    return [
        {
            "round": done,
            "steps": done * recipe.inner.local_steps,
            **row,
            "body_norm": sum(norms[done]) / len(norms[done]) if done in norms else None,
        }
        for done, row in sorted(rows.items())
    ]


def flops_per_token(recipe: Recipe, vocabulary: int) -> float:
    """Of forward and backward pass, matrix products and attention, as PyTorch counts them.

    Attention counts as the full product, as is usual, though half of it is masked.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from dept_fl.loss import next_token_loss, plain_head
    from dept_fl.model import build

    model = build(recipe.model, vocabulary, recipe.sequence_tokens, 0)
    sequence = torch.zeros(1, recipe.sequence_tokens + 1, dtype=torch.long)
    plain_head(model)  # tries the model, which is no part of a step
    # The counter does not know the fused kernel of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        next_token_loss(model, sequence).backward()
    return float(counter.get_total_flops()) / recipe.sequence_tokens
