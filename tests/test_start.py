"""A run that starts from an open model: its body and embeddings, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dept_fl import checkup
from dept_fl.adapt import Plan
from dept_fl.arms import ARMS
from dept_fl.bill import Size, bill, vocabularies
from dept_fl.central import Central
from dept_fl.checkup import Checkup, Subject
from dept_fl.config import CONF_DIR, Recipe, load_recipe
from dept_fl.errors import ConfigError, DeptError
from dept_fl.evaluate import evaluate
from dept_fl.export import export, silo_at_home
from dept_fl.model import assemble, build, layout, parameters
from dept_fl.outlook import look_ahead
from dept_fl.pretrained import load_pretrained
from dept_fl.progress import Progress
from dept_fl.rounds import Server, last_checkpoint, shared_tokenizer
from dept_fl.silo import Silo, with_shared_tokenizer
from dept_fl.silo_file import load_silo_file
from dept_fl.start import open_model
from dept_fl.strategy import DeptStrategy
from tests.conftest import SETTINGS
from tests.federation import ALL_VARIANTS, InProcessGrid, run, same, start, state_of, trained
from tests.test_checkup import FAST
from tests.test_flower import dept
from tests.test_pretrained import save_tokenizer
from tests.test_recipes import commands

Make = Callable[..., Recipe]
LENGTH, REACH = 16, 64  # tokens of a sequence, and what the open model was made for
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}
MPT = {"model_type": "mpt", "d_model": 16, "n_layers": 1, "n_heads": 2}
# Its second layer routes by scores to which a buffer is added.
ROUTED = {**LLAMA, "model_type": "glm4_moe", "n_routed_experts": 4, "num_experts_per_tok": 2}
ROUTED |= {"first_k_dense_replace": 1, "moe_intermediate_size": 8, "head_dim": 8, "n_group": 1}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "max_position_embeddings": REACH, "tie_word_embeddings": True},
    "llama-untied": {**LLAMA, "max_position_embeddings": REACH, "tie_word_embeddings": False},
    "gpt2": {**GPT2, "n_positions": REACH, "tie_word_embeddings": True},
    "gpt2-untied": {**GPT2, "n_positions": REACH, "tie_word_embeddings": False},
}


def save_model(
    folder: Path,
    text: list[str],
    rows: int = 0,
    dtype: str = "float32",
    steps: int = 0,
    **config: Any,
) -> None:
    """A causal LM that transformers alone made, trained so many steps and saved."""
    save_tokenizer(folder, 340, text)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made_for = AutoConfig.for_model(vocab_size=rows or len(tokenizer), **config)
        model = AutoModelForCausalLM.from_config(made_for, dtype=torch.float32)
    ids = torch.tensor(tokenizer("<|end|>".join(text))["input_ids"])
    batches = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH).split(32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        batch = batches[step % len(batches)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(getattr(torch, dtype)).save_pretrained(folder)


@pytest.fixture(scope="session")
def text(tiny_file: Path) -> list[str]:
    """What the open models have read: that of two silos."""
    files = [tiny_file.parent / f"{name}.jsonl" for name in ("ant", "bee")]
    return [json.loads(line)["text"] for f in files for line in f.read_text().splitlines()]


@pytest.fixture(scope="session")
def models(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An open model of each kind."""
    folder = tmp_path_factory.mktemp("open")
    for kind, config in KINDS.items():
        save_model(folder / kind, text, steps=60, **config)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def llama(models: dict[str, Path]) -> Path:
    return models["llama"]


@pytest.fixture
def starting(recipe: Make) -> Callable[..., Recipe]:
    """starting(folder, "variant=glob tokenizer=shared"): the small recipe from an open model."""

    def make(folder: Path, overrides: str = "") -> Recipe:
        return recipe(f"model.config={{}} {shlex.quote(f'model.start={folder}')} {overrides}")

    return make


