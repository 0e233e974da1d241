"""After DEPT: bodies learn on, from which embeddings, at which rate, and what the table says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dept_fl.adapt import Adaptation, Plan, _text, load_run, markdown, rows
from dept_fl.arms import chosen_arms
from dept_fl.checkpoint import load_state, round_folder, under_prefix
from dept_fl.cli import app
from dept_fl.compare import Comparison
from dept_fl.config import Recipe, load_recipe
from dept_fl.errors import ConfigError, DeptError
from dept_fl.jobs import run_job
from dept_fl.silo import Silo

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def runs(tiny_file: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of what a comparison trained on two of the three silos."""
    out = tmp_path_factory.mktemp("runs")
    recipe = load_recipe(tiny_file, "only=[ant,bee] inner.local_steps=6 inner.warmup_steps=4")
    for job in Comparison(recipe, chosen_arms("spec-opt,glob,std-0"), 1, out, home).jobs():
        run_job(job, out, home)
    return out


def plan(runs: Path, home: Path, *bodies: str, start: str = "random", **more: Any) -> Plan:
    folders = [b if b == "random" else str(runs / f"{b}-seed-3") for b in bodies]
    return Plan(folders, start.split(","), home, **more)


def made(
    plan_: Plan, words: str = "only=[cat]", steps: int = 6, every: int = 3
) -> list[Adaptation]:
    return plan_.jobs(plan_.recipe("", words, steps, every))


# ---- the plan ---------------------------------------------------------------------------------


def test_every_body_with_every_start_that_it_can_have(runs: Path, home: Path):
    jobs = made(plan(runs, home, "spec-opt", "random", start="random,copy", seeds=2))
    assert [job.name for job in jobs] == [
        "spec-opt-seed-3-random-seed-3", "spec-opt-seed-3-copy-seed-3", "random-random-seed-3",
        "spec-opt-seed-3-random-seed-4", "spec-opt-seed-3-copy-seed-4", "random-random-seed-4",
    ]  # fmt: skip


def test_the_papers_schedule(runs: Path, home: Path):
    """17 % of the steps; from random embeddings at the highest rate, else at half of it."""
    jobs = made(plan(runs, home, "glob", start="random,trained"), steps=0, every=0)
    fresh, trained = (job.recipe for job in jobs)
    assert fresh.total_steps == trained.total_steps == round(0.17 * 24)
    assert fresh.inner.learning_rate == 0.01
    assert trained.inner.learning_rate == 0.005
    assert fresh.silo_names == ["cat"]
    apart = "only=[cat] inner.embedding_learning_rate=0.04"
    jobs = made(plan(runs, home, "glob", start="random,trained"), apart, steps=0, every=0)
    rates = [job.recipe.inner.embedding_learning_rate for job in jobs]
    assert rates == [0.04, 0.02]


