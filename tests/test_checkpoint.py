from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dept_fl
from dept_fl import checkpoint
from dept_fl.checkpoint import (
    Tensors,
    drop_rounds_before,
    load_state,
    remove_whole,
    round_folder,
    rounds_on_disk,
    save_state,
    under_prefix,
    whole_folder,
    with_prefix,
    write_whole,
)
from dept_fl.errors import DamagedState, DeptError

TWO_DAYS_AGO = time.time() - 2 * 86_400

TENSORS: dict[str, Tensors] = {
    "plain": {"a": torch.arange(6.0).reshape(2, 3), "b/c.weight": torch.ones(4)},
    "scalar": {"step": torch.tensor(7.0), "one": torch.tensor([7])},
    "bf16": {"a": torch.randn(5, generator=torch.Generator().manual_seed(1)).bfloat16()},
    "whole numbers": {"a": torch.tensor([2**40, -1]), "b": torch.tensor([True, False])},
    "not contiguous": {"a": torch.arange(6.0).reshape(2, 3).T},
    "with a gradient": {"a": torch.ones(2, requires_grad=True)},
    "odd values": {"a": torch.tensor([float("inf"), -0.0, float("nan"), 1e-45])},
    "no rows": {"a": torch.zeros(0, 3)},
    "none": {},
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tensor.shape, raw


# ---- state -------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", TENSORS.values(), ids=TENSORS.keys())
def test_a_state_comes_back_bit_for_bit(tmp_path: Path, tensors: Tensors) -> None:
    save_state(tmp_path / "state", tensors, {})
    loaded, _ = load_state(tmp_path / "state")
    assert {n: bits(t) for n, t in loaded.items()} == {n: bits(t) for n, t in tensors.items()}


def test_tensors_that_share_memory_come_back_each_on_its_own(tmp_path: Path) -> None:
    ones = np.ones(4, np.float32)
    shared = {"a": torch.from_numpy(ones), "b": torch.from_numpy(ones), "none": torch.zeros(0)}
    save_state(tmp_path / "state", shared, {})
    found, _ = load_state(tmp_path / "state")
    assert {name: t.tolist() for name, t in found.items()} == {
        "a": [1] * 4,
        "b": [1] * 4,
        "none": [],
    }


def test_facts_come_back_with_the_tensors(tmp_path: Path) -> None:
    facts = {"round": 3, "history": {"ant": [1, 3]}, "name": "наука", "loss": 0.1, "none": None}
    save_state(tmp_path / "state", {}, facts)
    _, meta = load_state(tmp_path / "state")
    assert {key: meta[key] for key in facts} == facts


def test_a_state_replaces_the_one_before(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"a": torch.zeros(1)}, {"round": 1})
    save_state(tmp_path / "state", {"b": torch.ones(1)}, {"round": 2})
    tensors, meta = load_state(tmp_path / "state")
    assert (list(tensors), meta["round"]) == (["b"], 2)
    assert names(tmp_path) == ["state"]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    save_state(folder, {"a": torch.arange(100.0)}, {"round": 3})
    return folder


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("at", [0, 9, 100, -1])
def test_a_flipped_bit_in_the_tensors_is_noticed(state: Path, at: int) -> None:
    flip(state / "tensors.safetensors", at)
    with pytest.raises(DeptError, match="damaged"):
        load_state(state)


@pytest.mark.parametrize("keep", [0, 7, 200])
def test_cut_off_tensors_are_noticed(state: Path, keep: int) -> None:
    file = state / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DeptError, match="damaged"):
        load_state(state)


GARBLED = [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe\x00", b"\x00" * 40]


@pytest.mark.parametrize("content", GARBLED)
def test_garbled_facts_are_noticed(state: Path, content: bytes) -> None:
    (state / "state.json").write_bytes(content)
    with pytest.raises(DeptError, match="state: not readable as saved state"):
        load_state(state)


@pytest.mark.parametrize("gone", ["state.json", "tensors.safetensors", "."])
def test_a_state_with_a_part_missing_is_refused(state: Path, gone: str) -> None:
    path = state / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DeptError, match="state: not readable as saved state"):
        load_state(state)


@pytest.mark.parametrize("format_", [1, 4, 0, "2", None])
def test_another_format_is_refused(state: Path, format_: object) -> None:
    rewrite(state, format=format_)
    told = f"state of format {format_!r}, this version reads 2 and 3"
    with pytest.raises(DeptError, match=told) as e:
        load_state(state)
    assert not isinstance(e.value, DamagedState)


def rewrite(state: Path, **changes: object) -> None:
    """Change facts as another version would have written them: with a checksum that fits."""
    facts = {**json.loads((state / "state.json").read_text()), **changes}
    del facts["meta_sha256"]
    whole = {**facts, "meta_sha256": checkpoint._digest(facts)}
    (state / "state.json").write_text(json.dumps(whole))


def test_the_format_before_which_had_no_checksum_of_its_facts_is_named(state: Path) -> None:
    (state / "state.json").write_text('{"format": 1, "round": 3}')
    with pytest.raises(DeptError, match="state of format 1, this version reads 2 and 3"):
        load_state(state)