def opened(folder: Path) -> PreTrainedModel:
    """The model as transformers alone opens it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def server_of(recipe: Recipe, home: Path) -> Server:
    """The server alone, before any silo has answered."""
    made = with_shared_tokenizer(recipe, home)
    return Server(made, "e" * 12, shared_tokenizer(made))


def evaluated(recipe: Recipe, home: Path) -> dict[str, float]:
    """Bits per byte before the first step, of silos that have text which the model knows."""
    server, silos = start(recipe, home)
    return {
        name: silos[name].train(server.task(name)).metrics["bits_per_byte"]
        for name in ("ant", "bee")
    }


# ---- what is before round 1 --------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["glob", "spec-opt"])
def test_the_body_is_the_models_bit_for_bit(
    starting: Make, models: dict[str, Path], home: Path, kind: str, variant: str
) -> None:
    server = server_of(starting(models[kind], ALL_VARIANTS[variant]), home)
    own = parameters(opened(models[kind]))
    assert same(server.body, {name: own[name] for name in server.layout.body})
    assert server.layout.positions == (
        {} if "llama" in kind else {"transformer.wpe.weight": (REACH, 16)}
    )
    assert len(server.layout.tokens) == 1 + ("untied" in kind)
    if variant == "glob":
        assert same({**server.body, **server.embeddings}, own)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_models_vocabulary_round_0_is_the_model_itself(
    starting: Make, models: dict[str, Path], home: Path, kind: str
) -> None:
    made = starting(models[kind], "variant=glob tokenizer=shared")
    server, silos = start(made, home)
    model = opened(models[kind])
    for name in ("ant", "cat"):
        silo = silos[name]
        metrics = silo.train(server.task(name)).metrics
        own = evaluate(model, silo.stream, made.sequence_tokens, made.inner)
        assert metrics["bits_per_byte"] == pytest.approx(own.bits_per_byte, rel=1e-6)
        if name != "cat":  # whose language it never saw
            assert own.validation_loss < 0.8 * math.log(silo.tokenizer.size)


@pytest.mark.parametrize("variant", ["trim", "spec"])
@pytest.mark.parametrize("kind", ["gpt2-untied", "llama"])
def test_a_silos_part_of_the_vocabulary_has_the_models_rows(
    starting: Make, models: dict[str, Path], home: Path, kind: str, variant: str
) -> None:
    server, silos = start(starting(models[kind], ALL_VARIANTS[variant]), home)
    own = parameters(opened(models[kind]))
    for name, silo in silos.items():
        found = silo._start_embeddings(server.task(name), silo._state(0))
        rows = torch.from_numpy(silo.stream.vocabulary.ids)
        assert len(rows) < silo.tokenizer.size
        assert same(found, {n: own[n][rows] if n in silo.layout.tokens else own[n] for n in found})


def test_an_own_vocabulary_starts_better_from_copies_and_mixes_than_at_random(
    starting: Make, llama: Path, home: Path
) -> None:
    bits = {
        way: evaluated(starting(llama, f"model.start_embeddings={way}"), home)
        for way in ("random", "copy", "mix")
    }
    for name in ("ant", "bee"):
        assert bits["copy"][name] < bits["random"][name]
        assert bits["mix"][name] < bits["random"][name]


def test_another_shared_vocabulary_is_carried_over_too(
    starting: Make, recipe: Make, llama: Path, home: Path
) -> None:
    common = with_shared_tokenizer(recipe("variant=glob tokenizer=shared"), home).shared_tokenizer
    words = f"variant=glob tokenizer=shared {shlex.quote(f'shared_tokenizer={common}')}"
    bits = {
        way: evaluated(starting(llama, f"{words} model.start_embeddings={way}"), home)
        for way in ("random", "copy")
    }
    assert bits["copy"]["ant"] < bits["random"]["ant"]


def test_random_embeddings_are_those_of_a_run_without_an_open_model(
    starting: Make, recipe: Make, llama: Path, home: Path
) -> None:
    plain = recipe("model.config.num_key_value_heads=1")
    made = [
        silos["ant"]._start_embeddings(server.task("ant"), silos["ant"]._state(0))
        for server, silos in (
            start(each, home) for each in (plain, starting(llama, "model.start_embeddings=random"))
        )
    ]
    assert same(*made)


def test_rows_that_pad_the_table_are_left_out(
    starting: Make, text: list[str], home: Path, tmp_path: Path
) -> None:
    save_model(tmp_path, text, rows=384, **KINDS["llama-untied"])
    server = server_of(starting(tmp_path, "variant=glob tokenizer=shared"), home)
    own = parameters(opened(tmp_path))
    for name, tensor in server.embeddings.items():
        assert torch.equal(tensor, own[name][:340])


def test_a_checkpoint_in_bf16_is_trained_as_the_recipe_says(
    starting: Make, text: list[str], home: Path, tmp_path: Path
) -> None:
    save_model(tmp_path, text, dtype="bfloat16", **KINDS["llama"])
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    server, silos = start(starting(tmp_path, "inner.precision=fp32"), home)
    assert {tensor.dtype for tensor in server.body.values()} == {torch.float32}
    update = silos["ant"].train(server.task("ant"))
    assert {tensor.dtype for tensor in update.body.values()} == {torch.float32}


def test_mpt_and_its_like_start_too(
    starting: Make, text: list[str], home: Path, tmp_path: Path
) -> None:
    save_model(tmp_path, text, **MPT)
    server = server_of(starting(tmp_path, "variant=glob tokenizer=shared"), home)
    assert same({**server.body, **server.embeddings}, parameters(opened(tmp_path)))


# ---- the recipe --------------------------------------------------------------------------


def test_the_models_config_is_written_out_with_a_fingerprint(starting: Make, llama: Path) -> None:
    model = starting(llama).model
    assert {key: model.config[key] for key in KINDS["llama"]} == KINDS["llama"]
    assert "vocab_size" not in model.config
    assert len(model.start_fingerprint) == 64
    agreeing = starting(llama, "model.config.hidden_size=16")
    assert agreeing.model == model


def test_the_fingerprint_changes_with_the_weights(
    starting: Make, llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "same")
    before = starting(llama).model.start_fingerprint
    assert starting(tmp_path / "same").model.start_fingerprint == before
    model = opened(llama)
    parameters(model)["model.norm.weight"][0] += 1e-3
    model.save_pretrained(tmp_path / "same")
    assert starting(tmp_path / "same").model.start_fingerprint != before
    with pytest.raises(ConfigError, match=r"its files \(.{12}\) are not those of the run"):
        starting(tmp_path / "same", f"model.start_fingerprint={before}")


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
     "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"],
)  # fmt: skip
def test_the_fingerprint_is_of_the_tokenizers_files_too(
    starting: Make, llama: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    before = starting(tmp_path / "model").model.start_fingerprint
    with (tmp_path / "model" / name).open("a") as file:
        file.write("{}" if not file.tell() else "\n")
    assert starting(tmp_path / "model").model.start_fingerprint != before


def test_a_second_copy_of_the_weights_is_left_alone(
    starting: Make, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / "consolidated.safetensors").write_bytes(b"the same, named otherwise")
    (tmp_path / "model" / "README.md").write_text("a model")
    own = starting(llama).model.start_fingerprint
    assert starting(tmp_path / "model").model.start_fingerprint == own
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "dept_fl.start.snapshot_download", lambda _, **words: asked.update(words) or str(llama)
    )
    assert starting("org/model").model.start_fingerprint == own  # type: ignore[arg-type]
    there = ["config.json", "model.safetensors", "consolidated.safetensors", "tokenizer.model"]
    there += ["original/params.json", "onnx/model.safetensors", "pytorch_model.bin"]
    assert list(filter_repo_objects(there, **asked)) == [there[0], there[1], there[3]]


def test_weights_that_have_not_changed_are_not_read_again_for_the_fingerprint(
    starting: Make, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    read, plain = [], hashlib.file_digest

    def counted(file: Any, how: str) -> Any:
        read.append(Path(file.name).name)
        return plain(file, how)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    open_model(starting(tmp_path / "model"))
    assert read.count("model.safetensors") == 1


def test_a_path_is_relative_to_the_recipe_and_its_reach_is_kept(
    llama: Path, tmp_path: Path, tiny_file: Path
) -> None:
    shutil.copytree(llama, tmp_path / "models" / "mine")
    settings = yaml.safe_load(SETTINGS) | {"model": {"start": "models/mine"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    made = load_recipe(tmp_path / "recipe.yaml")
    assert made.model.start == str(tmp_path / "models" / "mine")
    longer = load_recipe(tmp_path / "recipe.yaml", f"sequence_tokens={2 * REACH}")
    assert layout(longer.model, longer.sequence_tokens).positions == {}  # rotary: no end
    built = build(longer.model, 340, longer.sequence_tokens, seed=0)
    assert built.config.max_position_embeddings == REACH


@pytest.mark.parametrize("how", ["dynamic", "longrope"])
def test_beyond_its_reach_a_model_scales_its_frequencies_as_ever(
    starting: Make, text: list[str], home: Path, tmp_path: Path, how: str
) -> None:
    rope: dict[str, Any] = {"rope_type": how, "rope_theta": 1e4}
    if how == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        rope["original_max_position_embeddings"] = REACH // 4
    else:
        rope["factor"] = 4.0
    save_model(tmp_path, text, **KINDS["llama"], rope_parameters=rope)
    made = starting(tmp_path, f"variant=glob tokenizer=shared sequence_tokens={2 * REACH}")
    server = server_of(made, home)
    ours = assemble(made.model, 2 * REACH, server.body, server.embeddings, 340).eval()
    ids = torch.arange(2 * REACH)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, opened(tmp_path)(input_ids=ids).logits)


def test_the_recipe_that_comes_along_is_a_good_one(llama: Path) -> None:
    made = load_recipe(CONF_DIR / "continue.yaml", f"model.start={llama}")
    assert (made.label, made.model.start_embeddings) == ("spec-opt", "mix")
    told = [words for _, words in commands([CONF_DIR / "continue.yaml"])]
    random, trim = (
        load_recipe(CONF_DIR / "continue.yaml", f"model.start={llama} {words}") for words in told
    )
    assert not random.model.gives_embeddings
    assert (trim.label, trim.common_tokenizer) == ("trim", str(llama))


# ---- what is refused ---------------------------------------------------------------------


def without(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()


def pickled(folder: Path) -> None:
    torch.save(opened(folder).state_dict(), folder / "pytorch_model.bin")
    without(folder, "*.safetensors")


def of_the_config(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return change


def headless(folder: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(folder)


BAD: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "missing": (shutil.rmtree, "", "no such folder, and not to be had from the hub"),
    "no config": (lambda f: without(f, "config.json"), "", "has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "", "cannot read it"),
    "pickled": (pickled, "", "has no *.safetensors, and pickled weights are not loaded"),
    "unknown": (of_the_config(model_type="nobody"), "", "transformers cannot read it"),
    "not causal": (headless, "", "is a LlamaModel, not a causal LM"),
    "quantised": (
        of_the_config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "", "its weights are quantised",
    ),
    "preset": (lambda f: None, "model.preset=llama-tiny", "has a config of its own; drop one"),
    "config": (
        lambda f: None, "model.config.hidden_size=32",
        "model.config.hidden_size=32: '{0}' has 16; remove it",
    ),
    "kind": (
        lambda f: None, "model.config.model_type=gpt2",
        "model.config.model_type='gpt2': '{0}' has 'llama'; remove it",
    ),
    "way": (
        lambda f: None, "model.start_embeddings=keep",
        "model.start_embeddings='keep': must be one of random, copy, mix",
    ),
    "pinned": (
        lambda f: None, "model.start_fingerprint=abc", "are not those of the run (abc)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_model_that_cannot_be_a_start_is_refused_with_its_mend(
    starting: Make, models: dict[str, Path], tmp_path: Path, case: str
) -> None:
    harm, overrides, told = BAD[case]
    folder = tmp_path / "model"
    shutil.copytree(models["llama-untied"], folder)
    harm(folder)
    with pytest.raises(ConfigError) as caught:
        starting(folder, overrides)
    (problem,) = caught.value.problems
    assert told.format(folder) in problem


@pytest.mark.parametrize("setting", ["start_fingerprint=abc", "start_embeddings=mix"])
def test_what_is_nothing_without_a_model_is_refused(recipe: Make, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting.partition('=')[0]}.*: nothing without"):
        recipe(f"model.{setting}")


def fewer_weights(folder: Path) -> None:
    """A checkpoint whose config asks for a head that it has not."""
    model = opened(folder)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_weights(*names: str) -> Callable[[Path], None]:
    """A checkpoint with more of them than its config's model has."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        more = {name: torch.ones(4) for name in names}
        save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})

    return change


