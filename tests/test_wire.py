"""Fewer bytes between silos and server: what silos hold, what is lost, and when the whole goes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from dept_fl import records
from dept_fl.checkpoint import load_state, round_folder, rounds_on_disk, save_state
from dept_fl.config import CODECS, Recipe
from dept_fl.cost import cost
from dept_fl.downlink import Downlink
from dept_fl.errors import BadUpdate, DeptError
from dept_fl.report import Ledger
from dept_fl.rounds import last_checkpoint, pretrain
from dept_fl.silo import Silo, Task
from dept_fl.train import Training
from tests.federation import (
    ALL_VARIANTS,
    InProcessGrid,
    run,
    same,
    silos_of,
    start,
    state_of,
    train_round,
    trained,
)

Make = Callable[..., Recipe]
every_variant = pytest.mark.parametrize("settings", ALL_VARIANTS.values(), ids=ALL_VARIANTS.keys())
SMALL = "wire.up=int4 wire.down=int8"


# ---- up: error feedback ------------------------------------------------------------------------


def test_what_the_codec_lost_is_added_to_the_next_delta_by_hand(recipe: Make, home: Path):
    """Steps of 1 (the largest is 7): 0.3 is sent as 0, 0.6 as 1, 0.9 - 1 + 0.3 = 0.2 as 0.

    What is kept is in bf16.
    """
    silo = Silo("ant", recipe("wire.up=int4"), home, "a" * 12)
    sent, lost = [], {}
    for _ in range(4):
        arrives, lost = silo._as_sent({"w": torch.tensor([[7.0, 0.3]])}, lost)
        sent.append(round(float(arrives["w"][0, 1]), 6))
    assert sent == [0.0, 1.0, 0.0, 0.0]
    assert float(lost["w"][0, 1]) == pytest.approx(4 * 0.3 - 1, rel=2**-7)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("feedback", ["true", "false"])
def test_what_is_sent_is_the_delta_up_to_rounding(
    recipe: Make, home: Path, codec: str, feedback: str
):
    """Vectors (norms, biases) to the bit, whether losses are kept or not."""
    silo = Silo("ant", recipe(f"wire.up={codec} wire.error_feedback={feedback}"), home, "a" * 12)
    delta = {"w": torch.tensor([[7.0, -2.0]]), "b": torch.tensor([0.3, -0.7])}
    for _ in range(2):
        sent, _ = silo._as_sent({n: t.clone() for n, t in delta.items()}, {})
        assert torch.equal(sent["b"], delta["b"])
        torch.testing.assert_close(sent["w"], delta["w"], rtol=0.01, atol=0.0)


@pytest.mark.parametrize("codec", CODECS)
def test_norms_are_federated_with_every_codec(recipe: Make, home: Path, codec: str):
    server, silos = start(recipe(f"wire.up={codec}"), home)
    begun = {n: t.clone() for n, t in server.body.items() if t.dim() == 1}
    assert begun
    updates = train_round(server, silos)
    for name, tensor in begun.items():
        assert all(bool(update.body[name].any()) for update in updates.values())
        assert not torch.equal(server.body[name], tensor)


def test_what_was_lost_in_a_round_is_in_the_next_update(recipe: Make, home: Path):
    """The same round from the same state, with and without the losses it holds."""
    server, silos = start(recipe("wire.up=int4"), home)
    train_round(server, silos)
    ant, task = silos["ant"], server.task("ant")
    folder = round_folder(ant._states, 1)
    lost = ant._state(1).lost
    assert lost.keys() == {n for n, t in server.body.items() if t.dim() > 1}
    with_them = ant.train(task).body
    kept = ant._state(2).lost
    tensors, meta = load_state(folder)
    none = {n: torch.zeros_like(t) if n.startswith("lost/") else t for n, t in tensors.items()}
    save_state(folder, none, {k: v for k, v in meta.items() if k not in ("format", "xxh3_128")})
    without = ant.train(task).body
    assert not same(with_them, without)
    for name, tensor in with_them.items():  # sent + kept = delta + lost
        nothing = torch.zeros_like(tensor)  # of vectors
        delta = without[name] + ant._state(2).lost.get(name, nothing)
        before = lost.get(name, nothing)
        torch.testing.assert_close(tensor + kept.get(name, nothing), delta + before)


def test_what_a_damaged_state_had_lost_is_not_sent_twice(recipe: Make, home: Path):
    server, silos = start(recipe("wire.up=int4"), home)
    for _ in range(2):
        train_round(server, silos)
    file = round_folder(silos["ant"]._states, 2) / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    state = silos["ant"]._state(2)
    assert "going on from its state of round 1" in state.warning
    assert state.lost == {}


def test_without_error_feedback_it_is_gone(recipe: Make, home: Path):
    silo = Silo("ant", recipe("wire.up=int4 wire.error_feedback=false"), home, "a" * 12)
    delta = {"w": torch.tensor([[7.0, 0.3]])}
    for _ in range(4):
        arrives, lost = silo._as_sent(delta, {})
        assert arrives["w"].tolist() == [[7.0, 0.0]]
        assert lost == {}


def test_a_silo_keeps_what_was_lost_with_the_round_it_belongs_to(recipe: Make, home: Path):
    """An update that was not merged leaves no trace of its losses either."""
    made = recipe("wire.up=int4")
    unbroken = state_of(*trained(made, home))
    assert any("/lost/" in name for name in unbroken)
    server, silos = start(made, home)
    while server.round < made.rounds:
        for silo in silos.values():
            silo.train(server.task(silo.name))
        train_round(server, silos)
    assert same(unbroken, state_of(server, silos))


# ---- down: what silos hold ---------------------------------------------------------------------


def test_the_copy_comes_nearer_with_every_change():
    goal = {"w": torch.randn(8, 64, generator=torch.Generator().manual_seed(0))}
    downlink = Downlink("int4", {"w": torch.zeros(8, 64)})
    distances = []
    for _ in range(4):
        downlink.follow(goal, goal)
        distances.append(float((goal["w"] - downlink.published["w"]).norm() / goal["w"].norm()))
    assert distances[0] < 0.15
    assert all(b < 0.25 * a for a, b in pairwise(distances))


@every_variant
def test_silos_train_from_the_copy_and_end_with_the_body_itself(
    recipe: Make, home: Path, settings: str
):
    server, silos = start(recipe(f"{settings} wire.down=int4"), home)
    train_round(server, silos)
    task = server.task("ant")
    assert not same(task.body, server.body)
    for name, tensor in server.body.items():
        torch.testing.assert_close(task.body[name], tensor, atol=0.02, rtol=0.2)
    pretrain(server, silos)
    assert same(server.task("ant").body, server.body)
    assert server.as_change(server.task("ant")).change is None


def test_a_silo_keeps_what_arrives_put_together_by_flower(recipe: Make, home: Path):
    server, silos = start(recipe(SMALL), home)
    task = server.task("ant")
    objects = get_all_nested_objects(record := records.to_record(task.body))
    contents = {object_id: each.deflate() for object_id, each in objects.items()}
    arrived = inflate_object_from_contents(record.object_id, contents)
    assert isinstance(arrived, ArrayRecord)
    body = records.from_record(arrived, server.layout.body)
    update = silos["ant"].train(replace(task, body=body))
    assert same(update.body, silos["ant"].train(task).body)


# ---- both ways through Flower's messages -------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "wire"),
    [
        *((name, SMALL) for name in ALL_VARIANTS),
        ("trim", "wire.up=bf16 wire.down=bf16"),
        ("spec-opt", "wire.down=int4"),
    ],
)
def test_flower_gives_the_tensors_of_the_plain_algorithm(
    recipe: Make, home: Path, tmp_path: Path, variant: str, wire: str
):
    """Also where silos miss rounds, and so get the whole."""
    made = recipe(f"{ALL_VARIANTS[variant]} {wire} silos_per_round=2 outer.optimizer=nesterov")
    server, _ = run(made, home, tmp_path)
    assert same(state_of(server, silos_of(server, home)), state_of(*trained(made, home)))


@every_variant
def test_killed_and_resumed_equals_unbroken(
    recipe: Make, home: Path, tmp_path: Path, settings: str
):
    made = recipe(f"{settings} {SMALL}")
    unbroken = state_of(*trained(made, home))
    server, silos = start(made, home)
    for _ in range(2):
        train_round(server, silos)
        server.save(tmp_path)
    tensors, meta = last_checkpoint(tmp_path, server.recipe)
    resumed, again = start(made, home, meta["experiment"])
    resumed.load(tensors, meta)
    change = resumed.as_change(resumed.task("ant")).change
    assert change is None  # it is not in a checkpoint
    pretrain(resumed, again)
    assert same(unbroken, state_of(resumed, again))


def test_the_whole_goes_to_those_who_missed_a_round_alone(recipe: Make, home: Path, tmp_path: Path):
    server, grid = run(recipe(f"{SMALL} silos_per_round=2 rounds=6"), home, tmp_path)
    seen = set()
    for message in grid.sent:
        if message.metadata.message_type != "train":
            continue
        task = message.content.config_records["task"]
        silo, round_ = str(task["silo"]), int(task["round"])
        expected = round_ > 1 and round_ - 1 in server.members[silo].merged
        assert ("digest" in task) == expected
        (name,) = message.content.array_records["body"]
        assert name.split()[0] == (server.recipe.wire.down if expected else "fp32")
        seen.add(expected)
    assert seen == {True, False}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("settings", [ALL_VARIANTS["trim"], ALL_VARIANTS["spec-opt"]])
def test_bytes_are_those_of_the_formula(
    recipe: Make, home: Path, tmp_path: Path, settings: str, codec: str
):
    made = recipe(f"{settings} wire.up={codec} wire.down={codec} rounds=2")
    server, _ = run(made, home, tmp_path)
    rows = [e for e in Ledger(tmp_path).read() if e["event"] == "silo_train"]
    assert len(rows) == 6
    for row in rows:
        vocabulary = server.registrations[row["silo"]].vocabulary
        expected = cost(server.recipe, server.layout, vocabulary)
        assert row["bytes_up_body"] + row["bytes_up_embeddings"] == expected.up_bytes
        down = row["bytes_down_body"] + row["bytes_down_embeddings"]
        assert down == (expected.whole_bytes if row["round"] == 1 else expected.down_bytes)


# ---- what goes wrong ---------------------------------------------------------------------------


def spoil_what_bee_received(home: Path) -> Callable[[Message, Message], Message]:
    """Behind round 1, what bee keeps of what arrived is whole, but another."""

    def spoil(message: Message, reply: Message) -> Message:
        task = message.content.config_records["task"]
        if (message.metadata.message_type, task["silo"], task.get("round")) == ("train", "bee", 1):
            folder = home / "silos" / "bee" / "state" / str(task["experiment"]) / "received"
            tensors, meta = load_state(round_folder(folder, 1))
            tensors = {name: tensor + 1.0 for name, tensor in tensors.items()}
            facts = {k: v for k, v in meta.items() if k not in ("format", "xxh3_128")}
            save_state(round_folder(folder, 1), tensors, facts)
        return reply

    return spoil


@pytest.mark.parametrize("settings", ["", "round_attempts=1", "quorum=0.6", "outer.merge=median"])
def test_a_silo_that_lost_what_it_had_gets_the_whole_in_the_same_round(
    recipe: Make, home: Path, tmp_path: Path, settings: str
):
    made = recipe(f"{SMALL} rounds=3 {settings}")
    spoil = spoil_what_bee_received(home)
    server, _ = run(made, home, tmp_path, tamper=spoil)
    assert server.members["bee"].merged == [1, 2, 3]
    assert same(state_of(server, silos_of(server, home)), state_of(*trained(made, home)))
    events = Ledger(tmp_path).read()
    warnings = [(e["round"], e["silo"]) for e in events if e["event"] == "warning"]
    assert warnings == [(2, "bee")]
    assert not any(e["event"] == "failure" for e in events)
    wholes = [e["round"] for e in events if e["event"] == "silo_train" and e["silo"] == "bee"
              and e["down_whole"]]  # fmt: skip
    assert wholes == [1, 2]


def cut_short_behind_round_2(home: Path, folder: str) -> Callable[[Message, Message], Message]:
    """A file of bee's, in a folder beneath its states, loses its last byte."""

    def cut(message: Message, reply: Message) -> Message:
        task = message.content.config_records["task"]
        if (message.metadata.message_type, task["silo"], task.get("round")) == ("train", "bee", 2):
            states = home / "silos" / "bee" / "state" / str(task["experiment"])
            file = round_folder(states / folder, 2) / "tensors.safetensors"
            file.write_bytes(file.read_bytes()[:-1])
        return reply

    return cut


