"""Fragments of the body that are synchronised in turn: by hand, and through Flower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn

from dept_fl.checkpoint import remove_whole, round_folder
from dept_fl.config import Recipe
from dept_fl.errors import BadUpdate, ConfigError, NeedsWhole
from dept_fl.model import Layout
from dept_fl.report import Ledger
from dept_fl.rounds import last_checkpoint, pretrain
from dept_fl.silo import Silo, Update
from dept_fl.traffic import traffic
from dept_fl.train import Training
from tests.federation import (
    ALL_VARIANTS,
    run,
    same,
    silos_of,
    start,
    state_of,
    train_round,
    trained,
)

Make = Callable[..., Recipe]
SPEC = ALL_VARIANTS["spec-opt"]


def shapes(*names: str) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, (2, 2))


def test_blocks_are_dealt_out_in_turn_and_what_follows_one_goes_with_it():
    body = shapes("m.in", "m.h.0.a", "m.h.0.b", "m.h.1.a", "m.h.2.e.7.a", "m.h.2.e.8.a", "m.norm")
    layout = Layout(body, {}, {})
    assert layout.fragments(1) == [body]
    assert [list(part) for part in layout.fragments(2)] == [
        ["m.in", "m.h.0.a", "m.h.0.b", "m.h.2.e.7.a", "m.h.2.e.8.a", "m.norm"],
        ["m.h.1.a"],
    ]
    with pytest.raises(ConfigError, match=r"wire\.fragments=4: the model has 3 blocks"):
        layout.fragments(4)


def test_one_fragment_a_round_and_all_in_the_last(recipe: Make):
    made = recipe("rounds=6 wire.fragments=2")
    assert [made.fragments_due(r) for r in range(1, 7)] == [[0], [1], [0], [1], [0], [0, 1]]
    assert [recipe().fragments_due(r) for r in range(1, 5)] == [[0]] * 4


def test_no_fragments_are_refused(recipe: Make):
    with pytest.raises(ConfigError, match=r"wire\.fragments=0: must be at least 1"):
        recipe("wire.fragments=0")
    with pytest.raises(ConfigError, match=r"wire\.fragments=3: the model has 2 blocks"):
        trained(recipe("wire.fragments=3"), Path())


# ---- by hand -----------------------------------------------------------------------------------

UNIT = 0.001
PACE = {"ant": 1, "bee": 3, "cat": 5}  # units by which training moves each of a silo's parameters


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of training: every parameter moves by its silo's pace, once a round."""

    def move(self: Silo, model: nn.Module, *_: object) -> Training:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += PACE[self.name] * UNIT
        return Training(1.0, 1.0, 1.0, self.recipe.round_tokens, 0.1, 0.1, 0, {})

    monkeypatch.setattr(Silo, "_train_steps", move)


def moved(now: torch.Tensor, before: torch.Tensor) -> float:
    """By how many units all numbers moved, which must be alike."""
    units = (now - before) / UNIT
    assert float(units.max() - units.min()) < 1e-3
    return round(float(units.mean()), 2)


@pytest.mark.usefixtures("paced")
@pytest.mark.parametrize("wire", ["", "wire.down=bf16"])
def test_fragments_move_as_worked_out_by_hand(recipe: Make, home: Path, wire: str):
    """Two silos at a pace of 1 and 3; what was not synchronised goes on at each from where it is.

    | round | fragment 0: deltas, mean | fragment 1: deltas, mean |
    |---|---|---|
    | 1 | 1, 3 -> 2; server 2 | each has its own: 1, 3 |
    | 2 | own: 2 + 1, 2 + 3 | 1 + 1, 3 + 3 -> 4; server 4 |
    | 3, the last | 3 + 1 - 2, 5 + 3 - 2 -> 4; server 6 | 1, 3 -> 2; server 6 |
    """
    made = recipe(f"{SPEC} only=[ant,bee] rounds=3 wire.fragments=2 {wire}")
    server, silos = start(made, home)
    begun = {name: tensor.clone() for name, tensor in server.body.items()}
    parts = server.layout.fragments(2)
    deltas = []
    for expected in ([2.0, 0.0], [2.0, 4.0], [6.0, 6.0]):
        updates = train_round(server, silos)
        deltas.append({n: {moved(t, 0 * t) for t in u.body.values()} for n, u in updates.items()})
        for part, units in zip(parts, expected, strict=True):
            assert {moved(server.body[name], begun[name]) for name in part} == {units}
    if not wire:
        assert deltas == [{"ant": {1}, "bee": {3}}, {"ant": {2}, "bee": {6}},
                          {"ant": {1, 2}, "bee": {3, 6}}]  # fmt: skip