def test_the_format_before_is_read_and_its_checksum_looked_at(state: Path) -> None:
    tensors, _ = load_state(state)
    content = (state / "tensors.safetensors").read_bytes()
    rewrite(state, format=2, xxh3_128="", sha256=hashlib.sha256(content).hexdigest())
    assert load_state(state)[0].keys() == tensors.keys()
    rewrite(state, sha256="0" * 64)
    with pytest.raises(DamagedState, match="its checksum differs"):
        load_state(state)


@pytest.mark.parametrize("gone", ["xxh3_128", "meta_sha256", "format"])
def test_a_checksum_that_is_missing_is_refused(state: Path, gone: str) -> None:
    facts = json.loads((state / "state.json").read_text())
    del facts[gone]
    (state / "state.json").write_text(json.dumps(facts))
    with pytest.raises(DamagedState):
        load_state(state)


@pytest.mark.parametrize(
    ("key", "value"), [("round", 4), ("position", 7), ("format", 2), ("xxh3_128", "0" * 32)]
)
def test_a_changed_fact_is_noticed(state: Path, key: str, value: object) -> None:
    facts = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps({**facts, key: value}))
    with pytest.raises(DamagedState, match=r"state.json is damaged \(its checksum differs\)"):
        load_state(state)


def test_any_flipped_bit_in_the_facts_is_noticed(state: Path) -> None:
    file = state / "state.json"
    whole = file.read_bytes()
    for at in range(len(whole)):
        for bit in (0, 2, 5):
            content = bytearray(whole)
            content[at] ^= 1 << bit
            file.write_bytes(content)
            try:
                _, meta = load_state(state)
            except DamagedState:
                continue
            # Only white space between the facts may change without a trace.
            assert json.loads(content) == json.loads(whole), (at, bit, meta)


def test_facts_that_are_not_json_leave_the_state_before(state: Path) -> None:
    with pytest.raises(TypeError):
        save_state(state, {}, {"bad": object()})
    assert load_state(state)[1]["round"] == 3
    assert names(state.parent) == ["state"]


# ---- whole folders -----------------------------------------------------------------------


def fill(target: Path, text: str, overwrite: bool = False) -> None:
    with whole_folder(target, overwrite) as draft:
        (draft / "text").write_text(text)


