"""Hostile bytes at every door: refused with a reason, never merged, never a crash."""

from __future__ import annotations

import io
import json
import pickle
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dept_fl import records
from dept_fl.checkpoint import Tensors
from dept_fl.config import Recipe, load_recipe, recipe_from_json
from dept_fl.errors import BadUpdate, ConfigError, DeptError
from dept_fl.post import Reply, Sent
from dept_fl.rounds import Merge, Server
from dept_fl.silo import Registration, Task, Update
from dept_fl.silo_file import SiloFile, load_silo_file
from dept_fl.strategy import DeptStrategy
from tests.federation import ALL_VARIANTS, InProcessGrid, start

fuzz = settings(
    deadline=None,
    max_examples=250,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Door(DeptStrategy):
    """The server behind its first round, waiting for bee's update of the second."""

    def __init__(self, recipe: Recipe, home: Path, folder: Path) -> None:
        InProcessGrid(1, home)  # messages can be made only within a run of Flower
        super().__init__(recipe, home, folder, resume=False, simulated=True)
        self._server, silos = start(recipe, home)
        self._recipe = self._server.recipe
        first = self._server.open_round(folder)
        updates = {name: silo.train(self._server.task(name)) for name, silo in silos.items()}
        for update in updates.values():
            self._server.add(first, update)
        self._server.close_round(first)
        self.silo = silos["bee"]
        self.update: Update = silos["bee"].train(self._server.task("bee"))
        self.registration: Registration = silos["bee"].register()
        self._folder = folder
        self._sent = {"bee": {}}
        self.refusals: list[str] = []

    @property
    def server(self) -> Server:
        return self._server

    def genuine(self) -> RecordDict:
        return records.update_record(self.update)

    def judge(self, content: RecordDict) -> tuple[Merge, str]:
        """What became of the round when this came from bee, and why it was refused."""
        self._merge, self._rows = self._server.open_round(self._folder), []
        question = Message(RecordDict(), 1, "train")
        sent = Sent(1, "bee", "train", 2, 10**9, 0.0)
        self._answered = Reply(sent)
        self.refusals.clear()
        self.aggregate_train(2, [Message(content, reply_to=question)])
        return self._merge, " ".join(self.refusals)

    def _failure(self, round_: int, silo: str, reason: str) -> None:
        self.refusals.append(f"{round_} {silo} {reason}")

    def _warning(self, round_: int, silo: str, reason: str) -> None:
        assert_fit_for_a_terminal(reason)


def assert_fit_for_a_terminal(text: str) -> None:
    assert all(c.isprintable() or c == "\n" for c in text)
    assert len(text) < 10_000


DOORS = {
    "spec-opt": ALL_VARIANTS["spec-opt"],
    "trim": ALL_VARIANTS["trim"],
    "int4": f"{ALL_VARIANTS['trim']} wire.up=int4 wire.down=int4",
    "fragments": f"{ALL_VARIANTS['spec-opt']} rounds=4 wire.fragments=2",
}


@pytest.fixture(scope="module", params=DOORS.values(), ids=DOORS.keys())
def door(
    request: pytest.FixtureRequest, tiny_file: Path, home: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Door:  # fmt: skip
    recipe = load_recipe(tiny_file, request.param)
    return Door(recipe, home, tmp_path_factory.mktemp("door"))


# ---- mutations of a genuine update, each of which makes it bad ---------------------------------

Mutation = Callable[[RecordDict], None]


def saved(array: np.ndarray, **changes: Any) -> bytes:
    """An array as numpy saves it, with another header over the same numbers."""
    facts = {"descr": "<f4", "fortran_order": False, "shape": array.shape, **changes}
    text = repr(facts).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    head = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
    return head + text + array.astype("<f4").tobytes()


def as_objects(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array.astype(object), allow_pickle=True)
    return stream.getvalue()


def as_archive(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, array)
    return stream.getvalue()


def other_dtype(array: np.ndarray, dtype: str) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array.astype(dtype))
    return stream.getvalue()


SHAPES_OF_ELSEWHERE: list[Callable[[tuple[int, ...]], Any]] = [
    lambda s: (*s, 1),
    lambda s: (1, *s),
    lambda s: (int(np.prod(s)) + 1,),
    lambda s: (-1, *s[1:]),
    lambda s: (0,),
    lambda s: tuple(2**62 for _ in s) or (2**62,),
    lambda s: (10**30, *s),
    lambda s: list(s),
    lambda s: (True, *s),
    lambda s: None,
    lambda s: "x",
]
DTYPES = ["<f8", "<f2", ">f4", "<i4", "|b1", "<c8", "<u4"]
DESCRIPTIONS = [
    ">f4", "<i4", "<u4", "|S4", "|V4", "|O", "<U1", "V0", "<m8[s]", "no type", "",
    [("a", "<f4")], [("\x1b[2J", "<f4")], {"names": ["a"]}, 7, None,
]  # fmt: skip


@st.composite
def other_bytes(draw: st.DrawFn, array: np.ndarray) -> bytes:
    """Bytes that are not the array: cut, stretched, of another type, order or serialisation."""
    data = saved(array)
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return data[: draw(st.integers(0, len(data) - 1))]
    if kind == 1:
        return data + draw(st.binary(min_size=1, max_size=64))
    if kind == 2:
        return other_dtype(array, draw(st.sampled_from(DTYPES)))
    if kind == 3:
        return saved(array, descr=draw(st.sampled_from(DESCRIPTIONS)))
    if kind == 4:
        return saved(array, fortran_order=draw(st.sampled_from([True, 1, "yes", None])))
    if kind == 5:
        shape = draw(st.sampled_from(SHAPES_OF_ELSEWHERE))(array.shape)
        return saved(array, shape=shape)
    if kind == 6:
        at, byte = draw(st.integers(0, 7)), draw(st.integers(1, 255))
        return data[:at] + bytes([data[at] ^ byte]) + data[at + 1 :]  # magic and version
    if kind == 7:
        return draw(st.binary(max_size=300))
    if kind == 8:
        return draw(st.sampled_from([as_objects, as_archive, pickle.dumps]))(array)
    return saved(array, **{draw(st.sampled_from(["extra", "\x1b[2J"])): 1})


@st.composite
def spoiled_numbers(draw: st.DrawFn, array: np.ndarray) -> bytes:
    """The array with a number that is none, or is absurd."""
    worse = array.copy()
    numbers = worse.view("<f4")
    bad = draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e30, 1e6]))
    numbers[draw(st.integers(0, numbers.size - 1))] = bad
    return saved(worse)


