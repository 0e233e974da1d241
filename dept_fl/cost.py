"""What a method holds, needs in memory and sends (paper, Tables 1, 2 and 9), as counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from dept_fl.codec import packed_bytes
from dept_fl.config import Recipe
from dept_fl.loss import tokens_at_once
from dept_fl.model import Blocks, Layout

METHODS = ("std", "glob", "trim", "spec", "spec-opt")

_NPY_HEADER_BYTES = 128
_FP32_BYTES, _BF16_BYTES = 4, 2
_LOGIT_COPIES = 3  # of whole logits at the peak; tests/test_cost.py measures it


# ---- parameters and traffic ------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """Of one model: theta, phi and psi; tied parameters count once."""

    body: int
    tokens: int
    positions: int

    @property
    def total(self) -> int:
        """M, if the vocabulary is the whole one."""
        return self.body + self.tokens + self.positions


def parameters(layout: Layout, vocabulary: int) -> Parameters:
    """Of the model that has this layout and a vocabulary of this size."""
    positions = layout.embedding_parameters(0)
    tokens = layout.embedding_parameters(vocabulary) - positions
    return Parameters(layout.body_parameters(), tokens, positions)


def sends_embeddings(method: str) -> bool:
    return not method.startswith("spec")


def sent_parameters(method: str, held: Parameters) -> int:
    """Of one exchange in one direction: a step's gradient in STD, else a round's delta."""
    return held.total if sends_embeddings(method) else held.body


def sent_a_step(method: str, held: Parameters, local_steps: int) -> float:
    """Parameters in one direction by optimiser step (Table 1, communication per step)."""
    sent = sent_parameters(method, held)
    return float(sent) if method == "std" else sent / local_steps


Shapes = Mapping[str, tuple[int, ...]]


def wire_bytes(shapes: Shapes, codec: str = "fp32") -> int:
    """Bytes of these tensors as an array of a message, with its header; 0 where there are none."""
    return packed_bytes(codec, shapes) + _NPY_HEADER_BYTES if shapes else 0


def round_bytes(
    method: str,
    layout: Layout,
    vocabulary: int,
    local_steps: int,
    codec: str = "fp32",
    body: Shapes | None = None,
) -> int:
    """Bytes in one direction in N_local steps.

    STD is data parallelism, in which a worker sends a bare fp32 gradient in every step.

    Args:
        body: what is synchronised of it in the round; None: all.
    """
    if method == "std":
        return parameters(layout, vocabulary).total * _FP32_BYTES * local_steps
    embeddings = layout.embeddings(vocabulary) if sends_embeddings(method) else {}
    due = layout.body if body is None else body
    return wire_bytes(due, codec) + wire_bytes(embeddings, codec)


@dataclass(frozen=True)
class Cost:
    """Of one silo in one round.

    Attributes:
        held_parameters: body, embeddings of its vocabulary, positions.
        up_parameters: what it sends.
        up_bytes: the same on the wire, with array headers.
        down_bytes: what comes down to it, which with fragments is that of the round before.
        whole_bytes: what comes down in fp32, to a silo that did not take part in the round before.
    """

    held_parameters: int
    up_parameters: int
    up_bytes: int
    down_bytes: int
    whole_bytes: int


def cost(recipe: Recipe, layout: Layout, vocabulary: int, round_: int = 1) -> Cost:
    """Of a silo of this recipe whose vocabulary has this size; with fragments, in this round."""
    held, steps = parameters(layout, vocabulary), recipe.inner.local_steps
    of_this, of_last = (layout.synchronised(recipe, r) for r in (round_, round_ - 1))
    up, down, whole = (
        round_bytes(recipe.label, layout, vocabulary, steps, codec, body)
        for codec, body in (
            (recipe.wire.up, of_this),
            (recipe.wire.down, of_last),
            ("fp32", layout.body),
        )
    )
    sent = replace(held, body=sum(map(prod, of_this.values())))
    return Cost(held.total, sent_parameters(recipe.label, sent), up, down, whole)


# ---- memory ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step needs, if all of it is there at once.

    Attributes:
        weights: fp32; with bf16 also the copy of each matrix that the backward pass reads.
        gradients: fp32.
        optimizer: two moments of each parameter (AdamW), or one (Muon's matrices), fp32.
        activations: what the blocks keep for the backward pass of one micro-batch.
        logits: what the loss has of them at its peak. Of a slice of the tokens, in fp32; with bf16
            also a copy for the products. Of all of a micro-batch where the model needs them whole,
            in fp32 three times: the log-softmax, and the gradients on its either side.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def memory(recipe: Recipe, layout: Layout, blocks: Blocks, vocabulary: int) -> Memory:
    """Of training with a vocabulary of this size.

    What came from the server, and the delta for it, lie in main memory besides.
    """
    held, bf16 = parameters(layout, vocabulary).total, trains_in_bf16(recipe)
    sequences = min(recipe.inner.sequences_per_pass, recipe.inner.batch_size)
    tokens = sequences * recipe.sequence_tokens
    copies = _BF16_BYTES * _multiplied(layout, vocabulary) if bf16 else 0
    return Memory(
        weights=held * _FP32_BYTES + copies,
        gradients=held * _FP32_BYTES,
        optimizer=_moments(recipe.inner.optimizer, layout, held) * _FP32_BYTES,
        activations=tokens * activation_bytes(layout, blocks, recipe.sequence_tokens, bf16),
        logits=_logits(tokens, vocabulary, blocks, bf16),
    )


def _logits(tokens: int, vocabulary: int, blocks: Blocks, bf16: bool) -> int:
    if not blocks.slices_logits:
        return tokens * vocabulary * _FP32_BYTES * _LOGIT_COPIES
    each = _FP32_BYTES + (_BF16_BYTES if bf16 else 0)
    return min(tokens, tokens_at_once(vocabulary)) * vocabulary * each


def _moments(optimizer: str, layout: Layout, held: int) -> int:
    if optimizer != "muon":
        return 2 * held
    return 2 * held - sum(prod(shape) for shape in layout.body.values() if len(shape) == 2)


def activation_bytes(layout: Layout, blocks: Blocks, sequence_tokens: int, bf16: bool) -> int:
    """Bytes that the blocks keep of each token for the backward pass.

    Every matrix keeps what it reads and what it writes. With GPT-2's matrices (d to 3d, d to d,
    d to 4d, 4d to d) these are 16 d numbers a block: in 16 bits the 34 h bytes of Korthikanti
    et al. 2022 (Reducing Activation Recomputation in Large Transformer Models, equation 1)
    without the 2 h of dropout's masks. Their attention scores, here one number for each head
    and position, come on top only where attention keeps them. With bf16 the two sums of a block
    are fp32, and of the scores there is a copy in either precision.

    Meant for dense blocks without dropout; those of experts and of state spaces keep more.
    """
    matrices = _matrices(layout)
    numbers = sum(sum(shape[-2:]) for shape in matrices)
    scores = blocks.count * blocks.heads * sequence_tokens if blocks.keeps_scores else 0
    if not bf16:
        return _FP32_BYTES * (numbers + scores)
    sums = 2 * blocks.count * blocks.width
    return _BF16_BYTES * (numbers - sums + scores) + _FP32_BYTES * (sums + scores)


def trains_in_bf16(recipe: Recipe) -> bool:
    """As the inner loop decides it, on a GPU where the recipe asks for one."""
    if recipe.inner.precision != "auto":
        return recipe.inner.precision == "bf16"
    return recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())


def _multiplied(layout: Layout, vocabulary: int) -> int:
    """Parameters of the matrices that tokens are multiplied with: the body's and the head."""
    head = max(prod(rest) for rest in layout.tokens.values())
    return sum(prod(shape) for shape in _matrices(layout)) + vocabulary * head


def _matrices(layout: Layout) -> list[tuple[int, ...]]:
    return [shape for shape in layout.body.values() if len(shape) >= 2]
