"""The best model of those evaluated is kept beside the last, and exported by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dept_fl.best import best_checkpoint, best_folder, best_round, keep_checkpoint
from dept_fl.checkpoint import load_meta, round_folder, save_state
from dept_fl.cli import app
from dept_fl.config import Recipe
from dept_fl.errors import DeptError
from dept_fl.evaluate import evaluate
from dept_fl.export import global_model, silo_of_run
from dept_fl.report import Event, Ledger
from dept_fl.silo import Silo
from tests.federation import ALL_VARIANTS, run, silos_of, start, train_round

Make = Callable[..., Recipe]
# Six rounds in which models become good, and then worse: the outer optimiser overshoots.
UP_AND_DOWN = (
    "rounds=6 inner.local_steps=6 inner.learning_rate=0.05 inner.warmup_steps=36 "
    "outer.optimizer=nesterov outer.learning_rate=3.0 outer.momentum=0.9"
)


def evaluated(round_: int, *bits: float, floor: float = 2.0, **more: object) -> list[Event]:
    return [
        {"event": "silo_eval", "round": round_, "silo": f"s{i}", "bits_per_byte": b}
        | {"unigram_bits_per_byte": floor, **more}
        for i, b in enumerate(bits)
    ]


def test_the_best_round_has_the_lowest_median_over_the_floor():
    events = [*evaluated(0, 0.1), *evaluated(1, 3.0, 1.0), *evaluated(2, 1.0, 2.0)]
    events += [*evaluated(3, 2.0, 1.0), {"event": "silo_train", "round": 4, "bits_per_byte": 0.1}]
    assert best_round(events) == 2  # 1.5 as round 3 has, which is later
    assert best_round(events, first=0) == 0
    assert best_round([*events, *evaluated(5, 3.9, floor=4.0)]) == 2
    assert best_round([*events, *evaluated(5, 2.9, floor=4.0)]) == 5
    assert best_round([*events, *evaluated(5, 0.1, floor=0.0)]) == 2
    assert best_round(evaluated(0, 0.1)) is None
    # Of three silos none alone has its way.
    honest = [*evaluated(1, 3.0, 3.0), *evaluated(2, 2.0, 2.0)]
    assert best_round([*honest, *evaluated(1, 0.0), *evaluated(2, 9e9)]) == 2


def best_of(silo: Silo) -> dict[str, object]:
    return load_meta(silo.best_folder)


def assert_model_is_as_told(silo: Silo, folder: Path) -> None:
    """What is kept, evaluated again, has the bits per byte that were written beside it."""
    tensors, recipe = load_file(folder / "tensors.safetensors"), silo.recipe
    parts = {p: {n.removeprefix(f"{p}/"): t for n, t in tensors.items() if n.startswith(f"{p}/")}
             for p in ("body", "embeddings")}  # fmt: skip
    model = silo._model(parts["body"], parts["embeddings"])
    found = evaluate(model, silo.stream, recipe.sequence_tokens, recipe.inner)
    assert found.bits_per_byte == load_meta(folder)["metrics"]["bits_per_byte"]


@pytest.mark.parametrize("variant", ["spec", "trim"])
def test_a_silo_keeps_the_best_of_those_it_evaluated(recipe: Make, home: Path, variant: str):
    server, silos = start(recipe(f"{ALL_VARIANTS[variant]} {UP_AND_DOWN}"), home)
    bits: dict[str, list[float]] = {name: [] for name in silos}
    for _ in range(server.recipe.rounds):
        for name, update in train_round(server, silos).items():
            bits[name].append(update.metrics["bits_per_byte"])
    for name, silo in silos.items():
        bits[name].append(silo.finish(server.task(name))[0]["bits_per_byte"])
        best = min(range(1, 7), key=lambda r: bits[name][r])
        assert best < 6, bits[name]
        assert best_of(silo)["round"] == best
        assert best_of(silo)["metrics"]["bits_per_byte"] == bits[name][best]
        assert_model_is_as_told(silo, silo.best_folder)
        assert_model_is_as_told(silo, silo.final_folder)


def test_where_the_final_model_is_the_best_it_is_kept_once(recipe: Make, home: Path):
    server, silos = start(recipe(), home)
    for _ in range(server.recipe.rounds):
        train_round(server, silos)
        assert server.round == 1 or silos["bee"].best_folder.is_dir()
    for name, silo in silos.items():
        silo.finish(server.task(name))
        assert not silo.best_folder.exists()


def test_the_best_of_rounds_that_are_done_again_does_not_stay(recipe: Make, home: Path):
    server, silos = start(recipe(), home)
    bee = silos["bee"]
    for _ in range(2):
        train_round(server, silos)
    for round_, stays in ((1, False), (0, True)):
        meta = {"round": round_, "metrics": {"bits_per_byte": 0.0}}
        save_state(bee.best_folder, {"x": torch.zeros(1)}, meta)
        task = server.task("bee")
        assert task.round == 3
        bee.train(task if stays else _as_round(server, 2))
        assert (best_of(bee)["metrics"]["bits_per_byte"] == 0.0) == stays


def _as_round(server, round_: int):
    """The task of a round that was done before, as a server that was resumed gives it."""
    now, server.round = server.round, round_ - 1
    task = server.task("bee")
    server.round = now
    return task


def test_nothing_is_kept_where_nobody_wants_it(recipe: Make, home: Path, tmp_path: Path):
    server, _ = run(recipe("rounds=3 keep_best=false"), home, tmp_path / "run")
    bee = silos_of(server, home)["bee"]
    assert not bee.best_folder.exists()
    with pytest.raises(DeptError, match=r"kept no best model \(keep_best=false"):
        silo_of_run(tmp_path / "run", "bee", home, best=True)


# ---- at the server, and exported -------------------------------------------------------------


@pytest.mark.parametrize("variant", ["glob", "spec-opt"])
def test_the_best_is_exported(recipe: Make, home: Path, tmp_path: Path, variant: str):
    run_dir = tmp_path / "run"
    server, _ = run(recipe(f"{ALL_VARIANTS[variant]} {UP_AND_DOWN}"), home, run_dir)
    events = Ledger(run_dir).read()
    of_bee = {
        e["round"]: e["bits_per_byte"]
        for e in events
        if e["event"] == "silo_eval" and e["silo"] == "bee" and e["round"]
    }
    best = min(of_bee, key=of_bee.__getitem__)
    assert best < 6
    for words, round_ in (([], 6), (["--round", "last"], 6), (["--round", "best"], best)):
        told = exported(run_dir, home, tmp_path / f"{len(words)}{round_}", "--silo", "bee", *words)
        assert told["source"].endswith(f"round {round_})")
        card = (Path(told["folder"]) / "README.md").read_text()
        assert f"| bits per byte of validation text | {of_bee[round_]:.4f} |" in card
    if not server.embeddings:
        assert not best_folder(run_dir).exists()
        return
    chosen = best_round(events)
    assert chosen is not None
    assert chosen < 6
    assert load_meta(best_folder(run_dir))["round"] == chosen
    told = exported(run_dir, home, tmp_path / "global", "--global", "--round", "best")
    assert told["source"] == str(best_folder(run_dir))
    body = global_model(run_dir, home, best=True).model.model.state_dict()
    arrived = load_file(best_folder(run_dir) / "tensors.safetensors")
    assert all(torch.equal(body[name], arrived[f"body/{name}"]) for name in server.body)
    # The same body as a silo's best of that round, wherever one is of it.
    for silo in silos_of(server, home).values():
        if best_of(silo)["round"] == chosen:
            kept = load_file(silo.best_folder / "tensors.safetensors")
            assert all(torch.equal(kept[f"body/{n}"], arrived[f"body/{n}"]) for n in server.body)


def exported(run_dir: Path, home: Path, out: Path, *words: str) -> dict[str, str]:
    command = ["export", str(run_dir), "--home", str(home), "--out", str(out), "--json", *words]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_stopped_and_resumed_keeps_the_same_best(recipe: Make, home: Path, tmp_path: Path):
    made = recipe(f"{ALL_VARIANTS['glob']} {UP_AND_DOWN}")
    whole, _ = run(made, home, tmp_path / "whole")
    stopped, seen = tmp_path / "stopped", []

    def fails(message, reply):
        seen.append(message.metadata.message_type)
        return None if seen.count("train") > 14 and len(seen) < 60 else reply  # in round 5

    with pytest.raises(DeptError, match="below quorum"):
        run(recipe(f"{ALL_VARIANTS['glob']} {UP_AND_DOWN} round_timeout_s=0.2"), home, stopped,
            tamper=fails)  # fmt: skip
    run(made, home, stopped, resume=True)
    kept = [
        load_file(best_folder(d) / "tensors.safetensors") for d in (tmp_path / "whole", stopped)
    ]
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert whole.round == 6


def test_a_best_checkpoint_that_is_not_there_is_told(tmp_path: Path):
    events = [*evaluated(3, 1.0), *evaluated(6, 1.5, final=True)]
    with pytest.raises(DeptError, match="round 3 was the best, and is not kept there"):
        best_checkpoint(tmp_path, events)
    save_state(round_folder(tmp_path / "checkpoints", 2), {"x": torch.ones(1)}, {"round": 2})
    keep_checkpoint(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(DeptError, match="round 3 was the best"):
        best_checkpoint(tmp_path, events)
    assert best_checkpoint(tmp_path, [*evaluated(2, 1.0), *events[1:]]) == best_folder(tmp_path)
    assert best_checkpoint(tmp_path, [*evaluated(3, 2.0), *events[1:]]) is None
