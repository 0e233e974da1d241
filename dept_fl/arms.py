"""The arms of a comparison: DEPT's variants, its baselines and controls, each one recipe."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dept_fl.config import Recipe, assignments, with_settings
from dept_fl.errors import ConfigError

SHARED = {"tokenizer": "shared"}
OWN = {"variant": "spec", "tokenizer": "own", "shared_tokenizer": ""}


@dataclass(frozen=True)
class Arm:
    """One way to train on the silos' text.

    Attributes:
        kind: `federation`: silos and a server; `alone`: each silo by itself; `mixed`: a
            federation whose silos each see the mixed text of all; `central`: one model.
        settings: of the recipe, by dotted name.
        tau: of a central arm's mixture, p_i ~ n_i^tau.
        small: a central arm whose batch is one silo's, so that it sees as many tokens as one
            silo; else as many as all silos together (the paper does not state the parity).
        forgets: embeddings are drawn anew in every round (active forgetting).
    """

    name: str
    kind: str
    words: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tau: float = 0.0
    small: bool = False
    forgets: bool = False

    def recipe(self, base: Recipe) -> Recipe:
        """The recipe of this arm, with what `base.arms` says of it.

        Raises:
            ConfigError: the two do not go together.
        """
        settings = {**self.settings, "only": base.silo_names, "without": [], "keep_best": False}
        if self.kind == "alone":  # the mean of one: training goes on where it was
            settings |= {"outer.optimizer": "average", "outer.merge": "mean"}
            settings |= {"outer.learning_rate": None, "outer.momentum": None}
            settings |= {"outer.clip_delta": 0.0, "inner.state": "keep"}
        if self.kind in ("alone", "central"):  # nothing is averaged from which to come up again
            settings["inner.rewarm_steps"] = 0
        made = with_settings(replace(base, arms=[]), settings)
        if self.kind == "central" and not self.small:
            made = _with_batch(made, made.inner.batch_size * len(made.silo_names))
        return with_settings(made, self._own_settings(base))

    def _own_settings(self, base: Recipe) -> dict[str, Any]:
        own: dict[str, Any] = {}
        for line in base.arms:
            pattern, _, words = line.partition(" ")
            if fnmatch.fnmatchcase(self.name, pattern):
                own |= assignments(words)
        return own


def _with_batch(recipe: Recipe, sequences: int) -> Recipe:
    """The recipe with another batch, in passes as large as before."""
    inner = recipe.inner
    return replace(
        recipe,
        inner=replace(inner, batch_size=sequences, micro_batch_size=inner.sequences_per_pass),
    )


def _central(name: str, tau: float, forgets: bool = False) -> list[Arm]:
    what = "embeddings drawn anew every N_local steps, " if forgets else ""
    settings = {"variant": "glob", **SHARED}
    words = f"one model, {what}sequences from silo i with p_i ~ n_i^{tau:g}"
    return [
        Arm(name, "central", f"{words}; tokens of all silos", settings, tau, False, forgets),
        Arm(f"{name}-small", "central", f"{words}; tokens of one", settings, tau, True, forgets),
    ]


ARMS = {
    arm.name: arm
    for arm in [
        *_central("std-0", 0.0),
        *_central("std-0.3", 0.3),
        *_central("std-1", 1.0),
        *_central("act", 1.0, forgets=True),
        Arm("alone", "alone", "each silo by itself, own tokenizer", OWN),
        Arm("mixed", "mixed", "GLOB, but each silo sees all silos' text mixed",
            {"variant": "glob", **SHARED}),
        Arm("glob", "federation", "GLOB", {"variant": "glob", **SHARED}),
        Arm("trim", "federation", "TRIM", {"variant": "trim", **SHARED}),
        Arm("spec", "federation", "SPEC, shared tokenizer", {"variant": "spec", **SHARED}),
        Arm("spec-opt", "federation", "SPEC with a tokenizer for each silo", OWN),
    ]
}  # fmt: skip


def chosen_arms(names: str) -> list[Arm]:
    """The arms of a comma-separated list; `all` are all.

    Raises:
        ConfigError: there is no such arm.
    """
    if names == "all":
        return list(ARMS.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in ARMS]
    if unknown or not wanted:
        raise ConfigError([f"--arms {names!r}: no such arm; arms: all, {', '.join(ARMS)}"])
    return [ARMS[name] for name in dict.fromkeys(wanted)]
