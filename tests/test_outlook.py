"""`dept run --dry-run`: what a run would train on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dept_fl.cli import app
from dept_fl.config import Recipe
from dept_fl.errors import DeptError
from dept_fl.outlook import look_ahead, show
from dept_fl.progress import Progress
from dept_fl.silo import Silo
from tests.test_start import KINDS, save_model

RecipeOf = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dept_fl.cli.runs.simulate", None)  # would be called in vain


def test_the_figures_are_those_of_the_silos(recipe: RecipeOf, home: Path) -> None:
    made = recipe()
    found = {each.silo: each for each in look_ahead(made, home, Progress()).silos}
    assert list(found) == ["ant", "bee", "cat"]
    for name, told in found.items():
        silo = Silo(name, made, home, "")
        assert told.train_documents + told.validation_documents == silo.corpus.documents
        assert told.train_tokens == len(silo.stream.train)
        assert told.vocabulary == 320
        # 4 rounds of 2 steps of 4 sequences of 16 tokens; batches of 4 whole sequences.
        assert told.epochs == pytest.approx(4 * 2 * 4 * 16 / told.train_tokens)
        assert told.epoch_batches == (told.train_tokens - 1) // 16 // 4
        assert told.written["own"].text_bytes == silo.corpus.validation_bytes
        texts = {" ".join(text.split()) for text in silo.corpus.texts("train")}
        for sample in told.samples:  # longer ones are cut
            assert any(text.startswith(sample.removesuffix("...")) for text in texts)
            assert sample in texts or len(sample) == 400
        assert len(told.samples) == 3
    # A vocabulary of one's own writes one's text in fewer tokens than a third of a shared one.
    assert all(
        told.written["own"].bytes_per_token > told.written["global"].bytes_per_token
        for told in found.values()
    )


def test_a_run_that_shares_its_tokenizer_is_compared_with_no_other(
    recipe: RecipeOf, home: Path
) -> None:
    found = look_ahead(recipe("variant=trim tokenizer=shared"), home, Progress()).silos
    assert [list(told.written) for told in found] == [["global"]] * 3
    assert all(told.vocabulary <= 320 for told in found)  # V_k


def test_of_sampled_silos_the_expected_epochs_are_told(recipe: RecipeOf, home: Path) -> None:
    all_, one = (
        look_ahead(recipe(words), home, Progress()).silos[0].epochs
        for words in ("", "silos_per_round=1")
    )
    assert one == pytest.approx(all_ / 3)


def test_the_command_tells_sources_and_what_was_left_out(tiny_file: Path, home: Path) -> None:
    words = ["run", str(tiny_file), "only=[ant]", "silos.ant.files=[]", "--home", str(home)]
    words += [f"silos.ant.sources.{n}.files=[{n}.jsonl]" for n in ("bee", "cat")]
    words += ["silos.ant.sources.bee.weight=2", "silos.ant.sources.cat.weight=1"]
    words += ["silos.ant.sources.bee.min_characters=410", "--dry-run"]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["silos"]["ant"]
    assert told["left_out"]["length"] > 0
    shares = {
        name: own["bytes"] * own["passes"] / told["train_bytes"]
        for name, own in told["sources"].items()
    }
    assert shares == pytest.approx({"bee": 2 / 3, "cat": 1 / 3}, abs=0.02)
    text = CliRunner().invoke(app, words).stdout
    assert f"{told['train_tokens']:,}" in text
    assert "sources of ant" in text
    assert "left out by length" in text
    assert text.count("  | ") == 3


def test_what_cannot_be_compared_with_is_left_out_and_said(
    recipe: RecipeOf, tiny_file: Path, home: Path
) -> None:
    """A run whose silos have their own tokenizers does without that of all silos' text."""
    words = "shared_vocab_size=50000"
    found = look_ahead(recipe(words), home, Progress())
    assert [list(told.written) for told in found.silos] == [["own"]] * 3
    reason = "no tokenizer of vocab_size=50000 can be trained on its text"
    assert found.not_compared.startswith(reason)
    assert json.loads(found.to_json())["not_compared"] == found.not_compared
    command = ["run", str(tiny_file), words, "--dry-run", "--home", str(home)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert f"not compared with a tokenizer for all silos: {reason}" in done.stdout
    assert "global tokenizer" not in done.stdout
    with pytest.raises(DeptError, match=f"^silo shared: {reason}"):
        look_ahead(recipe(f"{words} variant=trim tokenizer=shared"), home, Progress())


def test_an_open_models_tokenizer_is_named_as_that(
    recipe: RecipeOf,
    tiny_file: Path,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = json.loads((tiny_file.parent / "ant.jsonl").read_text().splitlines()[0])["text"]
    save_model(tmp_path, [text], **KINDS["llama"])
    made = f"model.config={{}} {shlex.quote(f'model.start={tmp_path}')}"
    found = look_ahead(recipe(made), home, Progress())
    assert [list(told.written) for told in found.silos] == [["own", "start"]] * 3
    show(found)
    assert "own tokenizer   tokenizer of model.start" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["silos.ant.files=[nowhere.txt]", "--dry-run"], "silo ant: no file matches"),
        (["inner.batch_size=5000", "--dry-run"], "silo ant: its training split has"),
        (["silos={}", "--dry-run"], "silos: none; name at least one"),
    ],
)
def test_a_mistake_is_one_clear_error(
    tiny_file: Path, home: Path, words: list[str], message: str
) -> None:
    done = CliRunner().invoke(app, ["run", str(tiny_file), "--home", str(home), *words])
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
