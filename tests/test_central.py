"""Mixed text and one model on it: exact shares, resets, resume, and what they must equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dept_fl.arms import ARMS
from dept_fl.central import Central, MixedSilo, Mixture
from dept_fl.config import Recipe, with_settings
from dept_fl.data import Batches, TokenStream
from dept_fl.errors import DeptError
from dept_fl.model import initial_embeddings, parameters
from dept_fl.report import Event, Ledger
from dept_fl.rounds import Server, pretrain, shared_tokenizer
from dept_fl.silo import Silo, with_shared_tokenizer
from dept_fl.tokenizer import Vocabulary

Make = Callable[..., Recipe]
LENGTH = 4


def stream(first: int, sequences: int) -> TokenStream:
    """Tokens first, first + 1, ...: each sequence tells its place and its silo."""
    tokens = np.arange(first, first + sequences * LENGTH + 1).astype(np.uint16)
    ids = np.arange(1000)
    return TokenStream(tokens, tokens, Vocabulary(ids, 1000), ids / ids.sum(), 1, 1)


STREAMS = {"a": stream(0, 10), "b": stream(500, 40)}


def mixture(tau: float, seed: int = 1) -> Mixture:
    return Mixture(STREAMS, LENGTH, tau, seed)


# ---- the mixture ------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "share"), [(0.0, 0.5), (1.0, 0.2)])
def test_silos_are_drawn_with_their_probability(tau: float, share: float):
    taken = mixture(tau).taken(10_000)
    assert sum(taken.values()) == 10_000
    assert taken["a"] / 10_000 == pytest.approx(share, abs=0.015)  # three deviations


def test_each_silos_sequences_come_in_epochs():
    rows = mixture(0.0).at(0, 100)
    of_a = [row[0] // LENGTH for row in rows.tolist() if row[0] < 500]
    assert len(of_a) > 30
    for epoch in range(len(of_a) // 10):
        assert sorted(of_a[10 * epoch : 10 * epoch + 10]) == list(range(10))


def test_the_mixture_is_a_function_of_seed_and_position_alone():
    whole = mixture(0.3).at(0, 9000)
    other = mixture(0.3)
    late = other.at(8990, 10)  # asked for first
    assert np.array_equal(late, whole[8990:])
    assert np.array_equal(np.concatenate([other.at(0, 4100), other.at(4100, 50)]), whole[:4150])
    assert not np.array_equal(mixture(0.3, seed=2).at(0, 50), whole[:50])
    counted = Counter("a" if row[0] < 500 else "b" for row in whole.tolist())
    assert mixture(0.3).taken(9000) == counted


def test_a_mixture_of_one_silo_is_that_silo_in_another_order():
    alone = Mixture({"a": STREAMS["a"]}, LENGTH, 1.0, 7).at(0, 10)
    own = Batches(STREAMS["a"], LENGTH, 7).at(0, 10)
    assert sorted(alone[:, 0].tolist()) == sorted(own[:, 0].tolist())


# ---- one model --------------------------------------------------------------------------------


def prepared(recipe: Make, home: Path, arm: str, overrides: str = "") -> Recipe:
    return with_shared_tokenizer(ARMS[arm].recipe(recipe(overrides)), home)


def silos_of(recipe: Recipe, home: Path) -> dict[str, Silo]:
    return {name: Silo(name, recipe, home, "central") for name in recipe.silo_names}


def central(recipe: Recipe, home: Path, folder: Path, forgets: bool = False) -> Central:
    return Central(recipe, silos_of(recipe, home), 1.0, folder, forgets)


def test_it_starts_from_what_the_server_of_glob_starts_from(
    recipe: Make, home: Path, tmp_path: Path
):
    made = prepared(recipe, home, "std-1")
    server = Server(made, "x", shared_tokenizer(made))
    own = parameters(central(made, home, tmp_path).model)
    for name, tensor in {**server.body, **server.embeddings}.items():
        assert torch.equal(own[name], tensor)


def test_rounds_are_only_pauses(recipe: Make, home: Path, tmp_path: Path):
    paused = prepared(recipe, home, "std-1", "inner.rewarm_steps=2")
    at_once = with_settings(paused, {"rounds": 1, "inner.local_steps": 8})
    models = []
    for made, folder in ((paused, "a"), (at_once, "b")):
        run = central(made, home, tmp_path / folder)
        for _ in range(made.rounds):
            run.train_round()
        models.append(parameters(run.model))
    for name, tensor in models[0].items():
        assert torch.equal(models[1][name], tensor)


class Stop(Exception):
    pass


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("stopped_in", ["save", "evaluation"])
def test_a_stopped_one_goes_on_as_the_unbroken(
    recipe: Make,
    home: Path,
    tmp_path: Path,
    forgets: bool,
    stopped_in: str,
    monkeypatch: pytest.MonkeyPatch,
):
    made = prepared(recipe, home, "act")
    unbroken = central(made, home, tmp_path / "whole", forgets)
    ledger_of(tmp_path / "whole", unbroken)
    parts = central(made, home, tmp_path / "parts", forgets)
    method = "_save" if stopped_in == "save" else "_write_evaluation"
    real = getattr(Central, method)

    def stops(self: Central, *words: object) -> None:
        if self.round == 3:
            raise Stop
        real(self, *words)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Central, method, stops)
        ledger_of(tmp_path / "parts", parts)
    again = central(made, home, tmp_path / "parts", forgets)
    events = ledger_of(tmp_path / "parts", again)
    assert again.sequences == unbroken.sequences
    for name, tensor in parameters(unbroken.model).items():
        assert torch.equal(parameters(again.model)[name], tensor)
    assert figures(events) == figures(Ledger(tmp_path / "whole").read())


def ledger_of(folder: Path, run: Central) -> list[Event]:
    folder.mkdir(exist_ok=True)
    run.run(Ledger(folder))
    return Ledger(folder).read()


def figures(events: list[Event]) -> list[tuple[object, ...]]:
    return [(e["event"], e["silo"], e["round"], e.get("bits_per_byte", e.get("loss")))
            for e in events]  # fmt: skip


def test_other_settings_than_the_checkpoints_are_refused(recipe: Make, home: Path, tmp_path: Path):
    made = prepared(recipe, home, "std-1")
    ledger_of(tmp_path, central(made, home, tmp_path))
    other = central(replace(made, seed=9), home, tmp_path)
    with pytest.raises(DeptError, match="made with other settings"):
        ledger_of(tmp_path, other)


def test_forgetting_draws_embeddings_anew_and_keeps_the_body(
    recipe: Make, home: Path, tmp_path: Path
):
    made = prepared(recipe, home, "act", "inner.learning_rate=1e-9")  # what moves is not training
    run = central(made, home, tmp_path, forgets=True)
    drawn = []
    for _ in range(3):
        run.train_round()
        body, embeddings = run.layout.split(parameters(run.model))
        drawn.append((
            {n: t.clone() for n, t in body.items()}, {n: t.clone() for n, t in embeddings.items()}
        ))  # fmt: skip
    for (body, old), (later_body, new) in pairwise(drawn):
        for name in body:
            torch.testing.assert_close(later_body[name], body[name], atol=1e-6, rtol=0)
        for name in old:
            assert float((new[name] - old[name]).norm()) > 0.5 * float(old[name].norm())
    size = len(drawn[1][1]["model.embed_tokens.weight"])
    expected = initial_embeddings(
        made.model, size, made.sequence_tokens, run.layout, made.seed, "round 3"
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(drawn[2][1][name], tensor, atol=1e-6, rtol=0)


def test_forgetting_drops_the_embeddings_moments_alone(recipe: Make, home: Path, tmp_path: Path):
    made = prepared(recipe, home, "act")
    run = central(made, home, tmp_path, forgets=True)
    run.train_round()
    before = {k for k in run._moments if "embed" in k}
    assert before
    run._forget()
    assert not {k for k in run._moments if "embed" in k}
    assert {k for k in run._moments if "layers.0" in k}


# ---- local SGD on mixed text -------------------------------------------------------------------


def test_the_control_with_one_worker_and_one_round_is_the_central_model(
    recipe: Make, home: Path, tmp_path: Path
):
    """Averaging over one worker does nothing, so both are the same steps on the same mixture."""
    made = prepared(recipe, home, "mixed", "rounds=1 inner.local_steps=4 only=[ant]")
    silos = {"ant": Silo("ant", made, home, "control")}
    worker = MixedSilo(silos["ant"], home, "control", silos)
    server = Server(made, "control", shared_tokenizer(made))
    server.register(worker.register())
    pretrain(server, {"ant": worker})
    run = Central(made, silos, 0.0, tmp_path)
    run.mixture = Mixture(run.streams, made.sequence_tokens, 0.0, worker.batch_seed)
    run.train_round()
    own = parameters(run.model)
    for name, tensor in {**server.body, **server.embeddings}.items():
        torch.testing.assert_close(own[name], tensor, atol=1e-6, rtol=1e-5)


def test_workers_see_all_silos_text_and_each_another_part(recipe: Make, home: Path):
    made = prepared(recipe, home, "mixed")
    pool = {name: Silo(name, made, home, "pool") for name in made.silo_names}
    workers = {n: MixedSilo(silo, home, "pool", pool) for n, silo in pool.items()}
    taken = {n: worker.taken(300) for n, worker in workers.items()}
    for counts in taken.values():
        assert sum(counts.values()) == 300
        assert all(60 < count < 140 for count in counts.values())  # 100 each, five deviations
    assert len({tuple(counts.items()) for counts in taken.values()}) > 1
