"""Experiment trackers: TensorBoard, Weights & Biases, MLflow and trackio follow a run's ledger.

Each is an optional package, imported only where the recipe's `trackers` name it, on the server
alone. None can end a run, and a resumed run goes on in the tracker's own run.
"""

from __future__ import annotations

import html
import json
import os
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Protocol

from dept_fl.checkpoint import write_whole
from dept_fl.config import TRACKERS, Recipe, by_name
from dept_fl.errors import ConfigError
from dept_fl.report import Event, Ledger, harmless

_PROJECT = "dept-fl"  # what W&B and trackio call it; MLflow: an experiment
_FIGURES = ("silo_eval", "silo_train", "round", "checkpoint")
_NOTES = ("failure", "absent", "late", "warning")
_NO_FIGURE = ("round", "during_round", "time")
_LONGEST_NOTE = 500
_PATIENCE_S = 60
_PARAMS, _METRICS = 100, 1000  # that MLflow takes in one request
_SETTINGS = {  # a server that is gone costs seconds, not minutes; nothing else is sent out
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}


@dataclass(frozen=True)
class Run:
    """What a tracker learns of a run.

    Attributes:
        id: the experiment's, which a resumed run keeps.
        folder: the run's.
        config: the recipe by dotted name, but for the silos' data.
        resumed: whether this tracker knows the run already.
    """

    id: str
    name: str
    folder: Path
    config: dict[str, Any]
    resumed: bool


class Tracker(Protocol):
    """A run in one of the packages; whatever it raises, the run goes on without it."""

    def scalars(self, values: Mapping[str, float], step: int, time_s: float) -> None: ...

    def note(self, text: str, step: int, time_s: float) -> None: ...

    def close(self, whole: bool) -> None:
        """Say whether the run came to its end."""


class TensorBoard:
    """Event files in RUN_DIR/tensorboard."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"))
        if not run.resumed:
            settings = "\n".join(f"{key}: {value}" for key, value in run.config.items())
            self._writer.add_text("recipe", _as_code(settings), 0)

    def scalars(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time_s)
        self._writer.flush()

    def note(self, text: str, step: int, time_s: float) -> None:
        self._writer.add_text("notes", _as_code(text), step, walltime=time_s)

    def close(self, whole: bool) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases: online where one is logged in, or as WANDB_MODE says."""

    def __init__(self, run: Run) -> None:
        import wandb

        self._html = wandb.Html
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run.id,
            name=run.name,
            dir=run.folder,
            config=run.config,
            allow_val_change=True,
            resume="allow",
            reinit="create_new",
            # What is printed stays here: it may hold text that a silo's model wrote.
            settings=wandb.Settings(
                console="off", init_timeout=_PATIENCE_S, finish_timeout=_PATIENCE_S
            ),
        )
        # W&B's own steps only rise, but an evaluation comes behind the next round's training.
        self._run.define_metric("*", step_metric="round")

    def scalars(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        self._run.log({"round": step, **values})

    def note(self, text: str, step: int, time_s: float) -> None:
        shown = self._html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({"round": step, "notes": shown})

    def close(self, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)


class MLflow:
    """MLFLOW_TRACKING_URI's server, else an SQLite file in RUN_DIR/mlflow."""

    def __init__(self, run: Run) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        address, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not address:
            folder = run.folder / "mlflow"
            folder.mkdir(exist_ok=True)
            address = f"sqlite:///{folder / 'mlflow.db'}"
            artifacts = (folder / "artifacts").as_uri()
        self._client = MlflowClient(address)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        group = found.experiment_id if found else self._client.create_experiment(name, artifacts)
        runs = self._client.search_runs([group], f"tags.dept_experiment = '{run.id}'")
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"dept_experiment": run.id}
        self._id = self._client.create_run(group, tags=tags, run_name=run.name).info.run_id
        params = [Param(key, str(value)) for key, value in run.config.items()]
        for i in range(0, len(params), _PARAMS):
            self._client.log_batch(self._id, params=params[i : i + _PARAMS])

    def scalars(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        at_ms = round(1000 * time_s)
        metrics = [self._metric(name, value, at_ms, step) for name, value in values.items()]
        for i in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._id, metrics=metrics[i : i + _METRICS])

    def note(self, text: str, step: int, time_s: float) -> None:
        self._client.log_text(self._id, text, f"notes/round-{step:05d}-{time_s:.3f}.txt")

    def close(self, whole: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if whole else "FAILED")