def test_damage_costs_a_warning_as_it_does_without_changes(
    recipe: Make, home: Path, tmp_path: Path
):
    cut = cut_short_behind_round_2(home, "")
    server, _ = run(recipe(f"{SMALL} round_attempts=1"), home, tmp_path, tamper=cut)
    assert server.members["bee"].merged == [1, 2, 3, 4]
    (told,) = (e["reason"] for e in Ledger(tmp_path).read() if e["event"] == "warning")
    assert "going on from its state of round 1" in told
    rows = [e for e in Ledger(tmp_path).read() if e["event"] == "silo_train"]
    assert not any(e["down_whole"] for e in rows if e["round"] > 1)


def test_damage_to_what_arrived_costs_bytes_alone(recipe: Make, home: Path, tmp_path: Path):
    cut, made = cut_short_behind_round_2(home, "received"), recipe(f"{SMALL} round_attempts=1")
    server, _ = run(made, home, tmp_path, tamper=cut)
    assert same(state_of(server, silos_of(server, home)), state_of(*trained(made, home)))
    (told,) = (e["reason"] for e in Ledger(tmp_path).read() if e["event"] == "warning")
    assert "received/round-00002: tensors.safetensors is damaged" in told
    assert "it gets all" in told


def test_what_arrived_is_on_disk_for_as_long_as_a_change_may_be_of_it(recipe: Make, home: Path):
    server, silos = start(recipe(SMALL), home)
    for _ in range(4):
        train_round(server, silos)
    assert rounds_on_disk(silos["ant"]._received) == [3, 4]
    silos["ant"].finish(server.task("ant"))
    assert not silos["ant"]._received.exists()


