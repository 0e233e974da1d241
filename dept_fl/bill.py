"""The bill of a recipe: what every method would cost each of its silos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dept_fl.config import Recipe
from dept_fl.cost import METHODS, Memory, Parameters, memory, parameters, round_bytes, sent_a_step
from dept_fl.errors import DeptError
from dept_fl.model import blocks, layout
from dept_fl.silo import Silo, has_shared_tokenizer, with_shared_tokenizer
from dept_fl.tokenizer import load_tokenizer

ANY_SILO = "any silo"  # where a recipe names none
_SHARED = "shared"


@dataclass(frozen=True)
class Size:
    """Of a vocabulary.

    Attributes:
        source: `given`; from the `recipe` or the `tokenizer` that it names; `prepared`, where
            the silo's tokens lie in the home; or `at most`, where nobody can know before.
    """

    tokens: int
    source: str


@dataclass(frozen=True)
class Vocabularies:
    """Of a federation.

    Attributes:
        shared: V, of the tokenizer that all silos share.
        used: V_k by silo, the ids of that one that occur in its text (TRIM, SPEC).
        own: by silo, of a tokenizer of its own (SPEC-OPT).
    """

    shared: Size
    used: dict[str, Size]
    own: dict[str, Size]

    def of(self, method: str) -> dict[str, Size]:
        """By silo."""
        if method in ("std", "glob"):
            return dict.fromkeys(self.own, self.shared)
        return self.own if method == "spec-opt" else self.used


def vocabularies(recipe: Recipe, home: Path, given: Mapping[str, int]) -> Vocabularies:
    """What can be known of a federation's vocabularies without reading its text.

    Args:
        given: sizes by name: `shared` for V, and a silo's for that of the recipe's own kind,
            V_k where its tokenizer is shared. They name the silos of a recipe that has none.

    Raises:
        DeptError: a name is no silo, V_k is larger than V, or a tokenizer cannot be read.
    """
    silos = recipe.silo_names or sorted(given.keys() - {_SHARED}) or [ANY_SILO]
    unknown = sorted(given.keys() - {_SHARED, *silos})
    if unknown:
        raise DeptError(
            f"--vocabulary {unknown[0]}={given[unknown[0]]}: no silo of this name; give one of "
            f"{', '.join([*silos, _SHARED])}"
        )
    sizes = {name: Size(size, "given") for name, size in given.items()}
    common = None if _SHARED in given else _common(recipe, home)
    shared = sizes.pop(_SHARED, None) or _shared_size(recipe, common)
    used_given, own_given = ({}, sizes) if recipe.own_tokenizers else (sizes, {})
    for name, size in used_given.items():
        if size.tokens > shared.tokens:
            raise DeptError(
                f"--vocabulary {name}={size.tokens}: is more than the shared tokenizer's "
                f"{shared.tokens}; give that too, as shared=SIZE"
            )
    used = {name: used_given.get(name) or _used_size(name, common, home, shared) for name in silos}
    own = {name: own_given.get(name) or _own_size(name, recipe) for name in silos}
    return Vocabularies(shared, used, own)


def _common(recipe: Recipe, home: Path) -> Recipe | None:
    """The recipe with the tokenizer that its silos would share, if there is one already."""
    common = replace(recipe, tokenizer="shared", variant="trim")
    found = has_shared_tokenizer(common, home)
    return with_shared_tokenizer(common, home) if found else None


def _shared_size(recipe: Recipe, common: Recipe | None) -> Size:
    if common is None:
        return Size(recipe.shared_vocab_size or recipe.vocab_size, "recipe")
    return Size(load_tokenizer(common.shared_tokenizer).size, "tokenizer")


def _used_size(name: str, common: Recipe | None, home: Path, shared: Size) -> Size:
    if common and name in common.silos:
        silo = Silo(name, common, home, "")
        if silo.is_tokenised:
            return Size(silo.stream.vocabulary.size, "prepared")
    return Size(shared.tokens, "at most")


def _own_size(name: str, recipe: Recipe) -> Size:
    silo = recipe.silos.get(name)
    if silo and silo.tokenizer:
        return Size(load_tokenizer(silo.tokenizer).size, "tokenizer")
    return Size((silo.vocab_size if silo else 0) or recipe.vocab_size, "recipe")


@dataclass(frozen=True)
class Share:
    """What one method costs one silo.

    Attributes:
        sent_a_step: parameters in one direction, by optimiser step.
        up_bytes, down_bytes: of a round, with the recipe's codecs where silos are averaged; with
            fragments, of the first round.
    """

    method: str
    silo: str
    vocabulary: Size
    parameters: Parameters
    memory: Memory
    sent_a_step: float
    up_bytes: int
    down_bytes: int

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        facts["parameters"]["total"] = self.parameters.total
        facts["memory"]["total"] = self.memory.total
        return facts


def bill(recipe: Recipe, known: Vocabularies) -> list[Share]:
    """Method by method, of every silo.

    Raises:
        ConfigError: transformers does not know the model.
    """
    found = layout(recipe.model, recipe.sequence_tokens)
    kind, steps = blocks(recipe.model, recipe.sequence_tokens), recipe.inner.local_steps
    due = found.synchronised(recipe, 1)
    shares = []
    for method in METHODS:
        for silo, size in known.of(method).items():
            held = parameters(found, size.tokens)
            share_of_body = 1 if method == "std" else recipe.wire.fragments
            sent = replace(held, body=held.body // share_of_body)
            share = Share(
                method=method,
                silo=silo,
                vocabulary=size,
                parameters=held,
                memory=memory(recipe, found, kind, size.tokens),
                sent_a_step=sent_a_step(method, sent, steps),
                up_bytes=round_bytes(method, found, size.tokens, steps, recipe.wire.up, due),
                down_bytes=round_bytes(method, found, size.tokens, steps, recipe.wire.down, due),
            )
            shares.append(share)
    return shares
