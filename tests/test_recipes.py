"""The recipes of conf/ that need more than this machine: their figures, and their data in small."""

from __future__ import annotations

import gzip
import json
import random
import re
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest

from dept_fl.config import CONF_DIR, Recipe, load_recipe
from dept_fl.model import layout
from dept_fl.silo import Silo

LATIN = ["ka", "lo", "mi", "nu", "pe", "ra", "so", "ti"]
GREEK = ["κα", "λο", "μι", "νυ", "πε", "ρα", "σο", "τι"]


def millions(recipe: Recipe, vocabulary: int) -> float:
    found = layout(recipe.model, recipe.sequence_tokens)
    return (found.body_parameters() + found.embedding_parameters(vocabulary)) / 1e6


@pytest.fixture(scope="module")
def mc4() -> Recipe:
    return load_recipe("conf/mc4.yaml")


@pytest.fixture(scope="module")
def pile() -> Recipe:
    return load_recipe("conf/pile.yaml")


# ---- the paper's figures ---------------------------------------------------------------------


def test_mc4_has_the_papers_languages_and_its_out_of_distribution_ones(mc4: Recipe) -> None:
    assert set(mc4.silo_names) == {"en", "it", "zh", "sr", "ms", "sw", "ur", "la"}
    assert set(mc4.silos) - set(mc4.silo_names) == {"el", "hi", "de"}
    configs = {name: source.hub_config for name, source in mc4.silos.items()}
    assert configs == {name: name for name in mc4.silos} | {"en": "en-multi"}


def test_the_pile_has_sixteen_subsets_and_ubuntu_irc_besides(pile: Recipe) -> None:
    assert len(pile.silo_names) == 16
    assert set(pile.silos) - set(pile.silo_names) == {"ubuntu-irc"}
    subsets = {condition for source in pile.silos.values() for condition in source.hub_where}
    assert len(subsets) == 17
    assert all(subset.startswith("meta.pile_set_name=") for subset in subsets)


def test_the_schedules_are_as_long_as_the_papers(mc4: Recipe, pile: Recipe) -> None:
    assert [(r.rounds, r.inner.local_steps, r.total_steps) for r in (mc4, pile)] == [
        (10, 500, 5_000),
        (27, 500, 13_500),
    ]
    large = load_recipe("conf/mc4.yaml", "model.preset=gpt2-1b rounds=14 inner.batch_size=512")
    assert large.total_steps == 7_000
    assert mc4.sequence_tokens == pile.sequence_tokens == large.sequence_tokens == 2048


@pytest.mark.parametrize(
    ("recipe", "overrides", "vocabulary", "printed"),
    [
        ("mc4", "", 250_112, 278),
        ("mc4", "", 216_135, 252),
        ("mc4", "", 50_257, 125),
        ("mc4", "model.preset=gpt2-1b", 250_112, 1_710),
        ("mc4", "model.preset=gpt2-1b", 50_257, 1_300),
        ("pile", "model.preset=gpt2-125m", 50_257, 125),
        ("pile", "model.preset=gpt2-125m", 45_554, 121),
        ("pile", "", 50_257, 350),
        ("pile", "", 45_554, 345.2),
    ],
)
def test_models_have_as_many_parameters_as_the_paper_prints(
    recipe: str, overrides: str, vocabulary: int, printed: float
) -> None:
    # Table 2; the prints are rounded, and those of 24 blocks leave positions out.
    made = load_recipe(f"conf/{recipe}.yaml", overrides)
    assert millions(made, vocabulary) == pytest.approx(printed, rel=0.018)


@pytest.mark.parametrize("recipe", ["mc4", "pile"])
def test_a_silo_takes_as_much_text_as_the_schedule_reads_once(recipe: str) -> None:
    made = load_recipe(f"conf/{recipe}.yaml")
    tokens = made.rounds * made.round_tokens
    for source in made.silos.values():
        assert source.max_bytes / tokens == pytest.approx(4.5, rel=0.03)


# What names an open model is tried with one, by tests/test_start.py.
OF_PRESETS = [file for file in sorted(CONF_DIR.glob("*.yaml")) if file.stem != "continue"]


def commands(files: Iterable[Path]) -> Iterable[tuple[str, str]]:
    for file in files:
        text = re.sub(r"\\\n#\s*", "", file.read_text(encoding="utf-8"))
        for words in re.findall(rf"^#   dept run conf/{file.name} (.*)$", text, re.MULTILINE):
            yield file.name, " ".join(map(shlex.quote, shlex.split(words, comments=True)))


@pytest.mark.parametrize(("file", "words"), commands(OF_PRESETS))
def test_every_command_that_a_recipe_tells_of_is_a_good_one(file: str, words: str) -> None:
    assert load_recipe(CONF_DIR / file, words) != load_recipe(CONF_DIR / file)


def test_recipes_tell_of_commands() -> None:
    found = list(commands(OF_PRESETS))
    assert {file for file, _ in found} == {"mc4.yaml", "pile.yaml"}
    labels = {load_recipe(CONF_DIR / file, words).label for file, words in found}
    assert labels == {"glob", "spec", "spec-opt"}


