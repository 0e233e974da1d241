"""`dept silo list` tells what lies in a home, as the silos themselves would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dept_fl.cli import app
from dept_fl.config import Recipe
from dept_fl.inventory import inventory
from dept_fl.silo import Silo
from tests.federation import ALL_VARIANTS, trained

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inventory")


@pytest.fixture
def bee(recipe: Make, place: Path) -> Silo:
    """A silo behind a whole run in which ant and cat trained too, and have no final model."""
    done = [each.name for each in place.glob("silos/bee/state/*")]
    made = recipe(f"{ALL_VARIANTS['trim']} rounds=3")
    if done:
        return Silo("bee", made, place, done[0])
    server, silos = trained(made, place)
    silos["bee"].finish(server.task("bee"))
    return silos["bee"]


def listed(*words: str) -> Any:
    done = CliRunner().invoke(app, ["silo", "list", *words, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_silo_is_told_as_it_is(bee: Silo, place: Path):
    told = listed("--home", str(place))
    assert told["home"] == str(place)
    assert [each["silo"] for each in told["silos"]] == ["ant", "bee", "cat"]
    found = told["silos"][1]
    corpus = bee.corpus
    assert found["text"] == {
        "documents": corpus.documents,
        "duplicates": corpus.duplicates,
        "bytes": corpus.text_bytes,
    }
    (source,) = bee.config.files
    assert found["source"] == f"files {source}"
    (stream,) = found["streams"]
    tokens = bee.folder / "tokens"
    (name,) = (each.name for each in tokens.iterdir())
    assert name.split("-")[1] == stream["tokenizer"]
    assert name.endswith("-used")  # TRIM's own ids alone
    assert 0 < stream["vocabulary"] < 320 < stream["tokens"]
    assert found["bytes"] == sum(p.stat().st_size for p in bee.folder.rglob("*") if p.is_file())


def test_experiments_are_told_with_their_rounds(bee: Silo, place: Path):
    ant, found, _ = (each["experiments"] for each in listed("--home", str(place))["silos"])
    (kept,) = found
    state = json.loads((bee.final_folder / "state.json").read_text())
    assert kept["experiment"] == bee.final_folder.parent.name
    assert (kept["variant"], kept["final"]) == ("trim", True)
    assert kept["bits_per_byte"] == state["metrics"]["bits_per_byte"]
    assert kept["rounds"][-1] == 3
    assert (ant[0]["final"], ant[0]["bits_per_byte"], ant[0]["variant"]) == (False, None, "trim")


def test_of_a_recipe_only_its_own_silos_and_its_own_text(bee: Silo, place: Path, tiny_file: Path):
    told = listed(str(tiny_file), "only=[bee]", "--home", str(place))
    assert [each["silo"] for each in told["silos"]] == ["bee"]
    assert told["silos"][0]["text"]["documents"] == bee.corpus.documents
    other = listed(str(tiny_file), "validation_fraction=0.3", "--home", str(place))
    assert [each["text"] for each in other["silos"]] == [None] * 3  # split in another way
    assert other["silos"][1]["experiments"] != []


def test_of_several_sources_each_is_told(tiny_file: Path, tmp_path: Path):
    words = ["silos.ant.files=[]", "silos.ant.sources.web.hub=allenai/c4"]
    words += ["silos.ant.sources.books.files=[bee.jsonl,cat.jsonl]", "only=[ant]"]
    (told,) = listed(str(tiny_file), *words, "--home", str(tmp_path))["silos"]
    books = ", ".join(str(tiny_file.parent / f"{name}.jsonl") for name in ("bee", "cat"))
    assert told["source"] == f"books: files {books}; web: hub allenai/c4"


def test_people_see_a_table(bee: Silo, place: Path):
    words = ["silo", "list", "--home", str(place)]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
    assert f"  bee           {bee.corpus.documents}" in done.stdout
    assert bee.final_folder.parent.name in done.stdout
    assert "   trim      1-3   " in done.stdout
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80


def test_what_is_damaged_or_missing_is_left_out(bee: Silo, recipe: Make, tmp_path: Path):
    folder = tmp_path / "silos" / "dog" / "state" / "0123456789ab" / "round-00002"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{")
    (tmp_path / "silos" / ".hidden").mkdir()
    (dog,) = inventory(tmp_path, None).silos
    assert (dog.source, dog.text, dog.streams, dog.bytes) == ("", None, [], 1)
    assert [(e.experiment, e.rounds, e.variant) for e in dog.experiments] == [
        ("0123456789ab", [2], "")
    ]


def test_an_empty_home_has_no_silos(tmp_path: Path):
    assert listed("--home", str(tmp_path)) == {"home": str(tmp_path), "silos": []}
    done = CliRunner().invoke(app, ["silo", "list", "--home", str(tmp_path)])
    assert done.stdout == f"no silos in {tmp_path}\n"
