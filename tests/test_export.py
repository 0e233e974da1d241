"""An exported folder is an ordinary one: transformers alone opens it, and finds the same model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from typer.testing import CliRunner

from dept_fl.checkpoint import load_state, save_state
from dept_fl.cli import app
from dept_fl.config import CONF_DIR, ModelConfig, Recipe
from dept_fl.errors import DeptError
from dept_fl.export import ODD, Exported, Subject, export, global_model, silo_at_home, silo_of_run
from dept_fl.pretrained import Encoder, load_pretrained
from dept_fl.report import Ledger
from dept_fl.silo import Silo
from dept_fl.silo_file import load_silo_file
from tests.conftest import sentencepiece_model
from tests.federation import ALL_VARIANTS, trained
from tests.test_pretrained import save_tokenizer

Make = Callable[..., Recipe]
SMALL = {  # the families of conf/models
    "llama-tiny": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "num_key_value_heads": 2},
    "gpt2-125m": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "mpt-125m": {"d_model": 16, "n_layers": 2, "n_heads": 2},
}


def small(preset: str) -> ModelConfig:
    config = yaml.safe_load((CONF_DIR / "models" / f"{preset}.yaml").read_text(encoding="utf-8"))
    return ModelConfig(config={**config, **SMALL[preset]})


def finished(recipe: Recipe, home: Path, run_dir: Path, name: str = "bee") -> Silo:
    """A silo behind a whole run, whose folder has a checkpoint and a ledger as a run's."""
    server, silos = trained(recipe, home)
    run_dir.mkdir(parents=True, exist_ok=True)
    ledger, sizes = Ledger(run_dir), {"train_bytes": 7, "train_tokens": 5, "validation_bytes": 3}
    plan = {"experiment": server.experiment, "recipe": recipe.label, "rounds": recipe.rounds}
    ledger.write("plan", **plan, estimate_s=1.0, silos=dict.fromkeys(silos, sizes))
    metrics, _, _ = silos[name].finish(server.task(name))
    ledger.write("silo_eval", silo=name, round=recipe.rounds, final=True, **metrics)
    ledger.write("end", round=recipe.rounds, seconds=1.0)
    server.save(run_dir)
    return silos[name]


def exported(silo: Silo, run_dir: Path, out: Path, home: Path) -> Exported:
    return export(silo_of_run(run_dir, silo.name, home), out)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def opened(folder: Path) -> tuple[object, object]:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def same_as_the_silos(silo: Silo, folder: Path, texts: list[str]) -> None:
    """Equal ids, text and logits, in the silo's own code and in transformers' alone."""
    own = load_pretrained(silo.final_folder)
    model, tokenizer = opened(folder)
    encoder = Encoder(own.tokenizer, own.vocabulary)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == encoder([text])[0]
        assert tokenizer.decode(ids) == text
        batch = torch.tensor([[encoder.end, *ids][: own.sequence_tokens]])
        with torch.no_grad():
            torch.testing.assert_close(
                model(batch).logits, own.model.eval()(input_ids=batch).logits
            )


@pytest.mark.parametrize("preset", sorted(SMALL))
def test_every_family_has_the_silos_ids_and_logits(
    recipe: Make, home: Path, run_dir: Path, out: Path, preset: str
):
    made = replace(recipe("rounds=1"), model=small(preset))
    silo = finished(made, home, run_dir)
    report = exported(silo, run_dir, out, home)
    own, odd = report.own_text, report.odd_strings
    assert own.different == own.ties == odd.different == odd.ties == 0
    assert own.texts == silo.corpus.validation_documents
    assert report.warnings == []
    same_as_the_silos(silo, out, [*silo.corpus.texts("validation"), *ODD])


