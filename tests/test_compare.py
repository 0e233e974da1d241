"""`dept compare` on a small federation: all arms, equal tokens and bytes, stopped and gone on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from dept_fl.arms import ARMS, Arm, chosen_arms
from dept_fl.cli import app
from dept_fl.compare import Comparison, Job, experiment_of, flops_per_token
from dept_fl.config import Recipe
from dept_fl.errors import ConfigError, DeptError
from dept_fl.jobs import result_of, run_job, run_jobs
from dept_fl.local import is_alive
from dept_fl.report import Event
from dept_fl.rounds import Server, pretrain
from dept_fl.silo import Silo, Task

Make = Callable[..., Recipe]


def comparison(recipe: Recipe, home: Path, out: Path, arms: str, **more: object) -> Comparison:
    settings = {"seeds": 1, "equal": "tokens", **more}
    return Comparison(recipe, chosen_arms(arms), out=out, home=home, **settings)  # type: ignore[arg-type]


def results(made: Comparison) -> dict[str, Event]:
    return {job.name: run_job(job, made.out, made.home) for job in made.jobs()}


@pytest.fixture(scope="module")
def all_arms(tiny_file: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    from dept_fl.config import load_recipe

    out = tmp_path_factory.mktemp("compare")
    return results(comparison(load_recipe(tiny_file), home, out, "all"))


def test_every_arm_ends_with_the_figures_of_every_silo(all_arms: dict[str, Event]):
    assert {r["arm"] for r in all_arms.values()} == set(ARMS)
    for name, found in all_arms.items():
        expected = {found["silo"]} if found["silo"] else {"ant", "bee", "cat"}
        assert set(found["silos"]) == expected, name
        for facts in found["silos"].values():
            assert 0 < facts["bits_per_byte"] < 20
            assert facts["flops"] > 0
        assert [point["round"] for point in found["curve"]] == [0, 1, 2, 3, 4]
        assert [point["steps"] for point in found["curve"]] == [0, 2, 4, 6, 8]
        assert all(set(p["bits_per_byte"]) == expected for p in found["curve"])


def test_curves_hold_what_was_evaluated(recipe: Make, home: Path, tmp_path: Path):
    """Behind rounds 0 and 3 and at the end, with the same figures as of every round."""
    arms = "std-0,spec-opt"
    often = results(comparison(recipe(""), home, tmp_path / "often", arms))
    seldom = results(comparison(recipe("evaluate_every=3"), home, tmp_path / "seldom", arms))
    for name, found in seldom.items():
        assert [point["round"] for point in found["curve"]] == [0, 3, 4]
        assert found["curve"] == [often[name]["curve"][t] for t in (0, 3, 4)]


def test_equal_tokens_are_equal(all_arms: dict[str, Event]):
    tokens: dict[str, float] = {}
    for found in all_arms.values():
        own = sum(facts["tokens"] for facts in found["silos"].values())
        tokens[found["arm"]] = tokens.get(found["arm"], 0) + own
    small = {name for name in tokens if name.endswith("-small")}
    # four rounds of two steps of four sequences of 16 tokens, of three silos or of one
    assert {tokens[name] for name in tokens.keys() - small} == {3 * 4 * 2 * 4 * 16}
    assert {tokens[name] for name in small} == {4 * 2 * 4 * 16}


def test_what_travels_is_counted(all_arms: dict[str, Event]):
    up = {r["arm"]: r["silos"][min(r["silos"])]["bytes_up"] for r in all_arms.values()}
    assert up["glob"] == up["mixed"] > up["trim"] > up["spec"] == up["spec-opt"] > 0
    assert up["std-1"] == up["act"] == up["alone"] == 0


def test_a_federations_arm_is_the_run_of_its_recipe(
    all_arms: dict[str, Event], recipe: Make, home: Path
):
    made = recipe()
    server = Server(made, "by-hand", None)
    silos = {name: Silo(name, made, home, "by-hand") for name in made.silo_names}
    for silo in silos.values():
        server.register(silo.register())
    pretrain(server, silos)
    for name, silo in silos.items():
        metrics, _, _ = silo.finish(server.task(name))
        found = all_arms[f"spec-opt-seed-{made.seed}"]["silos"][name]
        assert found["bits_per_byte"] == metrics["bits_per_byte"]


def test_states_of_rounds_do_not_pile_up(recipe: Make, home: Path, tmp_path: Path):
    made = comparison(recipe(), home, tmp_path, "spec-opt")
    results(made)
    (job,) = made.jobs()
    for name in made.recipe.silo_names:
        folder = home / "silos" / name / "state" / experiment_of(tmp_path / job.name)
        assert [each.name for each in folder.iterdir()] == ["final"]


# ---- equal bytes ------------------------------------------------------------------------------


def test_equal_bytes_are_equal(recipe: Make, home: Path, tmp_path: Path):
    base = recipe("inner.local_steps=20")
    made = comparison(base, home, tmp_path, "std-0,std-1,spec-opt", equal="both")
    text: dict[tuple[str, str], float] = {}
    for name, result in results(made).items():
        assert name.endswith("-bytes") == (result["equal"] == "bytes")
        text[result["arm"], result["equal"]] = sum(
            silo["text_bytes"] for silo in result["silos"].values()
        )
    whole = text["spec-opt", "tokens"]
    assert ("spec-opt", "bytes") not in text  # its bytes are what the others are to have
    for arm in ("std-0", "std-1"):
        assert text[arm, "tokens"] < 0.6 * whole  # one vocabulary for three languages
        assert text[arm, "bytes"] == pytest.approx(whole, rel=0.05)


def test_another_parity_is_refused(recipe: Make, home: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="--equal 'words': must be tokens, bytes or both"):
        comparison(recipe(), home, tmp_path, "all", equal="words")


# ---- stopped and gone on ----------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("arm", ["trim", "mixed", "act"])
def test_a_job_stopped_within_goes_on_as_the_unbroken(
    recipe: Make, home: Path, tmp_path: Path, arm: str, monkeypatch: pytest.MonkeyPatch
):
    from dept_fl import central, compare

    made = comparison(recipe("name=stopped"), home, tmp_path, arm)
    (job,) = made.jobs()
    whole = run_job(job, tmp_path / "whole", home)
    owner, method = (compare.Server, "save") if arm != "act" else (central.Central, "_save")
    save = getattr(owner, method)

    def stops(self: Server, *words: object) -> None:
        save(self, *words)
        if self.round == 2:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(owner, method, stops)
        run_job(job, tmp_path / "parts", home)
    assert result_of(job, tmp_path / "parts") is None
    again = run_job(job, tmp_path / "parts", home)
    assert without_times(again) == without_times(whole)


def without_times(result: Event) -> Event:
    return {k: v for k, v in result.items() if k not in ("wall_s", "train_s")}


def test_what_is_done_is_not_done_again_unless_the_settings_changed(
    recipe: Make, home: Path, tmp_path: Path
):
    said: list[str] = []
    made = comparison(recipe("name=again"), home, tmp_path, "std-0-small")
    first = run_jobs(made.jobs(), tmp_path, home, 1, said.append)
    second = run_jobs(made.jobs(), tmp_path, home, 1, said.append)
    assert first == second and not first[1]
    assert said[0] == "1 jobs, 0 done already; 1 side by side"
    assert said[1].startswith("std-0-small-seed-3: ")
    assert said[2:] == ["1 jobs, 1 done already; 1 side by side"]
    changed = replace(made, recipe=recipe("name=again inner.learning_rate=0.02"))
    assert result_of(changed.jobs()[0], tmp_path) is None
    with pytest.raises(DeptError, match="std-0-small-seed-3: made with other settings"):
        run_jobs(changed.jobs(), tmp_path, home, 1, said.append)
    assert result_of(made.jobs()[0], tmp_path) is not None  # nothing is lost


class Fails(Job):
    def run(self, folder: Path, home: Path) -> Event:
        raise ConfigError(["the training loss became nan"])


def test_a_job_that_fails_does_not_cost_the_others(recipe: Make, home: Path, tmp_path: Path):
    (good,) = comparison(recipe("name=good"), home, tmp_path, "std-0-small").jobs()
    bad = Fails(Arm("bad", "central", ""), 1, "tokens", recipe(), "")
    results, failures = run_jobs([bad, good], tmp_path, home, 1, lambda line: None)
    assert [result["arm"] for result in results] == ["std-0-small"]
    (failure,) = failures
    assert failure.startswith("bad-seed-1: ") and "  - the training loss became nan" in failure


class Endless(Job):
    def run(self, folder: Path, home: Path) -> Event:
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(600)
        return {}


SCRIPT = """
import signal
import sys
from pathlib import Path
from dept_fl.arms import Arm
from dept_fl.config import load_recipe
from dept_fl.jobs import run_jobs
from tests.test_compare import Endless
if __name__ == "__main__":
    # What a shell started in the background ignores it, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    job = Endless(Arm("endless", "central", ""), 1, "tokens", load_recipe(sys.argv[1]), "")
    try:
        run_jobs([job], Path(sys.argv[2]), Path(sys.argv[2]), 1, print)
    except KeyboardInterrupt:
        sys.exit("stopped")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_no_worker_outlives_the_command(tiny_file: Path, tmp_path: Path, name: str):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tiny_file), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        file = tmp_path / "endless-seed-1" / "pid"
        wait_until(lambda: file.is_file() and file.read_text() != "")
        worker = psutil.Process(int(file.read_text()))
        send = os.killpg if name == "SIGINT" else os.kill  # a terminal sends it to all of them
        send(parent.pid, signal.Signals[name])
        assert parent.wait(60) != 0
        wait_until(lambda: not is_alive(worker))
        assert parent.stderr is not None
        told = parent.stderr.read()
    assert "Traceback" not in told
    assert ("stopped" in told) == (name == "SIGINT")


