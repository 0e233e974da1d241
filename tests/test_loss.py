"""The sliced loss by hand and against whole logits, for heads of all kinds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from dept_fl import loss
from dept_fl.config import ModelConfig
from dept_fl.loss import next_token_loss, plain_head, tokens_at_once, without_logits
from dept_fl.model import Layout, blocks, build, layout
from dept_fl.stitch import StitchedModel
from dept_fl.train import autocast
from tests.test_model import GPT2, LLAMA, MPT

VOCABULARY, LENGTH = 50, 16
PLAIN: dict[str, dict[str, Any]] = {
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "untied": {**LLAMA, "tie_word_embeddings": False},
    "gpt2": GPT2,
    "mpt": MPT,
    "head bias": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    | {"model_type": "phi"},
    "projected": {  # its decoder ends in a matrix, from 16 to the 8 of its head
        "model_type": "opt",
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 8,
    },
}
CHANGED = {
    "soft cap": {**LLAMA, "model_type": "gemma2", "head_dim": 8},
    "scaled": {**LLAMA, "model_type": "granite", "logits_scaling": 2.0},
}
SEQUENCES = torch.arange(3 * (LENGTH + 1)).view(3, -1) * 7 % VOCABULARY


def model_of(config: dict[str, Any]) -> nn.Module:
    model = build(ModelConfig(config=config), VOCABULARY, LENGTH, seed=4)
    with torch.no_grad():
        for parameter in model.parameters():  # biases start as zeros
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
    return model.eval()


def whole(model: nn.Module, reduction: str = "mean") -> torch.Tensor:
    logits = model(input_ids=SEQUENCES[:, :-1]).logits
    return functional.cross_entropy(
        logits.float().flatten(0, 1), SEQUENCES[:, 1:].flatten(), reduction=reduction
    )


def gradients(model: nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["one slice", "slices of 20"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one slice":  # of 48 tokens, so the last is shorter
        monkeypatch.setattr(loss, "_LOGITS_AT_ONCE", 20 * VOCABULARY)


def test_loss_and_gradients_by_hand():
    """Logits ln 3 and 0 are probabilities 3/4 and 1/4; a gradient is softmax less one-hot."""
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[math.log(3)], [0.0]], requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)
    total = loss._Loss.apply(hidden, weight, bias, torch.tensor([0, 1]), True)
    assert total.item() == pytest.approx(math.log(4 / 3) + math.log(4))
    (total * 2).backward()
    torch.testing.assert_close(hidden.grad, 2 * math.log(3) * torch.tensor([[-0.25], [0.75]]))
    torch.testing.assert_close(weight.grad, 2 * torch.tensor([[0.5], [-0.5]]))
    torch.testing.assert_close(bias.grad, 2 * torch.tensor([0.5, -0.5]))


def test_the_slices_of_a_vocabulary():
    assert [tokens_at_once(size) for size in (2_048, 50_257, 250_112)] == [32_768, 1_335, 268]
    assert tokens_at_once(1 << 30) == 1


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.usefixtures("slices")
def test_the_sliced_loss_is_that_of_whole_logits(kind: str):
    model = model_of(PLAIN[kind])
    assert plain_head(model) is not None
    for reduction in ("mean", "sum"):
        ours, reference = next_token_loss(model, SEQUENCES, reduction), whole(model, reduction)
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=0)
        expected = gradients(model, reference)
        found = gradients(model, ours)
        assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("slices")
def test_in_bf16_the_loss_is_exact_and_gradients_are_as_near_as_those_of_whole_logits():
    model = model_of(PLAIN["untied"])
    exact = gradients(model, whole(model))
    with autocast("bf16", torch.device("cpu")):
        ours, reference = next_token_loss(model, SEQUENCES), whole(model)
    assert ours.item() == pytest.approx(reference.item(), rel=1e-5)
    plain, sliced = gradients(model, reference), gradients(model, ours)
    assert {gradient.dtype for gradient in sliced.values()} == {torch.float32}
    errors = [
        torch.cat([(found[name] - exact[name]).flatten() for name in exact]).norm()
        for found in (sliced, plain)
    ]
    assert errors[0] <= 1.25 * errors[1]


@pytest.mark.parametrize("kind", CHANGED)
def test_logits_that_the_model_changes_are_made_whole(kind: str):
    model = model_of(CHANGED[kind])
    assert plain_head(model) is None
    assert torch.equal(next_token_loss(model, SEQUENCES), whole(model))


def test_a_model_that_cannot_be_tried_makes_its_logits_whole():
    class Rows(nn.Module):
        """Reads its logits by token."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of(PLAIN["tied"])

        def forward(self, input_ids: torch.Tensor) -> Any:
            made = self.inner(input_ids=input_ids)
            made.logits = torch.stack([made.logits[0, i] for i in range(input_ids.shape[1])])[None]
            return made

    model = Rows()
    assert plain_head(model) is None
    assert math.isfinite(next_token_loss(model, SEQUENCES[:1]).item())


def test_trying_draws_no_random_numbers_and_leaves_the_model_as_it_was():
    model = build(ModelConfig(config=PLAIN["gpt2"]), VOCABULARY, LENGTH, seed=0).train()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    head = plain_head(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert head is model.lm_head and "forward" not in vars(head)


def test_a_fault_within_the_loss_gives_the_head_back():
    model = model_of(PLAIN["tied"])
    with pytest.raises(IndexError):
        next_token_loss(model, SEQUENCES + VOCABULARY)
    assert "forward" not in vars(plain_head(model))


def test_the_loss_of_stitched_embeddings_trains_their_maps():
    """Its head has no parameters of its own while it runs: functional_call lends them."""
    base = model_of(PLAIN["tied"])
    found: Layout = layout(ModelConfig(config=PLAIN["tied"]), LENGTH)
    own = {name: torch.randn(VOCABULARY, 4) for name in found.tokens}
    model = StitchedModel(base, own, {name: torch.randn(4, 16) for name in own}, found)
    assert plain_head(model) is not None
    expected = gradients(model, whole(model))
    found_here = gradients(model, next_token_loss(model, SEQUENCES))
    for name, gradient in expected.items():
        torch.testing.assert_close(found_here[name], gradient, rtol=1e-4, atol=1e-6)


def test_hidden_states_without_logits_are_those_with_them():
    model = model_of(PLAIN["tied"])
    with torch.no_grad():
        plain = model(input_ids=SEQUENCES, output_hidden_states=True)
        with without_logits(model):
            bare = model(input_ids=SEQUENCES, output_hidden_states=True)
    assert bare.logits.shape == (1, 1, 1)
    assert torch.equal(bare.hidden_states[-2], plain.hidden_states[-2])


@pytest.mark.parametrize("kind", [*PLAIN, *CHANGED])
def test_an_empty_model_tells_whether_its_logits_are_sliced(kind: str):
    config = {**PLAIN, **CHANGED}[kind]
    assert blocks(ModelConfig(config=config), LENGTH).slices_logits is (kind in PLAIN)


def test_no_gradients_are_computed_for_evaluation(monkeypatch: pytest.MonkeyPatch):
    model = model_of(PLAIN["tied"])
    monkeypatch.setattr(loss, "_add_product", lambda *_: pytest.fail("made a gradient"))
    with torch.no_grad():
        torch.testing.assert_close(next_token_loss(model, SEQUENCES), whole(model))