LATE: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "no head": ("llama-untied", fewer_weights, "", "has no lm_head.weight; is it a causal LM?"),
    "tied by mistake": (
        "llama-untied", of_the_config(tie_word_embeddings=True), "",
        "weights and config do not agree on lm_head.weight (tie_word_embeddings?)",
    ),
    "too long": (
        "gpt2", lambda f: None, f"sequence_tokens={REACH + 1}",
        f"has learned positions (transformer.wpe.weight) for {REACH} only; lower it",
    ),
    "fewer layers": (
        "llama", of_the_config(num_hidden_layers=1), "",
        "has model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "
        "model.layers.1.mlp.gate_proj.weight, which the model of its config.json has not",
    ),
    "biases": (
        "llama", with_weights("model.layers.0.self_attn.q_proj.bias"), "",
        "has model.layers.0.self_attn.q_proj.bias, which the model of its config.json has not",
    ),
    "another width": ("llama", of_the_config(intermediate_size=48), "", "cannot load it"),
    "no tokenizer": ("llama", lambda f: without(f, "tokenizer*"), "", "tokenizer '{0}'"),
    "an empty tokenizer": (  # which transformers makes up
        "gpt2", lambda f: without(f, "tokenizer*"), "", "tokenizer '{0}': has no pieces",
    ),
    "too large a tokenizer": (
        "llama",
        lambda f: save_tokenizer(f, 360, [a + b for a in "abcdefghi" for b in "jklmnopqrst"]),
        "",
        "ids, its embeddings 340 rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LATE)
def test_weights_or_a_tokenizer_that_do_not_fit_are_refused(
    starting: Make, models: dict[str, Path], tmp_path: Path, case: str
) -> None:
    kind, harm, overrides, told = LATE[case]
    folder = tmp_path / "model"
    shutil.copytree(models[kind], folder)
    harm(folder)
    with pytest.raises(DeptError) as caught:
        open_model(starting(folder, overrides))
    assert told.format(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
    ],
)
def test_what_old_checkpoints_hold_of_no_use_is_passed_over(
    starting: Make, models: dict[str, Path], home: Path, tmp_path: Path, kind: str, name: str
) -> None:
    shutil.copytree(models[kind], tmp_path / "model")
    with_weights(name)(tmp_path / "model")
    server = server_of(starting(tmp_path / "model", "variant=glob tokenizer=shared"), home)
    assert same({**server.body, **server.embeddings}, parameters(opened(models[kind])))