def test_rounds_that_fail_do_not_pile_up_what_arrived(
    recipe: Make, home: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> Training:
        raise DeptError("no")

    server, silos = start(recipe(f"{SMALL} rounds=5 quorum=0.5"), home)
    train_round(server, silos)
    bee = silos.pop("bee")
    for failed in (2, 3, 4):
        with monkeypatch.context() as patched, pytest.raises(DeptError):
            patched.setattr(Silo, "_train_steps", fail)
            bee.train(server.task("bee"))
        train_round(server, silos)
        assert rounds_on_disk(bee._received) == [1, failed]


def test_killed_before_its_state_is_whole_a_silo_does_the_round_again(
    recipe: Make, home: Path, monkeypatch: pytest.MonkeyPatch
):
    """What arrived in round 2 is on disk then; the task comes once more, as a change."""
    server, silos = start(recipe(SMALL), home)
    train_round(server, silos)
    task = server.as_change(server.task("bee"))
    assert task.change is not None
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Silo, "_save", Mock(side_effect=KeyboardInterrupt))
        silos["bee"].train(task)
    assert rounds_on_disk(silos["bee"]._states) == [1]
    assert rounds_on_disk(silos["bee"]._received) == [1, 2]
    again = silos["bee"].train(task)
    whole = silos["bee"].train(server.task("bee"))
    assert same(again.body, whole.body)