# ---- the handbook ----------------------------------------------------------------------------


def test_the_handbooks_silos_are_its_languages_six_of_which_train() -> None:
    recipe = load_recipe("conf/handbook.yaml")
    assert recipe.silo_names == ["ar", "de", "fr", "ja", "ru", "zh"]
    assert sorted(recipe.silos) == "ar ca de en es fa fr id it ja nb pt ru zh".split()
    assert (recipe.label, recipe.total_steps) == ("spec-opt", 384)
    for name, source in recipe.silos.items():
        folder = CONF_DIR.parent / "data" / "handbook" / name
        assert [Path(f).resolve() for f in source.files] == [folder / "train.jsonl"]
        assert [Path(f).resolve() for f in source.validation_files] == [folder / "validation.jsonl"]


# ---- local data of the hub's form ------------------------------------------------------------

SMALL = (
    "tokenizer=own shared_tokenizer= vocab_size=320 sequence_tokens=16 inner.batch_size=4 "
    "inner.micro_batch_size=4 validation_max_bytes=3000"
)


def texts(seed: str, count: int, syllables: list[str]) -> list[str]:
    draw = random.Random(seed)
    words = [a + b for a in syllables for b in syllables]
    return [" ".join(draw.choices(words, k=40)) for _ in range(count)]


def lines(texts_: Iterable[str], **fields: object) -> bytes:
    return "".join(json.dumps({"text": text, **fields}) + "\n" for text in texts_).encode()


def small(recipe: str, hub: Path, home: Path, silo: str) -> Silo:
    """A silo of the recipe whose hub data set is a local folder, with a small vocabulary."""
    made = load_recipe(f"conf/{recipe}.yaml", SMALL)
    silos = {name: replace(source, hub=str(hub)) for name, source in made.silos.items()}
    return Silo(silo, replace(made, silos=silos), home, "")


def check_splits(silo: Silo, train: list[str], validation: list[str]) -> None:
    assert list(silo.corpus.texts("train")) == train
    kept = list(silo.corpus.texts("validation"))
    assert kept == validation[: len(kept)]
    assert 0 < silo.corpus.validation_bytes <= 3000
    assert silo.stream.vocabulary.size == 320
    ends = silo.stream.train == silo.tokenizer.end_id
    assert ends.sum() == len(train) + 1


@pytest.mark.parametrize(("silo", "syllables"), [("sw", LATIN), ("el", GREEK)])
def test_mc4s_languages_are_read_from_data_of_its_form(
    tmp_path: Path, silo: str, syllables: list[str]
) -> None:
    """Shards of packed JSON Lines, and a card that tells which are whose."""
    hub = tmp_path / "c4"
    (hub / "multilingual").mkdir(parents=True)
    card = ["---", "configs:"]
    for language, its in (("sw", LATIN), ("el", GREEK)):
        found = texts(language, 70, its)
        head = f"multilingual/c4-{language}"
        for name, part in (
            (".tfrecord-00000-of-00002", found[:30]),
            (".tfrecord-00001-of-00002", found[30:60]),
            ("-validation.tfrecord-00000-of-00001", found[60:]),
        ):
            packed = gzip.compress(lines(part, timestamp="2019-01-01", url="http://x"))
            (hub / f"{head}{name}.json.gz").write_bytes(packed)
        card += [f"- config_name: {language}", "  data_files:"]
        for split, name in (("train", ""), ("validation", "-validation")):
            card += [f"  - split: {split}", f"    path: {head}{name}.tfrecord-*.json.gz"]
    (hub / "README.md").write_text("\n".join([*card, "---", ""]))
    expected = texts(silo, 70, syllables)
    check_splits(small("mc4", hub, tmp_path / "home", silo), expected[:60], expected[60:])


@pytest.mark.parametrize(
    ("silo", "subset"), [("wikipedia", "Wikipedia (en)"), ("ubuntu-irc", "Ubuntu IRC")]
)
def test_the_piles_subsets_are_read_from_data_of_its_form(
    tmp_path: Path, silo: str, subset: str
) -> None:
    """Files of rows in any order, each with the name of its subset; and a copy of a row."""
    hub = tmp_path / "pile"
    (hub / "train").mkdir(parents=True)
    for name, count in (("train/00", 60), ("train/01", 60), ("val", 20), ("test", 20)):
        rows = [
            lines([text], meta={"pile_set_name": of})
            for pair in zip(
                texts(name, count // 2, LATIN),
                texts(f"{name} other", count // 2, LATIN),
                strict=True,
            )
            for text, of in zip(pair, (subset, "Pile-CC"), strict=True)
        ]
        packed = pyarrow.compress(b"".join(rows), "zstd", asbytes=True)
        (hub / f"{name}.jsonl.zst").write_bytes(packed)
    train = [*texts("train/00", 30, LATIN), *texts("train/01", 30, LATIN)]
    check_splits(small("pile", hub, tmp_path / "home", silo), train, texts("val", 10, LATIN))