def test_a_whole_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with whole_folder(target) as draft:
        (draft / "text").write_text("whole")
        (draft / "sub").mkdir()
        (draft / "sub" / "deep").write_text("deep")
        assert not target.exists()
    assert (target / "text").read_text() == "whole"
    assert (target / "sub" / "deep").read_text() == "deep"
    assert names(target.parent) == ["b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failing_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), whole_folder(tmp_path / "target") as draft:
        (draft / "text").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_a_failing_block_leaves_what_was_there(tmp_path: Path) -> None:
    fill(tmp_path / "target", "first")
    with pytest.raises(ValueError), whole_folder(tmp_path / "target", overwrite=True):
        raise ValueError
    assert (tmp_path / "target" / "text").read_text() == "first"
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize(("overwrite", "stands"), [(False, "first"), (True, "second")])
def test_a_second_writer_replaces_only_if_told_to(
    tmp_path: Path, overwrite: bool, stands: str
) -> None:
    target = tmp_path / "target"
    with whole_folder(target, overwrite) as draft:
        fill(target, "first")
        (draft / "text").write_text("second")
    assert (target / "text").read_text() == stands
    assert names(tmp_path) == ["target"]


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("file")
    with pytest.raises(OSError):
        fill(tmp_path / "target", "folder")
    assert (tmp_path / "target").read_text() == "file"
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_many_writers_at_once_one_stands_whole(tmp_path: Path, overwrite: bool) -> None:
    errors: list[BaseException] = []

    def write(text: str) -> None:
        try:
            for _ in range(10):
                fill(tmp_path / "target", text, overwrite)
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(str(i),)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert errors == []
    assert (tmp_path / "target" / "text").read_text() in "0123"
    assert names(tmp_path) == ["target"]


KILLED = """
import os, sys
from pathlib import Path
from dept_fl.checkpoint import whole_folder
with whole_folder(Path(sys.argv[1]), overwrite=True) as draft:
    (draft / "text").write_text("half")
    os._exit(9)
"""


def kill_a_writer(target: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert done.returncode == 9


def test_a_killed_writer_leaves_no_target(tmp_path: Path) -> None:
    kill_a_writer(tmp_path / "target")
    assert not (tmp_path / "target").exists()
    (leftover,) = tmp_path.iterdir()
    assert (leftover / "text").read_text() == "half"
    fill(tmp_path / "target", "again")
    assert (tmp_path / "target" / "text").read_text() == "again"


def test_a_killed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    fill(tmp_path / "target", "first")
    kill_a_writer(tmp_path / "target")
    assert (tmp_path / "target" / "text").read_text() == "first"


# ---- leftovers ---------------------------------------------------------------------------


def leftover(folder: Path, name: str, file: str = "text") -> Path:
    """A draft of two days ago, as a killed process leaves it."""
    path = folder / name
    path.mkdir()
    (path / file).write_text("half")
    for each in (path / file, path):
        os.utime(each, (TWO_DAYS_AGO, TWO_DAYS_AGO))
    return path


@pytest.mark.parametrize(
    "name", [".target.0123abcd.draft", ".target.0123abcd.old", ".round-00001.0123abcd.draft"]
)
def test_old_leftovers_are_removed_by_the_next_writer(tmp_path: Path, name: str) -> None:
    leftover(tmp_path, name)
    fill(tmp_path / "target", "new")
    assert names(tmp_path) == ["target"]


def test_an_old_draft_of_a_file_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    draft = tmp_path / ".log.jsonl.0123abcd.draft"
    draft.write_text("half")
    os.utime(draft, (TWO_DAYS_AGO, TWO_DAYS_AGO))
    write_whole(tmp_path / "other", "text")
    assert names(tmp_path) == ["other"]


def test_a_draft_that_is_still_written_to_stays(tmp_path: Path) -> None:
    live = leftover(tmp_path, ".target.0123abcd.draft")
    os.utime(live / "text")
    fill(tmp_path / "target", "new")
    assert names(tmp_path) == [live.name, "target"]


@pytest.mark.parametrize("name", ["round-00001", ".config", ".my.draft", "target.0123abcd.draft"])
def test_what_is_no_leftover_stays(tmp_path: Path, name: str) -> None:
    leftover(tmp_path, name)
    fill(tmp_path / "target", "new")
    assert names(tmp_path) == sorted([name, "target"])


# ---- small files -------------------------------------------------------------------------


def test_a_small_file_is_replaced(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "one")
    write_whole(tmp_path / "file", "zwei ü")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "zwei ü"
    assert names(tmp_path) == ["file"]


def test_a_small_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "one")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file", "\ud800")
    assert (tmp_path / "file").read_text() == "one"
    assert names(tmp_path) == ["file"]


# ---- rounds ------------------------------------------------------------------------------


def test_rounds_are_listed_oldest_first(tmp_path: Path) -> None:
    for round_ in (10, 2, 100_000, 0):
        save_state(round_folder(tmp_path, round_), {}, {})
    assert rounds_on_disk(tmp_path) == [0, 2, 10, 100_000]


def test_drafts_and_strangers_are_no_rounds(tmp_path: Path) -> None:
    for name in (".round-00003.0123abcd.draft", ".round-00003.0123abcd.old", "round-x", "final"):
        (tmp_path / name).mkdir()
    for name in ("round-1", "round-00001.bak", "round-²²²²²", "round--0001", "xround-00001"):
        (tmp_path / name).mkdir()
    assert rounds_on_disk(tmp_path) == []


def test_a_killed_writer_adds_no_round(tmp_path: Path) -> None:
    save_state(round_folder(tmp_path, 1), {}, {})
    kill_a_writer(round_folder(tmp_path, 2))
    assert rounds_on_disk(tmp_path) == [1]


def test_there_are_no_rounds_where_there_is_no_folder(tmp_path: Path) -> None:
    assert rounds_on_disk(tmp_path / "none") == []
    drop_rounds_before(tmp_path / "none", 3)


def test_old_rounds_are_dropped(tmp_path: Path) -> None:
    for round_ in (1, 2, 3):
        save_state(round_folder(tmp_path, round_), {}, {})
    (tmp_path / "final").mkdir()
    drop_rounds_before(tmp_path, 3)
    assert names(tmp_path) == ["final", "round-00003"]


def test_removing_a_folder_twice_is_no_error(tmp_path: Path) -> None:
    fill(tmp_path / "target", "text")
    remove_whole(tmp_path / "target")
    remove_whole(tmp_path / "target")
    assert names(tmp_path) == []


# ---- names -------------------------------------------------------------------------------


def test_prefixes_keep_parts_apart() -> None:
    body, embeddings = {"a/b": torch.zeros(1)}, {"a/b": torch.ones(1), "c": torch.ones(2)}
    both = {**with_prefix("body", body), **with_prefix("embeddings", embeddings)}
    assert under_prefix("body", both) == body
    assert under_prefix("embeddings", both) == embeddings
    assert under_prefix("bod", both) == {}


# ---- no pickle ---------------------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save", "torch.package", "pandas.read_pickle"}


def unsafe(source: str) -> list[str]:
    """Imports of pickle, torch.load and numpy's allow_pickle in a piece of source."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            imported = []
        found += [n for n in imported if n.split(".")[0] in UNSAFE_MODULES or n in UNSAFE_CALLS]
        if isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_CALLS:
            found.append(ast.unparse(node))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += ["allow_pickle"] if ast.unparse(node.value) != "False" else []
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "x = torch.load(f)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_search_for_pickle_finds_it(source: str) -> None:
    assert unsafe(source)


@pytest.mark.parametrize("package", ["dept_fl", "server_app", "client_app"])
def test_nothing_reads_or_writes_pickle(package: str) -> None:
    root = Path(dept_fl.__file__).parents[1] / package
    files = sorted(root.rglob("*.py"))
    assert files
    assert {file.name: unsafe(file.read_text(encoding="utf-8")) for file in files} == {
        file.name: [] for file in files
    }