@st.composite
def spoiled_array(draw: st.DrawFn, door: Door) -> Mutation:
    content = door.genuine()
    part = draw(st.sampled_from(sorted(content.array_records)))
    name = draw(st.sampled_from(sorted(content.array_records[part])))
    array = content.array_records[part][name].numpy()
    data = draw(st.one_of(other_bytes(array), spoiled_numbers(array)))
    stype = "numpy.ndarray"
    if draw(st.integers(0, 9)) == 0:
        data = saved(array)
        stype = draw(st.sampled_from(["pickle", "", "torch", "\x1b[2J", "numpy.ndarray "]))
    shape = draw(st.sampled_from([array.shape, (1,), ()]))  # what Flower says beside the bytes

    def apply(found: RecordDict) -> None:
        if part in found.array_records:
            record = found.array_records[part]
            found[part] = ArrayRecord({**record, name: Array("float32", shape, stype, data)})

    return apply


def names() -> st.SearchStrategy[str]:
    return st.text(max_size=30).map(lambda text: f"x{text}\x1b[2J")


@st.composite
def other_names(draw: st.DrawFn, door: Door) -> Mutation:
    part = draw(st.sampled_from(sorted(door.genuine().array_records)))
    name = draw(st.sampled_from(sorted(door.genuine().array_records[part])))
    new, kind = draw(names()), draw(st.sampled_from(["lost", "added", "renamed", "emptied"]))

    def apply(content: RecordDict) -> None:
        if part not in content.array_records:
            return
        arrays = dict(content.array_records[part])
        if kind in ("added", "renamed") and name in arrays:
            arrays[new] = arrays[name]
        if kind in ("lost", "renamed"):
            arrays.pop(name, None)
        content[part] = ArrayRecord({} if kind == "emptied" else arrays)

    return apply


