"""The door of a silo: everything that crosses its border is made and read here.

| message        | to the silo                     | back to the server                       |
|----------------|---------------------------------|------------------------------------------|
| query          | recipe                          | names of the silos on the node           |
| query.register | recipe, silo                    | counts and sizes; in TRIM the ids of V_k |
| train          | recipe, silo, rounds, body; in  | deltas of what is due, metrics           |
|                | GLOB and TRIM embeddings; or of |                                          |
|                | both the change (wire.down,     |                                          |
|                | wire.fragments)                 |                                          |
| evaluate       | as train, always whole          | metrics; a sample where it is shared     |

In SPEC no array but the body's, and no token string or id, ever crosses.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from dept_fl.checkpoint import Tensors
from dept_fl.codec import ALIGNED, Encoded, encoded, packed_bytes
from dept_fl.config import SILO_NAME, Recipe, recipe_from_json
from dept_fl.errors import BadUpdate, DeptError, NeedsWhole
from dept_fl.silo import Change, Registration, Silo, Task, Update

BODY, EMBEDDINGS, TASK, METRICS, ROWS = "body", "embeddings", "task", "metrics", "rows"
QUERY_REGISTER = "query.register"

Shapes = Mapping[str, tuple[int, ...]]

_EXPERIMENT = 12  # hexadecimal digits
_FINGERPRINT = re.compile(r"[0-9a-f]{0,64}")
_INT64_BYTES = 8
_FACTS_BYTES = 1 << 20  # of all in a reply that is not an array
_ARRAY_BYTES = 4096  # of an array that is not its numbers
_MOST_ARRAYS = 2  # in a reply: those of the body and of the embeddings
_COUNTS = (
    "vocabulary",
    "tokenizer_size",
    "train_tokens",
    "train_bytes",
    "validation_bytes",
    "train_documents",
    "duplicates",
    "lossy_documents",
)
_LARGEST_METRIC = 1e15  # what people see of metrics, and make of them, stays in bounds
_LARGEST_PERPLEXITY = 1e300  # which is exponential; of a diverged model e^600 (evaluate.py)
_MEASURES = ("unigram_bits_per_byte", "step_s", "prepare_s")


# ---- tensors ----------------------------------------------------------------------------


def to_record(tensors: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """fp32 tensors, or encoded ones, as one array of bytes; nothing where there are none.

    One array, since Flower sends each by itself: a request takes it about as long as a megabyte.
    """
    given = encoded(tensors)
    if not given:
        return ArrayRecord()
    shape = (packed_bytes(given.codec, given.shapes),)
    head = io.BytesIO()
    facts = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, facts)
    data = b"".join([head.getvalue(), *given.packed()])
    name = _packed_name(given.codec, given.shapes)
    return ArrayRecord({name: Array("uint8", shape, "numpy.ndarray", data)})


def _packed_name(codec: str, shapes: Shapes) -> str:
    """Tells packed tensors of other names, shapes or codec apart."""
    facts = [codec, *((name, tuple(shapes[name])) for name in sorted(shapes))]
    return f"{codec} {xxhash.xxh3_64_hexdigest(repr(facts).encode())}"


def record_bytes(record: ArrayRecord) -> int:
    """Bytes of the arrays as they are on the wire."""
    return sum(len(array.data) for array in record.values())


def split_bytes(content: RecordDict) -> tuple[int, int]:
    """Bytes of a message's arrays on the wire: the body's, and all others'."""
    sizes = {name: record_bytes(record) for name, record in content.array_records.items()}
    body = sizes.pop(BODY, 0)
    return body, sum(sizes.values())


def from_record(record: ArrayRecord, shapes: Shapes, codec: str = "fp32") -> Tensors:
    """The record's tensors in fp32; those that came so are read-only views of the bytes.

    Raises:
        BadUpdate: see `encoded_from_record`.
    """
    return dict(encoded_from_record(record, shapes, codec))


