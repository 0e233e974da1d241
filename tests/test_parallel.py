"""Several processes give what one gives; where one of them ends, all end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from dept_fl.checkpoint import Tensors
from dept_fl.config import Recipe
from dept_fl.deadline import ends_within
from dept_fl.errors import ConfigError, DeptError
from dept_fl.model import parameters
from dept_fl.parallel import Group, _trouble, run_together
from dept_fl.silo import Silo
from dept_fl.train import pick_device
from tests.federation import start
from tests.together import RUNS, Until, run, run_all, train_until

Make = Callable[..., Recipe]
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The cases as two processes trained them, and the error in which the second one ended."""
    folder = tmp_path_factory.mktemp("together")
    with pytest.raises(DeptError) as caught:
        run_together(Group(2, "cpu", folder), run_all, folder)
    return folder, str(caught.value)


@pytest.mark.parametrize(("parallel", "case"), RUNS)
def test_two_processes_train_as_one_does(together: tuple[Path, str], parallel: str, case: str):
    found, training = torch.load(together[0] / f"{parallel} {case}", weights_only=False)
    model, alone = run(case)
    for name in ("loss", "last_loss", "gradient_norm"):
        assert getattr(training, name) == pytest.approx(getattr(alone, name), rel=1e-5)
    assert training.tokens == alone.tokens
    close(found, parameters(model))
    close(training.optimizer, alone.optimizer)


def close(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-4)


def test_a_silo_goes_from_one_process_to_two(recipe: Make, home: Path):
    """Its second round gives what one process gives, and leaves what one process leaves."""
    server, silos = start(recipe("only=[ant] inner.batch_size=8 rounds=2"), home)
    first = server.open_round(home)
    server.add(first, silos["ant"].train(server.task("ant")))
    server.close_round(first)
    task = server.task("ant")
    expected = silos["ant"].train(task)
    left = silos["ant"]._state(2)
    together = replace(server.recipe, processes=2, parallel="fsdp")
    ant = Silo("ant", together, home, server.experiment)
    found = ant.train(task)
    close(found.body, expected.body)
    for name in ("loss", "bits_per_byte", "tokens", "body_delta_norm", "embedding_delta_norm"):
        assert found.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4)
    state = ant._state(2)
    assert state.position == left.position
    close(state.embeddings, left.embeddings)
    close(state.moments, left.moments)
    assert not list(ant.folder.glob(".scratch*"))


def test_what_a_process_says_at_its_end_is_the_error(together: tuple[Path, str]):
    assert together[1] == "process 2 of the 2 that train together: ValueError: no more"


# ---- the end -----------------------------------------------------------------------------


def working(scratch: Path) -> list[psutil.Process]:
    """Processes of a group that trains with this scratch folder."""
    return [each for each in psutil.process_iter() if works(each, scratch)]


def works(process: psutil.Process, scratch: Path) -> bool:
    try:
        own = process.environ().get("SCRATCH") == str(scratch)
        return own and any("spawn_main" in word for word in process.cmdline())
    except psutil.Error:
        return False


def test_where_one_is_killed_all_end_with_one_error(tmp_path: Path, monkeypatch: Patch):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    with pytest.raises(DeptError, match=r"process 2 of the 2 .* killed, most likely for want of"):
        train_until(Until(False, signal.SIGKILL), tmp_path)
    assert not working(tmp_path) and not list(tmp_path.iterdir())


def test_at_the_deadline_all_end(tmp_path: Path, monkeypatch: Patch):
    """The deadline is an alarm, which goes off early here."""
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    with pytest.raises(DeptError, match=r"train: not done within"), ends_within(500, "train"):
        train_until(Until(True, signal.SIGALRM), tmp_path)
    assert not working(tmp_path) and not list(tmp_path.iterdir())


PROGRAM = """
import signal
from pathlib import Path
from tests.together import Until, train_until
if __name__ == "__main__":
    train_until(Until(True, signal.SIGTERM), Path({scratch!r}))
"""


def test_with_their_parent_all_end(tmp_path: Path):
    """A process with Python's own manners, which SIGTERM ends at once, with no word to others."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(scratch=str(tmp_path))],
        env={**os.environ, "SCRATCH": str(tmp_path)},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == -signal.SIGTERM
    psutil.wait_procs(working(tmp_path), timeout=10)
    assert not working(tmp_path)


@pytest.mark.parametrize(
    ("exit_codes", "told", "expected"),
    [
        ([1, -9], {0: "connection lost"}, "process 2 of the 2 that train together was killed"),
        ([1, 1], {1: "the cause", 0: "connection lost"}, "the cause"),
        ([None, 3], {}, "process 2 of the 2 that train together ended with exit status 3"),
        ([-11, None], {}, "process 1 of the 2 that train together ended with exit status -11"),
    ],
)
def test_the_first_trouble_is_told(
    tmp_path: Path, exit_codes: list[int | None], told: dict[int, str], expected: str
):
    for when, (rank, words) in enumerate(told.items()):
        file = tmp_path / f"error-{rank}"
        file.write_text(words)
        os.utime(file, (when, when))
    assert _trouble(exit_codes, tmp_path).startswith(expected)


# ---- settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ("processes=0", "processes=0: must be at least 1"),
        ("processes=3", "processes=3: must divide inner.batch_size=4"),
        ("processes=2 parallel=tp", "parallel='tp': must be one of ddp, fsdp"),
        (
            "processes=2 inner.micro_batch_size=4",
            "inner.micro_batch_size=4: must divide inner.batch_size=4 over processes=2",
        ),
        (
            "processes=2 parallel=fsdp inner.optimizer=muon",
            "parallel=fsdp with inner.optimizer=muon: it needs whole matrices; set parallel=ddp "
            "or inner.optimizer=adamw",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(recipe: Make, overrides: str, problem: str):
    with pytest.raises(ConfigError) as caught:
        recipe(overrides)
    assert caught.value.problems == [problem]


def test_settings_that_can_be(recipe: Make):
    recipe("processes=2 inner.micro_batch_size=2 inner.optimizer=muon")
    recipe("processes=1 parallel=fsdp inner.optimizer=muon")


def test_more_processes_than_gpus_are_refused(monkeypatch: Patch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", 2).type == "cuda"
    assert pick_device("cpu", 3).type == "cpu"
    with pytest.raises(DeptError, match=r"processes=3: PyTorch sees 2 GPUs here.*set processes=2"):
        pick_device("auto", 3)


# ---- on the way to another process ---------------------------------------------------------


def test_a_token_stream_travels_as_its_files_name(tmp_path: Path):
    tokens = np.arange(100_000, dtype=np.uint16)
    np.save(tmp_path / "train.npy", tokens)
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    sent = ForkingPickler.dumps(mapped)
    assert len(sent) < 1000
    found = ForkingPickler.loads(sent)
    assert isinstance(found, np.memmap) and np.array_equal(found, tokens)
    part = ForkingPickler.loads(ForkingPickler.dumps(mapped[7:9]))
    assert part.tolist() == [7, 8]