@st.composite
def other_records(draw: st.DrawFn, door: Door) -> Mutation:
    own = sorted(door.genuine())
    part, new = draw(st.sampled_from(own)), draw(names())
    kind = draw(st.sampled_from(["lost", "added", "renamed", "of another kind"]))
    other: Any = ConfigRecord({"a": 1}) if part in ("body", "embeddings") else ArrayRecord()

    def apply(content: RecordDict) -> None:
        if kind in ("added", "renamed"):
            content[new] = content.get(part, other)
        if kind in ("lost", "renamed"):
            content.pop(part, None)
        if kind == "of another kind":
            content[part] = other

    return apply


NO_METRICS: list[Any] = [
    -1.0, -1, -1e-300, float("nan"), float("inf"), -float("inf"), 1e300, 1.7e308, 10**301,
    [], [1.0], [float("nan")],
]  # fmt: skip


@st.composite
def other_metrics(draw: st.DrawFn, door: Door) -> Mutation:
    key = draw(st.sampled_from(sorted(door.update.metrics)))
    kind = draw(st.sampled_from(["lost", "bad", "bad and unknown", "tokens"]))
    value = draw(st.sampled_from(NO_METRICS))
    tokens = draw(
        st.one_of(st.integers(0, 2**62), st.floats(0, 1e299)).filter(
            lambda number: number != door.update.metrics["tokens"]
        )
    )
    unknown = draw(names())

    def apply(content: RecordDict) -> None:
        if "metrics" not in content.metric_records:
            return
        metrics = dict(content.metric_records["metrics"])
        if kind == "lost":
            metrics.pop(key, None)
        elif kind == "tokens":
            metrics["tokens"] = tokens
        else:
            metrics[unknown if kind == "bad and unknown" else key] = value
        content["metrics"] = MetricRecord(metrics)

    return apply


def config_values() -> st.SearchStrategy[Any]:
    """What Flower's ConfigRecord takes."""
    kinds = [
        st.integers(-(2**63), 2**63 - 1),
        st.floats(),
        st.text(max_size=50),
        st.binary(max_size=50),
        st.booleans(),
    ]
    return st.one_of(*kinds, *(st.lists(kind, max_size=4) for kind in kinds))


@st.composite
def other_task(draw: st.DrawFn, door: Door) -> Mutation:
    kind = draw(st.sampled_from(["round", "silo", "error", "lost", "random"]))
    value = draw(config_values())
    key = draw(st.sampled_from(["round", "silo"]))
    random = draw(st.dictionaries(st.text(max_size=9), config_values(), max_size=5))

    def apply(content: RecordDict) -> None:
        facts = dict(content.config_records.get("task", ConfigRecord()))
        if kind == "round" and (value != 2 or isinstance(value, float)):
            facts["round"] = value
        elif kind == "silo" and value != "bee":
            facts["silo"] = value
        elif kind == "lost":
            facts.pop(key, None)
        elif kind == "random":
            facts = {key: value for key, value in random.items() if key != "silo"}
        else:
            facts["error"] = value
        content["task"] = ConfigRecord(facts)

    return apply


def mutations(door: Door) -> st.SearchStrategy[list[Mutation]]:
    kinds = (spoiled_array, spoiled_array, other_names, other_records, other_metrics, other_task)
    return st.lists(st.one_of(*(kind(door) for kind in kinds)), min_size=1, max_size=3)


@settings(fuzz, max_examples=400)
@given(data=st.data())
def test_no_mutated_update_is_merged(door: Door, data: st.DataObject):
    content = door.genuine()
    for mutation in data.draw(mutations(door)):
        mutation(content)
    merge, reason = door.judge(content)
    assert merge.merged == []
    assert reason.startswith("2 bee ")
    assert_fit_for_a_terminal(reason)


