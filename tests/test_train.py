"""The inner loop: schedule, accumulation, and rounds that join without a seam."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dept_fl.config import InnerConfig, ModelConfig
from dept_fl.data import Batches, TokenStream
from dept_fl.errors import DeptError
from dept_fl.loss import next_token_loss
from dept_fl.model import build, parameters
from dept_fl.tokenizer import Vocabulary
from dept_fl.train import Schedule, learning_rate, pick_device, train

VOCABULARY = 32
INNER = InnerConfig(local_steps=3, batch_size=4, learning_rate=0.01, warmup_steps=2)
TINY = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def small_model() -> nn.Module:
    return build(ModelConfig(config={**TINY, "tie_word_embeddings": True}), VOCABULARY, 8, seed=1)


def batches(seed: int = 5) -> Batches:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 400).astype(np.uint16)
    ids = np.arange(VOCABULARY)
    stream = TokenStream(tokens, tokens, Vocabulary(ids, VOCABULARY), ids / ids.sum(), 1, 1)
    return Batches(stream, 8, seed)


def test_the_schedule_warms_up_then_follows_one_cosine_to_its_floor():
    inner = InnerConfig(learning_rate=1.0, warmup_steps=4, final_learning_rate_fraction=0.1)
    assert [learning_rate(inner, step, 24) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(inner, 4, 24) == 1.0
    assert learning_rate(inner, 14, 24) == pytest.approx(0.55)  # half way: the mean of both ends
    assert learning_rate(inner, 24, 24) == pytest.approx(0.1)


def test_gradient_accumulation_gives_the_steps_of_the_whole_batch():
    whole, parts = small_model(), small_model()
    train(whole, batches(), INNER, Schedule(0, 6), 0, {})
    train(parts, batches(), replace(INNER, micro_batch_size=1), Schedule(0, 6), 0, {})
    for name, tensor in parameters(whole).items():
        torch.testing.assert_close(parameters(parts)[name], tensor, atol=2e-5, rtol=1e-4)


def test_two_rounds_with_kept_moments_equal_one_of_twice_the_steps_bit_for_bit():
    once, twice = small_model(), small_model()
    train(once, batches(), replace(INNER, local_steps=6), Schedule(0, 6), 0, {})
    first = train(twice, batches(), INNER, Schedule(0, 6), 0, {})
    train(twice, batches(), INNER, Schedule(3, 6), 12, first.optimizer)
    for name, tensor in parameters(once).items():
        assert torch.equal(parameters(twice)[name], tensor)


EMBEDDINGS = ("model.embed_tokens.weight",)


def test_rounds_join_without_a_seam_for_muon_too():
    inner = replace(INNER, optimizer="muon", embedding_learning_rate=0.03)
    once, twice = small_model(), small_model()
    train(once, batches(), replace(inner, local_steps=6), Schedule(0, 6), 0, {}, EMBEDDINGS)
    first = train(twice, batches(), inner, Schedule(0, 6), 0, {}, EMBEDDINGS)
    kinds = {key.split("/")[0] for key in first.optimizer}
    assert kinds == {"exp_avg", "exp_avg_sq", "step", "momentum_buffer"}
    train(twice, batches(), inner, Schedule(3, 6), 12, first.optimizer, EMBEDDINGS)
    for name, tensor in parameters(once).items():
        assert torch.equal(parameters(twice)[name], tensor)


def test_embeddings_have_a_rate_of_their_own():
    """AdamW's first step moves each number by the rate, whatever the gradient."""
    model = small_model()
    before = {name: tensor.clone() for name, tensor in parameters(model).items()}
    inner = replace(INNER, local_steps=1, warmup_steps=0, embedding_learning_rate=0.05)
    train(model, batches(), inner, Schedule(0, 6), 0, {}, EMBEDDINGS)
    for name, tensor in parameters(model).items():
        moved = float((tensor - before[name]).abs().max())
        assert moved == pytest.approx(0.05 if name in EMBEDDINGS else 0.01, rel=0.01)


def test_reset_moments_take_another_path():
    kept, reset = small_model(), small_model()
    for model, carry in ((kept, True), (reset, False)):
        first = train(model, batches(), INNER, Schedule(0, 6), 0, {})
        train(model, batches(), INNER, Schedule(3, 6), 12, first.optimizer if carry else {})
    assert not torch.equal(next(kept.parameters()), next(reset.parameters()))


def test_training_is_torchs_adamw_on_clipped_gradients_of_the_mean_loss():
    ours, reference = small_model(), small_model()
    inner = replace(INNER, weight_decay=0.1, clip_norm=0.5)
    train(ours, batches(), inner, Schedule(0, 3), 0, {})
    matrices = [p for p in reference.parameters() if p.dim() >= 2]
    vectors = [p for p in reference.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for step in range(3):
        rows = torch.from_numpy(batches().at(4 * step, 4))
        logits = reference(input_ids=rows[:, :-1]).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(inner, step, 3)
        adamw.step()
        adamw.zero_grad()
    for name, tensor in parameters(reference).items():
        torch.testing.assert_close(parameters(ours)[name], tensor, atol=1e-6, rtol=1e-5)


def test_the_loss_of_a_model_that_knows_nothing_is_the_log_of_the_vocabulary():
    class Uniform(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> object:
            logits = torch.zeros(*input_ids.shape, VOCABULARY)
            return type("Output", (), {"logits": logits})

    loss = next_token_loss(Uniform(), torch.zeros(2, 9, dtype=torch.long))
    assert loss.item() == pytest.approx(np.log(VOCABULARY))


def test_a_loss_that_is_not_finite_names_the_learning_rate():
    model = small_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(DeptError, match=r"loss became nan .* inner.learning_rate=0.01"):
        train(model, batches(), INNER, Schedule(0, 6), 0, {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_asking_for_a_gpu_where_there_is_none_is_an_error():
    with pytest.raises(DeptError, match="device=cuda"):
        pick_device("cuda")
