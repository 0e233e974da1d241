"""What a silo keeps on its disk between rounds, and what it does when that is damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
from flwr.app import Message

from dept_fl import checkpoint
from dept_fl.checkpoint import load_state, round_folder, rounds_on_disk, under_prefix
from dept_fl.config import Recipe
from dept_fl.errors import DeptError
from dept_fl.report import Ledger
from dept_fl.rounds import Server, pretrain
from dept_fl.silo import Silo
from dept_fl.strategy import DeptStrategy
from tests.federation import InProcessGrid, same, start, train_round

Make = Callable[..., Recipe]


def flip_a_bit(state: Path) -> None:
    file = state / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut_short(state: Path) -> None:
    file = state / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def change_a_fact(state: Path) -> None:
    facts = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps({**facts, "position": 0}))


def cut_the_facts_short(state: Path) -> None:
    text = (state / "state.json").read_text()
    (state / "state.json").write_text(text[: len(text) // 2])


def lose_the_facts(state: Path) -> None:
    (state / "state.json").unlink()


def lose_the_tensors(state: Path) -> None:
    (state / "tensors.safetensors").unlink()


DAMAGES = [
    flip_a_bit, cut_short, change_a_fact, cut_the_facts_short, lose_the_facts, lose_the_tensors,
    shutil.rmtree,
]  # fmt: skip


def behind(rounds: int, recipe: Recipe, home: Path) -> tuple[Server, Silo]:
    """The server behind so many rounds, and one of its silos."""
    server, silos = start(replace(recipe, rounds=rounds), home)
    pretrain(server, silos)
    server.recipe = replace(server.recipe, rounds=recipe.rounds)
    ant = Silo("ant", server.recipe, home, server.experiment)
    return server, ant


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_the_newest_state_is_damaged_the_one_before_is_used(
    recipe: Make, home: Path, damage: Callable[[Path], None]
):
    server, ant = behind(2, recipe("rounds=4"), home)
    task = server.task("ant")
    expected = ant.train(replace(task, start_round=1))
    damage(round_folder(ant._states, 2))
    found = ant.train(task)
    assert same(found.body, expected.body)
    assert expected.warning == ""
    assert "round-00002" in found.warning
    assert "going on from its state of round 1" in found.warning


def test_behind_a_power_cut_a_silo_has_what_it_may_start_from(
    recipe: Make, home: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its first state is on the disk at once, each other one behind the next round."""
    server, silos = start(recipe("rounds=4"), home)
    ant, synced = silos["ant"], set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))

    def is_on_disk(folder: Path) -> bool:
        return {path.stat().st_ino for path in (folder, *folder.iterdir())} <= synced

    for round_ in range(1, 5):
        train_round(server, silos)
        kept = {r: is_on_disk(round_folder(ant._states, r)) for r in rounds_on_disk(ant._states)}
        assert kept == {r: r == 1 or r < round_ for r in kept}
        assert max(kept) == round_
    ant.finish(server.task("ant"))
    assert is_on_disk(ant.final_folder)


def test_without_an_older_state_the_silo_says_what_it_needs(recipe: Make, home: Path):
    server, ant = behind(1, recipe("rounds=4"), home)
    flip_a_bit(round_folder(ant._states, 1))
    reason = r"silo ant: .*round-00001: tensors.safetensors is damaged .*put its home back from a"
    with pytest.raises(DeptError, match=reason):
        ant.train(server.task("ant"))
    assert rounds_on_disk(ant._states) == [1]


def test_where_all_its_states_are_damaged_too(recipe: Make, home: Path):
    server, ant = behind(2, recipe("rounds=4"), home)
    for round_ in (1, 2):
        flip_a_bit(round_folder(ant._states, round_))
    with pytest.raises(DeptError, match=r"silo ant: .*round-00001.* put its home back"):
        ant.train(server.task("ant"))


def test_a_state_that_is_whole_but_of_other_text_is_never_passed_over(recipe: Make, home: Path):
    """That is no damage: an older one would only hide that the silo is another."""
    server, _ = behind(2, recipe("rounds=4"), home)
    other = Silo("ant", replace(server.recipe, validation_fraction=0.3), home, server.experiment)
    with pytest.raises(DeptError, match=r"its state of round 2 has t.*it is .* now"):
        other.train(server.task("ant"))


class Killed(BaseException):
    """Ends a process between two statements."""


def test_a_silo_that_is_killed_while_it_writes_leaves_nothing_that_could_be_read(
    recipe: Make, home: Path, monkeypatch: pytest.MonkeyPatch
):
    server, ant = behind(2, recipe("rounds=4"), home)
    task = server.task("ant")
    expected = ant.train(task)
    shutil.rmtree(round_folder(ant._states, 3))
    save_file = safetensors.torch.save_file

    def half(tensors: object, file: Path) -> None:
        save_file(tensors, file)
        file.write_bytes(file.read_bytes()[:100])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", half)
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # nobody tidies up
        with pytest.raises(Killed):
            ant.train(task)
    left = {path.name for path in ant._states.iterdir()}
    assert any(name.endswith(".draft") for name in left)
    assert rounds_on_disk(ant._states) == [1, 2]
    again = ant.train(task)
    assert again.warning == ""
    assert same(again.body, expected.body)


@pytest.fixture
def stopped(recipe: Make, home: Path, tmp_path: Path) -> Callable[[int], Silo]:
    """stopped(t): bee's silo in a run of three rounds that is killed at bee's task of round t."""

    def run_until(round_: int) -> Silo:
        experiment = []

        def kill(message: Message, reply: Message) -> Message:
            record = message.content.config_records["task"]
            experiment[:] = [record["experiment"]]
            if (record["silo"], record.get("round")) == ("bee", round_):
                raise Killed
            return reply

        with pytest.raises(Killed):
            run(recipe("rounds=3"), home, tmp_path, InProcessGrid(2, home, kill))
        return Silo("bee", recipe("rounds=3"), home, experiment[0])

    return run_until


def run(
    recipe: Recipe, home: Path, run_dir: Path, grid: InProcessGrid, resume: bool = False
) -> Server:
    return DeptStrategy(recipe, home, run_dir, resume, simulated=True).start(grid)


def warned(run_dir: Path) -> list[tuple[int, str]]:
    return [(e["round"], e["silo"]) for e in Ledger(run_dir).read() if e["event"] == "warning"]


def test_the_server_prints_and_records_that_a_state_was_damaged(
    recipe: Make, home: Path, tmp_path: Path, stopped: Callable[[int], Silo],
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    bee = stopped(3)
    shutil.rmtree(round_folder(bee._states, 3))  # it had trained, and was not heard
    flip_a_bit(round_folder(bee._states, 2))
    server = run(recipe("rounds=3"), home, tmp_path, InProcessGrid(2, home), resume=True)
    assert server.members["bee"].merged == [1, 2, 3]
    assert warned(tmp_path) == [(3, "bee")]
    printed = capsys.readouterr().out
    assert printed.count("round 3: warning: silo bee: ") == 1
    assert "going on from its state of round 1" in printed


def test_the_final_model_is_not_quietly_made_of_older_embeddings(
    recipe: Make, home: Path, tmp_path: Path, stopped: Callable[[int], Silo]
):
    bee = stopped(4)
    flip_a_bit(round_folder(bee._states, 3))
    run(recipe("rounds=3"), home, tmp_path, InProcessGrid(2, home), resume=True)
    assert warned(tmp_path) == [(3, "bee")]
    tensors, _ = load_state(bee.final_folder)
    assert same(under_prefix("embeddings", tensors), bee._state(2).embeddings)