@pytest.mark.usefixtures("paced")
def test_who_misses_a_round_goes_on_with_what_the_server_has_not_changed(recipe: Make, home: Path):
    """cat misses round 2, in which fragment 1 moves: of its own it keeps fragment 2 alone."""
    made = recipe(f"{SPEC} rounds=4 wire.fragments=3 model.config.num_hidden_layers=3 quorum=0.5")
    server, silos = start(made, home)
    begun = {name: tensor.clone() for name, tensor in server.body.items()}
    train_round(server, silos)  # fragment 0: mean of 1, 3, 5
    train_round(server, {name: silos[name] for name in ("ant", "bee")})  # fragment 1: of 2, 6
    assert server.as_change(server.task("cat")).change is None
    assert server.as_change(server.task("ant")).change is not None
    updates = train_round(server, silos)  # fragment 2: 3, 9 and, of two rounds, 10
    first, second, third = server.layout.fragments(3)
    assert {moved(t, 0 * t) for t in updates["cat"].body.values()} == {10}
    for part, units in ((first, 3.0), (second, 4.0), (third, 7.33)):
        assert {moved(server.body[name], begun[name]) for name in part} == {units}
    last = server.recipe.rounds
    updates = train_round(server, silos)
    assert server.round == last
    # Behind round 1 cat trained fragment 0 in rounds 3 and 4, fragment 1 likewise, 2 in round 4.
    by_part = [{moved(updates["cat"].body[n], 0 * begun[n]) for n in part}
               for part in (first, second, third)]  # fmt: skip
    assert by_part == [{10}, {10}, {5}]


@pytest.mark.usefixtures("paced")
def test_who_lost_what_arrived_goes_on_with_its_own_fragments(recipe: Make, home: Path):
    """The whole comes; bee's fragment 1, of two rounds, is of the same as the server's still."""
    server, silos = start(recipe(f"{SPEC} only=[ant,bee] rounds=3 wire.fragments=2"), home)
    train_round(server, silos)
    bee = silos["bee"]
    remove_whole(round_folder(bee._received, 1))
    with pytest.raises(NeedsWhole, match="received/round-00001"):
        bee.train(server.as_change(server.task("bee")))
    update = bee.train(server.task("bee"))
    assert {moved(t, 0 * t) for t in update.body.values()} == {6}
    assert not update.warning


def test_what_was_lost_of_a_fragment_waits_for_its_next_turn(recipe: Make, home: Path):
    silo = Silo("ant", recipe("wire.up=int4"), home, "a" * 12)
    kept = torch.tensor([[0.25]])
    _, lost = silo._as_sent({"w": torch.tensor([[7.0, 0.3]])}, {"other": kept})
    assert lost.keys() == {"other", "w"}
    assert lost["other"] is kept


# ---- through messages --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        *ALL_VARIANTS.values(),
        f"{SPEC} wire.up=int4 wire.down=int8",
        f"{ALL_VARIANTS['trim']} wire.up=int4 outer.merge=median",
    ],
)
def test_flower_gives_the_tensors_of_the_plain_algorithm(
    recipe: Make, home: Path, tmp_path: Path, settings: str
):
    """Also where silos miss rounds."""
    made = recipe(
        f"{settings} rounds=5 wire.fragments=2 silos_per_round=2 outer.optimizer=nesterov"
    )
    server, _ = run(made, home, tmp_path)
    assert same(state_of(server, silos_of(server, home)), state_of(*trained(made, home)))
    whole, _ = trained(replace(made, wire=replace(made.wire, fragments=1)), home)
    assert not same(server.body, whole.body)