def test_buffers_that_would_not_come_over_are_refused(
    starting: Make, text: list[str], home: Path, tmp_path: Path
) -> None:
    save_model(tmp_path, text, **ROUTED)
    made = starting(tmp_path, "variant=glob tokenizer=shared")
    assert server_of(made, home).body  # as long as they are those of any such model
    tensors = load_file(tmp_path / "model.safetensors")
    (bias,) = (name for name in tensors if name.endswith("e_score_correction_bias"))
    tensors[bias][0] = 0.5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    changed = starting(tmp_path, "variant=glob tokenizer=shared")
    with pytest.raises(ConfigError, match=f"its buffers {bias} are not those of a fresh model"):
        server_of(changed, home)


def test_a_config_that_differs_by_layer_is_refused(starting: Make, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma4_text"}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="its config cannot be written out: 'head_dim' is a per-"):
        starting(tmp_path)


def test_a_sequence_beyond_learned_positions_is_fine_with_fresh_ones(
    starting: Make, models: dict[str, Path], home: Path
) -> None:
    words = f"sequence_tokens={REACH + 1} model.start_embeddings=random"
    server = server_of(starting(models["gpt2"], words), home)
    assert server.layout.positions == {"transformer.wpe.weight": (REACH + 1, 16)}


# ---- whole runs --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["trim", "spec-opt"])
def test_the_strategy_gives_the_tensors_of_the_plain_algorithm(
    starting: Make, llama: Path, home: Path, tmp_path: Path, variant: str
) -> None:
    made = starting(llama, f"{ALL_VARIANTS[variant]} rounds=2")
    server, _ = run(made, home, tmp_path / "run")
    plain, silos = trained(made, home)
    names = server.recipe.silo_names
    again = {name: Silo(name, server.recipe, home, server.experiment) for name in names}
    assert same(state_of(server, again), state_of(plain, silos))
    assert not same(server.body, Server(made, "x", None).body)


def test_a_stopped_run_goes_on_from_the_same_model_alone(
    starting: Make, models: dict[str, Path], home: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models["llama"], folder)
    server, _ = run(starting(folder, "rounds=2"), home, tmp_path / "run")
    folder.rename(tmp_path / "moved")
    tensors, meta = last_checkpoint(tmp_path / "run", starting(tmp_path / "moved", "rounds=2"))
    again = Server(starting(tmp_path / "moved", "rounds=2"), meta["experiment"], None)
    again.load(tensors, meta)
    assert same(again.body, server.body)
    with pytest.raises(ConfigError, match=r"resume with another recipe: model\.start_fing"):
        last_checkpoint(tmp_path / "run", starting(models["llama-untied"], "rounds=2"))


def test_a_shared_tokenizer_may_move_with_the_model(
    starting: Make, models: dict[str, Path], home: Path, tmp_path: Path
) -> None:
    folder, words = tmp_path / "model", "variant=glob tokenizer=shared rounds=2"
    shutil.copytree(models["llama"], folder)
    server_of(starting(folder, words), home).save(tmp_path / "run")
    folder.rename(tmp_path / "moved")
    moved = with_shared_tokenizer(starting(tmp_path / "moved", words), home)
    assert last_checkpoint(tmp_path / "run", moved)[1]["round"] == 0
    other = shlex.quote(f"shared_tokenizer={models['gpt2']}")
    with pytest.raises(ConfigError, match="resume with another recipe: shared_tokenizer"):
        last_checkpoint(tmp_path / "run", starting(tmp_path / "moved", f"{words} {other}"))


@pytest.mark.parametrize("words", ["", "model.start_embeddings=random"])
def test_a_dry_run_looks_at_the_model_too(
    starting: Make, models: dict[str, Path], home: Path, tmp_path: Path, words: str
) -> None:
    shutil.copytree(models["gpt2"], tmp_path / "model")
    with_weights("more")(tmp_path / "model")
    with pytest.raises(ConfigError, match="has more, which the model of its config"):
        look_ahead(starting(tmp_path / "model", words), home, Progress())
    longer = starting(models["gpt2"], f"sequence_tokens={REACH + 1}")
    with pytest.raises(ConfigError, match=f"for {REACH} only; lower it"):
        look_ahead(longer, home, Progress())


def test_other_commands_go_on_working(
    starting: Make, llama: Path, home: Path, tmp_path: Path
) -> None:
    made = starting(llama, "rounds=1")
    known = vocabularies(made, home, {})
    assert known.shared == Size(340, "tokenizer")
    assert {share.parameters.body for share in bill(made, known)} == {
        layout(made.model, LENGTH).body_parameters()
    }
    server, silos = trained(made, home)
    silos["ant"].finish(server.task("ant"))
    found = load_pretrained(silos["ant"].final_folder)
    assert found.model.config.max_position_embeddings == REACH
    server.save(tmp_path / "run")
    adapting = Plan([str(tmp_path / "run")], ["random"], home)
    (job,) = adapting.jobs(adapting.recipe("", "only=[cat] shared_vocab_size=320", 2, 1))
    assert (job.recipe.model.start, job.recipe.shared_tokenizer != str(llama)) == ("", True)


@pytest.mark.parametrize("arm", ["std-0", "alone", "glob", "spec-opt"])
def test_the_arms_of_a_comparison_start_from_the_model(
    starting: Make, llama: Path, home: Path, tmp_path: Path, arm: str
) -> None:
    made = with_shared_tokenizer(ARMS[arm].recipe(starting(llama)), home)
    own = parameters(opened(llama))
    if ARMS[arm].kind == "central":
        silos = {name: Silo(name, made, home, "") for name in made.silo_names}
        assert same(parameters(Central(made, silos, 0.0, tmp_path).model), own)
    else:
        server = server_of(made, home)
        assert same(server.body, {name: own[name] for name in server.body})


# ---- real partners -----------------------------------------------------------------------


@pytest.fixture
def partners(tiny_file: Path, llama: Path, tmp_path: Path) -> Callable[..., list[Path]]:
    """partners(start=...): the files of two silos, each with a model folder of its own."""

    def write(**settings: Any) -> list[Path]:
        files = []
        for name in ("ant", "bee"):
            shutil.copytree(llama, tmp_path / f"{name}-model", dirs_exist_ok=True)
            facts = {"name": name, "home": f"{name}-home", "vocab_size": 320}
            facts |= {"files": [str(tiny_file.parent / f"{name}.jsonl")]}
            own = {k: v.format(name) if isinstance(v, str) else v for k, v in settings.items()}
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**facts, **own}))
            files.append(tmp_path / f"{name}.yaml")
        return files

    return write