@pytest.mark.parametrize(("sampling", "tau"), [("uniform", 0.0), ("proportional", 1.0)])
def test_sampling_is_the_mixtures_exponent(runs: Path, home: Path, sampling: str, tau: float):
    (job,) = made(plan(runs, home, "std-0", sampling=sampling), words="")
    assert job.tau == tau
    assert job.recipe.silo_names == ["ant", "bee"]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "start": ({"start": "copied"}, "--start 'copied': must be one of random, trained, copy"),
    "sampling": ({"sampling": "even"}, "--sampling 'even': must be one of uniform, proportional"),
    "stitch": ({"start": "stitch"}, "--start stitch: needs --own"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(runs: Path, home: Path, case: str):
    more, told = MISTAKES[case]
    with pytest.raises(ConfigError, match=told):
        plan(runs, home, "glob", **more)


def test_a_start_from_an_open_model_is_no_setting_of_adapt(runs: Path, home: Path):
    with pytest.raises(ConfigError, match=r"model\.start='org/model': what a run starts from"):
        made(plan(runs, home, "glob"), "only=[cat] model.start=org/model")


def test_two_bodies_of_one_name_are_refused(runs: Path, home: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="two of one name"):
        Plan([str(runs / "glob-seed-3"), str(tmp_path / "glob-seed-3")], ["random"], home)


def test_a_folder_without_a_run_is_named(home: Path, tmp_path: Path):
    with pytest.raises(DeptError, match="no checkpoint; name the folder of a run"):
        Plan([str(tmp_path)], ["random"], home).recipe("", "", 1, 1)
    with pytest.raises(ConfigError, match="a random body alone tells no model"):
        Plan(["random"], ["random"], home).recipe("", "", 1, 1)


# ---- what learns on ------------------------------------------------------------------------------


def test_the_body_is_the_runs_and_the_embeddings_are_new(runs: Path, home: Path, tmp_path: Path):
    (job,) = made(plan(runs, home, "spec-opt"), steps=1, every=1)
    result = run_job(job, tmp_path, home)
    saved, _ = load_state(round_folder(tmp_path / job.name / "checkpoints", 1))
    start = load_run(runs / "spec-opt-seed-3").body
    for name, tensor in under_prefix("body", saved).items():  # one step of AdamW away
        assert float((tensor - start[name]).abs().max()) <= 0.011
    assert [point["steps"] for point in result["curve"]] == [0, 1]
    assert result["transfer"] == {}


def test_trained_embeddings_go_on_where_the_run_ended(runs: Path, home: Path, tmp_path: Path):
    for arm in ("glob", "std-0"):
        (job,) = made(plan(runs, home, arm, start="trained"), words="")
        result = run_job(job, tmp_path, home)
        ended = json.loads((runs / f"{arm}-seed-3" / "result.json").read_text())["curve"][-1]
        assert result["curve"][0]["bits_per_byte"] == pytest.approx(ended["bits_per_byte"])


@pytest.mark.parametrize(
    ("bodies", "start", "told"),
    [
        (["spec-opt"], "trained", "--start trained: only runs with shared embeddings"),
        (["glob", "std-0", "random"], "copy", "--start copy: only SPEC runs can have it"),
    ],
)
def test_a_start_that_no_body_can_have_is_refused(
    runs: Path, home: Path, bodies: list[str], start: str, told: str
):
    with pytest.raises(ConfigError, match=told):
        made(plan(runs, home, *bodies, start=f"random,{start}"))


def test_each_body_gets_the_starts_that_it_can_have(runs: Path, home: Path):
    jobs = made(plan(runs, home, "spec-opt", "glob", start="trained,copy"))
    assert [(job.label, job.start) for job in jobs] == [
        ("spec-opt-seed-3", "copy"), ("glob-seed-3", "trained"),
    ]  # fmt: skip


def test_trained_embeddings_of_another_tokenizer_are_refused(
    runs: Path, home: Path, tmp_path: Path
):
    """Of as many pieces, but other ones."""
    (job,) = made(plan(runs, home, "glob", start="trained"), words="shared_tokenizer= only=[cat]")
    with pytest.raises(ConfigError, match="its embeddings are of another tokenizer"):
        run_job(job, tmp_path, home)


def test_tokens_are_alike_by_the_text_of_all_silos(runs: Path, home: Path):
    """As many tokens of each where they are sampled uniformly, else what there is."""
    (job,) = made(plan(runs, home, "spec-opt"), words="")
    ant, bee = (Silo(name, job.recipe, home, "").stream for name in ("ant", "bee"))
    least = min(len(ant.train), len(bee.train))
    assert _text([ant, bee], 0.0).tolist() == [*ant.train[:least], *bee.train[:least]]
    assert _text([ant, bee], 1.0).tolist() == [*ant.train, *bee.train]


def test_a_body_that_was_trained_again_is_another_job(runs: Path, home: Path, tmp_path: Path):
    (before,) = made(plan(runs, home, "glob"))
    folder = tmp_path / "glob-seed-3"
    shutil.copytree(runs / "glob-seed-3", folder)
    same = Plan([str(folder)], ["random"], home)
    (moved,) = made(same)
    assert moved.key == before.key
    shutil.rmtree(folder / "checkpoints" / "round-00004")
    (older,) = made(same)
    assert older.key != before.key


def test_silos_embeddings_are_carried_over_to_a_global_vocabulary(
    runs: Path, home: Path, tmp_path: Path
):
    """For the silos' own text, what they learned is worth more than chance before any step."""
    jobs = made(plan(runs, home, "spec-opt", start="random,copy,mix"), words="")
    results = {job.start: run_job(job, tmp_path, home) for job in jobs}
    first = {start: result["curve"][0]["mean"] for start, result in results.items()}
    assert first["copy"] < first["random"] - 0.2
    assert first["mix"] < first["random"] - 0.2
    assert results["copy"]["transfer"]["rows"]["copied"] > 100


def test_where_no_silo_kept_embeddings_the_home_is_named(runs: Path, home: Path, tmp_path: Path):
    (job,) = made(plan(runs, home, "spec-opt", start="copy"), words="")
    run = load_run(Path(job.body))
    assert run.experiment
    with pytest.raises(DeptError, match=r"no silo in .* has embeddings of this run"):
        job._sources(run, tmp_path)


def test_a_body_of_another_model_is_refused(runs: Path, home: Path, tmp_path: Path):
    (job,) = made(plan(runs, home, "glob"), words="only=[cat] model.config.hidden_size=32")
    with pytest.raises(ConfigError, match="its body is not that of the recipe's model"):
        run_job(job, tmp_path, home)


def test_a_random_body_is_no_runs_first_body(runs: Path, home: Path, tmp_path: Path):
    jobs = made(plan(runs, home, "spec-opt", "random"), steps=1, every=1)
    bodies = []
    for job in jobs:
        run_job(job, tmp_path, home)
        saved, _ = load_state(round_folder(tmp_path / job.name / "checkpoints", 1))
        bodies.append(under_prefix("body", saved)["model.layers.0.mlp.up_proj.weight"])
    assert float((bodies[0] - bodies[1]).norm() / bodies[1].norm()) > 0.5
    assert torch.isfinite(bodies[1]).all()


# ---- the table -----------------------------------------------------------------------------------


def curve(*bits: float) -> list[dict[str, Any]]:
    return [{"steps": 5 * i, "mean": b, "bits_per_byte": {"x": b}} for i, b in enumerate(bits)]


def test_the_table_by_hand():
    results = [
        {"body": "b", "start": "random", "seed": 1, "curve": curve(9.0, 5.0, 3.0)},
        {"body": "b", "start": "random", "seed": 2, "curve": curve(11.0, 7.0, 5.0)},  # ends: 4
        {"body": "b", "start": "copy", "seed": 1, "curve": curve(6.0, 3.0, 2.0)},
        {"body": "b", "start": "copy", "seed": 2, "curve": curve(6.0, 5.0, 4.0)},
        {"body": "b", "start": "mix", "seed": 1, "curve": curve(8.0, 6.0, 5.0)},
    ]
    copy, random, mix = rows(results)
    assert (copy.first, copy.last, copy.reached, copy.seeds) == (6.0, 3.0, 5, 2)
    assert (random.first, random.last, random.reached) == (10.0, 4.0, None)
    assert (mix.last, mix.reached) == (5.0, None)
    text = markdown([copy, random, mix])
    assert "| b | copy | 6.000 | 3.000 ± 1.414 | at step 5 of 10 |" in text
    assert "| b | random | 10.000 | 4.000 ± 1.414 |  |" in text
    assert "| b | mix | 8.000 | 5.000 | never |" in text


def test_the_command(runs: Path, home: Path, tmp_path: Path):
    words = ["adapt", str(runs / "spec-opt-seed-3"), "random", "--start", "random,copy"]
    words += ["--set", "only=[cat]", "--steps", "4", "--every", "2", "--home", str(home)]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "| spec-opt-seed-3 | copy |" in done.output
    assert "| random | random |" in done.output
    assert (tmp_path / "adaptation.png").is_file()
    found = json.loads((tmp_path / "adaptation.json").read_text())
    assert len(found["rows"]) == 3
    wrong = CliRunner().invoke(app, [*words, "--out", str(tmp_path), "--sampling", "x"])
    assert wrong.exit_code == 2
    assert "must be one of uniform, proportional" in wrong.stderr
