"""A partner's own file: what it says holds, whatever a server's recipe says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dept_fl.config import (
    InnerConfig,
    Recipe,
    SiloConfig,
    SourceConfig,
    load_recipe,
    recipe_from_json,
)
from dept_fl.errors import ConfigError, DeptError
from dept_fl.silo_file import KEYS, SiloFile, as_yaml, load_silo_file

MODEL = {"model_type": "llama"}
RECIPE = load_recipe("conf/partners.yaml")
LEAST: dict[str, Any] = {"name": "fr", "files": ["fr.txt"], "vocab_size": 500}

# Each key with a value that is not its default.
GIVEN: dict[str, Any] = {
    "name": "fr",
    "home": "/srv/dept",
    "files": ["/data/fr.txt"],
    "validation_files": ["/data/validation.txt"],
    "hub": "a/b",
    "hub_config": "fr",
    "hub_split": "test",
    "hub_validation_split": "dev",
    "hub_files": ["dev=dev.jsonl"],
    "hub_where": ["meta.kind=law"],
    "packages": ["stdlib"],
    "include": ["*.md"],
    "exclude": ["*.rst"],
    "content": "code",
    "column": "body",
    "columns": ["title", "body"],
    "where": ["score>=0.8"],
    "min_characters": 5,
    "max_characters": 500,
    "sources": {"web": {"files": ["/data/web"], "where": ["a=b"], "weight": 2.0}},
    "sample_by": "line",
    "encoding": "latin-1",
    "max_bytes": 7,
    "tokenizer": "org/name",
    "vocab_size": 321,
    "tokenizer_train_bytes": 5000,
    "validation_fraction": 0.3,
    "validation_max_bytes": 77,
    "deduplicate": False,
    "near_duplicates": 0.8,
    "device": "cpu",
    "processes": 4,
    "parallel": "fsdp",
    "share_samples": True,
    "share_embeddings": True,
    "micro_batch_size": 2,
    "start": "org/model",
}
SOURCES = {"files", "hub", "packages"}
OF_THE_HUB = {"hub_validation_split", "hub_files", "hub_where"}  # refused without one
OF_THE_RECIPE = {
    "tokenizer_train_bytes",
    "validation_fraction",
    "validation_max_bytes",
    "deduplicate",
    "near_duplicates",
    "device",
    "processes",
    "parallel",
    "share_samples",
}


def written(folder: Path, **settings: Any) -> Path:
    file = folder / "fr.yaml"
    file.write_text(yaml.safe_dump({**LEAST, **settings}), encoding="utf-8")
    return file


def problems(folder: Path, **settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_silo_file(written(folder, **settings))
    return caught.value.problems


# ---- what it says ------------------------------------------------------------------------


def test_every_key_is_tried_here() -> None:
    assert sorted(GIVEN) == sorted(KEYS)


ELSEWHERE = {
    "name",
    "home",
    "sources",
    "micro_batch_size",
    "share_embeddings",
    "start",
}  # have tests of their own


@pytest.mark.parametrize("key", sorted(set(KEYS) - ELSEWHERE))
def test_every_key_holds_over_any_recipe(tmp_path: Path, key: str) -> None:
    one_source = {"files": []} if key in SOURCES - {"files"} else {}
    if key in OF_THE_HUB:
        one_source = {"files": [], "hub": GIVEN["hub"]}
    file = load_silo_file(written(tmp_path, **one_source, **{key: GIVEN[key]}))
    recipe = file.over(RECIPE)
    owner = recipe if key in OF_THE_RECIPE else recipe.silos["fr"]
    assert getattr(owner, key) == GIVEN[key]


def test_sources_hold_over_any_recipe_and_their_paths_start_at_the_file(tmp_path: Path) -> None:
    sources = {
        "web": {"files": "web/*.jsonl", "where": ["lang=fr"], "weight": 2},
        "books": {"files": ["/books"], "weight": 1},
    }
    silo = load_silo_file(written(tmp_path, files=[], sources=sources)).over(RECIPE).silos["fr"]
    assert silo.sources == {
        "web": SourceConfig(files=[f"{tmp_path}/web/*.jsonl"], where=["lang=fr"], weight=2.0),
        "books": SourceConfig(files=["/books"], weight=1.0),
    }
    assert silo.shares == {"books": 1 / 3, "web": 2 / 3}


@pytest.mark.parametrize(
    ("sources", "problem"),
    [
        ({"web": {"colum": "x"}}, "sources.web.colum: no such setting of a source; did you mean "),
        ({"web": {"files": [], "hub": ""}}, "sources.web: set exactly one of files, hub, pack"),
        ({"web": "x"}, "sources.web: a source needs a mapping, such as {files: "),
        ({"web": {"files": ["x"], "weight": "much"}}, "sources.web.weight='much': must be a num"),
        ({"a b": {"files": ["x"]}}, "sources.a b: a source's name has lower-case letters"),
        (["x"], "sources=['x']: must be a mapping of sources by name"),
    ],
)
def test_problems_of_sources_are_told_in_words_of_the_file(
    tmp_path: Path, sources: Any, problem: str
) -> None:
    found = problems(tmp_path, files=[], sources=sources)
    assert any(each.startswith(f"{tmp_path / 'fr.yaml'}: {problem}") for each in found), found


def test_the_micro_batch_is_the_silos_own(tmp_path: Path) -> None:
    asked = replace(RECIPE, inner=replace(RECIPE.inner, micro_batch_size=8))
    assert load_silo_file(written(tmp_path)).over(asked).inner.micro_batch_size == 0
    file = load_silo_file(written(tmp_path, micro_batch_size=2))
    assert file.over(asked).inner.micro_batch_size == 2


def test_a_micro_batch_that_does_not_fit_is_told_in_words_of_the_file(tmp_path: Path) -> None:
    file = load_silo_file(written(tmp_path, micro_batch_size=3))
    with pytest.raises(ConfigError) as caught:
        file.over(RECIPE)
    assert caught.value.problems == [
        f"{file.path}: micro_batch_size=3: must divide inner.batch_size=16"
    ]


def test_processes_that_do_not_fit_are_told_in_words_of_the_file(tmp_path: Path) -> None:
    for settings, problem in (
        ({"processes": 3}, "processes=3: must divide inner.batch_size=16"),
        (
            {"processes": 4, "micro_batch_size": 8},
            "micro_batch_size=8: must divide inner.batch_size=16 over processes=4",
        ),
    ):
        file = load_silo_file(written(tmp_path, **settings))
        with pytest.raises(ConfigError) as caught:
            file.over(RECIPE)
        assert caught.value.problems == [f"{file.path}: {problem}"]


def test_samples_are_shared_only_where_the_file_says_so(tmp_path: Path) -> None:
    asked = replace(RECIPE, share_samples=True)
    for settings in ({}, {"share_samples": False}, {"share_samples": None}):
        file = load_silo_file(written(tmp_path, **settings))
        assert file.over(asked).share_samples is False
    assert load_silo_file(written(tmp_path, share_samples=True)).over(RECIPE).share_samples is True


@pytest.mark.parametrize("variant", ["glob", "trim"])
def test_embeddings_are_shared_only_where_the_file_says_so(tmp_path: Path, variant: str) -> None:
    asked = replace(RECIPE, variant=variant, tokenizer="shared")
    refusal = f"share_embeddings: false, but variant={variant} sends this silo's embeddings"
    for settings in ({}, {"share_embeddings": False}, {"share_embeddings": None}):
        file = load_silo_file(written(tmp_path, tokenizer="org/name", **settings))
        with pytest.raises(ConfigError, match=refusal):
            file.over(asked)
        assert file.over(replace(asked, variant="spec")).variant == "spec"
    shares = load_silo_file(written(tmp_path, tokenizer="org/name", share_embeddings=True))
    assert shares.over(asked).variant == variant


def test_relative_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (folder / "own.model").write_bytes(b"")
    (folder / "set").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings = {"files": ["x/*.txt", "../**/*.jsonl", "/abs/y.txt"], "home": "home"}
    settings["validation_files"] = "v.txt"
    file = load_silo_file(written(folder, tokenizer="own.model", **settings))
    source = file.over(RECIPE).silos["fr"]
    assert source.files == [f"{folder}/x/*.txt", f"{folder}/../**/*.jsonl", "/abs/y.txt"]
    assert source.validation_files == [str(folder / "v.txt")]
    assert source.tokenizer == str(folder / "own.model")
    assert file.home == folder / "home"
    file = load_silo_file(written(folder, files=[], hub="set"))
    assert file.over(RECIPE).silos["fr"].hub == str(folder / "set")


def test_one_file_need_not_be_a_list(tmp_path: Path) -> None:
    file = load_silo_file(written(tmp_path, files="x/*.txt"))
    assert file.over(RECIPE).silos["fr"].files == [str(tmp_path / "x/*.txt")]


def test_a_name_of_the_hub_stays_a_name(tmp_path: Path) -> None:
    file = load_silo_file(written(tmp_path, tokenizer="org/name", files=[], hub="allenai/c4"))
    source = file.over(RECIPE).silos["fr"]
    assert (source.tokenizer, source.hub) == ("org/name", "allenai/c4")


def test_the_home_is_the_files_else_the_environments_else_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("DEPT_HOME", raising=False)
    assert load_silo_file(written(tmp_path)).home == Path("/home/me/.dept-fl")
    monkeypatch.setenv("DEPT_HOME", "/srv/env")
    assert load_silo_file(written(tmp_path)).home == Path("/srv/env")
    assert load_silo_file(written(tmp_path, home="/srv/file")).home == Path("/srv/file")
    assert load_silo_file(written(tmp_path, home="~/h")).home == Path("/home/me/h")


def test_alone_it_asks_for_no_server_and_for_hardly_any_text(tmp_path: Path) -> None:
    for settings in ({}, {"micro_batch_size": 3}, {"micro_batch_size": 3, "processes": 2}):
        recipe = load_silo_file(written(tmp_path, **settings)).alone()
        assert recipe.silos["fr"].vocab_size == 500
        assert recipe.inner.batch_size * recipe.sequence_tokens <= 12


# ---- mistakes ----------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"colum": "x"}, "colum: no such setting of a silo; did you mean 'column'?"),
    "far from all": ({"q": 1}, "q: no such setting of a silo; known: name, home, files"),
    "a recipe's": ({"inner": {"batch_size": 1}}, "inner: no such setting of a silo"),
    "bad name": ({"name": "../x"}, "name='../x': must be lower-case letters"),
    "no name": ({"name": None}, "name=None: must be"),
    "true name": ({"name": True}, "name=True: must be"),
    "home": ({"home": ["a"]}, "home=['a']: must be the path of a folder"),
    "no vocabulary": ({"vocab_size": None}, "vocab_size: missing; set it, or name an existing"),
    "small": ({"vocab_size": 5}, "vocab_size=5: must be at least 300"),
    "text": ({"vocab_size": "many"}, "vocab_size='many': must be a whole number"),
    "no source": ({"files": []}, "set exactly one of files, hub, packages, sources (set: none)"),
    "two sources": ({"hub": "a/b"}, "of files, hub, packages, sources (set: files, hub)"),
    "empty pattern": ({"files": [""]}, "an empty path or package name"),
    "empty file": ({"files": ""}, "an empty path or package name"),
    "no paths": ({"files": {"a": 1}}, "files={'a': 1}: must be a list"),
    "no validation paths": ({"validation_files": 3}, "validation_files=3: must be a list"),
    "misplaced": ({"hub_where": ["a=b"]}, "hub_where=['a=b']: only together with hub; remove it"),
    "encoding": ({"encoding": "utf-9"}, "encoding='utf-9': no such text encoding"),
    "processes": ({"processes": 0}, "processes=0: must be at least 1"),
    "parallel": ({"parallel": "tp"}, "parallel='tp': must be one of ddp, fsdp"),
    "device": ({"device": "tpu"}, "device='tpu': must be one of auto, cpu, cuda"),
    "fraction": ({"validation_fraction": 2}, "validation_fraction=2.0: must be above 0"),
    "consent": ({"share_embeddings": "yes"}, "share_embeddings='yes': must be true or false"),
    "samples": ({"share_samples": "some"}, "share_samples='some': must be true or false"),
    "micro": ({"micro_batch_size": -1}, "micro_batch_size=-1: must be at least 0"),
    "micro text": ({"micro_batch_size": "x"}, "micro_batch_size='x': must be a whole number"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_with_the_file_and_the_mend(tmp_path: Path, case: str) -> None:
    settings, expected = MISTAKES[case]
    told = problems(tmp_path, **settings)
    assert all(problem.startswith(f"{tmp_path / 'fr.yaml'}: ") for problem in told)
    assert expected in "\n".join(told)
    assert "silos." not in "\n".join(told)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    assert len(problems(tmp_path, colum="x", name="X", vocab_size=None)) == 3
    assert len(problems(tmp_path, device="tpu", vocab_size=5)) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a: [", "not readable as YAML"), ("- a", "expected a mapping"), ("", "name=None")],
)
def test_what_is_no_mapping_is_named(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "fr.yaml").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_silo_file(tmp_path / "fr.yaml")


def test_a_file_that_is_not_there_or_relative_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file; `dept silo new` makes one"):
        load_silo_file(tmp_path / "fr.yaml")
    with pytest.raises(ConfigError, match="must be an absolute path"):
        load_silo_file("fr.yaml")


# ---- a server's recipe -------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> SiloFile:
    return load_silo_file(written(tmp_path, device="cpu"))


def sent(**settings: Any) -> Recipe:
    """A recipe as it comes out of a server's message."""
    return recipe_from_json(replace(RECIPE, **settings).to_json())


