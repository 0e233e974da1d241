"""State on disk: folders written whole or not at all, safetensors and JSON, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dept_fl.errors import DeptError

Tensors = dict[str, torch.Tensor]

_FORMAT = 1
_TENSORS, _META = "tensors.safetensors", "state.json"


@contextmanager
def whole_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to fill that appears at `target` in one step when the block ends well.

    Where another process was first, its folder stands and this one is dropped, unless
    `overwrite` is set. A block that fails, or a process that is killed, leaves no `target`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}.{uuid4().hex[:8]}.draft"
    draft.mkdir()
    try:
        yield draft
        for file in draft.iterdir():
            _to_disk(file)
        _move(draft, target, overwrite)
        _to_disk(target.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _move(draft: Path, target: Path, overwrite: bool) -> None:
    if overwrite and target.exists():
        # Two renames: a crash between them loses only `target`, whose writer runs again.
        old = target.parent / f".{target.name}.{uuid4().hex[:8]}.old"
        target.rename(old)
        draft.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        return
    try:
        draft.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def write_whole(file: Path, text: str) -> None:
    """Replace a small file in one step."""
    draft = file.with_name(f".{file.name}.{uuid4().hex[:8]}.draft")
    draft.write_text(text, encoding="utf-8")
    _to_disk(draft)
    draft.replace(file)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_state(folder: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able facts to `folder`, atomically, with a checksum."""
    with whole_folder(folder, overwrite=True) as draft:
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(plain, draft / _TENSORS)
        facts = {**meta, "format": _FORMAT, "sha256": _sha256(draft / _TENSORS)}
        (draft / _META).write_text(json.dumps(facts, indent=1, sort_keys=True), encoding="utf-8")


def load_state(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read what `save_state` wrote.

    Raises:
        DeptError: the folder is missing, damaged, or of another format.
    """
    try:
        meta = load_meta(folder)
        if meta.get("format") != _FORMAT:
            raise DeptError(
                f"{folder}: state of format {meta.get('format')!r}, this version reads {_FORMAT}"
            )
        if _sha256(folder / _TENSORS) != meta["sha256"]:
            raise DeptError(f"{folder}: {_TENSORS} is damaged (its checksum differs)")
        return load_file(folder / _TENSORS), meta
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DeptError(f"{folder}: not readable as saved state: {error}") from error


def load_meta(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / _META).read_text(encoding="utf-8"))
    return meta


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def round_folder(parent: Path, round_: int) -> Path:
    return parent / f"round-{round_:05d}"


def rounds_on_disk(parent: Path) -> list[int]:
    """The rounds whose state is whole in `parent`, oldest first."""
    return sorted(int(p.name[6:]) for p in parent.glob("round-*") if p.name[6:].isdigit())


def drop_rounds_before(parent: Path, oldest: int) -> None:
    for round_ in rounds_on_disk(parent):
        if round_ < oldest:
            shutil.rmtree(round_folder(parent, round_), ignore_errors=True)


def with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    head = f"{prefix}/"
    return {n.removeprefix(head): t for n, t in tensors.items() if n.startswith(head)}