def deployed(recipe: Recipe, files: list[Path], tmp_path: Path) -> Server:
    (tmp_path / "run").mkdir()
    grid = InProcessGrid(files, tmp_path / "home")
    return DeptStrategy(recipe, tmp_path / "home", tmp_path / "run", False, False).start(grid)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("spec-opt", {"start": "{}-model"}),
        ("spec", {"start": "{}-model", "tokenizer": "{}-model"}),
        ("trim", {"tokenizer": "{}-model", "share_embeddings": True}),
    ],
)
def test_partners_read_the_model_on_their_own_machines(
    starting: Make,
    llama: Path,
    partners: Callable[..., list[Path]],
    tmp_path: Path,
    variant: str,
    settings: dict[str, Any],
) -> None:
    made = starting(llama, f"{ALL_VARIANTS[variant]} silos={{}} min_silos=2 rounds=1")
    files = partners(**settings)
    server = deployed(made, files, tmp_path)
    assert server.members["ant"].merged == server.members["bee"].merged == [1]
    own = load_silo_file(files[0]).over(made)
    assert own.model.start == (str(tmp_path / "ant-model") if "start" in settings else "")
    exported = export(silo_at_home(load_silo_file(files[0]), ""), tmp_path / "out")
    assert str(tmp_path) not in (Path(exported.folder) / "README.md").read_text()


