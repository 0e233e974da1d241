from __future__ import annotations

import resource
from typing import Any

import pytest
import torch

from dept_fl.checkpoint import Tensors
from dept_fl.config import CONF_DIR, Recipe, load_recipe
from dept_fl.config import ModelConfig as Model
from dept_fl.errors import ConfigError
from dept_fl.model import (
    assemble,
    build,
    initial_body,
    initial_embeddings,
    join,
    layout,
    parameters,
    seed_of,
)

LENGTH = 16

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}
MPT = {"model_type": "mpt", "d_model": 16, "n_layers": 2, "n_heads": 2}
OPT = {
    "model_type": "opt",
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 8,
}
PHI = {
    "model_type": "phi",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SMALL: dict[str, dict[str, Any]] = {
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "llama-untied": {**LLAMA, "tie_word_embeddings": False},
    "gpt2": GPT2,
    "mpt": MPT,
    "opt": OPT,
    "phi": PHI,
}

PRESETS = sorted(p.stem for p in (CONF_DIR / "models").glob("*.yaml"))


def preset(name: str) -> Model:
    return resolved(f"model.preset={name}").model


def resolved(overrides: str) -> Recipe:
    return load_recipe("conf/demo.yaml", overrides)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=tokens).logits
    return found


def some_tokens(vocabulary: int = 50) -> torch.Tensor:
    return torch.arange(LENGTH)[None] * 7 % vocabulary


# ---- the presets -------------------------------------------------------------------------


def gpt2_body(width: int, blocks: int) -> int:
    attention = width * 3 * width + 3 * width + width * width + width
    feed_forward = width * 4 * width + 4 * width + 4 * width * width + width
    norms = 2 * 2 * width
    return blocks * (attention + feed_forward + norms) + 2 * width


def mpt_body(width: int, blocks: int) -> int:
    return blocks * (12 * width * width + 2 * width) + width  # no biases at all


def llama_body(width: int, inner: int, blocks: int) -> int:
    return blocks * (4 * width * width + 3 * width * inner + 2 * width) + width


BODIES = {
    "gpt2-125m": (768, gpt2_body(768, 12)),
    "gpt2-350m": (1024, gpt2_body(1024, 24)),
    "gpt2-1b": (2048, gpt2_body(2048, 24)),
    "mpt-125m": (768, mpt_body(768, 12)),
    "mpt-350m": (1024, mpt_body(1024, 24)),
    "mpt-1b": (2048, mpt_body(2048, 24)),
    "llama-tiny": (192, llama_body(192, 512, 4)),
    "llama-nano": (128, llama_body(128, 344, 4)),
}


def test_every_preset_has_its_body_counted_here() -> None:
    assert sorted(BODIES) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_body_of_its_size(name: str) -> None:
    assert layout(preset(name), 128).body_parameters() == BODIES[name][1]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_one_tied_token_matrix(name: str) -> None:
    width = BODIES[name][0]
    found = layout(preset(name), 128)
    assert list(found.tokens.values()) == [(width,)]
    token_rows = dict.fromkeys(found.tokens, (50257, width))
    assert found.embeddings(50257) == {**token_rows, **found.positions}


@pytest.mark.parametrize("name", PRESETS)
def test_of_the_presets_only_gpt2_learns_positions(name: str) -> None:
    width = BODIES[name][0]
    expected = [(128, width)] if name.startswith("gpt2") else []
    assert list(layout(preset(name), 128).positions.values()) == expected


def test_embeddings_are_counted_for_a_vocabulary() -> None:
    found = layout(preset("gpt2-125m"), 128)
    assert found.embedding_parameters(50257) == 50257 * 768 + 128 * 768


def test_the_layout_of_the_largest_preset_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layout(preset("gpt2-1b"), 2048)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 1024 * 1024  # its parameters are 4.8 GB


# ---- the layout of other models ----------------------------------------------------------


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())
def test_the_body_depends_on_neither_vocabulary_nor_length(config: dict[str, Any]) -> None:
    model = Model(config=config)
    found = layout(model, LENGTH)
    other = build(model, 91, 3 * LENGTH, seed=1)
    shapes = {name: tuple(p.shape) for name, p in other.named_parameters()}
    assert {name: shapes[name] for name in found.body} == found.body


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())
def test_the_layout_has_every_parameter_once(config: dict[str, Any]) -> None:
    model = Model(config=config)
    found = layout(model, LENGTH)
    built = {n: tuple(p.shape) for n, p in build(model, 50, LENGTH, seed=1).named_parameters()}
    assert {**found.body, **found.embeddings(50)} == built
    assert len(found.body) + len(found.tokens) + len(found.positions) == len(built)


