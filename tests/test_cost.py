"""Counts by hand, against transformers' own models, and against a step that is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dept_fl import loss as loss_module
from dept_fl.config import ModelConfig, Recipe
from dept_fl.cost import (
    Cost,
    Memory,
    Parameters,
    activation_bytes,
    cost,
    memory,
    parameters,
    round_bytes,
    sent_a_step,
    trains_in_bf16,
)
from dept_fl.loss import next_token_loss
from dept_fl.model import Blocks, Layout, blocks, build, layout
from dept_fl.paper import preset
from dept_fl.records import record_bytes, to_record
from dept_fl.train import Schedule, autocast, train
from dept_fl.variants import variant

Make = Callable[..., Recipe]

# Two matrices in one block of width 2: 3 x 2 and 2 x 3.
SMALL = Layout(
    body={"up": (3, 2), "down": (2, 3), "norm": (2,)},
    tokens={"wte": (2,)},
    positions={"wpe": (5, 2)},
)
SMALL_BLOCKS = Blocks(count=1, width=2, heads=2, keeps_scores=False, slices_logits=False)
SMALL_HELD = Parameters(body=14, tokens=7 * 2, positions=10)

# ---- parameters and traffic ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "width", "count"), [("125m", 768, 12), ("350m", 1024, 24), ("1b", 2048, 24)]
)
def test_gpt2_parameters_are_the_sum_by_hand(size: str, width: int, count: int):
    found = parameters(layout(preset(f"gpt2-{size}"), 2048), 50_257)
    attention = (width * 3 * width + 3 * width) + (width * width + width)
    feed_forward = (width * 4 * width + 4 * width) + (4 * width * width + width)
    norms = 2 * 2 * width
    body = count * (attention + feed_forward + norms) + 2 * width  # and the final norm
    assert found == Parameters(body, tokens=50_257 * width, positions=2048 * width)


def test_gpt2_small_with_its_own_1024_positions_has_the_parameters_that_everybody_knows():
    assert parameters(layout(preset("gpt2-125m"), 1024), 50_257).total == 124_439_808


@pytest.mark.parametrize(
    ("size", "width", "count"), [("125m", 768, 12), ("350m", 1024, 24), ("1b", 2048, 24)]
)
def test_mpt_has_neither_biases_nor_positions(size: str, width: int, count: int):
    found = parameters(layout(preset(f"mpt-{size}"), 2048), 50_257)
    body = count * (12 * width**2 + 2 * width) + width
    assert found == Parameters(body, tokens=50_257 * width, positions=0)


def test_an_output_bias_is_one_number_a_token():
    biased = replace(SMALL, tokens={"wte": (2,), "bias": ()})
    assert parameters(biased, 7) == Parameters(body=14, tokens=7 * 2 + 7, positions=10)


def test_what_is_sent_by_hand():
    assert parameters(SMALL, 7) == SMALL_HELD
    by_step = {m: sent_a_step(m, SMALL_HELD, 10) for m in ("std", "glob", "trim", "spec")}
    assert by_step == {"std": 38.0, "glob": 3.8, "trim": 3.8, "spec": 1.4}
    by_round = {m: round_bytes(m, SMALL, 7, 10) for m in by_step}
    whole, body = 38 * 4 + 2 * 128, 14 * 4 + 128
    assert by_round == {"std": 38 * 4 * 10, "glob": whole, "trim": whole, "spec": body}
    assert round_bytes("spec-opt", SMALL, 7, 10) == body


def test_trim_sends_the_rows_of_v_k_and_as_many_bytes_as_their_record_has(recipe: Make):
    settings = recipe("variant=trim tokenizer=shared shared_tokenizer=x")
    found = layout(settings.model, settings.sequence_tokens)
    rows = torch.tensor([0, 2, 3, 250, 319])
    embeddings = {n: torch.zeros(shape) for n, shape in found.embeddings(320).items()}
    scattered = variant("trim").start(embeddings, found, rows)
    body = {name: torch.zeros(shape) for name, shape in found.body.items()}
    made = cost(settings, found, vocabulary=5)
    assert made.up_bytes == sum(record_bytes(to_record(part)) for part in (body, scattered))
    assert made.up_parameters == sum(prod(t.shape) for t in (*body.values(), *scattered.values()))
    up = made.up_bytes
    assert made == Cost(made.held_parameters, made.held_parameters, up, up, up)
    assert made.held_parameters == found.body_parameters() + 5 * 16


def test_spec_sends_the_body_and_holds_its_rows_besides(recipe: Make):
    settings = recipe()
    found = layout(settings.model, settings.sequence_tokens)
    made = cost(settings, found, vocabulary=300)
    assert made.up_parameters == found.body_parameters() == made.held_parameters - 300 * 16


# ---- memory -------------------------------------------------------------------------------------


def test_memory_by_hand(recipe: Make):
    settings = recipe("sequence_tokens=5 inner.batch_size=6 inner.micro_batch_size=3 device=cpu")
    tokens = 3 * 5
    assert memory(settings, SMALL, SMALL_BLOCKS, 7) == Memory(
        weights=38 * 4,
        gradients=38 * 4,
        optimizer=38 * 8,
        activations=tokens * 4 * ((3 + 2) + (2 + 3)),
        logits=3 * tokens * 7 * 4,
    )


def test_memory_in_bf16_by_hand(recipe: Make):
    settings = recipe("sequence_tokens=5 inner.batch_size=3 inner.precision=bf16")
    tokens = 3 * 5
    made = memory(settings, SMALL, SMALL_BLOCKS, 7)
    assert made.weights == 38 * 4 + 2 * (6 + 6 + 7 * 2)  # the head reads the token embeddings
    assert made.activations == tokens * (2 * 10 + 2 * (2 * 2))  # two sums of width 2 stay fp32
    assert made.total == made.weights + 38 * 12 + made.activations + 3 * tokens * 7 * 4


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 4), ("bf16", 4 + 2)])
def test_sliced_logits_are_those_of_a_slice(recipe: Make, precision: str, bytes_each: int):
    settings = recipe(f"sequence_tokens=5 inner.batch_size=3 inner.precision={precision}")
    sliced = replace(SMALL_BLOCKS, slices_logits=True)
    assert memory(settings, SMALL, sliced, 7).logits == 3 * 5 * 7 * bytes_each
    long = replace(settings, sequence_tokens=2048)  # 6,144 tokens, of which a slice has 268
    assert memory(long, SMALL, sliced, 250_112).logits == 268 * 250_112 * bytes_each


def test_a_micro_batch_is_never_larger_than_the_batch(recipe: Make):
    few = recipe("inner.batch_size=2")
    many = recipe("inner.batch_size=2 inner.micro_batch_size=2")
    assert memory(few, SMALL, SMALL_BLOCKS, 7) == memory(many, SMALL, SMALL_BLOCKS, 7)


def test_gpt2s_matrices_keep_16_d_numbers_a_block():
    """Korthikanti et al. 2022 count 34 d bytes in 16 bits, of which dropout's masks take 2 d."""
    d, count = 768, 12
    found, kind = layout(preset("gpt2-125m"), 2048), blocks(preset("gpt2-125m"), 2048)
    assert activation_bytes(found, kind, 2048, bf16=False) == count * 16 * d * 4
    assert activation_bytes(found, kind, 2048, bf16=True) == count * ((34 - 2) * d + 2 * 2 * d)