@st.composite
def harmless(draw: st.DrawFn, door: Door) -> Mutation:
    """What a silo may say: any figures below 1e15, any warning, more than was asked for."""
    extra = draw(st.dictionaries(names(), st.floats(0, 9e14), max_size=2))
    known = draw(st.sampled_from(sorted(set(door.update.metrics) - {"tokens"})))
    figure = draw(st.sampled_from([0, 0.0, 5e-324, 9e14, 2**49]))
    warning = draw(st.text(max_size=100) | st.just("x" * 5000) | st.just("a\nround 9: \x1b[2J\x07"))
    tiny = draw(st.sampled_from([1e-45, -1e-45, -0.0, 1e-38]))
    facts = draw(st.dictionaries(names(), config_values(), max_size=2))

    def apply(content: RecordDict) -> None:
        metrics = {**content.metric_records["metrics"], **extra, known: figure}
        content["metrics"] = MetricRecord(metrics)
        task = {**content.config_records["task"], **facts, "warning": warning}
        content["task"] = ConfigRecord(task)
        ((name, array),) = content.array_records["body"].items()
        numbers = array.numpy().copy()
        numbers[:4].view(np.float32)[0] = tiny
        content["body"] = ArrayRecord({name: Array(numbers)})

    return apply


@settings(fuzz, max_examples=60)
@given(data=st.data())
def test_what_a_silo_may_say_is_merged_whatever_it_says(door: Door, data: st.DataObject):
    content = door.genuine()
    data.draw(harmless(door))(content)
    merge, reason = door.judge(content)
    assert reason == ""
    assert merge.merged == ["bee"]
    part = merge.parts[0]
    shapes = door.server.parts("bee", 2)[part]
    name = next(iter(shapes))
    spooled = merge.spool.get("bee", part, shapes)
    codec = door.server.recipe.wire.up
    body = door.server.layout.synchronised(door.server.recipe, 2)
    sent = records.from_record(content.array_records["body"], body, codec)[name]
    assert torch.equal(spooled[name], sent)


def test_the_genuine_update_is_merged(door: Door):
    merge, reason = door.judge(door.genuine())
    assert (merge.merged, reason) == (["bee"], "")
    spooled: Tensors = {}
    for part, shapes in door.server.parts("bee", 2).items():
        spooled |= merge.spool.get("bee", part, shapes)
    assert all(torch.equal(spooled[name], tensor) for name, tensor in door.update.body.items())


# ---- registrations ------------------------------------------------------------


def register(door: Door, content: RecordDict) -> str:
    """Why bee may not register so; empty where it may."""
    try:
        door.server.register(records.read_registration(content, "bee"))
    except BadUpdate as error:
        assert_fit_for_a_terminal(str(error))
        return str(error)
    return ""


COUNTS = [
    "vocabulary", "tokenizer_size", "train_tokens", "train_bytes", "validation_bytes",
    "train_documents", "duplicates", "lossy_documents",
]  # fmt: skip
MEASURES = ["unigram_bits_per_byte", "step_s", "prepare_s"]
NO_COUNTS: list[Any] = [
    -1, 10**15, 2**63 - 1, -(2**63), 1.5, float("nan"), float("inf"), "7", b"7", True, [7], [],
]  # fmt: skip
NO_MEASURES: list[Any] = [-1, -0.1, float("nan"), float("inf"), 1e15, "7", b"7", False, [1.0]]


@st.composite
def spoiled_registration(draw: st.DrawFn, door: Door) -> RecordDict:
    content = records.registration_record(door.registration)
    facts = dict(content.config_records["task"])
    kind = draw(st.sampled_from(["count", "measure", "lost", "silo", "print", "error", "rows"]))
    if kind == "count":
        facts[draw(st.sampled_from(COUNTS))] = draw(st.sampled_from(NO_COUNTS))
    elif kind == "measure":
        facts[draw(st.sampled_from(MEASURES))] = draw(st.sampled_from(NO_MEASURES))
    elif kind == "lost":
        del facts[draw(st.sampled_from([*COUNTS, *MEASURES, "silo"]))]
    elif kind == "silo":
        facts["silo"] = draw(config_values().filter(lambda value: value != "bee"))
    elif kind == "print":
        own = facts["fingerprint"]
        facts["fingerprint"] = draw(
            (config_values() | st.just("a" * 64)).filter(lambda value: value != own)
        )
    elif kind == "error":
        facts["error"] = draw(config_values())
    content["task"] = ConfigRecord(facts)
    if kind == "rows":
        rows = door.registration.rows
        content["rows"] = draw(other_rows(None if rows is None else rows.numpy()))
    return content