TOKENS_AND_POSITIONS = {
    "llama-tied": ([(16,)], []),
    "llama-untied": ([(16,), (16,)], []),
    "gpt2": ([(16,)], [(LENGTH, 16)]),
    "mpt": ([(16,)], []),
    "opt": ([(8,)], [(LENGTH + 2, 16)]),  # its positions start at 2
    "phi": ([(16,), (16,), ()], []),  # its head has a bias, one number a token
}


@pytest.mark.parametrize("name", SMALL)
def test_tokens_and_positions_are_told_apart(name: str) -> None:
    found = layout(Model(config=SMALL[name]), LENGTH)
    shapes = (list(found.tokens.values()), list(found.positions.values()))
    assert shapes == TOKENS_AND_POSITIONS[name]


def test_a_width_that_equals_a_probing_size_does_not_matter() -> None:
    config = {**GPT2, "n_embd": 307, "n_head": 1}
    plain = layout(Model(config=GPT2), LENGTH)
    assert layout(Model(config=config), LENGTH).body.keys() == plain.body.keys()


def test_a_table_of_any_other_kind_goes_with_the_positions() -> None:
    config = {**PHI, "model_type": "bert"}
    found = layout(Model(config=config), LENGTH)
    assert found.positions == {
        "bert.embeddings.position_embeddings.weight": (LENGTH, 16),
        "bert.embeddings.token_type_embeddings.weight": (2, 16),
    }


# ---- split and join ----------------------------------------------------------------------


def halves(name: str, seed: int) -> tuple[Any, Tensors, Tensors]:
    config = Model(config=SMALL[name])
    model = build(config, 50, LENGTH, seed)
    return (model, *layout(config, LENGTH).split(parameters(model)))


@pytest.mark.parametrize("name", SMALL)
def test_split_then_join_gives_the_same_model_bit_for_bit(name: str) -> None:
    source, body, embeddings = halves(name, seed=1)
    target, *_ = halves(name, seed=2)
    assert not torch.equal(logits(target, some_tokens()), logits(source, some_tokens()))
    join(target, body, embeddings)
    assert all(torch.equal(p, parameters(source)[n]) for n, p in parameters(target).items())
    assert torch.equal(logits(target, some_tokens()), logits(source, some_tokens()))


@pytest.mark.parametrize("name", SMALL)
def test_an_assembled_model_is_the_one_that_was_split_its_buffers_too(name: str) -> None:
    source, body, embeddings = halves(name, seed=1)
    made = assemble(Model(config=SMALL[name]), LENGTH, body, embeddings, 50)
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in source.named_parameters()]
    buffers = dict(source.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in made.named_buffers())
    assert torch.equal(logits(made, some_tokens()), logits(source, some_tokens()))


def test_an_assembled_model_leaves_out_the_drawing_of_parameters_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[torch.Tensor] = []
    draw = torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, "normal_", lambda t, *a, **k: [drawn.append(t), draw(t)][1])
    _, body, embeddings = halves("llama-tied", seed=1)
    assert drawn
    drawn.clear()
    assemble(Model(config=SMALL["llama-tied"]), LENGTH, body, embeddings, 50)
    assert not drawn


def test_layouts_of_different_models_with_the_same_settings_differ() -> None:
    wide = {**LLAMA, "hidden_size": 32}
    shapes = [layout(Model(config=config), LENGTH).body for config in (LLAMA, wide, LLAMA)]
    assert shapes[0] == shapes[2] != shapes[1]


def test_a_tied_head_stays_tied_behind_join() -> None:
    source, body, embeddings = halves("llama-tied", seed=1)
    target, *_ = halves("llama-tied", seed=2)
    join(target, body, embeddings)
    assert target.get_output_embeddings().weight is target.get_input_embeddings().weight
    assert target.get_input_embeddings().weight is not source.get_input_embeddings().weight


def test_join_copies() -> None:
    _, body, embeddings = halves("gpt2", seed=1)
    target, *_ = halves("gpt2", seed=2)
    join(target, body, embeddings)
    name = next(iter(body))
    before = body[name].clone()
    parameters(target)[name].add_(1.0)
    assert torch.equal(body[name], before)


def test_join_refuses_a_missing_parameter() -> None:
    model, body, embeddings = halves("gpt2", seed=1)
    missing = body.popitem()[0]
    with pytest.raises(ValueError, match=missing):
        join(model, body, embeddings)


def test_join_refuses_an_unknown_parameter() -> None:
    model, body, embeddings = halves("gpt2", seed=1)
    with pytest.raises(ValueError, match=r"stray\.weight"):
        join(model, {**body, "stray.weight": torch.zeros(1)}, embeddings)


