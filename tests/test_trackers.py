"""Trackers show what the ledger holds, once, also where a run is killed; none can end a run.

With the packages themselves, offline.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
from flwr.app import Error, Message

from dept_fl import trackers
from dept_fl.config import TRACKERS, Recipe, load_recipe
from dept_fl.errors import ConfigError
from dept_fl.report import Event, Ledger
from dept_fl.trackers import Run, Trackers, require_packages
from tests.federation import run

Series = dict[str, list[tuple[int, float]]]
Make = Callable[..., Recipe]

HERE = [name for name in TRACKERS if find_spec(name)]
HOSTILE = "<script>alert(1)</script>\x1b[2J\nsecond"


class Killed(BaseException):
    """Ends the server between two statements."""


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No account, no network, no folder of the user's."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
            patch.delenv(name)
        patch.setenv("HOME", str(folder))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        yield folder


@pytest.fixture(scope="module")
def followed(tiny_file: Path, home: Path, offline: Path) -> Path:
    """The folder of a run with a bad reply in round 2 that was killed in round 3, resumed,
    and, when it was over, resumed once more."""
    recipe = load_recipe(tiny_file, f"rounds=4 round_timeout_s=60 trackers=[{','.join(HERE)}]")
    folder = offline / "run"
    failed = False

    def tamper(message: Message, reply: Message) -> Message:
        nonlocal failed
        task = message.content.config_records["task"]
        if task.get("round") == 2 and task["silo"] == "bee" and not failed:
            failed = True
            return Message(Error(8, HOSTILE), reply_to=message)
        if task.get("round") == 3 and task["silo"] == "cat":
            raise Killed
        return reply

    with pytest.raises(Killed):
        run(recipe, home, folder, tamper=tamper)
    run(recipe, home, folder, resume=True)
    run(recipe, home, folder, resume=True)
    return folder


def told_to_tensorboard(folder: Path) -> tuple[Series, str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    tags = found.Tags()
    series = {
        name: [(point.step, point.value) for point in found.Scalars(name)]
        for name in tags["scalars"]
    }
    texts = [
        point.tensor_proto.string_val[0].decode()
        for tag in tags["tensors"]
        for point in found.Tensors(tag)
    ]
    return series, "\n".join(texts)


def told_to_wandb(folder: Path) -> tuple[Series, str]:
    from wandb.proto.wandb_internal_pb2 import Record

    series: Series = {}
    ids = set()
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in _leveldb(file.read_bytes(), start=7):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            row = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            for name in row.keys() - {"round"}:
                if not name.startswith(("_", "notes")):
                    series.setdefault(name, []).append((int(row["round"]), float(row[name])))
    assert ids == {_experiment(folder)}
    notes = [file.read_text() for file in folder.glob("wandb/*/files/media/html/*.html")]
    return series, "\n".join(notes)


def _leveldb(data: bytes, start: int) -> Iterator[bytes]:
    """The records of LevelDB's log format: checksum, length and kind, in blocks of 32 KiB."""
    at, record = start, b""
    while at + 7 <= len(data):
        if (left := -at % 32_768) and left < 7:
            at += left
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole of it, or its end
            yield record
            record = b""