@st.composite
def other_rows(draw: st.DrawFn, rows: np.ndarray | None) -> ArrayRecord:
    if rows is None:  # SPEC sends none, so that any is too many
        made = np.array(draw(st.lists(st.integers(0, 400), max_size=5)), np.int64)
        return ArrayRecord({"rows": Array(made)})
    at = draw(st.integers(0, len(rows) - 1))
    worse = rows.copy()
    kind = draw(st.sampled_from(["twice", "away", "below", "shorter", "longer", "type", "name"]))
    if kind == "twice":
        worse[at] = worse[at - 1]
    elif kind == "away":
        worse[-1] = draw(st.sampled_from([320, 2**40, 2**63 - 1]))
    elif kind == "below":
        worse[0] = draw(st.sampled_from([-1, -(2**63)]))
    elif kind == "shorter":
        worse = np.delete(worse, at)
    elif kind == "longer":
        worse = np.append(worse, worse[-1] + 1)
    elif kind == "type":
        return ArrayRecord({"rows": Array(rows.astype(draw(st.sampled_from(DTYPES[:5]))))})
    else:
        return ArrayRecord({draw(names()): Array(rows)})
    return ArrayRecord({"rows": Array(worse)})


@settings(fuzz, max_examples=150)
@given(data=st.data())
def test_no_mutated_registration_is_taken(door: Door, data: st.DataObject):
    before = dict(door.server.registrations)
    assert register(door, data.draw(spoiled_registration(door))) != ""
    assert door.server.registrations == before


def test_the_genuine_registration_is_taken(door: Door):
    assert register(door, records.registration_record(door.registration)) == ""


@fuzz
@given(facts=st.dictionaries(st.sampled_from(["silos", "error", "x"]), config_values()))
@example({"silos": ["ant"]})
@example({"silos": ["../ant"]})
@example({"silos": ["ant\n"]})
def test_a_node_names_silos_or_is_refused(facts: dict[str, Any]):
    content = RecordDict({"task": ConfigRecord(facts)})
    try:
        named = records.read_hosts(content)
    except BadUpdate as error:
        assert_fit_for_a_terminal(str(error))
        return
    assert named == facts["silos"]
    assert all(set(name) <= set(string.ascii_lowercase + string.digits + "-_") for name in named)


# ---- what a silo gets from a hostile server ----------------------------------------------------


def json_values() -> st.SearchStrategy[Any]:
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    return st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=6,
    )