def wait_until(done: Callable[[], bool], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("arm", ["trim", "spec-opt"])
def test_a_job_stopped_in_its_last_evaluation_goes_on(
    recipe: Make, home: Path, tmp_path: Path, arm: str, monkeypatch: pytest.MonkeyPatch
):
    (job,) = comparison(recipe("name=late"), home, tmp_path, arm).jobs()
    whole = run_job(job, tmp_path / "whole", home)
    finish = Silo.finish

    def stops(self: Silo, task: Task) -> object:
        if self.name == "bee":
            raise Stop
        return finish(self, task)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Silo, "finish", stops)
        run_job(job, tmp_path / "parts", home)
    again = run_job(job, tmp_path / "parts", home)
    assert without_times(again) == without_times(whole)


def test_a_sample_of_the_silos_is_refused(recipe: Make, home: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="silos_per_round=2: arms that take a sample"):
        comparison(recipe("silos_per_round=2"), home, tmp_path, "all")


# ---- the count of operations ---------------------------------------------------------------------


def test_flops_of_a_token_by_hand(recipe: Make):
    # A matrix of [in, out] costs 2 in out forward and twice that backward. Two layers with q, k, v,
    # o of 16 x 16 and three of 16 x 32; the head of 16 x 100. Attention multiplies 16 numbers of
    # each head's query with all 16 keys, and the weights with as many values.
    matrices = 2 * (4 * 16 * 16 + 3 * 16 * 32) + 16 * 100
    attention = 2 * (16 * 16 + 16 * 16)
    assert flops_per_token(recipe(), 100) == 6 * (matrices + attention)