def test_join_refuses_a_parameter_given_twice() -> None:
    model, body, embeddings = halves("gpt2", seed=1)
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight"):
        join(model, {**body, "transformer.wte.weight": torch.zeros(50, 16)}, embeddings)


@pytest.mark.parametrize("shape", [(51, 16), (50, 1), (16,), ()])
def test_join_refuses_another_shape(shape: tuple[int, ...]) -> None:
    model, body, embeddings = halves("gpt2", seed=1)
    embeddings["transformer.wte.weight"] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"wte\.weight: .* for \(50, 16\)"):
        join(model, body, embeddings)


# ---- fresh parameters --------------------------------------------------------------------


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def body_of(config: dict[str, Any], seed: int) -> Tensors:
    model = Model(config=config)
    return initial_body(model, LENGTH, layout(model, LENGTH), seed)


def embeddings_of(config: dict[str, Any], vocabulary: int, seed: int, owner: str) -> Tensors:
    model = Model(config=config)
    return initial_embeddings(model, vocabulary, LENGTH, layout(model, LENGTH), seed, owner)


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())
def test_the_initial_body_depends_on_the_seed_alone(config: dict[str, Any]) -> None:
    first = body_of(config, seed=1)
    torch.rand(1)
    assert same(first, body_of({**config, "vocab_size": 999}, seed=1))
    assert not same(first, body_of(config, seed=2))


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())
def test_initial_embeddings_differ_by_owner_and_seed(config: dict[str, Any]) -> None:
    ant = embeddings_of(config, 50, 1, "ant")
    torch.rand(1)
    assert same(ant, embeddings_of(config, 50, 1, "ant"))
    assert not same(ant, embeddings_of(config, 50, 1, "bee"))
    assert not same(ant, embeddings_of(config, 50, 1, ""))
    assert not same(ant, embeddings_of(config, 50, 2, "ant"))


@pytest.mark.parametrize("vocabulary", [33, 50])
def test_initial_embeddings_have_the_owners_vocabulary(vocabulary: int) -> None:
    shapes = {n: tuple(t.shape) for n, t in embeddings_of(GPT2, vocabulary, 1, "ant").items()}
    assert shapes == layout(Model(config=GPT2), LENGTH).embeddings(vocabulary)