def test_what_was_decoded_takes_no_memory_in_training(
    recipe: Make, home: Path, monkeypatch: pytest.MonkeyPatch
):
    alive: list[weakref.ref[torch.Tensor]] = []
    through_disk, train_steps = Silo._through_disk, Silo._train_steps

    def watched(self: Silo, task: Task) -> Task:
        alive.extend(weakref.ref(tensor) for tensor in task.body.values())
        return through_disk(self, task)

    def trained_without(self: Silo, *given: Any) -> Training:
        assert alive
        assert not [each for each in alive if each() is not None]
        file = round_folder(self._received, 2) / "tensors.safetensors"
        assert str(file) in Path("/proc/self/maps").read_text()
        return train_steps(self, *given)

    server, silos = start(recipe(SMALL), home)
    train_round(server, silos)
    monkeypatch.setattr(Silo, "_through_disk", watched)
    monkeypatch.setattr(Silo, "_train_steps", trained_without)
    silos["bee"].train(server.as_change(server.task("bee")))


def test_a_silo_that_never_has_enough_fails_the_round_as_any_other(
    recipe: Make, home: Path, tmp_path: Path
):
    """A hostile one could else keep the server sending."""

    def never(message: Message, reply: Message) -> Message:
        task = message.content.config_records["task"]
        if message.metadata.message_type == "train" and task["silo"] == "bee":
            reply.content["task"] = ConfigRecord({"error": "more", "needs_whole": True})
        return reply

    server, grid = run(recipe(f"{SMALL} quorum=0.6"), home, tmp_path, tamper=never)
    assert server.members["bee"].merged == []
    asked = [m.content.config_records["task"] for m in grid.sent
             if m.metadata.message_type == "train"]  # fmt: skip
    assert sum(task["silo"] == "bee" for task in asked) == 8  # twice in each of four rounds