HOSTILE: dict[str, Callable[[], Recipe]] = {
    "files of another": lambda: sent(silos={"fr": SiloConfig(files=["/etc/passwd"])}),
    "column of another": lambda: sent(silos={"fr": SiloConfig(hub="a/b", column="secret")}),
    "tokenizer": lambda: sent(tokenizer="shared", shared_tokenizer="/etc/x.model"),
    "other silos only": lambda: sent(silos={"sw": SiloConfig(files=["x"])}, only=["sw"]),
    "without it": lambda: sent(without=["fr"]),
    "sampled": lambda: sent(silos={"sw": SiloConfig(files=["x"])}, silos_per_round=1),
    "its split": lambda: sent(
        validation_fraction=0.9, validation_max_bytes=1 << 40, deduplicate=False
    ),
    "its tokenizer's text": lambda: sent(tokenizer_train_bytes=1 << 40),
    "its vocabulary": lambda: sent(vocab_size=9999),
    "its device": lambda: sent(device="cuda"),
    "its processes": lambda: sent(processes=8, parallel="fsdp"),
    "its samples": lambda: sent(share_samples=True, sample_tokens=5000),
    "its memory": lambda: sent(inner=replace(RECIPE.inner, micro_batch_size=16)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_no_recipe_changes_what_is_the_silos_own(tmp_path: Path, case: str) -> None:
    model = tmp_path / "own.model"
    model.write_bytes(b"")
    file = load_silo_file(written(tmp_path, device="cpu", tokenizer=str(model)))
    fair, changed = file.over(sent()), file.over(HOSTILE[case]())
    assert changed.silos == fair.silos
    assert changed.silo_names == ["fr"]
    own = OF_THE_RECIPE | {"shared_tokenizer", "silos_per_round"}
    for key in own:
        assert getattr(changed, key) == getattr(fair, key)
    assert changed.inner.micro_batch_size == fair.inner.micro_batch_size


def test_all_else_is_the_recipes(file: SiloFile) -> None:
    inner = InnerConfig(local_steps=3, batch_size=5, learning_rate=0.5, warmup_steps=1)
    recipe = file.over(sent(seed=9, rounds=7, sequence_tokens=33, inner=inner))
    assert (recipe.seed, recipe.rounds, recipe.sequence_tokens) == (9, 7, 33)
    assert recipe.inner == inner
    assert recipe.model == RECIPE.model


def test_a_shared_tokenizer_has_to_be_named_in_the_file(file: SiloFile, tmp_path: Path) -> None:
    for variant in ("glob", "trim", "spec"):
        shared = sent(variant=variant, tokenizer="shared", shared_tokenizer="from/the-server")
        with pytest.raises(ConfigError, match="tokenizer: missing; the federation shares one"):
            file.over(shared)
    named = load_silo_file(written(tmp_path, tokenizer="org/name"))
    assert named.over(shared).silos["fr"].tokenizer == "org/name"


def test_a_message_cannot_read_this_machines_environment() -> None:
    tree = asdict(RECIPE)
    tree["name"] = "${oc.env:HOME}"
    with pytest.raises(DeptError, match="may not hold"):
        recipe_from_json(json.dumps(tree))


# ---- writing one -------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    given = {**GIVEN, "files": ["x y/*.txt", 'quote"d', "ü#: é"], "hub": "", "packages": []}
    given |= {"hub_validation_split": "", "hub_files": [], "hub_where": [], "sources": {}}
    given |= {"near_duplicates": 0.0}
    (tmp_path / "fr.yaml").write_text(as_yaml(given), encoding="utf-8")
    assert yaml.safe_load(as_yaml(given)) == given
    source = load_silo_file(tmp_path / "fr.yaml").over(RECIPE).silos["fr"]
    assert source.files == [str(tmp_path / each) for each in given["files"]]


def test_every_key_is_explained_and_the_defaults_are_the_real_ones(tmp_path: Path) -> None:
    text = as_yaml(LEAST)
    assert max(map(len, text.splitlines())) <= 100
    bare = [line.removeprefix("# ") for line in text.splitlines() if ": " in line]
    settings = {key: value for line in bare for key, value in yaml.safe_load(line).items()}
    assert sorted({*settings, "home"}) == sorted(KEYS)
    file = tmp_path / "fr.yaml"
    file.write_text(text, encoding="utf-8")
    short = load_silo_file(file).over(RECIPE)
    file.write_text("\n".join(bare), encoding="utf-8")
    assert load_silo_file(file).over(RECIPE) == short
    assert set(settings) >= {f.name for f in fields(SiloConfig)}