@pytest.mark.parametrize("variant", sorted(ALL_VARIANTS))
def test_every_variant_has_the_silos_ids_and_logits(
    recipe: Make, home: Path, run_dir: Path, out: Path, variant: str
):
    silo = finished(recipe(f"{ALL_VARIANTS[variant]} rounds=1"), home, run_dir)
    made = exported(silo, run_dir, out, home)
    assert made.vocabulary == silo.stream.vocabulary.size
    local = silo.stream.vocabulary.size < silo.tokenizer.size
    assert local == (variant in ("spec", "trim"))
    # Of what the silo never met, V_k writes some otherwise than with the fewest pieces.
    same_as_the_silos(silo, out, [*silo.corpus.texts("train")] if local else list(ODD))
    _, tokenizer = opened(out)
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in ODD] == list(ODD)


def test_transformers_alone_opens_it_and_writes_text(
    recipe: Make, home: Path, run_dir: Path, out: Path
):
    silo = finished(recipe("rounds=1"), home, run_dir)
    exported(silo, run_dir, out, home)
    code = (
        "import sys; from transformers import pipeline\n"
        f"write = pipeline('text-generation', model={str(out)!r})\n"
        "text = write('el campo', max_new_tokens=5)[0]['generated_text']\n"
        "assert text.startswith('el campo') and len(text) > 8, text\n"
        "assert 'dept_fl' not in sys.modules\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", code], cwd=out, env=environment, check=True)


def test_it_writes_no_further_than_positions_were_learned(
    recipe: Make, home: Path, run_dir: Path, out: Path
):
    gpt2 = replace(recipe("rounds=1"), model=small("gpt2-125m"))
    exported(finished(gpt2, home, run_dir), run_dir, out, home)
    written = pipeline("text-generation", model=str(out))("el", return_tensors=True)
    assert 1 < len(written[0]["generated_token_ids"]) <= 16


# ---- tokenizers of others ------------------------------------------------------------------


def test_an_adopted_hugging_face_tokenizer_is_saved_as_it_is(
    recipe: Make, tmp_path: Path, run_dir: Path, out: Path
):
    save_tokenizer(tmp_path / "fast")
    made = recipe(f"silos.bee.tokenizer={tmp_path / 'fast'} only=[bee] rounds=1")
    silo = finished(made, tmp_path / "home", run_dir)
    exported(silo, run_dir, out, tmp_path / "home")
    own, there = ((folder / "tokenizer.json").read_text() for folder in (out, tmp_path / "fast"))
    assert json.loads(own) == json.loads(there)
    same_as_the_silos(silo, out, list(silo.corpus.texts("validation")))


def test_a_part_of_an_adopted_tokenizer_is_filled_up_with_the_rarest_row(
    recipe: Make, tmp_path: Path, run_dir: Path, out: Path
):
    save_tokenizer(tmp_path / "fast", size=330)
    made = recipe(f"{ALL_VARIANTS['spec']} shared_tokenizer={tmp_path / 'fast'} rounds=1")
    silo = finished(made, tmp_path / "home", run_dir)
    report = exported(silo, run_dir, out, tmp_path / "home")
    vocabulary, own = silo.stream.vocabulary, load_pretrained(silo.final_folder)
    assert vocabulary.size < report.vocabulary == silo.tokenizer.size
    assert "were never trained by this silo" in report.warnings[0]
    model, tokenizer = opened(out)
    text = next(silo.corpus.texts("train"))
    ids = torch.tensor([tokenizer(text)["input_ids"][:16]])
    local = torch.from_numpy(vocabulary.local_ids())[ids]
    with torch.no_grad():
        wide, narrow = model(ids).logits, own.model.eval()(input_ids=local).logits
    torch.testing.assert_close(wide[..., vocabulary.ids], narrow)
    least = int(silo.stream.unigram.argmin())
    strange = sorted(set(range(vocabulary.full)) - set(vocabulary.ids.tolist()))
    torch.testing.assert_close(wide[..., strange[0]], narrow[..., least])
    assert model.generation_config.suppress_tokens == strange