def encoded_from_record(record: ArrayRecord, shapes: Shapes, codec: str) -> Encoded:
    """Views of the bytes that came, for tensors of these shapes.

    Raises:
        BadUpdate: it is not what `to_record` makes of tensors of these names and shapes with this
            codec, or the bytes are not what their header says. Nothing is allocated before that
            is known.
    """
    name = _packed_name(codec, shapes) if shapes else ""
    if list(record) != ([name] if name else []):
        raise BadUpdate(
            f"holds {_some(record) or 'nothing'}, asked for was {name or 'nothing'}: parameters "
            "of other names or shapes, or another codec"
        )
    if not name:
        return Encoded(codec, {}, {})
    view, expected = _view(name, record[name]), (packed_bytes(codec, shapes),)
    if view.dtype != np.uint8 or view.shape != expected:
        raise BadUpdate(f"{name} is {view.dtype} {view.shape}, expected uint8 {expected}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of read-only memory; nobody writes to it
        packed = torch.from_numpy(view)
    return Encoded.unpacked(codec, packed, shapes)


def _view(name: str, array: Array) -> npt.NDArray[Any]:
    stream = io.BytesIO(array.data[:1024])
    try:
        version = np.lib.format.read_magic(stream)
        if array.stype != "numpy.ndarray" or version != (1, 0):
            raise ValueError(f"serialised as {array.stype} {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        size = math.prod(shape)
        if fortran or len(array.data) - stream.tell() != size * dtype.itemsize or dtype.hasobject:
            raise ValueError("its length does not fit its header")
        if stream.tell() % ALIGNED:  # numpy takes 64
            raise ValueError("its numbers begin at an odd place")
        return np.frombuffer(array.data, dtype, size, stream.tell()).reshape(shape)
    except Exception as error:  # hostile bytes; numpy's header parser raises what it likes
        reason = printable(str(error), 200)
        raise BadUpdate(f"{name} is not a plain array: {reason}") from error


# ---- which silos ------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What each message says about itself.

    Attributes:
        limit_s: seconds after which the server does not wait for the answer any more.
    """

    experiment: str
    recipe: Recipe
    silo: str
    limit_s: float


def header_record(
    experiment: str, recipe: Recipe, silo: str = "", limit_s: float = 3600.0
) -> ConfigRecord:
    sent = replace(recipe, trackers=[])  # which are the server's own affair
    facts = {"experiment": experiment, "recipe": sent.to_json()}
    return ConfigRecord({**facts, "silo": silo, "limit_s": limit_s})


def read_header(content: RecordDict) -> Header:
    """The header of a message from the server; its names are safe as names of folders.

    Raises:
        DeptError: it is not one.
    """
    try:
        record = content.config_records[TASK]
        experiment, silo = str(record["experiment"]), str(record["silo"])
        recipe = recipe_from_json(str(record["recipe"]))
        limit_s = float(_number(record, "limit_s"))
    except KeyError as error:
        raise DeptError(f"message without {error}: is the server of another version?") from error
    if len(experiment) != _EXPERIMENT or not set(experiment) <= set("0123456789abcdef"):
        raise DeptError(f"message with experiment={experiment!r:.100}: not an experiment id")
    if silo and not SILO_NAME.fullmatch(silo):
        raise DeptError(f"message with silo={silo!r:.100}: not a silo's name")
    if not 0.0 < limit_s < 1e8:
        raise DeptError(f"message with limit_s={limit_s!r}: not a time to answer in")
    return Header(experiment, recipe, silo, limit_s)


def content_of(message: Message) -> RecordDict:
    """What a reply holds.

    Raises:
        BadUpdate: it is an error.
    """
    if message.has_error():
        reason = printable(str(message.error.reason))
        raise BadUpdate(f"error {message.error.code}: {reason}")
    return message.content


def failure(error: Exception) -> RecordDict:
    """The reply of a silo that could not do its task."""
    whole = isinstance(error, NeedsWhole)
    return RecordDict({TASK: ConfigRecord({"error": str(error), "needs_whole": whole})})


def needs_whole(content: RecordDict) -> bool:
    """Whether it is the `failure` of a silo that a change did not do for."""
    record = content.config_records.get(TASK, ConfigRecord())
    return "error" in record and record.get("needs_whole") is True


def raise_failure(content: RecordDict) -> None:
    """Raise BadUpdate if the reply is a `failure`."""
    record = content.config_records.get(TASK)
    if record is not None and "error" in record:
        raise BadUpdate(reason(content))


def reason(content: RecordDict) -> str:
    """What a `failure` says."""
    told = printable(str(content.config_records[TASK].get("error", "")))
    return told or "failed, and does not say why"


def printable(text: str, longest: int = 2000) -> str:
    """Text from elsewhere for a terminal: no control characters but line ends, indented."""
    lines = text[:longest].splitlines()
    clean = ["".join(c if c.isprintable() else "?" for c in line) for line in lines]
    return "\n    ".join(clean)


def _some(names: Iterable[str]) -> str:
    return ", ".join(printable(name, 80) for name in sorted(names)[:3])


def hosts_record(silos: list[str]) -> RecordDict:
    return RecordDict({TASK: ConfigRecord({"silos": silos})})


def read_hosts(content: RecordDict) -> list[str]:
    raise_failure(content)
    silos = _config(content).get("silos")
    if not isinstance(silos, list) or not all(
        isinstance(name, str) and SILO_NAME.fullmatch(name) for name in silos
    ):
        raise BadUpdate("does not name its silos")
    return [str(name) for name in silos]


# ---- registration -----------------------------------------------------------------------


def registration_record(registration: Registration) -> RecordDict:
    facts: dict[str, Any] = {key: getattr(registration, key) for key in (*_COUNTS, *_MEASURES)}
    text = {"silo": registration.silo, "fingerprint": registration.fingerprint}
    content = RecordDict({TASK: ConfigRecord({**facts, **text, "on_gpu": registration.on_gpu})})
    if registration.rows is not None:
        content[ROWS] = ArrayRecord({ROWS: Array(registration.rows.numpy())})
    return content


def read_registration(content: RecordDict, silo: str) -> Registration:
    raise_failure(content)
    record = _config(content)
    if record.get("silo") != silo:
        raise BadUpdate(f"answers for silo {record.get('silo')!r:.100}, asked was {silo!r}")
    counts = {key: _whole(record, key) for key in _COUNTS}
    measures = {key: float(_number(record, key)) for key in _MEASURES}
    for key, value in (*counts.items(), *measures.items()):
        if not 0 <= value < 1e15:
            raise BadUpdate(f"{key}={value!r} is not plausible")
    if not 0 < counts["vocabulary"] <= counts["tokenizer_size"] < 1 << 31:
        raise BadUpdate(f"vocabulary of {counts['vocabulary']} ids is not plausible")
    fingerprint = str(record.get("fingerprint", ""))
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise BadUpdate(f"fingerprint={fingerprint!r:.100} is not one")
    return Registration(
        silo=silo,
        fingerprint=fingerprint,
        on_gpu=bool(record.get("on_gpu", False)),
        rows=_rows(content),
        **counts,
        **measures,  # type: ignore[arg-type]
    )


def _rows(content: RecordDict) -> torch.Tensor | None:
    if ROWS not in content.array_records:
        return None
    record = content.array_records[ROWS]
    if list(record) != [ROWS]:
        raise BadUpdate("its token ids are not one array")
    view = _view(ROWS, record[ROWS])
    if view.dtype != np.int64 or view.ndim != 1:
        raise BadUpdate(f"its token ids are {view.dtype} {view.shape}, expected a list of int64")
    return torch.from_numpy(view.copy())


# ---- training ---------------------------------------------------------------------------


def task_record(
    task: Task, header: ConfigRecord, body: ArrayRecord, embeddings: ArrayRecord
) -> RecordDict:
    """The message of a task; body and embeddings are records of the task's, or of its change's.

    They are given so that what several silos get is serialised, and kept, once.
    """
    rounds = {"round": task.round, "start_round": task.start_round, "keep_from": task.keep_from}
    digests = {"digest": task.change.digest} if task.change else {}
    content = RecordDict({TASK: ConfigRecord({**header, **rounds, **digests}), BODY: body})
    if embeddings:
        content[EMBEDDINGS] = embeddings
    return content


def read_task(content: RecordDict, silo: Silo) -> Task:
    """A task from the server. Shapes are the silo's own, from the recipe's model.

    Raises:
        DeptError: it is not one.
    """
    try:
        record = _config(content)
        round_, start, keep = (_whole(record, k) for k in ("round", "start_round", "keep_from"))
        if not 0 <= keep <= start < round_:
            raise BadUpdate(f"its rounds are not in order: {keep}, {start}, {round_}")
        task = Task(silo.name, round_, start, keep, body={}, embeddings={})
        came = content.array_records[BODY]
        came_too = content.array_records.get(EMBEDDINGS, ArrayRecord())
        embeddings, codec = silo.received_embedding_shapes, silo.recipe.wire.down
        if "digest" not in record:
            body = from_record(came, silo.layout.body)
            return replace(task, body=body, embeddings=from_record(came_too, embeddings))
        if start != round_ - 1:
            raise BadUpdate(f"a change for round {round_}, of what is behind round {start}")
        change = Change(
            encoded_from_record(came, silo.layout.synchronised(silo.recipe, start), codec),
            encoded_from_record(came_too, embeddings, codec),
            str(record["digest"]),
        )
        return replace(task, change=change)
    except (BadUpdate, KeyError) as error:
        raise DeptError(f"silo {silo.name}: the server's message is not usable: {error}") from error


def update_record(update: Update) -> RecordDict:
    facts = ConfigRecord({"silo": update.silo, "round": update.round, "warning": update.warning})
    content = RecordDict(
        {
            TASK: facts,
            BODY: to_record(update.body),
            METRICS: MetricRecord(update.metrics),  # type: ignore[arg-type]
        }
    )
    if update.embeddings:
        content[EMBEDDINGS] = to_record(update.embeddings)
    return content


def read_update(content: RecordDict, body: Shapes, embeddings: Shapes, codec: str) -> Update:
    """A silo's update; the server checks round, silo and values against its own state.

    Raises:
        BadUpdate: it is a failure, or not of the form that was asked for.
    """
    raise_failure(content)
    record = _config(content)
    if BODY not in content.array_records or METRICS not in content.metric_records:
        raise BadUpdate("has no body or no metrics")
    asked = {TASK, BODY, METRICS, *([EMBEDDINGS] if embeddings else [])}
    if unknown := content.keys() - asked:
        raise BadUpdate(f"has records nobody asked for: {_some(unknown)}")
    return Update(
        silo=str(record.get("silo")),
        round=_whole(record, "round"),
        body=encoded_from_record(content.array_records[BODY], body, codec),
        embeddings=encoded_from_record(
            content.array_records.get(EMBEDDINGS, ArrayRecord()), embeddings, codec
        ),
        metrics=_metrics(content),
        warning=printable(str(record.get("warning", ""))),
    )


def finished_record(
    silo: str, metrics: dict[str, float], text: str | None, warning: str = ""
) -> RecordDict:
    facts = ConfigRecord({"silo": silo, "warning": warning})
    if text is not None:
        facts["sample"] = text
    return RecordDict({TASK: facts, METRICS: MetricRecord(metrics)})  # type: ignore[arg-type]


def read_finished(content: RecordDict, silo: str) -> tuple[dict[str, float], str, str]:
    """The metrics, the text that the model wrote, and a warning, both empty where there is none.

    Raises:
        BadUpdate: it is a failure, or no final evaluation of this silo.
    """
    raise_failure(content)
    record = _config(content)
    if record.get("silo") != silo or METRICS not in content.metric_records:
        raise BadUpdate("is not an evaluation of this silo")
    sample, warning = str(record.get("sample", "")), str(record.get("warning", ""))
    return _metrics(content), sample[:100_000], printable(warning)


def largest_reply(arrays: Shapes, codec: str, rows: int = 0) -> int:
    """Bytes that an honest reply with these arrays has at most; the rest is never fetched."""
    numbers = packed_bytes(codec, arrays) + _INT64_BYTES * rows
    return numbers + _FACTS_BYTES + _ARRAY_BYTES * _MOST_ARRAYS


def _config(content: RecordDict) -> ConfigRecord:
    record = content.config_records.get(TASK)
    if record is None:
        raise BadUpdate("has no header")
    return record


def _number(record: ConfigRecord, key: str) -> float:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
        raise BadUpdate(f"{key}={value!r:.100} is not a number")
    return value


def _whole(record: ConfigRecord, key: str) -> int:
    value = _number(record, key)
    if isinstance(value, float):
        raise BadUpdate(f"{key}={value!r} is not a whole number")
    return value


def _metrics(content: RecordDict) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for key, value in content.metric_records[METRICS].items():
        # All that silos measure are counts, seconds, norms, losses: never below 0.
        most = _LARGEST_PERPLEXITY if key.endswith("perplexity") else _LARGEST_METRIC
        if isinstance(value, list) or not 0 <= value < most:
            name = printable(key, 80)
            raise BadUpdate(
                f"metric {name}={value!r:.100} is not a finite number from 0 on, below {most:g}"
            )
        metrics[key] = float(value)
    return metrics