def test_a_change_of_what_a_silo_never_had_is_refused(recipe: Make, home: Path):
    server, silos = start(recipe(SMALL), home)
    train_round(server, silos)
    task = server.as_change(server.task("ant"))
    assert task.change is not None
    header = records.header_record(server.experiment, server.recipe, "ant")
    body = records.to_record(task.change.body)
    never = replace(task, start_round=0, keep_from=0)
    content = records.task_record(never, header, body, records.to_record({}))
    answer = InProcessGrid(1, home)._answer(Message(content, 1000, "train"))
    reason = str(answer.content.config_records["task"]["error"])
    assert "a change for round 2, of what is behind round 0" in reason


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        (lambda a: a.astype(np.int8), "is int8 .*expected uint8"),
        (lambda a: a[:-1].copy(), "expected"),
        (lambda a: a.astype(np.float32), "is float32 .*expected uint8"),
    ],
)
def test_arrays_of_another_form_than_the_codecs_are_refused(
    recipe: Make, home: Path, spoiled: Callable[[np.ndarray], np.ndarray], reason: str
):
    server, silos = start(recipe("wire.up=int4"), home)
    content = records.update_record(silos["ant"].train(server.task("ant")))
    ((name, array),) = content.array_records["body"].items()
    content["body"] = ArrayRecord({name: Array(spoiled(array.numpy()))})
    with pytest.raises(BadUpdate, match=reason):
        records.read_update(content, server.layout.body, {}, "int4")


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_any_bytes_of_a_hostile_silo_are_judged_as_values(recipe: Make, home: Path, codec: str):
    """Scales of 2^127, of infinity or NaN: refused as a whole, or as large as their norm says."""
    server, silos = start(recipe(f"wire.up={codec}"), home)
    content = records.update_record(silos["ant"].train(server.task("ant")))
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(30):
        arrays = {
            name: Array(generator.integers(0, 256, array.numpy().nbytes, np.uint8)
                        .view(array.numpy().dtype).reshape(array.numpy().shape))
            for name, array in content.array_records["body"].items()
        }  # fmt: skip
        content["body"] = ArrayRecord(arrays)
        update = records.read_update(content, server.layout.body, {}, codec)
        try:
            server.check(server.open_round(home), update)
        except BadUpdate:
            refused += 1
    assert refused == 30


def test_no_more_is_fetched_than_the_codec_makes(recipe: Make):
    shapes = {"w": (1024, 1024)}
    assert records.largest_reply(shapes, "fp32") - records.largest_reply(shapes, "int4") > 3_600_000