def test_normalising_models_are_exported_where_they_do_no_harm(
    recipe: Make, tmp_path: Path, run_dir: Path, out: Path
):
    file, texts = tmp_path / "bee.model", ["el campo tiene flores rojas"] * 9
    file.write_bytes(sentencepiece_model(texts, vocab_size=275))
    silo = finished(
        recipe(f"silos.bee.tokenizer={file} only=[bee] rounds=1"), tmp_path / "home", run_dir
    )
    made = exported(silo, run_dir, out, tmp_path / "home")
    assert made.own_text.different == 0
    assert any("odd strings get other ids" in warning for warning in made.warnings)


def test_a_tokenizer_that_gives_other_ids_on_the_silos_text_is_refused(
    recipe: Make, tmp_path: Path, run_dir: Path, out: Path
):
    file = tmp_path / "bee.model"
    file.write_bytes(sentencepiece_model(["el campo tiene flores rojas"] * 9, vocab_size=275))
    silo = finished(
        recipe(f"silos.bee.tokenizer={file} only=[bee] rounds=1"), tmp_path / "home", run_dir
    )
    subject = silo_of_run(run_dir, "bee", tmp_path / "home")
    harmed = Subject(**{**vars(subject), "text": [*subject.text, "ﬁ\u0301"]})
    with pytest.raises(DeptError, match=r"1 of \d+ documents of its own text would get other ids"):
        export(harmed, out)
    assert not out.exists()
    assert silo.final_folder.is_dir()


# ---- what is exported ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["glob", "trim"])
def test_the_servers_model_is_exported(
    recipe: Make, home: Path, run_dir: Path, out: Path, variant: str
):
    silo = finished(recipe(f"{ALL_VARIANTS[variant]} rounds=1"), home, run_dir)
    made = export(global_model(run_dir, home), out)
    assert made.vocabulary == silo.tokenizer.size
    again = out.with_name("again")
    command = ["export", str(run_dir), "--global", "--home", str(home), "--out", str(again)]
    assert CliRunner().invoke(app, command).exit_code == 0
    files = [(folder / "model.safetensors").read_bytes() for folder in (out, again)]
    assert files[0] == files[1]
    assert made.own_text.different == made.odd_strings.different == 0
    model, tokenizer = opened(out)
    text = next(silo.corpus.texts("train"))
    ids = torch.tensor([tokenizer(text)["input_ids"][:16]])
    own, table = load_pretrained(silo.final_folder), model.get_input_embeddings().weight
    local = torch.from_numpy(silo.stream.vocabulary.local_ids())[ids]
    torch.testing.assert_close(table[ids], own.model.get_input_embeddings().weight[local])


def test_spec_has_no_global_model(recipe: Make, home: Path, run_dir: Path):
    finished(recipe("rounds=1"), home, run_dir)
    with pytest.raises(DeptError, match="no global model, since embeddings never left"):
        global_model(run_dir, home)