@pytest.mark.parametrize("wire", ["", "wire.up=int4 wire.down=int8"])
def test_killed_and_resumed_equals_unbroken(recipe: Make, home: Path, tmp_path: Path, wire: str):
    made = recipe(f"{SPEC} rounds=5 wire.fragments=2 outer.optimizer=nesterov {wire}")
    unbroken = state_of(*trained(made, home))
    server, silos = start(made, home)
    for _ in range(3):
        train_round(server, silos)
        server.save(tmp_path)
    tensors, meta = last_checkpoint(tmp_path, server.recipe)
    resumed, again = start(made, home, meta["experiment"])
    resumed.load(tensors, meta)
    pretrain(resumed, again)
    assert same(unbroken, state_of(resumed, again))


def test_bytes_are_those_of_the_formula_and_half_as_many(recipe: Make, home: Path, tmp_path: Path):
    run(recipe(f"{SPEC} rounds=4 wire.fragments=2"), home, tmp_path / "parts")
    run(recipe(f"{SPEC} rounds=4"), home, tmp_path / "whole")
    for each in traffic(tmp_path / "parts"):
        assert (each.up_ratio, each.down_ratio) == (1.0, 1.0)
    up = {}
    for kind in ("parts", "whole"):
        rows = [e for e in Ledger(tmp_path / kind).read() if e["event"] == "silo_train"]
        up[kind] = [e["bytes_up_body"] for e in rows if e["silo"] == "ant"]
    assert up["parts"][0] + up["parts"][1] == up["whole"][0] + 128  # of a second array
    assert up["parts"][3] == up["whole"][3]  # the last round


def test_deltas_of_what_is_not_due_are_refused(recipe: Make, home: Path, tmp_path: Path):
    server, silos = start(recipe(f"{SPEC} wire.fragments=2"), home)
    update = silos["ant"].train(server.task("ant"))
    merge = server.open_round(tmp_path)
    whole = {name: torch.zeros(shape) for name, shape in server.layout.body.items()}
    for body in (whole, {n: whole[n] for n in whole.keys() - update.body.keys()}):
        with pytest.raises(BadUpdate, match="body: parameters missing or not asked for"):
            server.add(merge, Update("ant", 1, body, {}, update.metrics))
    server.add(merge, update)


def test_each_fragment_is_clipped_to_what_is_usual_of_it(recipe: Make, home: Path):
    """The first delta of a fragment is of fewer rounds than the next, and no measure for it."""
    server, silos = start(recipe(f"{SPEC} rounds=6 wire.fragments=2 outer.clip_delta=2.0"), home)
    for _ in range(5):
        train_round(server, silos)
    usual = server._norms.rounds
    assert {part: len(norms) for part, norms in usual.items()} == {
        "body 1": 3, "body 2": 2, "embeddings": 5}  # fmt: skip


@pytest.mark.usefixtures("paced")
def test_a_fragments_first_delta_counts_as_if_it_were_of_a_whole_turn(recipe: Make, home: Path):
    """All silos at their pace: fragment 0 moved for one round of two, fragment 1 for both."""
    server, silos = start(recipe(f"{SPEC} only=[ant,bee] wire.fragments=2"), home)
    for _ in range(3):
        train_round(server, silos)
    numbers = [sum(prod(s) for s in part.values()) for part in server.layout.fragments(2)]
    expected = [[1.0 * 2, 3.0 * 2], [2.0, 6.0], [2.0, 6.0]]  # in units, of the rounds 1, 2, 3
    found = server._norms.rounds
    for got, units, count in zip(
        [*found["body 1"][:1], *found["body 2"], *found["body 1"][1:]],
        expected,
        [numbers[0], numbers[1], numbers[0]],
        strict=True,
    ):
        assert got == pytest.approx([u * UNIT * count**0.5 for u in units], rel=1e-2)


def test_of_a_damaged_state_what_was_not_sent_since_is_still_owed(recipe: Make, home: Path):
    """Round 3 sent what was lost of fragment 0 in round 1, not what was of fragment 1 in 2."""
    server, silos = start(recipe(f"{SPEC} rounds=8 wire.fragments=2 wire.up=int4"), home)
    for _ in range(3):
        train_round(server, silos)
    ant = silos["ant"]
    before = ant._state(2).lost
    file = round_folder(ant._states, 3) / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    owed = ant._state(3).lost
    second = server.layout.fragments(2)[1]
    assert owed.keys() == {name for name, shape in second.items() if len(shape) > 1}
    assert same(owed, {name: before[name] for name in owed})
