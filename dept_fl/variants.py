"""GLOB, TRIM and SPEC (paper, section 2): what a silo starts from and what it sends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the rules of the variants are read where torch is not needed
    import torch

    from dept_fl.checkpoint import Tensors
    from dept_fl.model import Layout


class Variant(Protocol):
    """One object that holds all a variant decides.

    Attributes:
        embeddings_travel: whether phi and psi are the server's and go with the body.
        restricts_vocabulary: whether a silo has only V_k of a shared tokenizer's ids.
        rows_known: whether the server must know which ids those are.
    """

    embeddings_travel: bool
    restricts_vocabulary: bool
    rows_known: bool

    def start(self, embeddings: Tensors, layout: Layout, rows: torch.Tensor | None) -> Tensors:
        """What the silo gets of the server's embeddings. rows: [|V_k|] ids, in TRIM."""
        ...

    def sent(self, delta: Tensors) -> Tensors:
        """What of the silo's embedding deltas it sends back."""
        ...

    def shapes(self, layout: Layout, vocabulary: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the embeddings that travel to and from a silo with so many ids."""
        ...


class Glob:
    """All of phi and psi travel and are averaged over the sampled silos."""

    embeddings_travel = True
    restricts_vocabulary = False
    rows_known = False

    def start(self, embeddings: Tensors, layout: Layout, rows: torch.Tensor | None) -> Tensors:
        return embeddings

    def sent(self, delta: Tensors) -> Tensors:
        return delta

    def shapes(self, layout: Layout, vocabulary: int) -> dict[str, tuple[int, ...]]:
        return layout.embeddings(vocabulary)


class Trim:
    """The rows of a silo's own vocabulary travel; a row's mean is over the silos that hold it."""

    embeddings_travel = True
    restricts_vocabulary = True
    rows_known = True

    def start(self, embeddings: Tensors, layout: Layout, rows: torch.Tensor | None) -> Tensors:
        return {
            name: tensor[rows] if name in layout.tokens else tensor
            for name, tensor in embeddings.items()
        }

    def sent(self, delta: Tensors) -> Tensors:
        return delta

    def shapes(self, layout: Layout, vocabulary: int) -> dict[str, tuple[int, ...]]:
        return layout.embeddings(vocabulary)


class Spec:
    """Nothing embedding-shaped travels: phi_k and psi_k are the silo's own."""

    embeddings_travel = False
    restricts_vocabulary = True
    rows_known = False

    def start(self, embeddings: Tensors, layout: Layout, rows: torch.Tensor | None) -> Tensors:
        return {}

    def sent(self, delta: Tensors) -> Tensors:
        return {}

    def shapes(self, layout: Layout, vocabulary: int) -> dict[str, tuple[int, ...]]:
        return {}


_VARIANTS: dict[str, Variant] = {"glob": Glob(), "trim": Trim(), "spec": Spec()}


def variant(name: str) -> Variant:
    return _VARIANTS[name]
