"""The door: what goes out comes back the same, and nothing else gets through."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from dept_fl import records
from dept_fl.config import Recipe
from dept_fl.errors import BadUpdate, DeptError
from dept_fl.silo import Update

SHAPES = {"a": (2, 3), "b": (4,), "c": ()}
TENSORS = {
    name: torch.arange(12.0)[: max(1, int(np.prod(s)))].reshape(s) for name, s in SHAPES.items()
}


def record(**changes: Array) -> ArrayRecord:
    arrays = {name: Array(t.numpy()) for name, t in TENSORS.items()}
    return ArrayRecord({**arrays, **changes})


def update_content(**changes: Any) -> RecordDict:
    content = records.update_record(Update("ant", 1, TENSORS, {}, {"loss": 1.0}))
    for name, value in changes.items():
        content[name] = value
    return content


def test_tensors_come_back_bit_for_bit_and_without_a_copy():
    made = records.to_record(TENSORS)
    back = records.from_record(made, SHAPES)
    assert all(torch.equal(back[name], TENSORS[name]) for name in SHAPES)
    data = np.frombuffer(made["a"].data, np.uint8)
    start = back["a"].data_ptr() - data.ctypes.data
    assert 0 < start < len(data)


def test_bytes_on_the_wire_are_the_serialised_arrays():
    made = records.to_record(TENSORS)
    assert records.record_bytes(made) == (6 + 4 + 1) * 4 + 3 * 128


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("a", Array(np.zeros((3, 2), np.float32)), "expected"),
        ("a", Array(np.zeros((2, 3), np.float64)), "expected float32"),
        ("a", Array(np.zeros((2, 3), np.int32)), "expected float32"),
        ("b", Array(np.zeros(5, np.float32)), "expected"),
        ("b", Array("float32", (4,), "numpy.ndarray", b""), "not a plain array"),
        ("b", Array("float32", (4,), "numpy.ndarray", b"\x93NUMPY\x01\x00"), "not a plain array"),
        ("b", Array("float32", (4,), "pickle", Array(np.zeros(4, np.float32)).data), "pickle"),
        ("b", Array("f", (4,), "numpy.ndarray", Array(np.zeros(4, "f")).data[:-1]), "length"),
        ("b", Array("f", (4,), "numpy.ndarray", Array(np.zeros(4, "f")).data + b"x"), "length"),
    ],
)
def test_an_array_that_is_not_what_was_asked_for_is_refused(name: str, array: Array, reason: str):
    with pytest.raises(BadUpdate, match=reason):
        records.from_record(record(**{name: array}), SHAPES)


def test_a_header_that_promises_petabytes_allocates_nothing():
    data = Array(np.zeros(4, np.float32)).data
    huge = data.replace(b"(4,), }" + b" " * 15, b"(4000000000000000,), }")
    with pytest.raises(BadUpdate, match="length"):
        records.from_record(record(b=Array("f", (4,), "numpy.ndarray", huge)), SHAPES)


def test_parameters_that_are_missing_or_extra_are_named():
    with pytest.raises(BadUpdate, match="missing or not asked for: d"):
        records.from_record(record(d=Array(np.zeros(1, np.float32))), SHAPES)
    with pytest.raises(BadUpdate, match="missing or not asked for: b"):
        records.from_record(ArrayRecord({"a": Array(np.zeros((2, 3), np.float32))}), SHAPES)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": ConfigRecord({"error": "silo ant: no text"})}, "silo ant: no text"),
        ({"task": ConfigRecord({"silo": "ant"})}, "round=None is not a number"),
        ({"task": ConfigRecord({"silo": "ant", "round": "1"})}, "round='1' is not a number"),
        ({"task": ConfigRecord({"silo": "ant", "round": float("inf")})}, "not a number"),
        ({"metrics": MetricRecord({"loss": float("nan")})}, "not a finite number"),
        ({"metrics": MetricRecord({"loss": [1.0]})}, "not a finite number"),
        ({"metrics": MetricRecord({"bits_per_byte": 1e15})}, r"bits_per_byte=1.*below 1e\+15"),
        ({"metrics": MetricRecord({"tokens": 2**62})}, r"tokens=4.*below 1e\+15"),
        ({"metrics": MetricRecord({"perplexity": 1e300})}, r"below 1e\+300"),
        ({"task": ConfigRecord({"silo": "ant", "round": 1.5})}, "round=1.5 is not a whole number"),
        ({"embeddings": record()}, "nobody asked for: embeddings"),
        ({"embeddings": ConfigRecord({"a": 1})}, "nobody asked for: embeddings"),
        ({"embeddings": ArrayRecord()}, "nobody asked for: embeddings"),
    ],
)
def test_a_reply_that_is_not_an_update_is_refused(changes: dict[str, Any], reason: str):
    with pytest.raises(BadUpdate, match=reason):
        records.read_update(update_content(**changes), SHAPES, {}, "fp32")


def test_a_silo_whose_model_diverged_may_say_so():
    metrics = {"perplexity": math.exp(600), "unigram_perplexity": 9.0, "bits_per_byte": 9e14}
    content = update_content(metrics=MetricRecord(metrics))
    assert records.read_update(content, SHAPES, {}, "fp32").metrics == metrics


@pytest.mark.parametrize("part", ["task", "body", "metrics"])
def test_a_reply_without_one_of_its_parts_is_refused(part: str):
    content = update_content()
    del content[part]
    with pytest.raises(BadUpdate, match="has no"):
        records.read_update(content, SHAPES, {}, "fp32")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 300))
def test_no_bytes_crash_the_reader(noise: bytes, at: int):
    """Valid arrays with noise written over them: refused, or read as float32 of the shape."""
    data = bytearray(Array(np.zeros(4, np.float32)).data)
    data[at : at + len(noise)] = noise
    broken = Array("float32", (4,), "numpy.ndarray", bytes(data))
    try:
        back = records.from_record(record(b=broken), SHAPES)
    except BadUpdate:
        return
    assert back["b"].shape == (4,)
    assert back["b"].dtype == torch.float32


@pytest.mark.parametrize(
    ("experiment", "silo", "reason"),
    [
        ("../../etc", "ant", "not an experiment id"),
        ("a" * 11 + "/", "ant", "not an experiment id"),
        ("a" * 12, "../ant", "not a silo's name"),
        ("a" * 12, "/root", "not a silo's name"),
        ("a" * 12, "ANT", "not a silo's name"),
    ],
)
def test_names_from_the_server_cannot_leave_the_home(
    recipe: Callable[..., Recipe], experiment: str, silo: str, reason: str
):
    header = records.header_record(experiment, recipe(), silo)
    with pytest.raises(DeptError, match=reason):
        records.read_header(RecordDict({"task": header}))


def test_the_recipe_crosses_unchanged(recipe: Callable[..., Recipe]):
    made = recipe("variant=trim tokenizer=shared inner.betas=[0.8,0.9] share_samples=false")
    header = records.read_header(RecordDict({"task": records.header_record("0" * 12, made, "ant")}))
    assert header.recipe == made
    assert header.silo == "ant"


def test_no_silo_learns_what_follows_the_run(recipe: Callable[..., Recipe]):
    header = records.header_record("0" * 12, recipe("trackers=[wandb,mlflow]"), "ant")
    assert "wandb" not in str(header["recipe"])
    assert records.read_header(RecordDict({"task": header})).recipe == recipe()


def test_a_message_of_another_version_says_so():
    with pytest.raises(DeptError, match="another version"):
        records.read_header(RecordDict({}))


def test_home_is_never_taken_from_a_message(recipe: Callable[..., Recipe], tmp_path: Path):
    assert str(tmp_path) not in str(records.header_record("0" * 12, recipe(), "ant"))


def registered(**changes: Any) -> RecordDict:
    facts = dict.fromkeys(("vocabulary", "tokenizer_size"), 5)
    facts |= dict.fromkeys(("train_tokens", "train_bytes", "validation_bytes"), 1)
    facts |= dict.fromkeys(("train_documents", "duplicates", "lossy_documents"), 1)
    measures = dict.fromkeys(("unigram_bits_per_byte", "step_s", "prepare_s"), 1.0)
    return RecordDict({"task": ConfigRecord({**facts, **measures, "silo": "ant", **changes})})


def test_a_registration_is_read():
    assert records.read_registration(registered(), "ant").vocabulary == 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"silo": "bee"}, "answers for silo 'bee'"),
        ({"vocabulary": 6}, "not plausible"),
        ({"vocabulary": 0}, "not plausible"),
        ({"tokenizer_size": 2**40, "vocabulary": 2**40}, "not plausible"),
        ({"train_tokens": -1}, "not plausible"),
        ({"step_s": 1e308}, "not a number"),
        ({"step_s": float("nan")}, "not a number"),
        ({"step_s": "1"}, "not a number"),
        ({"train_bytes": 2**63}, "not a number"),
        ({"train_bytes": 1.0}, "train_bytes=1.0 is not a whole number"),
        ({"fingerprint": "\x1b[2J"}, r"fingerprint='\\x1b\[2J' is not one"),
        ({"fingerprint": "a" * 65}, "is not one"),
        ({"fingerprint": ["a"]}, "is not one"),
    ],
)
def test_a_registration_that_cannot_be_is_refused(changes: dict[str, Any], reason: str):
    with pytest.raises(BadUpdate, match=reason):
        records.read_registration(registered(**changes), "ant")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, np.int32),
        np.zeros((1, 3), np.int64),
        np.zeros(3, ">i8"),
        np.array(["a"]),
        np.zeros(2, "datetime64[s]"),
    ],
)
def test_token_ids_of_another_kind_are_refused(array: np.ndarray):
    content = registered()
    content["rows"] = ArrayRecord({"rows": Array(array)})
    with pytest.raises(BadUpdate, match="token ids are"):
        records.read_registration(content, "ant")
    content["rows"] = ArrayRecord({"other": Array(np.zeros(3, np.int64))})
    with pytest.raises(BadUpdate, match="not one array"):
        records.read_registration(content, "ant")


def test_records_nobody_asked_for_are_refused():
    with pytest.raises(BadUpdate, match="nobody asked for: extra"):
        records.read_update(update_content(extra=record()), SHAPES, {}, "fp32")


def test_text_from_a_silo_cannot_forge_lines_of_the_terminal():
    forged = records.printable("bad\nround 5: rejected: silo ant\x1b[2J")
    assert forged.splitlines()[1] == "    round 5: rejected: silo ant?[2J"
