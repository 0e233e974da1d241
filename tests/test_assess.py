"""`dept evaluate`: a kept model on its own text and on others, by hand and as the run told."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dept_fl.cli import app
from dept_fl.config import ModelConfig, Recipe
from dept_fl.model import build
from dept_fl.pretrained import Encoder, load_pretrained
from dept_fl.silo import Silo
from tests.federation import ALL_VARIANTS
from tests.test_pretrained import LLAMA, finished, save_tokenizer

Make = Callable[..., Recipe]


def told(*words: str) -> Any:
    done = CliRunner().invoke(app, ["evaluate", *words, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(*words: str) -> str:
    done = CliRunner().invoke(app, ["evaluate", *words])
    assert done.exit_code == 2, done.output
    return done.stderr


@pytest.fixture
def zeros(tmp_path: Path) -> Path:
    """A Hugging Face folder with a model to which all of 300 ids are alike."""
    folder = tmp_path / "zeros"
    save_tokenizer(folder)
    model = build(ModelConfig(config=LLAMA), 300, 24, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["trim", "spec-opt"])
def silo(request: pytest.FixtureRequest, tiny_file: Path, tmp_path_factory: Any) -> Silo:
    from dept_fl.config import load_recipe

    made = load_recipe(tiny_file, f"{ALL_VARIANTS[request.param]} rounds=2")
    return finished(made, tmp_path_factory.mktemp("assess"))


def test_a_silos_model_on_its_own_validation_text_is_as_the_run_told(silo: Silo):
    found = told(str(silo.final_folder))
    metrics = json.loads((silo.final_folder / "state.json").read_text())["metrics"]
    same = ("bits_per_byte", "perplexity", "unigram_bits_per_byte", "unigram_perplexity")
    assert {k: found[k] for k in same} == pytest.approx({k: metrics[k] for k in same})
    assert found["tokens"] == metrics["validation_tokens"]
    assert (found["documents"], found["bytes"]) == (
        silo.corpus.validation_documents,
        silo.corpus.validation_bytes,
    )
    assert (found["unigram_of"], found["text"]) == ("training", "validation split of silo bee")


def test_the_same_text_from_files_gives_the_same_figures(silo: Silo, tmp_path: Path):
    texts = [{"text": text} for text in silo.corpus.texts("validation")]
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, texts)))
    own, given = (told(str(silo.final_folder), *w) for w in ([], ["--data", f"{tmp_path}/v.jsonl"]))
    different = ("text", "model")
    assert {k: v for k, v in given.items() if k not in different} == pytest.approx(
        {k: v for k, v in own.items() if k not in different}
    )


def test_where_the_silos_tokens_are_gone_the_unigram_is_the_texts_own(recipe: Make, tmp_path: Path):
    final = finished(recipe("rounds=1"), tmp_path).final_folder
    (counts,) = tmp_path.glob("silos/bee/tokens/*/counts.npy")
    counts.unlink()
    (tmp_path / "t.txt").write_text("flores rojas")
    assert told(str(final), "--data", str(tmp_path / "t.txt"))["unigram_of"] == "this"


def test_figures_by_hand(zeros: Path, tmp_path: Path):
    text = "the leaf is under a small green tree, ✓"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    found = told(str(zeros), "--data", str(tmp_path / "t.txt"), "--set", "sample_by=document")
    model = load_pretrained(zeros)
    encoder = Encoder(model.tokenizer, model.vocabulary)
    ids = [*encoder([text])[0], encoder.end]  # the end that stands first is given
    assert (found["documents"], found["bytes"], found["tokens"]) == (1, len(text) + 2, len(ids))
    assert found["perplexity"] == pytest.approx(300)
    assert found["bits_per_byte"] == pytest.approx(len(ids) * math.log2(300) / (len(text) + 2))
    counts = Counter([encoder.end, *ids])  # add-one over the tokenizer's ids
    whole = sum(counts.values()) + model.tokenizer.size
    bits = -sum(math.log2((counts[i] + 1) / whole) for i in ids)
    assert found["unigram_bits_per_byte"] == pytest.approx(bits / (len(text) + 2))
    assert (found["unigram_of"], found["window_tokens"]) == ("this", 24)
    assert found["lossy_documents"] == 0


def test_a_shorter_window_is_another_figure(silo: Silo):
    whole, short = (told(str(silo.final_folder), *w) for w in ([], ["--window", "2"]))
    assert (whole["window_tokens"], short["window_tokens"]) == (16, 2)
    assert short["tokens"] == whole["tokens"]
    assert short["bits_per_byte"] != whole["bits_per_byte"]


def test_people_read_lines(silo: Silo):
    done = CliRunner().invoke(app, ["evaluate", str(silo.final_folder)])
    heads = [line[:16].strip() for line in done.stdout.splitlines()]
    assert heads == ["model", "text", "bits per byte", "unigram floor", "perplexity"]
    assert "evaluating ..." in done.stderr


def test_what_cannot_be_is_one_clear_error(silo: Silo, zeros: Path, tmp_path: Path):
    assert "brings no text: name some with --data" in refused(str(zeros))
    idle = refused(str(silo.final_folder), "--column", "body", "--set", "sample_by=line")
    assert idle.endswith("error: --set, --column: goes with --data FILES; none is given\n")
    assert "no model; give a silo's folder" in refused(str(tmp_path))
    (tmp_path / "t.jsonl").write_text('{"body": "x"}')
    data = ["--data", str(tmp_path / "t.jsonl")]
    assert "columns: body; set --column" in refused(str(zeros), *data)
    assert "no file matches ['nowhere.txt']; check FILES" in refused(
        str(zeros), "--data", "nowhere.txt"
    )
    assert "--set 'max=1'" in refused(str(zeros), *data, "--set", "max=1")
    assert "--window 25: the model takes 24" in refused(str(zeros), *data, "--window", "25")
    (tmp_path / "empty.txt").write_text("\n")
    assert "no text in it" in refused(str(zeros), "--data", str(tmp_path / "empty.txt"))
