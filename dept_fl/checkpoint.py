"""State on disk: folders written whole or not at all, safetensors and JSON, never pickle."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import xxhash
from safetensors import SafetensorError

from dept_fl.errors import DamagedState, DeptError

if TYPE_CHECKING:
    import torch  # takes seconds, which commands that only look at folders need not wait

Tensors = dict[str, "torch.Tensor"]

_FORMAT = 3
# Of the tensors' file by format. It finds damage, and no enemy: a disk that somebody else writes to
# is lost anyhow. XXH3 takes a tenth of the time of SHA-256.
_CHECKSUMS: dict[int, tuple[str, Any]] = {
    2: ("sha256", hashlib.sha256),
    _FORMAT: ("xxh3_128", xxhash.xxh3_128),
}
_TENSORS, _META = "tensors.safetensors", "state.json"
_ROUND = re.compile(r"round-([0-9]{5,})")
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.(draft|old)")
_STALE_S = 86_400.0


@contextmanager
def whole_folder(target: Path, overwrite: bool = False, durable: bool = True) -> Iterator[Path]:
    """A new folder to fill that appears at `target` in one step when the block ends well.

    Where another process was first, its folder stands and this one is dropped, unless
    `overwrite` is set. A block that fails, or a process that is killed, leaves no `target`.

    Args:
        durable: wait until the disk has it, so that it outlives the machine's power as well.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    draft = _hidden(target, "draft")
    draft.mkdir()
    try:
        yield draft
        if durable:
            _contents_to_disk(draft)
        _move(draft, target, overwrite)
        if durable:
            _to_disk(target.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def make_durable(folder: Path) -> None:
    """Wait until the disk has a folder that was written without waiting."""
    _contents_to_disk(folder)
    _to_disk(folder.parent)


def _contents_to_disk(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _to_disk(path)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent` for as long as the block lasts.

    What a killed process leaves of it is removed with the other leftovers.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    folder = _hidden(parent / "scratch", "draft")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hidden(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{uuid4().hex[:8]}.{kind}")


def _move(draft: Path, target: Path, overwrite: bool) -> None:
    aside: list[Path] = []
    while not _takes_place(draft, target) and overwrite:
        # A crash behind this line loses only `target`, whose writer runs again.
        aside.append(_set_aside(target))
    for old in aside:
        shutil.rmtree(old, ignore_errors=True)


def _takes_place(draft: Path, target: Path) -> bool:
    """Rename, unless a folder with something in it stands there."""
    try:
        draft.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _set_aside(folder: Path) -> Path:
    old = _hidden(folder, "old")
    with suppress(FileNotFoundError):  # another process was first
        folder.rename(old)
    return old


def remove_whole(folder: Path) -> None:
    """Remove a folder so that, whenever this is cut short, no half of it stands under its name."""
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what killed processes left; a live writer's draft is never a day without a write."""
    for path in parent.glob(".*"):
        if _LEFTOVER.fullmatch(path.name) and _is_stale(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_stale(path: Path) -> bool:
    try:
        newest = max(each.stat().st_mtime for each in (path, *path.rglob("*")))
    except OSError:  # its writer is just moving or removing it
        return False
    return time.time() - newest > _STALE_S


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes with the process, however it ends.

    Raises:
        DeptError: another process holds it.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DeptError(
                f"{folder}: another run writes here; wait for its end, stop it, or name another "
                "run-dir"
            ) from error
        yield


def write_whole(file: Path, text: str) -> None:
    """Replace a small file in one step."""
    _sweep(file.parent)
    draft = _hidden(file, "draft")
    try:
        draft.write_text(text, encoding="utf-8")
        _to_disk(draft)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    _to_disk(file.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_state(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    durable: bool = True,
) -> None:
    """Write tensors and JSON-able facts to `folder`, atomically, with a checksum.

    Args:
        durable: as in `whole_folder`.
    """
    from safetensors.torch import save_file

    with whole_folder(folder, overwrite=True, durable=durable) as draft:
        save_file(_apart(tensors), draft / _TENSORS)
        facts = {**meta, "format": _FORMAT, **_checksum(draft / _TENSORS, _FORMAT)}
        whole = {**facts, "meta_sha256": _digest(facts)}
        (draft / _META).write_text(json.dumps(whole, indent=1, sort_keys=True), encoding="utf-8")


def _apart(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Each in memory of its own, as safetensors wants it."""
    plain: Tensors = {}
    places = set()
    for name, tensor in tensors.items():
        each = tensor.detach().cpu().contiguous()
        plain[name] = each.clone() if each.data_ptr() in places else each
        places.add(each.data_ptr())
    return plain


def load_state(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read what `save_state` wrote.

    Raises:
        DamagedState: the folder is missing or damaged. DeptError: it is of another format.
    """
    try:
        meta = load_meta(folder)
        found = _checksum(folder / _TENSORS, meta["format"])
        if not found.items() <= meta.items():
            raise DamagedState(f"{folder}: {_TENSORS} is damaged (its checksum differs)")
        return mapped(folder), meta
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _unreadable(folder, error) from error


def mapped(folder: Path) -> Tensors:
    """The tensors that `save_state` wrote, from the file, without a look for damage."""
    from safetensors.torch import load_file

    return load_file(folder / _TENSORS)


def load_meta(folder: Path) -> dict[str, Any]:
    """The facts that `save_state` wrote, without the tensors."""
    meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    if not isinstance(meta, dict):
        raise ValueError(f"{_META} holds no mapping")
    checksum, format_ = meta.pop("meta_sha256", ""), meta.get("format")
    known_format = isinstance(format_, int) and format_ in _CHECKSUMS
    if checksum != _digest(meta) and (checksum or known_format):  # format 1 had none
        raise DamagedState(f"{folder}: {_META} is damaged (its checksum differs)")
    if not known_format:
        known = " and ".join(map(str, _CHECKSUMS))
        raise DeptError(f"{folder}: state of format {format_!r}, this version reads {known}")
    return meta


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """XXH3 of the tensors' names and bytes, 128 bits: tells damage, not an enemy."""
    whole = xxhash.xxh3_128()
    for name in sorted(tensors):
        whole.update(name.encode())
        whole.update(tensors[name].contiguous().numpy().data)
    return whole.hexdigest()


def _checksum(file: Path, format_: int) -> dict[str, str]:
    name, kind = _CHECKSUMS[format_]
    with file.open("rb") as stream:
        return {name: hashlib.file_digest(stream, kind).hexdigest()}


def checksum_of(folder: Path) -> str:
    """Of the tensors that `save_state` wrote, as it stands beside them.

    Raises:
        DamagedState: the folder is missing or damaged. DeptError: it is of another format.
    """
    try:
        meta = load_meta(folder)
        return str(meta[_CHECKSUMS[meta["format"]][0]])
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> DamagedState:
    return DamagedState(f"{folder}: not readable as saved state: {error}")


def round_folder(parent: Path, round_: int) -> Path:
    return parent / f"round-{round_:05d}"


def rounds_on_disk(parent: Path) -> list[int]:
    """The rounds whose state is whole in `parent`, oldest first."""
    named = (_ROUND.fullmatch(path.name) for path in parent.glob("round-*"))
    return sorted(int(match[1]) for match in named if match)


def drop_rounds_before(parent: Path, oldest: int) -> None:
    for round_ in rounds_on_disk(parent):
        if round_ < oldest:
            remove_whole(round_folder(parent, round_))


def with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    head = f"{prefix}/"
    return {n.removeprefix(head): t for n, t in tensors.items() if n.startswith(head)}