def test_a_partner_exports_its_newest_final(recipe: Make, tmp_path: Path, out: Path):
    home = tmp_path / "home"
    first, second = (finished(recipe("rounds=1"), home, tmp_path / name) for name in "ab")
    os.utime(second.final_folder / "state.json", (1, 1))
    file = tmp_path / "bee.yaml"
    file.write_text(
        yaml.safe_dump({"name": "bee", "files": ["x"], "vocab_size": 320, "home": str(home)})
    )
    settings = load_silo_file(file)
    experiments = [silo.final_folder.parent.name for silo in (first, second)]
    newest = silo_at_home(settings, "")
    assert f"experiment {experiments[0]}, the newest of 2" in newest.source
    done = CliRunner().invoke(app, ["export", "--silo-file", str(file), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert opened(out)[1].vocab_size == newest.model.tokenizer.size
    assert experiments[1] in silo_at_home(settings, experiments[1]).source
    with pytest.raises(DeptError, match=r"--experiment 0: no final model; there is "):
        silo_at_home(settings, "0")
    shutil.rmtree(home / "silos" / "bee" / "state")
    with pytest.raises(DeptError, match="silo bee has no final model"):
        silo_at_home(settings, "")


def test_the_card_tells_counts_and_no_text(recipe: Make, home: Path, run_dir: Path, out: Path):
    silo = finished(recipe("rounds=1"), home, run_dir)
    exported(silo, run_dir, out, home)
    card = (out / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    bits = load_state(silo.final_folder)[1]["metrics"]["bits_per_byte"]
    assert f"| bits per byte of validation text | {bits:.4f} |" in card
    assert f"| train tokens | {len(silo.stream.train):,} |" in card
    assert "bee.jsonl" not in card
    assert "flores" not in card


def test_without_its_text_the_odd_strings_alone_are_compared(
    recipe: Make, tmp_path: Path, run_dir: Path, out: Path
):
    silo = finished(recipe("rounds=1"), tmp_path / "home", run_dir)
    shutil.rmtree(silo.folder / "text")
    made = exported(silo, run_dir, out, tmp_path / "home")
    assert made.own_text.texts == 0
    assert "its text is not there any more" in made.warnings[0]


# ---- mistakes ------------------------------------------------------------------------------


def told(*words: object) -> str:
    done = CliRunner().invoke(app, ["export", *map(str, words)])
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("error: ")]
    return line


def test_mistakes_cost_one_line(recipe: Make, tmp_path: Path, run_dir: Path, out: Path):
    home = tmp_path / "home"
    at = ("--out", out, "--home", home)
    assert "give RUN_DIR with --silo NAME or --global" in told(run_dir, *at)
    assert "no such folder" in told(run_dir, "--silo", "bee", *at)
    silo = finished(recipe("rounds=1"), home, run_dir)
    assert "--silo fr: not in this run; it has ant, bee, cat" in told(run_dir, "--silo", "fr", *at)
    assert "silo ant kept no final model there" in told(run_dir, "--silo", "ant", *at)
    out.mkdir()
    (out / "mine").touch()
    assert "not an empty folder" in told(run_dir, "--silo", "bee", *at)
    (out / "mine").unlink()
    tensors, meta = load_state(silo.final_folder)
    save_state(silo.final_folder, tensors, {**meta, "tokenizer": "0123"})
    assert "the tokenizer that it was trained with" in told(run_dir, "--silo", "bee", *at)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(line for line in lines if '"end"' not in line))
    assert "its run has not ended" in told(run_dir, "--silo", "bee", *at)


# ---- use -----------------------------------------------------------------------------------


def generated(folder: Path, *words: str) -> dict[str, object]:
    done = CliRunner().invoke(app, ["generate", str(folder), "--json", *words])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_generate_writes_the_same_from_the_silos_folder_and_the_exported_one(
    recipe: Make, home: Path, run_dir: Path, out: Path
):
    silo = finished(recipe(f"{ALL_VARIANTS['trim']} rounds=1"), home, run_dir)
    done = CliRunner().invoke(
        app,
        ["export", str(run_dir), "--silo", "bee", "--out", str(out), "--home", str(home), "--json"],
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["folder"] == str(out)
    words = ("--prompt", "el campo", "--tokens", "12")
    for more in (("--seed", "3"), ("--temperature", "0"), ("--top-k", "1")):
        first = generated(silo.final_folder, *words, *more)
        assert first == generated(out, *words, *more)
        assert first["tokens"] <= 12
    assert generated(out, *words, "--top-k", "1") == generated(out, *words, "--temperature", "0")
    assert generated(out, *words, "--seed", "3") != generated(out, *words, "--seed", "4")


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_evaluation_harness_runs_it(recipe: Make, home: Path, run_dir: Path, out: Path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    exported(finished(recipe("rounds=1"), home, run_dir), run_dir, out, home)
    tasks = out.parent / "tasks"
    shutil.copytree(Path(__file__).parent / "lm_eval_task", tasks)
    text = (tasks / "dept_tiny.yaml").read_text(encoding="utf-8")
    file = str(tasks / "dept_tiny.jsonl")
    (tasks / "dept_tiny.yaml").write_text(text.replace("dept_tiny.jsonl", file), encoding="utf-8")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={out},device=cpu",
        tasks=["dept_tiny"],
        task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0,
    )
    assert 0.0 <= found["results"]["dept_tiny"]["acc,none"] <= 1.0