def test_a_partner_without_the_model_or_with_another_is_refused(
    starting: Make, models: dict[str, Path], partners: Callable[..., list[Path]], tmp_path: Path
) -> None:
    made = starting(models["llama"], "silos={} rounds=1")
    file = load_silo_file(partners()[0])
    with pytest.raises(ConfigError, match="start: missing; the federation starts from the embed"):
        file.over(made)
    fresh = starting(models["llama"], "silos={} model.start_embeddings=random")
    assert file.over(fresh).model.start == ""
    other = load_silo_file(partners(start=str(models["llama-untied"]))[0])
    silo = Silo("ant", other.over(made), other.home, "e" * 12)
    with pytest.raises(DeptError, match="are not those of the run"):
        silo.register()


def test_a_model_of_the_partners_is_nothing_to_a_federation_without_one(
    recipe: Make, partners: Callable[..., list[Path]], tmp_path: Path
) -> None:
    files = partners(start="{}-model")
    made = recipe("silos={} min_silos=2 rounds=1")
    server = deployed(made, files, tmp_path)
    assert server.members["bee"].merged == [1]
    assert load_silo_file(files[0]).over(made).first_model == 1  # round 0 has no model


def test_a_partners_check_tells_whether_the_model_is_there(
    llama: Path,
    partners: Callable[..., list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkup, "try_step", lambda *_: FAST)
    settings = yaml.safe_load(SETTINGS) | {"silos": {}, "model": {"start": str(llama)}}
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(settings))
    for start_, state in (("{}-model", "ok"), ("ant-model/gone", "FAILED")):
        (file, _) = partners(start=start_)
        subject = Subject(file, str(tmp_path / "federation.yaml"))
        found = dict(Checkup(subject, Progress()).run())
        assert found["tokens"].state == state, found
    assert "no such folder" in found["tokens"].words


# ---- the real thing ----------------------------------------------------------------------


@pytest.mark.flower
def test_dept_run_starts_from_an_open_model(tiny_file: Path, llama: Path, tmp_path: Path) -> None:
    words = [
        "model.config={}",
        f"model.start={llama}",
        "rounds=1",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    done = dept("run", str(tiny_file), *words, home=tmp_path / "home")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"start   {llama}" in done.stdout
