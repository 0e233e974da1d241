"""The paper's downstream tasks, RACE, MNLI, STS-B and SST-2: their data, checked, as texts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
from pyarrow import compute

from dept_fl.errors import DeptError

Row = Mapping[str, Any]
_DATA_FILE = re.compile(r"(?P<split>\w+)(-[\w-]+)?\.(?P<kind>jsonl|json|parquet|csv)")
_BUILDERS = {"jsonl": "json", "json": "json", "parquet": "parquet", "csv": "csv"}


@dataclass(frozen=True)
class Item:
    """An example's texts: each candidate is scored as `text` with that candidate behind it.

    Attributes:
        candidates: one, but for tasks that choose among several; "" where there is no second text.
    """

    text: str
    candidates: list[str]


@dataclass(frozen=True)
class Task:
    """A data set's form, and how a row of it is read.

    Attributes:
        hub, config: name on the hub.
        texts: columns of text; `options` is the column of a list of them, if there is one.
        label: the label's column.
        labels: the values it may have, in the order of the classes; empty: a score from
            `lowest` to `highest`, which is predicted by regression and measured by Pearson's r.
        choices: candidates of a row; 1: the label is a class.
        first_gives_way: of a pair that is too long the first text is cut, not the longer one.
        validation: splits to evaluate on, by the name under which their figure is shown.
    """

    name: str
    hub: str
    config: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[Any, ...]
    read: Callable[[Row], Item]
    options: str = ""
    choices: int = 1
    lowest: float = 0.0
    highest: float = 0.0
    first_gives_way: bool = False
    validation: Mapping[str, str] = field(default_factory=lambda: {"validation": "validation"})

    @property
    def measure(self) -> str:
        return "accuracy" if self.labels else "Pearson"

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for one candidate."""
        return len(self.labels) if self.labels and self.choices == 1 else 1

    @property
    def columns(self) -> list[str]:
        return [*self.texts, *([self.options] if self.options else []), self.label]


def _race(row: Row) -> Item:
    """A gap in the question takes the option; behind a question without one it is the answer."""
    question, options = row["question"], row["options"]
    if "_" in question:
        before, after = re.split("_+", question, maxsplit=1)
        return Item(row["article"], [f"{before}{option}{after}" for option in options])
    return Item(row["article"], [f"{question} {option}" for option in options])


_GLUE = "nyu-mll/glue"
TASKS = {
    task.name: task
    for task in (
        Task(
            name="race",
            hub="ehovy/race",
            config="all",
            texts=("article", "question"),
            options="options",
            label="answer",
            labels=("A", "B", "C", "D"),
            choices=4,
            first_gives_way=True,
            read=_race,
        ),
        Task(
            name="mnli",
            hub=_GLUE,
            config="mnli",
            texts=("premise", "hypothesis"),
            label="label",
            labels=(0, 1, 2),
            read=lambda row: Item(row["premise"], [row["hypothesis"]]),
            validation={"matched": "validation_matched", "mismatched": "validation_mismatched"},
        ),
        Task(
            name="stsb",
            hub=_GLUE,
            config="stsb",
            texts=("sentence1", "sentence2"),
            label="label",
            labels=(),
            highest=5.0,
            read=lambda row: Item(row["sentence1"], [row["sentence2"]]),
        ),
        Task(
            name="sst2",
            hub=_GLUE,
            config="sst2",
            texts=("sentence",),
            label="label",
            labels=(0, 1),
            read=lambda row: Item(row["sentence"], [""]),
        ),
    )
}


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise DeptError(f"--task {name}: must be one of {', '.join(TASKS)}")
    return TASKS[name]


# ---- data --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskData:
    """A task's rows: `datasets.Dataset` of the task's columns."""

    train: Any
    validation: dict[str, Any]