class Trackio:
    """Hugging Face's trackio: its folder on this machine, unless it is told of a Space."""

    def __init__(self, run: Run) -> None:
        import trackio

        self._finish = trackio.finish
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=run.name,
            config=run.config,
            resume="allow",
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def scalars(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        self._run.log(dict(values), step=step)

    def note(self, text: str, step: int, time_s: float) -> None:
        self._run.alert("notes", text, step=step)

    def close(self, whole: bool) -> None:
        self._finish()


_KINDS: dict[str, Callable[[Run], Tracker]] = dict(
    zip(TRACKERS, (TensorBoard, WandB, MLflow, Trackio), strict=True)
)


def require_packages(recipe: Recipe) -> None:
    """Raise ConfigError where a tracker's package is missing, before anything is started."""
    # A folder of that name, such as W&B leaves, is found too, but has no origin.
    missing = [name for name in recipe.trackers if getattr(find_spec(name), "origin", None) is None]
    if missing:
        raise ConfigError(
            [f"trackers={name}: not installed; pip install 'dept-fl[{name}]'" for name in missing]
        )


class Trackers:
    """The trackers of a run, told what is new in its ledger; one that fails is dropped.

    Use as a context manager around the run.

    Args:
        warn: takes a line for each tracker that is dropped.
    """

    def __init__(
        self, recipe: Recipe, experiment: str, ledger: Ledger, warn: Callable[[str], None]
    ) -> None:
        self._ledger, self._warn, self._position = ledger, warn, 0
        self._live: dict[str, _Follower] = {}
        for name in dict.fromkeys(recipe.trackers):
            with self._dropped_on_error(name):
                self._live[name] = _Follower(name, recipe, experiment, ledger.file.parent)

    def follow(self) -> None:
        """Tell what was written since the last time; to be called behind a checkpoint.

        What has no checkpoint may be done again, and told again.
        """
        events, self._position = self._ledger.read_from(self._position)
        for name, follower in list(self._live.items()):
            with self._dropped_on_error(name):
                follower.take(events)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.follow()
        for name, follower in list(self._live.items()):
            with self._dropped_on_error(name):
                follower.tracker.close(whole=error is None)

    @contextmanager
    def _dropped_on_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of somebody else's library: it can be anything
            self._live.pop(name, None)
            words = " ".join(str(error).split())[:_LONGEST_NOTE]
            self._warn(f"warning: {name} follows no more: {type(error).__name__}: {words}")


class _Follower:
    """A tracker, and what it was told: the last step of each kind of event of each silo."""

    def __init__(self, name: str, recipe: Recipe, experiment: str, run_dir: Path) -> None:
        for key, value in _SETTINGS.items():
            os.environ.setdefault(key, value)
        self._file = run_dir / "trackers" / f"{name}.json"
        resumed = self._file.is_file()
        told = json.loads(self._file.read_text(encoding="utf-8")) if resumed else {}
        self._steps: dict[str, int] = told.get("steps", {})
        self._noted_s: float = told.get("noted_s", 0.0)
        settings = {k: v for k, v in by_name(recipe).items() if not k.startswith("silos.")}
        self.tracker = _KINDS[name](
            Run(
                id=experiment,
                name=f"{recipe.name}-{recipe.label}-{experiment}",
                folder=run_dir,
                config={"experiment": experiment, **settings},
                resumed=resumed,
            )
        )

    def take(self, events: list[Event]) -> None:
        """Tell the events that it has not been told: figures step by step, then notes.

        Each step is kept as told just before it is: where this is cut short, that step alone is
        missing, and nothing is there twice.

        Raises:
            TimeoutError: all of it takes longer than _PATIENCE_S, for which replies wait.
        """
        due = monotonic() + _PATIENCE_S
        figures, notes = self._new_figures(events), self._new_notes(events)
        for step, group in figures:
            self._steps |= {_key(event): step for event in group}
            self._keep()
            values = {name: value for event in group for name, value in _figures(event)}
            self.tracker.scalars(values, step, group[-1]["time"])
            _check(due)
        for step, group in notes:
            self._noted_s = max(self._noted_s, *(event["time"] for event in group))
            self._keep()
            self.tracker.note("\n".join(map(_note, group)), step, group[-1]["time"])
            _check(due)

    def _new_figures(self, events: list[Event]) -> list[tuple[int, list[Event]]]:
        """By step, the first one first."""
        found: dict[int, list[Event]] = defaultdict(list)
        last = dict(self._steps)
        for event in events:
            step, key = event.get("round", 0), _key(event)
            if event["event"] in _FIGURES and step > last.get(key, -1):
                last[key] = step
                found[step].append(event)
        return sorted(found.items())

    def _new_notes(self, events: list[Event]) -> list[tuple[int, list[Event]]]:
        """Oldest first, those of one step that follow each other together."""
        new = [e for e in events if e["event"] in _NOTES and e["time"] > self._noted_s]
        return [(step, list(each)) for step, each in groupby(new, lambda e: e.get("round", 0))]

    def _keep(self) -> None:
        self._file.parent.mkdir(exist_ok=True)
        told = {"steps": self._steps, "noted_s": self._noted_s}
        write_whole(self._file, json.dumps(told, sort_keys=True))


def _check(due: float) -> None:
    if monotonic() >= due:
        raise TimeoutError(
            f"what is new took longer than {_PATIENCE_S} s; resume the run to tell it the rest"
        )


def _key(event: Event) -> str:
    return f"{event['event']}/{event.get('silo', '')}"


def _figures(event: Event) -> Iterator[tuple[str, float]]:
    """What an event counts and measures: `loss/fr`; of the whole round: `round/seconds`."""
    for key, value in event.items():
        name = f"{key}/{event['silo']}" if "silo" in event else f"round/{key}"
        if isinstance(value, list):  # of silos: sampled, merged
            yield name, len(value)
        elif key not in _NO_FIGURE and type(value) in (int, float):  # a bool is no figure
            yield name, value


def _note(event: Event) -> str:
    """One line; silos and errors may have put anything into it."""
    words = [event["event"], event.get("silo", ""), event.get("reason", "")]
    line = " ".join(": ".join(word for word in words if word).split())
    return harmless(line)[:_LONGEST_NOTE]


def _as_code(text: str) -> str:
    """For a place that renders Markdown: shown as it is."""
    return textwrap.indent(text, "    ")
