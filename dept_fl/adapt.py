"""After DEPT: a body learns on from other embeddings (paper, section 3; Fig. 3: plasticity)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dept_fl.central import Central
from dept_fl.checkpoint import (
    Tensors,
    checksum_of,
    load_meta,
    load_state,
    round_folder,
    rounds_on_disk,
    under_prefix,
    write_whole,
)
from dept_fl.config import Recipe, assignments, load_recipe, recipe_from_json, with_settings
from dept_fl.data import TokenStream, Watch, unwatched
from dept_fl.errors import ConfigError, DeptError
from dept_fl.final import read_final
from dept_fl.model import initial_body, layout, seed_of
from dept_fl.report import Event, Ledger
from dept_fl.silo import Silo, with_shared_tokenizer
from dept_fl.standings import deviation, mean, plot_curves
from dept_fl.tokenizer import Tokenizer, Vocabulary, load_tokenizer
from dept_fl.transfer import METHODS, Source, Target, transfer

RANDOM = "random"  # as a body, or as a start: drawn anew
TRAINED = "trained"
STARTS = (RANDOM, TRAINED, *(method for method in METHODS if method != RANDOM))
SAMPLING = {"uniform": 0.0, "proportional": 1.0}  # tau of the mixture
_STEPS_SHARE = 0.17  # the paper takes another 15 to 19 % of the steps


@dataclass(frozen=True)
class Run:
    """What a run left: a checkpoint of its server, or of a comparison's job.

    Attributes:
        embeddings: in GLOB, TRIM and STD; empty in SPEC.
        experiment: under which silos keep their embeddings.
    """

    folder: Path
    recipe: Recipe
    body: Tensors
    embeddings: Tensors
    experiment: str


def load_run(run_dir: Path, checkpoint: Path | None = None) -> Run:
    """A checkpoint of a run; the newest in its folder, unless one is named.

    Raises:
        DeptError: there is none that can be read.
    """
    tensors, meta = load_state(checkpoint or _newest(run_dir))
    return Run(
        run_dir,
        _recipe_in(meta),
        under_prefix("body", tensors),
        under_prefix("embeddings", tensors),
        meta.get("experiment", ""),
    )


def recipe_of_run(run_dir: Path) -> Recipe:
    """The recipe alone, without reading tensors."""
    return _recipe_in(load_meta(_newest(run_dir)))


def _recipe_in(meta: Mapping[str, Any]) -> Recipe:
    return recipe_from_json(json.dumps(meta["recipe"]))


def _newest(run_dir: Path) -> Path:
    rounds = rounds_on_disk(run_dir / "checkpoints")
    if not rounds:
        raise DeptError(f"{run_dir}: no checkpoint; name the folder of a run or of a job")
    return round_folder(run_dir / "checkpoints", rounds[-1])


@dataclass(frozen=True)
class Adaptation:
    """One body, learning on from one kind of embeddings: a job.

    Attributes:
        body: the folder of a run, or `random`.
        start: of the embeddings: `random`, `trained` (the run's own), or a method of `transfer`.
        recipe: of the training: one tokenizer, `rounds` evaluations every `local_steps`.
        tau: of the text's mixture.
        facts: a digest of the body, of `own` and of the silos' text.
        own: for `stitch`, the folder in which a silo kept embeddings of this tokenizer.
    """

    body: str
    start: str
    recipe: Recipe
    tau: float
    facts: str
    own: str = ""

    @property
    def name(self) -> str:
        return f"{self.label}-{self.start}-seed-{self.recipe.seed}"

    @property
    def label(self) -> str:
        return Path(self.body).name

    @property
    def key(self) -> str:
        facts = f"{self.facts} {self.start} {self.tau} {self.recipe.to_json()}"
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    @property
    def work(self) -> int:
        return self.recipe.rounds * self.recipe.round_tokens

    def run(self, folder: Path, home: Path) -> Event:
        recipe, ledger = self.recipe, Ledger(folder)
        silos = {name: Silo(name, recipe, home, "") for name in recipe.silo_names}
        embeddings, report = self._embeddings(silos, home)
        start = self._body(), embeddings
        central = Central(recipe, silos, self.tau, folder, start=start)
        central.run(ledger)
        return {
            "body": self.label,
            "start": self.start,
            "seed": recipe.seed,
            "transfer": report,
            "curve": _curve(ledger.read(), recipe.inner.local_steps),
        }

    def line(self, result: Event) -> str:
        first, last = result["curve"][0], result["curve"][-1]
        return f"{self.name}: {first['mean']:.3f} to {last['mean']:.3f} bits per byte"

    def tidy(self, folder: Path, home: Path) -> None:
        """The trained model stays."""

    def _body(self) -> Tensors:
        recipe = self.recipe
        found = layout(recipe.model, recipe.sequence_tokens)
        if self.body == RANDOM:
            seed = seed_of(recipe.seed, "random body")
            return initial_body(recipe.model, recipe.sequence_tokens, found, seed)
        body = load_run(Path(self.body)).body
        if {name: tuple(t.shape) for name, t in body.items()} != found.body:
            raise ConfigError([f"{self.body}: its body is not that of the recipe's model"])
        return body

    def _embeddings(self, silos: Mapping[str, Silo], home: Path) -> tuple[Tensors, Event]:
        """Where the embeddings start, and what `transfer` tells of them."""
        tokenizer = next(iter(silos.values())).tokenizer
        if self.start == TRAINED:
            run = load_run(Path(self.body))
            if load_tokenizer(run.recipe.shared_tokenizer).fingerprint != tokenizer.fingerprint:
                raise ConfigError(
                    [f"{self.body}: its embeddings are of another tokenizer; use another --start"]
                )
            return run.embeddings, {}
        own = self._own_embeddings(tokenizer, home) if self.start == "stitch" else {}
        text = _text([silo.stream for silo in silos.values()], self.tau)
        target = Target("adaptation", tokenizer, Vocabulary.whole(tokenizer), text, own)
        if self.start == RANDOM:
            return transfer(RANDOM, [], target, self.recipe).embeddings, {}
        sources = self._sources(load_run(Path(self.body)), home)
        made = transfer(self.start, sources, target, self.recipe)
        return made.embeddings, asdict(made.report)

    def _sources(self, run: Run, home: Path) -> list[Source]:
        finals = sorted(home.glob(f"silos/*/state/{run.experiment}/final"))
        if not run.experiment or not finals:
            raise DeptError(
                f"{self.body}: no silo in {home} has embeddings of this run; --start {self.start} "
                "needs those of a SPEC run's silos, in their --home"
            )
        return [Source.of(read_final(folder, home)) for folder in finals]

    def _own_embeddings(self, tokenizer: Tokenizer, home: Path) -> Tensors:
        final = read_final(Path(self.own), home)
        if final.silo.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                [
                    f"--own {self.own}: its embeddings are of another tokenizer; name it with "
                    "--set shared_tokenizer=FILE"
                ]
            )
        return final.embeddings


def _text(streams: Sequence[TokenStream], tau: float) -> npt.NDArray[Any]:
    """The silos' training tokens: as many of each where they are sampled uniformly, else all."""
    length = min(len(stream.train) for stream in streams) if tau == 0.0 else None
    return np.concatenate([stream.train[:length] for stream in streams])


@dataclass(frozen=True)
class Plan:
    """Every body with every start that it can have, over seeds.

    Attributes:
        bodies: folders of runs, or `random`.
        own: see `Adaptation`.

    Raises:
        ConfigError: naming what is not known.
    """

    bodies: Sequence[str]
    starts: Sequence[str]
    home: Path
    seeds: int = 1
    sampling: str = "uniform"
    own: str = ""

    def __post_init__(self) -> None:
        if len(set(self.starts)) < len(self.starts):
            raise ConfigError([f"--start {','.join(self.starts)}: names one twice"])
        labels = [Path(body).name for body in self.bodies]
        if len(set(labels)) < len(labels):
            raise ConfigError([f"bodies {', '.join(labels)}: two of one name; rename a folder"])
        for start in self.starts:
            if start not in STARTS:
                raise ConfigError([f"--start {start!r}: must be one of {', '.join(STARTS)}"])
        if self.sampling not in SAMPLING:
            raise ConfigError(
                [f"--sampling {self.sampling!r}: must be one of {', '.join(SAMPLING)}"]
            )
        if "stitch" in self.starts and not self.own:
            raise ConfigError(["--start stitch: needs --own, whose embeddings are to be mapped"])

    def _digest(self, body: str, recipe: Recipe) -> str:
        facts = [Silo(name, recipe, self.home, "").corpus.digest for name in recipe.silo_names]
        if body != RANDOM:
            facts.append(checksum_of(_newest(Path(body))))
        if self.own:
            facts.append(checksum_of(Path(self.own)))
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()

    def recipe(self, file: str, overrides: str, steps: int, every: int) -> Recipe:
        """The first run's recipe with one tokenizer for all, and other steps.

        Args:
            file: of a recipe whose silos and model are taken instead.
            overrides: such as ``only=[el]``.
            steps: of the training; 0: 17 % of the run's.
            every: steps between evaluations; 0: an eighth of them.
        """
        runs = [body for body in self.bodies if body != RANDOM]
        if not runs and not file:
            raise ConfigError(["a random body alone tells no model: name a run, or --recipe"])
        first = recipe_of_run(Path(runs[0])) if runs else None
        base = load_recipe(file) if file or first is None else first
        steps = steps or max(1, round(_STEPS_SHARE * base.total_steps))
        every = min(every or max(1, steps // 8), steps)
        settings = {
            "variant": "glob",
            "tokenizer": "shared",
            # Trained embeddings need their own tokenizer; else it is made of the text at hand.
            "shared_tokenizer": first.shared_tokenizer if first and TRAINED in self.starts else "",
            "model.start": "",  # what a body starts from is told by --start
            "rounds": max(1, round(steps / every)),
            "inner.local_steps": every,
            "inner.rewarm_steps": 0,  # pauses for evaluation are no rounds
            "inner.warmup_steps": min(base.inner.warmup_steps, steps // 10),
            "only": base.silo_names,
            "without": [],
            "silos_per_round": 0,
            "evaluate_every": 1,
        }
        return with_settings(replace(base, arms=[]), {**settings, **assignments(overrides)})

    def jobs(self, recipe: Recipe, watch: Watch = unwatched) -> list[Adaptation]:
        """In the order in which they are run, with the text that they share made ready.

        Args:
            watch: sees the documents as they are read, and as they are tokenised.

        Raises:
            ConfigError: for a start that none of the bodies can have.
        """
        starts = {body: [s for s in self.starts if _can_have(body, s)] for body in self.bodies}
        for start in self.starts:
            if not any(start in can for can in starts.values()):
                what = "SPEC runs" if start != TRAINED else "runs with shared embeddings"
                raise ConfigError([f"--start {start}: only {what} can have it; none is named"])
        for name in recipe.silo_names:
            _ = Silo(name, recipe, self.home, "", watch).corpus
        digests = {body: self._digest(body, recipe) for body in self.bodies}
        made = []
        for seed in range(recipe.seed, recipe.seed + self.seeds):
            seeded = with_shared_tokenizer(replace(recipe, seed=seed), self.home)
            for body in self.bodies:
                for start in starts[body]:
                    # The paper: half the rate where the embeddings are trained already.
                    own = seeded if start == RANDOM else _at_half_rate(seeded)
                    tau = SAMPLING[self.sampling]
                    made.append(Adaptation(body, start, own, tau, digests[body], self.own))
        for name in made[0].recipe.silo_names:  # before jobs run side by side would make it twice
            _ = Silo(name, made[0].recipe, self.home, "", watch).stream
        return made


def _at_half_rate(recipe: Recipe) -> Recipe:
    inner, embeddings = recipe.inner, recipe.inner.embedding_learning_rate
    half = None if embeddings is None else embeddings / 2
    return with_settings(
        recipe,
        {"inner.learning_rate": inner.learning_rate / 2, "inner.embedding_learning_rate": half},
    )


def _can_have(body: str, start: str) -> bool:
    if start == RANDOM or body == RANDOM:
        return start == RANDOM
    shares_embeddings = recipe_of_run(Path(body)).variant != "spec"
    return shares_embeddings == (start == TRAINED)


def _curve(events: list[Event], every: int) -> list[dict[str, Any]]:
    by_round: dict[int, dict[str, float]] = {}
    for event in events:
        if event["event"] == "silo_eval":
            by_round.setdefault(event["round"], {})[event["silo"]] = event["bits_per_byte"]
    return [
        {"steps": done * every, "bits_per_byte": silos, "mean": mean(list(silos.values()))}
        for done, silos in sorted(by_round.items())
    ]


@dataclass(frozen=True)
class Row:
    """A body with a start, means over silos and seeds.

    Attributes:
        first, last: bits per byte before the first step and at the end.
        spread: standard deviation of `last` over seeds; None for one.
        reached: the first evaluated step at which the mean over seeds is where the random start
            of the same body ends; None: never, or it is that start.
    """

    body: str
    start: str
    seeds: int
    first: float
    last: float
    spread: float | None
    reached: int | None
    curve: list[tuple[int, float]]


def rows(results: Sequence[Event]) -> list[Row]:
    """One row for each body and start, the best end first."""
    together: dict[tuple[str, str], list[Event]] = {}
    for result in results:
        together.setdefault((result["body"], result["start"]), []).append(result)
    curves = {key: _mean_curve(seeds) for key, seeds in together.items()}
    made = []
    for (body, start), curve in curves.items():
        baseline = curves.get((body, RANDOM), []) if start != RANDOM else []
        goal = baseline[-1][1] if baseline else -math.inf
        reached = next((steps for steps, bits in curve if bits <= goal), None)
        seeds = len(together[body, start])
        spread = deviation([each["curve"][-1]["mean"] for each in together[body, start]])
        made.append(Row(body, start, seeds, curve[0][1], curve[-1][1], spread, reached, curve))
    return sorted(made, key=lambda row: row.last)


def _mean_curve(seeds: Sequence[Event]) -> list[tuple[int, float]]:
    by_seed = [[(point["steps"], point["mean"]) for point in each["curve"]] for each in seeds]
    return [
        (points[0][0], mean([bits for _, bits in points])) for points in zip(*by_seed, strict=True)
    ]


def markdown(made: Sequence[Row]) -> str:
    lines = [
        "| body | embeddings start | bits/byte at step 0 | at the end | random's end reached |",
        "|---|---|---|---|---|",
    ]
    for row in made:
        steps = row.curve[-1][0]
        reached = "" if row.start == RANDOM else "never"
        if row.reached is not None:
            reached = f"at step {row.reached} of {steps}"
        spread = f" ± {row.spread:.3f}" if row.spread is not None else ""
        lines.append(
            f"| {row.body} | {row.start} | {row.first:.3f} | {row.last:.3f}{spread} | {reached} |"
        )
    return "\n".join(lines) + "\n"


def write(results: Sequence[Event], facts: Event, folder: Path) -> list[Row]:
    """adaptation.md, .json and .png (Fig. 3) in `folder`; returns the rows."""
    made = rows(results)
    write_whole(folder / "adaptation.md", markdown(made))
    whole = {**facts, "rows": [asdict(row) for row in made], "results": list(results)}
    write_whole(folder / "adaptation.json", json.dumps(whole, indent=1, sort_keys=True) + "\n")
    curves = {f"{row.body}, {row.start}": {"bits": row.curve} for row in made}
    plot_curves(curves, folder / "adaptation.png", {"bits": "validation bits per byte"})
    return made