def test_a_model_depends_on_its_seed_alone() -> None:
    first, again, other = (parameters(build(Model(config=GPT2), 50, 16, s)) for s in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("step", ["layout", "build"])
def test_making_a_model_leaves_the_global_generator_alone(step: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    if step == "layout":
        layout(Model(config=GPT2), LENGTH)
    else:
        build(Model(config=GPT2), 50, LENGTH, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", SMALL)
def test_a_built_model_is_plain_fp32_without_padding(name: str) -> None:
    model = build(Model(config=SMALL[name]), 50, LENGTH, seed=1, end_id=7)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.config.eos_token_id == 7
    # A padding row would get no gradient, and id 1 is a real piece here.
    assert model.get_input_embeddings().padding_idx is None


@pytest.mark.parametrize(
    ("one", "other"),
    [((1, "a"), (1, "b")), ((1,), (2,)), (("ab", "c"), ("a", "bc")), ((1, ""), (1,))],
)
def test_seeds_for_different_purposes_differ(
    one: tuple[int | str, ...], other: tuple[int | str, ...]
) -> None:
    assert seed_of(*one) != seed_of(*other)
    assert 0 <= seed_of(*one) < 2**63


# ---- what the models compute -------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_one_step_has_a_finite_loss_and_a_gradient_everywhere(name: str) -> None:
    model = build(Model(config=SMALL[name]), 50, LENGTH, seed=1)
    loss = model(input_ids=some_tokens(), labels=some_tokens()).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert 2.0 < float(loss.detach()) < 6.0  # near ln 50
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("config", [*SMALL.values(), {**PHI, "model_type": "bert"}])
def test_no_model_looks_ahead(config: dict[str, Any]) -> None:
    model = build(Model(config=config), 50, LENGTH, seed=1)
    tokens, changed = some_tokens(), some_tokens()
    changed[0, -1] = 49
    assert torch.equal(logits(model, tokens)[0, :-1], logits(model, changed)[0, :-1])


def test_mpt_knows_the_order_of_tokens_without_learning_positions() -> None:
    # In a single block without positions, the last token sees the others as a set.
    config = Model(config={**MPT, "n_layers": 1})
    model = build(config, 50, LENGTH, seed=1)
    tokens = some_tokens()
    swapped = tokens[:, [1, 0, *range(2, LENGTH)]]
    assert not torch.allclose(logits(model, tokens)[0, -1], logits(model, swapped)[0, -1], atol=0)
    assert layout(config, LENGTH).positions == {}


# ---- what is refused ---------------------------------------------------------------------

BAD = [
    ({"model_type": "lama"}, "model_type='lama': .* did you mean 'llama'"),
    ({"model_type": "t5"}, "model_type='t5': transformers has no causal LM .* llama, gpt2, mpt"),
    ({"model_type": "vit"}, "model_type='vit': transformers has no causal LM of this type"),
    ({}, "model_type=None: transformers has no causal LM"),
    ({"model_type": ["gpt2"]}, "model_type=.'gpt2'.: transformers has no causal LM"),
    ({**LLAMA, "hidden_sise": 16}, "hidden_sise: .* no such setting; did you mean 'hidden_size'"),
    ({**GPT2, "zzz": 16}, "model.config.zzz: GPT2Config has no such setting"),
    ({**MPT, "attn_config": {"allibi": True}}, "attn_config.allibi: .* did you mean 'alibi'"),
    ({**LLAMA, "hidden_size": "wide"}, "'hidden_size' expected int, got str .value: 'wide'."),
    ({**LLAMA, "num_attention_heads": 3}, "hidden size .16. is not a multiple .* heads .3."),
    ({**GPT2, "n_head": 3}, "hidden size 16 is not a multiple of 3 attention heads"),
    ({**MPT, "n_heads": 3}, "hidden size 16 is not a multiple of 3 attention heads"),
    (
        {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 3},
        "4 attention heads do not divide over 3 key-value heads",
    ),
    ({**LLAMA, "hidden_act": "gelloo"}, "cannot build it: KeyError: 'gelloo'"),
    ({**LLAMA, "attn_implementation": "org/code"}, "attn_implementation='org/code': must be one"),
    (
        {**LLAMA, "attn_implementation": "flash_attention_2"},  # which may be fetched too
        "attn_implementation='flash_attention_2': must be one of eager, sdpa",
    ),
    (
        {"model_type": "gemma3", "attn_implementation": {"text_config": "org/code"}},
        "attn_implementation='org/code': must be one",
    ),
    (
        {"model_type": "gemma3", "text_config": {"_attn_implementation": "org/code"}},
        "attn_implementation='org/code': must be one",
    ),
    (
        {**LLAMA, "experts_implementation": "sonicmoe"},
        "experts_implementation='sonicmoe': must be one of eager, batched_mm, grouped_mm",
    ),
    ({"model_type": "gemma4_text"}, "model_type='gemma4_text'.: .*'head_dim' is a per-layer attri"),
    ({"model_type": "gemma4_text", "head_dim": 8}, "'head_dim' is a per-layer attribute"),
    ({"model_type": "xlnet"}, "model_type='xlnet'.: NotImplementedError: .*no sequence length"),
    ({"model_type": "gemma3"}, "model: has no token embeddings or no body; is it a causal LM"),
]


@pytest.mark.parametrize(("config", "fragment"), BAD, ids=[b[1][:30] for b in BAD])
def test_a_bad_model_is_named_with_its_mend(config: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        layout(Model(config=config), LENGTH)


ACCEPTED = [
    {"rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    {"attn_implementation": "eager"},
    {"head_dim": 6},
    {"architectures": ["LlamaForCausalLM"], "transformers_version": "5.0"},
]


@pytest.mark.parametrize("settings", ACCEPTED, ids=[next(iter(a)) for a in ACCEPTED])
def test_what_transformers_itself_writes_or_translates_is_accepted(settings: Any) -> None:
    found = layout(Model(config={**LLAMA, **settings}), LENGTH)
    assert len(found.body) == 19


@pytest.mark.parametrize("name", ["eager", "batched_mm", "grouped_mm"])
def test_experts_may_run_by_what_transformers_has_itself(name: str) -> None:
    mixture = {**LLAMA, "model_type": "mixtral", "num_local_experts": 2}
    assert layout(Model(config={**mixture, "experts_implementation": name}), LENGTH).body


def test_building_a_model_changes_no_recipe():
    """transformers completes the mappings that it is given, in place."""
    config = {**LLAMA, "rope_parameters": {"rope_type": "default"}}
    model = Model(config=config)
    layout(model, LENGTH)
    build(model, 50, LENGTH, 0)
    assert model.config["rope_parameters"] == {"rope_type": "default"}


def test_transformers_fetches_no_kernels():
    from transformers.integrations import hub_kernels

    assert not hub_kernels._kernels_enabled