def test_only_attention_without_a_fused_kernel_keeps_its_scores():
    """BLOOM's ALiBi is computed in steps; the scores of a block are heads * L for each token."""
    gpt2, mpt = (blocks(preset(name), 2048) for name in ("gpt2-125m", "mpt-125m"))
    bloom = blocks(of_type("bloom"), 2048)
    assert [kind.keeps_scores for kind in (gpt2, mpt, bloom)] == [False, False, True]
    assert (mpt.count, mpt.width, mpt.heads) == (12, 768, 12)
    found = layout(preset("mpt-125m"), 2048)
    scores = activation_bytes(found, replace(mpt, keeps_scores=True), 2048, bf16=False)
    assert scores - activation_bytes(found, mpt, 2048, bf16=False) == 12 * 12 * 2048 * 4


@pytest.mark.parametrize(
    ("settings", "bf16"),
    [
        ("device=cpu", False),
        ("device=cuda", True),
        ("device=cuda inner.precision=fp32", False),
        ("device=cpu inner.precision=bf16", True),
    ],
)
def test_the_precision_is_that_of_the_device(recipe: Make, settings: str, bf16: bool):
    assert trains_in_bf16(recipe(settings)) is bf16


# ---- against a step that is measured -------------------------------------------------------------

_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0},
    "mpt": {"d_model": 64, "n_layers": 4, "n_heads": 4, "expansion_ratio": 4},
    "llama": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, **_GROUPED},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4,
                 "num_attention_heads": 4},
    "opt": {"hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
            "word_embed_proj_dim": 64, "dropout": 0.0},
    "bloom": {"hidden_size": 64, "n_layer": 4, "n_head": 4},
}  # fmt: skip
SEQUENCES, LENGTH, VOCABULARY = 4, 128, 512
LOGITS = SEQUENCES * LENGTH * VOCABULARY * 4


def of_type(kind: str) -> ModelConfig:
    return ModelConfig(config={"model_type": kind, **MODELS[kind]})


