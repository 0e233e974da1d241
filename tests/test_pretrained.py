"""A silo's final model comes back with its tokenizer; controls keep what they say they keep."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dept_fl.config import ModelConfig, Recipe
from dept_fl.errors import DeptError
from dept_fl.evaluate import evaluate
from dept_fl.model import build, parameters
from dept_fl.pretrained import Encoder, Pretrained, load_pretrained, with_control
from dept_fl.silo import Silo
from tests.federation import ALL_VARIANTS, same, trained
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

Make = Callable[..., Recipe]
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32}
LLAMA |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def finished(recipe: Recipe, home: Path) -> Silo:
    """A silo behind a whole run, with its final folder."""
    server, silos = trained(recipe, home)
    silos["bee"].finish(server.task("bee"))
    return silos["bee"]


@pytest.mark.parametrize("variant", ["trim", "spec-opt"])
def test_a_silos_final_model_is_the_one_that_it_evaluated(recipe: Make, home: Path, variant: str):
    made = recipe(f"{ALL_VARIANTS[variant]} rounds=1")
    server, silos = trained(made, home)
    silo = silos["bee"]
    metrics, _, _ = silo.finish(server.task("bee"))
    found = load_pretrained(silo.final_folder)
    again = evaluate(found.model, silo.stream, made.sequence_tokens, made.inner)
    assert again.bits_per_byte == pytest.approx(metrics["bits_per_byte"])
    assert found.sequence_tokens == made.sequence_tokens
    assert found.vocabulary.size == silo.stream.vocabulary.size
    assert found.model.config.eos_token_id == silo.stream.vocabulary.local_ids()[
        silo.tokenizer.end_id
    ]  # fmt: skip


def test_text_becomes_the_ids_that_the_silo_trains_on(recipe: Make, home: Path):
    silo = finished(recipe(f"{ALL_VARIANTS['trim']} rounds=1"), home)
    found = load_pretrained(silo.final_folder)
    assert found.vocabulary.size < found.tokenizer.size  # so that some ids are written as others
    encoder = Encoder(found.tokenizer, found.vocabulary)
    documents = list(silo.corpus.texts("validation"))
    ids = [encoder.end]
    for encoded in encoder(documents):
        ids += [*encoded, encoder.end]
    local = silo.stream.vocabulary.local_ids()[silo.stream.validation]
    assert ids == local.tolist()
    unseen = encoder(["Ω ~ кот"])[0]
    assert min(unseen) >= 0
    whole = [int(found.vocabulary.ids[i]) for i in unseen]
    assert found.tokenizer.decode(whole) == "Ω ~ кот"


def test_no_text_is_no_ids(recipe: Make, home: Path):
    found = load_pretrained(finished(recipe("rounds=1"), home).final_folder)
    assert Encoder(found.tokenizer, found.vocabulary)(["", "a"])[0] == []


def test_the_silos_text_need_not_be_there_any_more(recipe: Make, tmp_path: Path):
    """Its tokenizer is enough, and is found again in a home that was moved."""
    silo = finished(recipe("rounds=1"), tmp_path / "home")
    final = silo.final_folder.relative_to(tmp_path / "home")
    shutil.rmtree(silo.folder / "text")
    shutil.move(tmp_path / "home", tmp_path / "moved")
    found = load_pretrained(tmp_path / "moved" / final)
    assert found.tokenizer.fingerprint == silo.tokenizer.fingerprint


def test_without_its_tokenizer_it_is_refused(recipe: Make, tmp_path: Path):
    silo = finished(recipe("rounds=1"), tmp_path)
    shutil.rmtree(tmp_path / "tokenizers" / "bee")
    with pytest.raises(DeptError, match=r"final: the tokenizer .* is neither in .*tokenizers nor"):
        load_pretrained(silo.final_folder)


def test_without_the_ids_of_its_embeddings_it_is_refused(recipe: Make, tmp_path: Path):
    silo = finished(recipe(f"{ALL_VARIANTS['spec']} rounds=1"), tmp_path)
    shutil.rmtree(silo.folder / "tokens")
    with pytest.raises(DeptError, match=r"vocabulary.npy, which tells the ids .*, is missing"):
        load_pretrained(silo.final_folder)


def test_a_state_in_the_middle_of_a_run_is_no_model(recipe: Make, tmp_path: Path):
    silo = finished(recipe("rounds=1"), tmp_path)
    with pytest.raises(DeptError, match="not the final state of a silo"):
        load_pretrained(silo.final_folder.with_name("round-00001"))


def test_a_folder_without_a_model(tmp_path: Path):
    with pytest.raises(DeptError, match="no model; give a silo's folder home/silos/SILO/state/"):
        load_pretrained(tmp_path)


# ---- Hugging Face folders ---------------------------------------------------------------------


def save_tokenizer(
    folder: Path, size: int = 290, texts: Iterable[str] = ("the leaf is under a small green tree",)
) -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (LLAMA, 24),
        ({"model_type": "mpt", "d_model": 16, "n_layers": 1, "n_heads": 2}, 24),
        ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}, 24),
        ({"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2}, 512),
    ],
)
def test_an_exported_model_is_loaded(tmp_path: Path, config: dict[str, object], longest: int):
    save_tokenizer(tmp_path)
    saved = build(ModelConfig(config=config), 300, 24, seed=1)
    saved.save_pretrained(tmp_path)
    found = load_pretrained(tmp_path)
    assert same(parameters(found.model), parameters(saved))
    assert found.sequence_tokens == longest
    assert found.tokenizer.decode(found.tokenizer.encode(["the leaf"])[0]) == "the leaf"
    assert found.vocabulary.size == found.tokenizer.size <= 300


def test_a_tokenizer_with_more_ids_than_the_model_has_is_refused(tmp_path: Path):
    save_tokenizer(tmp_path)
    build(ModelConfig(config=LLAMA), 100, 24, seed=1).save_pretrained(tmp_path)
    with pytest.raises(DeptError, match=r"tokenizer has 2.. ids, its model embeddings of 100"):
        load_pretrained(tmp_path)


def test_weights_that_are_missing_or_pickled_are_refused(tmp_path: Path):
    save_tokenizer(tmp_path)
    model = build(ModelConfig(config=LLAMA), 300, 24, seed=1)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DeptError, match="transformers cannot load its model"):
        load_pretrained(tmp_path)


# ---- controls ------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pretrained(request: pytest.FixtureRequest, recipe: Make, home: Path) -> Pretrained:
    tied = f"model.config.tie_word_embeddings={str(request.param).lower()} rounds=1"
    return load_pretrained(finished(recipe(tied), home).final_folder)


def changed(before: Pretrained, control: str, seed: int = 1) -> set[str]:
    """The parameters that a control draws anew; those that begin as constants cannot tell."""
    old, new = (parameters(m) for m in (before.model, with_control(before, control, seed)))
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_without_a_control_it_is_a_copy(pretrained: Pretrained):
    assert changed(pretrained, "none") == set()
    with_control(pretrained, "none", 1).get_input_embeddings().weight.data.zero_()
    assert float(pretrained.model.get_input_embeddings().weight.detach().abs().sum()) > 0


def test_a_random_body_keeps_the_embeddings(pretrained: Pretrained):
    names = set(parameters(pretrained.model))
    embeddings = {name for name in names if "embed_tokens" in name or "lm_head" in name}
    assert len(embeddings) in (1, 2)
    assert changed(pretrained, "random") == names - embeddings
    assert changed(pretrained, "scratch") == names


def test_a_control_depends_on_the_seed_alone(pretrained: Pretrained):
    first, again, other = (
        parameters(with_control(pretrained, "random", seed)) for seed in (1, 1, 2)
    )
    assert same(first, again)
    assert not same(first, other)
