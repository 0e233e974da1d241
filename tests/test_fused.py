"""What runs fused beside the same of transformers, from outputs to saved folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.mpt.modeling_mpt import MptAttention, MptModel

from dept_fl.config import ModelConfig
from dept_fl.fused import FusedGelu, FusedMptAttention
from dept_fl.model import build

LENGTH, VOCABULARY = 24, 50
MPT = {"model_type": "mpt", "d_model": 24, "n_layers": 2, "n_heads": 3, "expansion_ratio": 2}
IDS = torch.arange(2 * LENGTH).view(2, -1) * 7 % VOCABULARY


def pair(**config: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A fused model and the same of transformers alone."""
    fused, plain = (
        build(ModelConfig(config={**MPT, **config}), VOCABULARY, LENGTH, seed=2) for _ in range(2)
    )
    own = {"FusedMptModel": MptModel, "FusedMptAttention": MptAttention}
    for module in plain.modules():
        module.__class__ = own.get(type(module).__name__, type(module))
    assert sum(isinstance(module, FusedMptAttention) for module in fused.modules()) == 2
    assert not any(isinstance(module, FusedMptAttention) for module in plain.modules())
    return fused, plain


@pytest.mark.parametrize("length", [1, 2, LENGTH])
@pytest.mark.parametrize(
    "config", [{}, {"attn_config": {"clip_qkv": 0.05, "softmax_scale": 0.3}}, {"n_heads": 4}]
)
def test_outputs_and_gradients_are_those_of_transformers(config: dict[str, Any], length: int):
    made, grads = [], []
    for model in pair(**config):
        logits = model(input_ids=IDS[:, :length]).logits
        logits.square().sum().backward()
        made.append(logits.detach())
        grads.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-5)
    for name, gradient in grads[1].items():
        torch.testing.assert_close(grads[0][name], gradient, rtol=1e-3, atol=1e-4)


def test_bf16_is_as_near_to_fp32_as_that_of_transformers():
    fused, plain = pair()
    with torch.no_grad():
        exact = plain(input_ids=IDS).logits
        with torch.autocast("cpu", torch.bfloat16):
            errors = [(m(input_ids=IDS).logits - exact).norm() for m in (fused, plain)]
    assert errors[0] <= 1.2 * errors[1]


def test_padding_and_a_cache_are_left_to_transformers():
    fused, plain = (model.eval() for model in pair())
    padding = torch.ones_like(IDS)
    padding[0, :5] = 0
    with torch.no_grad():
        masked = [
            m(input_ids=IDS, attention_mask=padding).logits[padding > 0] for m in (fused, plain)
        ]
        torch.testing.assert_close(*masked, rtol=1e-4, atol=1e-5)
        whole = plain(input_ids=IDS).logits
        first = fused(input_ids=IDS[:, :10], use_cache=True)
        rest = fused(input_ids=IDS[:, 10:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(
        torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-5
    )


def test_no_token_sees_those_behind_it():
    fused, _ = pair()
    changed = IDS.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        a, b = fused(input_ids=IDS).logits, fused(input_ids=changed).logits
    assert torch.equal(a[:, :-1], b[:, :-1])
    assert not torch.equal(a[:, -1], b[:, -1])


def test_dropout_in_attention_is_kept():
    fused, _ = pair()
    for block in fused.transformer.blocks:
        block.attn.attn_dropout_p = 0.5  # which transformers' check of a config takes as 0 or 1
    assert not torch.equal(*(fused.train()(input_ids=IDS).logits for _ in range(2)))
    assert torch.equal(*(fused.eval()(input_ids=IDS).logits for _ in range(2)))


def test_a_saved_model_is_a_plain_mpt(tmp_path: Path):
    fused, plain = pair()
    fused.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    configs = [(tmp_path / name / "config.json").read_bytes() for name in ("fused", "plain")]
    assert configs[0] == configs[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert not any(isinstance(module, FusedMptAttention) for module in loaded.modules())
    with torch.no_grad():
        expected = plain.eval()(input_ids=IDS).logits
        torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, expected)


# ---- GELU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_gelu_and_its_gradient_are_those_of_transformers(name: str):
    made = []
    for gelu in (FusedGelu(), ACT2FN[name]):
        x = torch.linspace(-6, 6, 1001, dtype=torch.float64, requires_grad=True)
        y = gelu(x)
        y.sum().backward()
        made.append((y.detach(), x.grad))
    torch.testing.assert_close(made[0], made[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 2},
        {
            "model_type": "gpt2",
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 2,
            "activation_function": "gelu_fast",
        },
        {"model_type": "gptj", "n_embd": 32, "n_layer": 3, "n_head": 2, "rotary_dim": 8},
        {
            "model_type": "gpt_neo",
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 2,
            "attention_types": [[["global"], 3]],
        },
    ],
    ids=["gpt2", "gelu_fast", "gptj", "gpt_neo"],
)
def test_the_gelu_of_gpt2_and_its_kin_runs_fused(config: dict[str, Any]):
    model = build(ModelConfig(config=config), VOCABULARY, LENGTH, seed=1)
    assert sum(isinstance(module, FusedGelu) for module in model.modules()) == 3
