"""What a silo holds and what travels (paper, Table 1), as counts."""

from __future__ import annotations

from dataclasses import dataclass

from dept_fl.config import Recipe
from dept_fl.model import Layout
from dept_fl.silo import Registration
from dept_fl.variants import variant

_NPY_HEADER_BYTES = 128
_FP32_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Of one silo in one round.

    Attributes:
        held_parameters: body, embeddings of its vocabulary, positions.
        up_parameters: what it sends, and as many come down.
        up_bytes: the same on the wire, fp32 with array headers.
    """

    held_parameters: int
    up_parameters: int
    up_bytes: int


def cost(recipe: Recipe, layout: Layout, registration: Registration) -> Cost:
    body = layout.body_parameters()
    embeddings = layout.embedding_parameters(registration.vocabulary)
    travels = variant(recipe.variant).embeddings_travel
    arrays = len(layout.body) + (len(layout.tokens) + len(layout.positions) if travels else 0)
    up = body + (embeddings if travels else 0)
    return Cost(
        held_parameters=body + embeddings,
        up_parameters=up,
        up_bytes=up * _FP32_BYTES + arrays * _NPY_HEADER_BYTES,
    )
