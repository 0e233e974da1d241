"""Local data of the hub's form is read in every way that people have it; bad rows are named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from dept_fl.errors import DeptError
from dept_fl.tasks import TASKS, Item, find_task, load_data

ROWS: dict[str, dict[str, Any]] = {
    "race": {
        "example_id": "high1.txt",
        "article": "It rained.",
        "answer": "B",
        "question": "What fell?",
        "options": ["snow", "rain", "hail", "leaves"],
    },
    "mnli": {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0, "idx": 4},
    "stsb": {"sentence1": "It rains.", "sentence2": "Rain falls.", "label": 4.6, "idx": 4},
    "sst2": {"sentence": "a fine film", "label": 1, "idx": 4},
}
Splits = dict[str, list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def splits_of(name: str) -> list[str]:
    return ["train", *TASKS[name].validation.values()]


def write(folder: Path, splits: Mapping[str, list[dict[str, Any]]]) -> str:
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(params=list(ROWS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_folder_of_files_named_by_split(name: str, tmp_path: Path):
    row = ROWS[name]
    counts = {split: i + 1 for i, split in enumerate(splits_of(name))}
    write(tmp_path, {split: [row] * count for split, count in counts.items()})
    (tmp_path / "test.jsonl").write_text(json.dumps({**row, TASKS[name].label: -1}) + "\n")
    found = load_data(TASKS[name], str(tmp_path))
    assert len(found.train) == 1
    assert {split: len(rows) for split, rows in found.validation.items()} == {
        shown: counts[split] for shown, split in TASKS[name].validation.items()
    }
    assert set(found.train.column_names) == set(TASKS[name].columns)


def test_what_datasets_saved(name: str, tmp_path: Path):
    saved = {split: datasets.Dataset.from_list([ROWS[name]] * 2) for split in splits_of(name)}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    assert len(load_data(TASKS[name], str(tmp_path / "saved")).train) == 2


def test_a_copy_of_what_is_on_the_hub(name: str, tmp_path: Path):
    """A README that tells the configurations, and a folder of Parquet for each, as GLUE and RACE
    are kept."""
    task = TASKS[name]
    lines = ["---", "configs:"]
    for config in (task.config, "other"):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits_of(name):
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
            file = tmp_path / config / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(exist_ok=True)
            count = 3 if config == task.config else 1
            datasets.Dataset.from_list([ROWS[name]] * count).to_parquet(file)
    (tmp_path / "README.md").write_text("\n".join([*lines, "---", "# a data set"]))
    assert len(load_data(task, str(tmp_path)).train) == 3


def test_what_a_row_is_read_as():
    race = ROWS["race"]
    assert TASKS["race"].read(race) == Item(
        "It rained.", [f"What fell? {option}" for option in race["options"]]
    )
    gap = {**race, "question": "The sky sent __ on _ us."}
    assert TASKS["race"].read(gap).candidates[1] == "The sky sent rain on _ us."
    assert TASKS["mnli"].read(ROWS["mnli"]) == Item("It rains.", ["It is wet."])
    assert TASKS["stsb"].read(ROWS["stsb"]) == Item("It rains.", ["Rain falls."])
    assert TASKS["sst2"].read(ROWS["sst2"]) == Item("a fine film", [""])


def test_how_many_numbers_the_head_gives():
    outputs = {name: (task.outputs, task.choices) for name, task in TASKS.items()}
    assert outputs == {"race": (1, 4), "mnli": (3, 1), "stsb": (1, 1), "sst2": (2, 1)}
    assert {name: task.measure for name, task in TASKS.items()} == {
        "race": "accuracy", "mnli": "accuracy", "stsb": "Pearson", "sst2": "accuracy",
    }  # fmt: skip


BAD_ROWS = [
    ("sst2", {"text": "x", "label": 1}, "no column 'sentence'; columns: text, label; sst2 takes"),
    ("sst2", {"sentence": 3, "label": 1}, "column 'sentence' holds int64, not text"),
    ("sst2", {"sentence": None, "label": 1}, "column 'sentence': 1 null; drop those rows"),
    ("sst2", {"sentence": "x", "label": -1}, r"'label': -1 is no label .*\(0, 1\); -1 marks rows"),
    ("sst2", {"sentence": "x", "label": "positive"}, "'positive' is no label of sst2"),
    ("mnli", {"premise": "x", "hypothesis": "y", "label": 3}, "3 is no label of mnli"),
    ("stsb", {"sentence1": "x", "sentence2": "y", "label": 5.5}, r"5.5 is no label .*\(0 to 5\)"),
    ("stsb", {"sentence1": "x", "sentence2": "y", "label": "5"}, "'5' is no label of stsb"),
    ("race", {**ROWS["race"], "answer": "E"}, r"'E' is no label of race \('A', 'B', 'C', 'D'\)"),
    ("race", {**ROWS["race"], "options": ["x"] * 3}, r"lists of \[3\] texts, not of 4"),
    ("race", {**ROWS["race"], "options": "x"}, "column 'options' holds string, not lists of text"),
    ("race", {**ROWS["race"], "options": [1, 2, 3, 4]}, "not lists of text"),
]


@pytest.mark.parametrize(("name", "row", "reason"), BAD_ROWS)
def test_a_bad_row_is_one_clear_error(tmp_path: Path, name: str, row: dict[str, Any], reason: str):
    last = splits_of(name)[-1]
    good = {key: ROWS[name][key] for key in TASKS[name].columns}
    data = write(tmp_path, {split: [good] for split in splits_of(name)} | {last: [row]})
    with pytest.raises(DeptError, match=f"^{name}: .*, split '{last}': .*{reason}"):
        load_data(TASKS[name], data)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "sst2: .* cannot be read: .*; give --data, a folder with train.jsonl, validation"),
        ({"train.jsonl": '{"sentence": "x", "label": 1}\n'}, "has no split 'validation'; splits: "),
        ({"train.jsonl": "not json"}, "sst2: .* cannot be read: "),
        (
            {"train.jsonl": '{"sentence": "x", "label": 1}\n', "train-2.csv": "sentence,label"},
            "train-2.csv and others of another kind; keep one",
        ),
    ],
)
def test_a_folder_that_is_none_of_these(tmp_path: Path, files: dict[str, str], reason: str):
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(DeptError, match=reason):
        load_data(TASKS["sst2"], str(tmp_path))


def test_a_task_that_is_not_one_of_the_four():
    with pytest.raises(DeptError, match="--task cola: must be one of race, mnli, stsb, sst2"):
        find_task("cola")