def paths(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every place in a tree of mappings."""
    found = [path] if path else []
    if isinstance(tree, dict):
        for key, value in tree.items():
            found += paths(value, (*path, key))
    return found


@st.composite
def other_recipe(draw: st.DrawFn, recipe: Recipe) -> str:
    """A genuine recipe with something else somewhere in it."""
    tree = json.loads(recipe.to_json())
    *above, last = draw(st.sampled_from(paths(tree)))
    place = tree
    for key in above:
        place = place[key]
    kind = draw(st.sampled_from(["lost", "another", "added", "text"]))
    if kind == "lost":
        del place[last]
    elif kind == "added":
        place[draw(st.text(max_size=10))] = draw(json_values())
    else:
        place[last] = draw(json_values())
    text = json.dumps(tree)
    return text[: draw(st.integers(0, len(text)))] if kind == "text" else text


@settings(fuzz, max_examples=120)
@given(data=st.data())
def test_a_servers_recipe_is_read_or_refused(tiny_file: Path, data: st.DataObject):
    text = data.draw(other_recipe(load_recipe(tiny_file)) | st.text(max_size=40))
    try:
        made = recipe_from_json(text)
    except ConfigError:
        return
    assert recipe_from_json(made.to_json()) == made


@settings(fuzz, max_examples=100)
@given(data=st.data())
def test_a_servers_header_is_read_or_refused(tiny_file: Path, data: st.DataObject):
    facts = dict(records.header_record("0" * 12, load_recipe(tiny_file), "ant"))
    key = data.draw(st.sampled_from(sorted(facts)))
    if data.draw(st.booleans()):
        facts[key] = data.draw(config_values())
    else:
        del facts[key]
    try:
        header = records.read_header(RecordDict({"task": ConfigRecord(facts)}))
    except DeptError as error:
        assert len(str(error)) < 10_000
        return
    assert "/" not in header.experiment + header.silo
    assert 0 < header.limit_s < 1e8


NO_ROUNDS: dict[str, list[Any]] = {
    "round": [1, 0, -1, -(2**63), 2.0, float("nan"), "2", b"2", True, [2], None],
    "start_round": [2, 3, 2**63 - 1, -1, 1.0, float("inf"), "1", False, [], None],
    "keep_from": [2, 10**9, -1, 0.0, "0", True, [0], None],
}


def task_content(door: Door) -> RecordDict:
    server, task = door.server, door.server.as_change(door.server.task("bee"))
    header = records.header_record(server.experiment, server.recipe, "bee")
    sent = task.change or task
    body, embeddings = records.to_record(sent.body), records.to_record(sent.embeddings)
    return records.task_record(task, header, body, embeddings)


def read_task(door: Door, content: RecordDict) -> Task:
    return records.read_task(content, door.silo)


@st.composite
def spoiled_task(draw: st.DrawFn, door: Door) -> Mutation:
    content = task_content(door)
    part = draw(st.sampled_from(sorted(content.array_records)))
    name = draw(st.sampled_from(sorted(content.array_records[part])))
    array = content.array_records[part][name].numpy()
    worse = Array("float32", array.shape, "numpy.ndarray", draw(other_bytes(array)))
    kind = draw(st.sampled_from(["rounds", "array", "lost array", "lost record"]))
    key = draw(st.sampled_from(sorted(NO_ROUNDS)))
    value = draw(st.sampled_from(NO_ROUNDS[key]))
    record = draw(st.sampled_from(sorted(content)))

    def apply(found: RecordDict) -> None:
        arrays = dict(found.array_records[part])
        if kind == "rounds":
            facts = {**found.config_records["task"], key: value}
            found["task"] = ConfigRecord({k: v for k, v in facts.items() if v is not None})
        elif kind == "array":
            found[part] = ArrayRecord({**arrays, name: worse})
        elif kind == "lost array":
            found[part] = ArrayRecord({k: v for k, v in arrays.items() if k != name})
        else:
            del found[record]

    return apply


@settings(fuzz, max_examples=120)
@given(data=st.data())
def test_no_mutated_task_reaches_a_silo(door: Door, data: st.DataObject):
    content = task_content(door)
    data.draw(spoiled_task(door))(content)
    with pytest.raises(DeptError):
        read_task(door, content)


def test_the_genuine_task_reaches_it(door: Door):
    found = read_task(door, task_content(door))
    assert (found.round, found.start_round, found.keep_from) == (2, 1, 0)
    assert (found.change is not None) == door.server.recipe.wire.sends_changes


# ---- files that people write ------------------------------------------------------------

SILO_FILE = {"name": "ant", "home": "/home", "files": ["a.txt"], "vocab_size": 300}
SILO_KEYS = [*SILO_FILE, "hub", "packages", "tokenizer", "validation_fraction", "device", "x"]
SILO_KEYS += ["sources", "where", "columns", "near_duplicates"]


def read_file(folder: Path, content: bytes) -> SiloFile | None:
    """The silo that a file with this in it describes; None where it is refused."""
    file = folder / "silo.yaml"
    file.write_bytes(content)
    try:
        return load_silo_file(file)
    except ConfigError as error:
        assert all(str(file) in problem for problem in error.problems)
        return None


@settings(fuzz, max_examples=120)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@example(b"")
@example(b"&a [*a]")
@example(b"name: !!python/object/apply:os.system [ls]")
@example(b"{" * 2000)
def test_no_bytes_of_a_silos_file_crash_its_reader(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
):
    assert read_file(tmp_path_factory.getbasetemp(), content) is None


@settings(fuzz, max_examples=150)
@given(key=st.sampled_from(SILO_KEYS), value=json_values())
def test_any_value_of_a_silos_setting_is_taken_or_refused(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
):
    text = yaml.safe_dump({**SILO_FILE, key: value}, allow_unicode=True)
    found = read_file(tmp_path_factory.getbasetemp(), text.encode("utf-8", "replace"))
    if found is not None:
        assert found.home.is_absolute()
        assert "/" not in found.name
