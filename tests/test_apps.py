"""The thin entry modules: where a run may write, and which silos a node hosts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from client_app.app import hosted_silos
from dept_fl.checkpoint import only_writer
from dept_fl.config import Recipe
from dept_fl.errors import DeptError
from dept_fl.run_dir import open_run_dir

Make = Callable[..., Recipe]


def context(**node: Any) -> Context:
    return Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config={})


def test_silos_are_dealt_to_nodes_by_partition(recipe: Make):
    hosts = [
        hosted_silos(recipe(), context(**{"partition-id": i, "num-partitions": 2})) for i in (0, 1)
    ]
    assert hosts == [["ant", "cat"], ["bee"]]


def test_a_node_without_a_silo_says_how_it_gets_one(recipe: Make):
    with pytest.raises(DeptError, match="has no silo: start its SuperNode with --node-config"):
        hosted_silos(recipe(), context())


def test_runs_started_in_the_same_second_get_folders_of_their_own(recipe: Make, tmp_path: Path):
    folders = {open_run_dir("", tmp_path, recipe(), resume=False) for _ in range(5)}
    assert len(folders) == 5
    assert all(folder.is_dir() and folder.parent == tmp_path / "runs" for folder in folders)


def test_a_relative_run_dir_is_refused(recipe: Make, tmp_path: Path):
    with pytest.raises(DeptError, match="run-dir='out': must be absolute"):
        open_run_dir("out", tmp_path, recipe(), resume=False)


def test_a_run_dir_that_cannot_be_is_refused(recipe: Make, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeptError, match="cannot be made"):
        open_run_dir(f"{tmp_path}/file/run", tmp_path, recipe(), resume=False)


def test_resuming_needs_a_run_to_resume(recipe: Make, tmp_path: Path):
    with pytest.raises(DeptError, match="give the run-dir"):
        open_run_dir("", tmp_path, recipe(), resume=True)
    with pytest.raises(DeptError, match="no checkpoint in"):
        open_run_dir(str(tmp_path / "typo"), tmp_path, recipe(), resume=True)


def test_a_run_dir_in_use_is_refused_and_free_again_when_its_holder_dies(tmp_path: Path):
    code = f"""
import sys, time
from pathlib import Path
from dept_fl.checkpoint import only_writer
with only_writer(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(DeptError, match="another run writes here"), only_writer(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with only_writer(tmp_path):
        pass