def told_to_mlflow(folder: Path) -> tuple[Series, str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    group = client.get_experiment_by_name("dept-fl")
    (found,) = client.search_runs([group.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["rounds"] == "4"
    assert not [name for name in found.data.params if name.startswith("silos.")]
    series = {
        name: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }
    notes = [file.read_text() for file in (folder / "mlflow").rglob("notes/*.txt")]
    return series, "\n".join(notes)


def told_to_trackio(folder: Path) -> tuple[Series, str]:
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("dept-fl")
    series: Series = {}
    for row in SQLiteStorage.get_logs("dept-fl", name):
        for key, value in row.items():
            if "/" in key:
                series.setdefault(key, []).append((row["step"], value))
    return series, json.dumps(SQLiteStorage.get_alerts("dept-fl"), default=str)


READERS = dict(
    zip(
        TRACKERS,
        (told_to_tensorboard, told_to_wandb, told_to_mlflow, told_to_trackio),
        strict=True,
    )
)


def _experiment(folder: Path) -> str:
    return next(e["experiment"] for e in Ledger(folder).read() if e["event"] == "plan")


def expected(folder: Path) -> Series:
    """Loss, bits per byte, norms, bytes and seconds by silo and round, as the ledger has them."""
    events = Ledger(folder).read()
    of_silos = {
        "silo_train": ("loss", "body_norm", "body_delta_norm", "bytes_up_body", "train_s"),
        "silo_eval": ("bits_per_byte", "perplexity"),
    }
    found: Series = {}
    for event in events:
        for key in of_silos.get(event["event"], ()):
            found.setdefault(f"{key}/{event['silo']}", []).append((event["round"], event[key]))
        if event["event"] == "round":
            figures = {"seconds": event["seconds"], "merged": len(event["merged"])}
            for key, value in figures.items():
                found.setdefault(f"round/{key}", []).append((event["round"], value))
    return found


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_has_every_round_of_a_killed_and_resumed_run_once(name: str, followed: Path):
    pytest.importorskip(name)
    series, _ = READERS[name](followed)
    wanted = expected(followed)
    assert [step for step, _ in wanted["loss/cat"]] == [1, 2, 3, 4]
    assert [step for step, _ in wanted["bits_per_byte/cat"]] == [0, 1, 2, 3, 4]
    assert wanted.keys() <= series.keys()
    for figure, points in wanted.items():
        assert sorted(series[figure]) == [
            (step, pytest.approx(value, rel=1e-6))
            for step, value in points  # TensorBoard: fp32
        ], figure
    assert not [figure for figure in series if "down_whole" in figure or "time/" in figure]


@pytest.mark.parametrize("name", TRACKERS)
def test_failures_are_notes_in_which_nothing_is_alive(name: str, followed: Path):
    pytest.importorskip(name)
    _, notes = READERS[name](followed)
    shown = "&lt;script&gt;" if name == "wandb" else "<script>"
    assert notes.count(shown) == 1
    assert f"failure: bee: {shown}" in notes
    assert "\x1b" not in notes
    assert "?[2J second" in notes
    if name == "tensorboard":  # which renders Markdown: four spaces make it code
        assert "    failure: bee: <script>" in notes


def test_a_tracker_that_a_resumed_run_is_given_learns_all_rounds(
    recipe: Make, home: Path, tmp_path: Path
):
    pytest.importorskip("tensorboard")
    run(recipe("rounds=3"), home, tmp_path)
    run(recipe("rounds=3 trackers=[tensorboard]"), home, tmp_path, resume=True)
    series, _ = told_to_tensorboard(tmp_path)
    assert [step for step, _ in series["loss/ant"]] == [1, 2, 3]
    assert [step for step, _ in series["bits_per_byte/ant"]] == [0, 1, 2, 3]


# ---- trackers that fail --------------------------------------------------------------------------


def test_a_tracker_without_an_account_costs_one_line(
    recipe: Make,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # else it keeps the environment of before
    monkeypatch.setenv("WANDB_MODE", "online")
    server, _ = run(recipe("rounds=1 trackers=[wandb]"), home, tmp_path)
    assert server.round == 1
    told = [line for line in capsys.readouterr().out.splitlines() if "warning: wandb" in line]
    assert len(told) == 1
    assert "follows no more: UsageError" in told[0]


def test_a_tracker_whose_server_is_gone_costs_one_line(
    recipe: Make,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    server, _ = run(recipe("rounds=1 trackers=[mlflow]"), home, tmp_path)
    assert server.round == 1
    assert capsys.readouterr().out.count("warning: mlflow follows no more") == 1


class Fragile:
    """Keeps what it is told, up to a step at which it breaks."""

    told: ClassVar[list[int]]
    breaks_at = 99

    def __init__(self, run: Run) -> None: ...

    def scalars(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        if step == self.breaks_at:
            raise OSError("no space left\non device")
        self.told.append(step)

    def note(self, text: str, step: int, time_s: float) -> None: ...

    def close(self, whole: bool) -> None:
        self.told.append(-1)


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> type[Fragile]:
    class Here(Fragile):
        told: ClassVar[list[int]] = []

    monkeypatch.setitem(trackers._KINDS, "mlflow", Here)
    return Here


def follow_rounds(recipe: Recipe, folder: Path, rounds: int) -> list[str]:
    """Trackers over a ledger with so many rounds; returns the warnings."""
    ledger, warnings = Ledger(folder), []
    for step in range(len(ledger.read()) + 1, rounds + 1):
        ledger.write("round", round=step, seconds=1.0)
    with Trackers(recipe, "e1", ledger, warnings.append):
        pass
    return warnings


def test_what_fails_in_the_midst_is_dropped_and_told_no_more(
    recipe: Make, tmp_path: Path, fragile: type[Fragile]
):
    fragile.breaks_at = 2
    warnings = follow_rounds(recipe("trackers=[mlflow]"), tmp_path, 3)
    assert warnings == ["warning: mlflow follows no more: OSError: no space left on device"]
    assert fragile.told == [1]
    fragile.breaks_at = 99
    assert follow_rounds(recipe("trackers=[mlflow]"), tmp_path, 4) == []
    assert fragile.told == [1, 3, 4, -1]  # 2 is missing; nothing is there twice


def test_a_note_that_fails_is_the_only_one_that_is_lost(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fragile: type[Fragile]
):
    ledger = Ledger(tmp_path)
    for step in (1, 3, 2):  # a silo that is late is told of behind the round
        ledger.write("failure", round=step, silo="bee", reason="no")
        time.sleep(0.002)  # the ledger has milliseconds

    def note(self: Fragile, text: str, step: int, time_s: float) -> None:
        if step == broken:
            raise OSError("gone")
        self.told.append(step)

    monkeypatch.setattr(fragile, "note", note)
    broken = 3
    assert len(follow_rounds(recipe("trackers=[mlflow]"), tmp_path, 0)) == 1
    assert fragile.told == [1]
    broken = 0
    assert follow_rounds(recipe("trackers=[mlflow]"), tmp_path, 0) == []
    assert fragile.told == [1, 2, -1]


def test_a_slow_tracker_is_dropped_after_a_minute_and_told_the_rest_on_resume(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fragile: type[Fragile]
):
    # A request takes 25 s, by a clock that only requests move.
    monkeypatch.setattr(trackers, "monotonic", lambda: 25.0 * len(fragile.told))
    (warning,) = follow_rounds(recipe("trackers=[mlflow]"), tmp_path, 5)
    assert "mlflow follows no more: TimeoutError: what is new took longer than 60 s" in warning
    assert fragile.told == [1, 2, 3]
    assert follow_rounds(recipe("trackers=[mlflow]"), tmp_path, 5) == []
    assert fragile.told == [1, 2, 3, 4, 5, -1]


def test_mlflow_takes_a_thousand_figures_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow")
    sizes, send = [], mlflow.MlflowClient.log_batch

    def log_batch(self: Any, run_id: str, metrics: Any = (), **more: Any) -> None:
        sizes.append(len(metrics))
        send(self, run_id, metrics=metrics, **more)

    config = {f"setting-{i}": i for i in range(150)}  # of which it takes only a hundred
    made = trackers.MLflow(Run("e1", "name", tmp_path, config, resumed=False))
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
    made.scalars({f"loss/{i}": 1.0 for i in range(1001)}, 1, 1.0)
    assert sizes == [1000, 1]
    assert len(made._client.get_run(made._id).data.metrics) == 1001


def test_a_damaged_memory_of_what_was_told_drops_the_tracker(
    recipe: Make, tmp_path: Path, fragile: type[Fragile]
):
    follow_rounds(recipe("trackers=[mlflow]"), tmp_path, 1)
    (tmp_path / "trackers" / "mlflow.json").write_text("{")
    (warning,) = follow_rounds(recipe("trackers=[mlflow]"), tmp_path, 2)
    assert "mlflow follows no more: JSONDecodeError" in warning
    assert fragile.told == [1, -1]


@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None)], ids=["missing", "a folder"])
def test_a_missing_package_is_named_before_the_run(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, spec: Any
):
    monkeypatch.setattr(trackers, "find_spec", lambda name: spec)
    with pytest.raises(ConfigError, match=r"trackers=wandb: .*pip install 'dept-fl\[wandb\]'"):
        require_packages(recipe("trackers=[wandb]"))
    require_packages(recipe())


def test_an_unknown_tracker_is_named(recipe: Make):
    with pytest.raises(ConfigError, match="trackers='wand': must be one of tensorboard, wandb"):
        recipe("trackers=[wand]")


def test_no_tracker_is_imported_where_none_is_named():
    code = "import sys, server_app.app, client_app.app, dept_fl.cli, dept_fl.strategy\n"
    code += f"print(sorted(set(sys.modules) & set({TRACKERS})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_note_is_one_short_line():
    event: Event = {"event": "failure", "silo": "bee", "reason": "a\r\n\x07b " + "x" * 9999}
    note = trackers._note(event)
    assert note.startswith("failure: bee: a ?b xxx")
    assert len(note) == 500
