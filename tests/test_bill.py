"""What a recipe's federation costs: by what is given, by what is prepared, and at most."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dept_fl.bill import ANY_SILO, Size, bill, vocabularies
from dept_fl.cli import app
from dept_fl.config import Recipe
from dept_fl.cost import METHODS
from dept_fl.errors import DeptError
from tests.federation import start

Make = Callable[..., Recipe]


def test_without_prepared_silos_v_k_is_at_most_v_and_no_text_is_read(recipe: Make, tmp_path: Path):
    known = vocabularies(recipe("silos.bee.vocab_size=310"), tmp_path, {})
    assert known.shared == Size(320, "recipe")
    assert known.used == dict.fromkeys(("ant", "bee", "cat"), Size(320, "at most"))
    assert known.own == {
        "ant": Size(320, "recipe"), "bee": Size(310, "recipe"), "cat": Size(320, "recipe")
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_prepared_silos_tell_their_v_k(recipe: Make, tmp_path: Path):
    made = recipe("variant=trim tokenizer=shared")
    server, _ = start(made, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    known = vocabularies(made, tmp_path, {})
    assert known.shared == Size(320, "tokenizer")
    held = {name: Size(r.vocabulary, "prepared") for name, r in server.registrations.items()}
    assert known.used == held
    assert min(size.tokens for size in held.values()) < 320
    assert vocabularies(recipe(), tmp_path, {}).used == held  # of the same text
    assert sorted(tmp_path.rglob("*")) == before


def test_the_shared_tokenizer_has_a_size_of_its_own(recipe: Make, tmp_path: Path):
    made = recipe("variant=trim tokenizer=shared shared_vocab_size=340")
    assert vocabularies(made, tmp_path, {}).shared == Size(340, "recipe")
    start(made, tmp_path)
    known = vocabularies(made, tmp_path, {})
    assert known.shared == Size(340, "tokenizer")
    assert {size.source for size in known.used.values()} == {"prepared"}
    assert set(known.own.values()) == {Size(320, "recipe")}


def test_other_text_is_not_taken_for_that_which_was_prepared(recipe: Make, tmp_path: Path):
    start(recipe("variant=trim tokenizer=shared"), tmp_path)
    other = recipe("variant=trim tokenizer=shared validation_fraction=0.3")
    assert set(vocabularies(other, tmp_path, {}).used.values()) == {Size(320, "at most")}


def test_a_given_size_is_that_of_the_recipes_own_kind(recipe: Make, tmp_path: Path):
    given = {"shared": 1000, "bee": 500}
    own = vocabularies(recipe(), tmp_path, given)
    assert own.own["bee"] == Size(500, "given")
    assert own.used["bee"] == Size(1000, "at most")
    used = vocabularies(recipe("variant=trim tokenizer=shared"), tmp_path, given)
    assert used.used == {
        "ant": Size(1000, "at most"), "bee": Size(500, "given"), "cat": Size(1000, "at most")
    }  # fmt: skip
    assert used.own["bee"] == Size(320, "recipe")
    assert used.of("glob") == dict.fromkeys(("ant", "bee", "cat"), Size(1000, "given"))


def test_given_names_are_the_silos_of_a_recipe_that_has_none(recipe: Make, tmp_path: Path):
    bare = recipe("silos={}")
    assert list(vocabularies(bare, tmp_path, {}).own) == [ANY_SILO]
    known = vocabularies(bare, tmp_path, {"sw": 32_000, "fr": 50_257, "shared": 250_112})
    assert known.own == {"fr": Size(50_257, "given"), "sw": Size(32_000, "given")}


@pytest.mark.parametrize(
    ("overrides", "given", "reason"),
    [
        ("", {"dog": 300}, "--vocabulary dog=300: no silo of this name; give one of ant, bee"),
        ("variant=trim tokenizer=shared", {"ant": 500}, "ant=500: is more than .* 320"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    recipe: Make, tmp_path: Path, overrides: str, given: dict[str, int], reason: str
):
    with pytest.raises(DeptError, match=reason):
        vocabularies(recipe(overrides), tmp_path, given)


def test_the_bill_by_hand(recipe: Make, tmp_path: Path):
    """The recipe's Llama has width 16, 2 blocks and a feed-forward width of 32."""
    made = recipe("variant=trim tokenizer=shared only=[ant]")
    shares = bill(made, vocabularies(made, tmp_path, {"shared": 320, "ant": 100}))
    body = 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
    assert [share.method for share in shares] == list(METHODS)
    std, _, trim, spec, spec_opt = shares
    assert [s.parameters.total - body for s in shares] == [
        16 * n for n in (320, 320, 100, 100, 320)
    ]
    assert std.sent_a_step == body + 16 * 320
    assert trim.sent_a_step == (body + 16 * 100) / 2  # of 2 local steps
    assert std.up_bytes == 2 * 4 * (body + 16 * 320)
    assert trim.up_bytes == 4 * (body + 16 * 100) + 128 * 2
    assert spec.up_bytes == spec_opt.down_bytes == 4 * body + 128
    assert trim.memory.optimizer == 8 * (body + 16 * 100)
    assert trim.memory.logits == 4 * (4 * 16) * 100  # fewer tokens than a slice


def cost(*words: str, home: Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["cost", *words, "--home", str(home)])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_in_100_columns(tiny_file: Path, tmp_path: Path):
    code, printed, _ = cost(str(tiny_file), "--vocabulary", "ant=300", home=tmp_path)
    assert code == 0
    assert max(map(len, printed.splitlines())) <= 100
    assert "tiny: spec-opt; 3 silos; rounds of 2 local steps of 4 x 16 tokens" in printed
    for words in ("spec-opt *", "<= 320", "313", "given", "at most V"):
        assert words in printed  # 313: the mean of 300, 320 and 320


def test_the_largest_models_in_100_columns(tiny_file: Path, tmp_path: Path):
    words = ["model.config=null", "model.preset=gpt2-1b", "sequence_tokens=2048"]
    words += ["inner.batch_size=512", "--vocabulary", "shared=250112"]
    code, printed, _ = cost(str(tiny_file), *words, home=tmp_path)
    assert code == 0
    assert max(map(len, printed.splitlines())) <= 100
    assert "1.725 B" in printed


def test_the_command_as_json(tiny_file: Path, tmp_path: Path):
    _, printed, _ = cost(str(tiny_file), "--json", home=tmp_path)
    facts = json.loads(printed)
    assert facts["method"] == "spec-opt"
    assert len(facts["shares"]) == 5 * 3
    share = facts["shares"][0]
    assert share["memory"]["total"] == sum(
        size for part, size in share["memory"].items() if part != "total"
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--paper", "conf/demo.yaml"], "one of them"),
        (["--vocabulary", "fr"], "--vocabulary fr: expected NAME=SIZE"),
        (["--vocabulary", "fr=0"], "--vocabulary fr=0: expected NAME=SIZE"),
        (["conf/demo.yaml", "model.preset=gpt5"], "gpt5"),
    ],
)
def test_a_mistake_is_one_clear_error(tmp_path: Path, words: list[str], reason: str):
    code, _, told = cost(*words, home=tmp_path)
    assert code == 2
    assert reason in told
    assert "Traceback" not in told