def load_data(task: Task, data: str = "") -> TaskData:
    """The task's splits, every row checked.

    Args:
        data: a name on the hub, or a folder: a copy of what is on the hub, files named by split
            (train.jsonl, validation.parquet, ...), or what `datasets` saved. Empty: the hub's own.

    Raises:
        DeptError: naming the data, what is wrong with it and the mend.
    """
    where = data or task.hub
    try:
        splits = _read(task, data)
    except DeptError:
        raise
    except Exception as error:  # network, hub and reader errors of several libraries
        raise DeptError(
            f"{task.name}: {where} cannot be read: {_reason(error)}; give --data, a folder with "
            f"{', '.join(f'{split}.jsonl' for split in _splits(task))}, or a name on the hub"
        ) from error
    for split in _splits(task):
        if split not in splits:
            raise DeptError(
                f"{task.name}: {where} has no split {split!r}; splits: {', '.join(splits)}"
            )
        if problem := _problem(task, splits[split]):
            raise DeptError(f"{task.name}: {where}, split {split!r}: {problem}")
    found = {split: splits[split].select_columns(task.columns) for split in _splits(task)}
    validation = {name: found[split] for name, split in task.validation.items()}
    return TaskData(found["train"], validation)


def _reason(error: BaseException) -> str:
    while error.__cause__:  # the first one says what, those around it only where
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _splits(task: Task) -> list[str]:
    return ["train", *task.validation.values()]


def _read(task: Task, data: str) -> Mapping[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    if not data:
        return dict(datasets.load_dataset(task.hub, task.config))
    folder = Path(data).expanduser()
    if (folder / "dataset_dict.json").is_file():
        return dict(datasets.load_from_disk(str(folder)))
    if files := _files(task, folder):
        return {split: _from_files(those) for split, those in files.items()}
    config = task.config if task.config in datasets.get_dataset_config_names(data) else None
    return dict(datasets.load_dataset(str(folder) if folder.is_dir() else data, config))


def _from_files(files: list[Path]) -> Any:
    """A split; each is read by itself, so that another's columns do not matter to it."""
    import datasets

    (kind, *more) = sorted({_BUILDERS[file.suffix.lstrip(".")] for file in files})
    if more:
        raise DeptError(f"{files[0].parent}: {files[0].name} and others of another kind; keep one")
    return datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train")


def _files(task: Task, folder: Path) -> dict[str, list[Path]]:
    """Files of a folder by the split that their names begin with."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _DATA_FILE.fullmatch(file.name)
        if match and match["split"] in _splits(task):
            found.setdefault(match["split"], []).append(file)
    return found


def _problem(task: Task, split: Any) -> str:
    """What is wrong with a split, with the mend; empty if nothing is."""
    missing = [column for column in task.columns if column not in split.column_names]
    if missing:
        return (
            f"no column {', '.join(map(repr, missing))}; columns: {', '.join(split.column_names)}; "
            f"{task.name} takes {', '.join(task.columns)}"
        )
    table = split.select_columns(task.columns).with_format("arrow")[:]
    if not table.num_rows:
        return "has no rows"
    for column in task.columns:
        if table[column].null_count:
            return f"column {column!r}: {table[column].null_count:,} null; drop those rows"
    for column in task.texts:
        if not _is_text(table[column].type):
            return f"column {column!r} holds {table[column].type}, not text"
    return _options_problem(task, table) or _label_problem(task, table[task.label])


def _options_problem(task: Task, table: Any) -> str:
    if not task.options:
        return ""
    options = table[task.options]
    is_list = pyarrow.types.is_list(options.type) or pyarrow.types.is_large_list(options.type)
    if not is_list or not _is_text(options.type.value_type):
        return f"column {task.options!r} holds {options.type}, not lists of text"
    lengths = compute.unique(compute.list_value_length(options)).to_pylist()
    if lengths != [task.choices]:
        return f"column {task.options!r}: lists of {sorted(lengths)} texts, not of {task.choices}"
    return ""


def _is_text(kind: Any) -> bool:
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _label_problem(task: Task, labels: Any) -> str:
    values = compute.unique(labels).to_pylist()
    if task.labels:
        wrong = [value for value in values if value not in task.labels or isinstance(value, bool)]
        allowed = ", ".join(map(repr, task.labels))
    else:
        wrong = [value for value in values if not _is_score(value, task)]
        allowed = f"{task.lowest:g} to {task.highest:g}"
    if not wrong:
        return ""
    hint = "; -1 marks rows without a label, drop them" if -1 in wrong else ""
    return f"column {task.label!r}: {wrong[0]!r} is no label of {task.name} ({allowed}){hint}"


def _is_score(value: Any, task: Task) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and task.lowest <= value <= task.highest
