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


PACKED = 24 + 16 + 8  # bytes; that of `c` is four of them and four of padding
(NAME,) = records.to_record(TENSORS)


def record(**changes: Array) -> ArrayRecord:
    """The tensors as they are sent, and with `packed` something else in place of their bytes."""
    array = changes.pop("packed", records.to_record(TENSORS)[NAME])
    return ArrayRecord({NAME: array, **changes})


def bytes_array(size: int = PACKED) -> bytes:
    return Array(np.zeros(size, np.uint8)).data


def update_content(**changes: Any) -> RecordDict:
    content = records.update_record(Update("ant", 1, TENSORS, {}, {"loss": 1.0}))
    for name, value in changes.items():
        content[name] = value
    return content


def test_tensors_come_back_bit_for_bit_and_without_a_copy():
    made = records.to_record(TENSORS)
    back = records.from_record(made, SHAPES)
    assert all(torch.equal(back[name], TENSORS[name]) for name in SHAPES)
    data = np.frombuffer(made[NAME].data, np.uint8)
    starts = [back[name].data_ptr() - data.ctypes.data for name in SHAPES]
    assert starts == [128, 128 + 24, 128 + 24 + 16]


def test_what_is_sent_is_what_numpy_would_write():
    array = records.to_record(TENSORS)[NAME]
    numbers = array.numpy()
    assert (numbers.dtype, numbers.shape) == (np.uint8, (PACKED,))
    assert Array(numbers).data == array.data
    assert numbers[:24].view(np.float32).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_nothing_is_sent_of_nothing():
    assert records.to_record({}) == ArrayRecord()
    assert records.from_record(ArrayRecord(), {}) == {}


@pytest.mark.parametrize(
    ("shapes", "codec"),
    [
        ({**SHAPES, "a": (3, 2)}, "fp32"),
        ({**SHAPES, "d": ()}, "fp32"),
        ({"a": (2, 3), "b": (4,)}, "fp32"),
        ({"a": (2, 3), "x": (4,), "c": ()}, "fp32"),
        (SHAPES, "bf16"),
        ({}, "fp32"),
    ],
)
def test_what_was_packed_for_other_parameters_is_refused(shapes: Any, codec: str):
    """Even where the bytes are as many."""
    with pytest.raises(BadUpdate, match="parameters of other names or shapes, or another codec"):
        records.from_record(record(), shapes, codec)


def test_bytes_on_the_wire_are_the_serialised_arrays():
    made = records.to_record(TENSORS)
    assert records.record_bytes(made) == PACKED + 128


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (Array(np.zeros((PACKED, 1), np.uint8)), "expected"),
        (Array(np.zeros(PACKED // 4, np.float32)), "expected uint8"),
        (Array(np.zeros(PACKED, np.int8)), "expected uint8"),
        (Array(np.zeros(PACKED - 1, np.uint8)), "expected"),
        (Array(np.zeros(PACKED + 8, np.uint8)), "expected"),
        (Array("uint8", (PACKED,), "numpy.ndarray", b""), "not a plain array"),
        (Array("uint8", (PACKED,), "numpy.ndarray", b"\x93NUMPY\x01\x00"), "not a plain array"),
        (Array("uint8", (PACKED,), "pickle", bytes_array()), "pickle"),
        (Array("uint8", (PACKED,), "numpy.ndarray", bytes_array()[:-1]), "length"),
        (Array("uint8", (PACKED,), "numpy.ndarray", bytes_array() + b"x"), "length"),
    ],
)
def test_an_array_that_is_not_what_was_asked_for_is_refused(array: Array, reason: str):
    with pytest.raises(BadUpdate, match=reason):
        records.from_record(record(packed=array), SHAPES)


def test_a_header_that_promises_petabytes_allocates_nothing():
    huge = bytes_array().replace(b"(48,), }" + b" " * 14, b"(48000000000000,), }  ")
    assert huge != bytes_array()
    with pytest.raises(BadUpdate, match="length"):
        records.from_record(record(packed=Array("u1", (4,), "numpy.ndarray", huge)), SHAPES)


def test_arrays_that_are_missing_or_extra_are_named():
    with pytest.raises(BadUpdate, match=f"holds d, {NAME}, asked for was {NAME}"):
        records.from_record(record(d=Array(np.zeros(1, np.float32))), SHAPES)
    with pytest.raises(BadUpdate, match=f"holds nothing, asked for was {NAME}"):
        records.from_record(ArrayRecord(), SHAPES)
    with pytest.raises(BadUpdate, match=f"holds {NAME}, asked for was nothing"):
        records.from_record(record(), {})


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
    data = bytearray(bytes_array())
    data[at : at + len(noise)] = noise
    broken = Array("uint8", (PACKED,), "numpy.ndarray", bytes(data))
    try:
        back = records.from_record(record(packed=broken), SHAPES)
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