# ---- the command -------------------------------------------------------------------------------


def test_the_command_writes_tables_and_plots(tiny_file: Path, home: Path, tmp_path: Path):
    words = ["compare", str(tiny_file), "rounds=1", "--out", str(tmp_path), "--home", str(home)]
    done = CliRunner().invoke(app, [*words, "--arms", "alone,std-1-small", "--seeds", "2"])
    assert done.exit_code == 0, done.output
    assert "Equal tokens, 2 seeds, mean of 3 silos:" in done.output
    assert "| std-1-small |" in done.output
    assert (tmp_path / "curves.png").is_file()
    again = CliRunner().invoke(app, [*words, "--arms", "alone,std-1-small", "--seeds", "2",
                                     "--json"])  # fmt: skip
    assert "8 jobs, 8 done already" in again.output
    assert {row["arm"] for row in json.loads(again.stdout)} == {"alone", "std-1-small"}


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--arms", "std-7"], "no such arm"),
        (["--equal", "text"], "must be tokens, bytes or both"),
        (["roundz=3"], "roundz: no such setting"),
    ],
)
def test_mistakes_cost_one_line(
    tiny_file: Path, home: Path, tmp_path: Path, words: list[str], fragment: str
):
    fixed = ["compare", str(tiny_file), "--out", str(tmp_path), "--home", str(home)]
    done = CliRunner().invoke(app, [*fixed, *words])
    assert done.exit_code == 2
    assert fragment in done.stderr