def loss_of(model: torch.nn.Module, precision: str) -> torch.Tensor:
    ids = torch.arange(SEQUENCES * (LENGTH + 1)).remainder(VOCABULARY).view(SEQUENCES, -1)
    with autocast(precision, torch.device("cpu")):
        return next_token_loss(model, ids)


def kept_bytes(kind: str, precision: str) -> int:
    """What autograd keeps for the backward pass of a real model, its parameters apart."""
    model = build(of_type(kind), VOCABULARY, LENGTH, seed=0)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # holding them, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, precision)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("kind", "precision", "low", "high"),
    [
        ("gpt2", "fp32", 1.0, 1.05),
        ("gpt2", "bf16", 1.0, 1.05),
        ("mpt", "fp32", 1.0, 1.1),  # its ALiBi bias, once for all blocks, is not counted
        ("mpt", "bf16", 1.0, 1.1),
        ("llama", "fp32", 1.0, 1.2),
        ("llama", "bf16", 1.3, 1.5),  # its norms are written out, in fp32
        ("gpt_neox", "fp32", 1.0, 1.2),
        ("gpt_neox", "bf16", 1.0, 1.2),
        ("opt", "fp32", 0.65, 0.75),  # ReLU keeps what it writes, which the next matrix reads
        ("opt", "bf16", 0.8, 0.9),
    ],
)
def test_the_formula_of_activations_is_near_what_a_real_model_keeps(
    kind: str, precision: str, low: float, high: float
):
    found, bf16 = layout(of_type(kind), LENGTH), precision == "bf16"
    each = activation_bytes(found, blocks(of_type(kind), LENGTH), LENGTH, bf16)
    copies = 2 * multiplied(found) if bf16 else 0  # those of the weights are kept as well
    measured = kept_bytes(kind, precision) - copies
    assert low <= measured / (SEQUENCES * LENGTH * each) <= high


def multiplied(found: Layout) -> int:
    return sum(prod(shape) for shape in found.body.values() if len(shape) == 2)


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, made)):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self._alive.setdefault(reference.cdata, (reference, storage.nbytes()))
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return made


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimisers_states_are_those_that_training_leaves(recipe: Make, optimizer: str):
    inner = replace(recipe().inner, optimizer=optimizer, local_steps=1, batch_size=1)
    settings = replace(recipe(), inner=inner, model=of_type("gpt2"), sequence_tokens=LENGTH)
    found = layout(settings.model, LENGTH)
    model = build(settings.model, VOCABULARY, LENGTH, seed=0)
    embeddings = (*found.tokens, *found.positions)
    left = train(model, Zeros(), inner, Schedule(0, 1), 0, {}, embeddings).optimizer
    counted = memory(settings, found, blocks(settings.model, LENGTH), VOCABULARY)
    assert counted.optimizer == sum(t.numel() * 4 for t in left.values() if t.dim())


class Zeros:
    """Sequences of one token."""

    def at(self, position: int, count: int) -> npt.NDArray[np.int64]:
        return np.zeros((count, LENGTH + 1), dtype=np.int64)


def at_the_peak(kind: str, precision: str) -> int:
    """Bytes of a training step beside the model and what its blocks keep."""
    model = build(of_type(kind), VOCABULARY, LENGTH, seed=0)
    weights = sum(p.numel() * 4 for p in model.parameters())
    with Peak() as peak:
        loss_of(model, precision).backward()
    return peak.bytes - weights - kept_bytes(kind, precision)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("precision", "copies"), [("fp32", 1.0), ("bf16", 1.5)])
def test_at_the_peak_the_loss_has_a_slice_of_logits(
    kind: str, precision: str, copies: float, monkeypatch: pytest.MonkeyPatch
):
    """Besides hidden states, their gradient and the head's; in bf16 what is multiplied, and the
    head's gradient of one slice."""
    monkeypatch.setattr(loss_module, "_LOGITS_AT_ONCE", VOCABULARY * 384)
    beside = 4 * 64 * (2 * SEQUENCES * LENGTH + VOCABULARY)
    if precision == "bf16":
        beside += 2 * 64 * (2 * VOCABULARY + 384)
    slice_bytes = 384 * VOCABULARY * 4
    measured = at_the_peak(kind, precision) - beside
    assert measured / slice_bytes == pytest.approx(copies, abs=0.15)


def test_at_the_peak_whole_logits_are_there_three_times(monkeypatch: pytest.MonkeyPatch):
    """The log-softmax is among what is kept; two gradients come on top."""
    monkeypatch.setattr(loss_module, "plain_head", lambda model: None)
    for kind in ("gpt2", "llama"):
        assert at_the_peak(kind, "fp32") / LOGITS == pytest.approx(2.0, abs=0.05)
