"""A silo with several GPUs: processes that train together, and end together."""

from __future__ import annotations

import json
import mmap
import os
import signal
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dept_fl.checkpoint import Tensors, scratch_folder, under_prefix, with_prefix, write_whole
from dept_fl.config import InnerConfig
from dept_fl.errors import DeptError
from dept_fl.jobs import begin_worker
from dept_fl.model import join, parameters, with_config
from dept_fl.train import Schedule, Sequences, Training, train
from dept_fl.world import WORLDS

_START, _END, _FACTS = "start.safetensors", "end.safetensors", "training.json"


@dataclass(frozen=True)
class Workers:
    """The processes that train a silo's model; where it is a single one, that is this one.

    Attributes:
        parallel: how they share a step, `ddp` or `fsdp`.
        scratch: a folder through which tensors go to them and come back. On disk there is room,
            while a container's shared memory is often 64 MB, and a file that is mapped is in
            memory once, however many read it.
    """

    processes: int
    parallel: str
    scratch: Path

    def train(
        self,
        model: PreTrainedModel,
        batches: Sequences,
        inner: InnerConfig,
        schedule: Schedule,
        position: int,
        moments: Tensors,
        embeddings: Collection[str] = (),
    ) -> Training:
        """As `train.train`, up to the order in which numbers are added.

        Raises:
            DeptError: the loss is not finite, or a process fails or is killed.
        """
        if self.processes == 1:
            return train(model, batches, inner, schedule, position, moments, embeddings)
        own = cast(nn.Module, model)
        device = next(own.parameters()).device
        own.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the workers need it
        with scratch_folder(self.scratch) as folder:
            tensors = {**with_prefix("model", parameters(own)), **with_prefix("moments", moments)}
            save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, folder / _START)
            task = _Task(
                config=model.config,
                frozen=[name for name, p in own.named_parameters() if not p.requires_grad],
                batches=batches,
                inner=inner,
                schedule=schedule,
                position=position,
                embeddings=embeddings,
                parallel=self.parallel,
                seed=torch.initial_seed(),
            )
            run_together(Group(self.processes, device.type, folder), _train, task, folder)
            found = load_file(folder / _END)
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        join(own, under_prefix("model", found), {})
        own.to(device)
        return Training(**{**facts, "optimizer": under_prefix("moments", found)})


@dataclass(frozen=True)
class _Task:
    """What the workers are told; the tensors are in files.

    Attributes:
        config: of the model, and which of its parameters do not learn.
        seed: of the first worker's dropout; those of the others follow it.
    """

    config: PretrainedConfig
    frozen: Collection[str]
    batches: Sequences
    inner: InnerConfig
    schedule: Schedule
    position: int
    embeddings: Collection[str]
    parallel: str
    seed: int


def _train(rank: int, device: torch.device, task: _Task, folder: Path) -> None:
    tensors = load_file(folder / _START)
    model = cast(nn.Module, with_config(task.config))
    for name, parameter in model.named_parameters():
        parameter.data = tensors[f"model/{name}"]
        parameter.requires_grad_(name not in task.frozen)
    world = WORLDS[task.parallel](device)
    torch.manual_seed(task.seed + rank)
    training = train(
        model,
        task.batches,
        task.inner,
        task.schedule,
        task.position,
        under_prefix("moments", tensors),
        task.embeddings,
        world,
    )
    trained = world.gather(parameters(model))
    if rank == 0:
        tensors = {**with_prefix("model", trained), **with_prefix("moments", training.optimizer)}
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / _END)
        facts = asdict(replace(training, optimizer={}))
        (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


# ---- processes ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Processes of this machine that can talk to each other, over loopback alone.

    Attributes:
        device: `cuda`, one GPU for each, or `cpu`.
        folder: where they meet and tell what went wrong.
    """

    processes: int
    device: str
    folder: Path


def run_together(group: Group, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(rank, device, *arguments)` in each process of a new group.

    No process outlives this call, nor this process, however either ends.

    Raises:
        DeptError: one of them fails or is killed.
    """
    spawn = get_context("spawn")  # neither CUDA nor PyTorch's threads survive a fork
    threads = max(1, torch.get_num_threads() // group.processes)
    members = [
        spawn.Process(target=_member, args=(rank, group, threads, work, arguments), daemon=True)
        for rank in range(group.processes)
    ]
    try:
        for member in members:
            member.start()
        _wait_for(members, group.folder)
    finally:
        for member in members:
            if member.pid is not None:
                member.kill()
                member.join()


def _wait_for(members: Sequence[BaseProcess], folder: Path) -> None:
    running = list(members)
    while running:
        wait([member.sentinel for member in running])
        if any(member.exitcode for member in members):
            raise DeptError(_trouble([member.exitcode for member in members], folder))
        running = [member for member in running if member.exitcode is None]


def _trouble(exit_codes: Sequence[int | None], folder: Path) -> str:
    """Why the first of the processes ended that did not end well."""
    for rank, code in enumerate(exit_codes):
        if code == -signal.SIGKILL:  # nobody else could tell
            return (
                f"{_name(rank, len(exit_codes))} was killed, most likely for want of memory; set a "
                "lower micro_batch_size"
            )
    # The others fail too once they miss one, so the first to tell knows why.
    told = sorted(folder.glob("error-*"), key=lambda file: file.stat().st_mtime_ns)
    if told:
        return told[0].read_text(encoding="utf-8")
    rank = next(rank for rank, code in enumerate(exit_codes) if code)
    return f"{_name(rank, len(exit_codes))} ended with exit status {exit_codes[rank]}; see its log"


def _name(rank: int, processes: int) -> str:
    return f"process {rank + 1} of the {processes} that train together"


def _member(
    rank: int, group: Group, threads: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started us
    begin_worker(threads)
    try:
        device = _meet(rank, group)
        work(rank, device, *arguments)
        dist.destroy_process_group()
    except BaseException as error:
        told = str(error)
        if not isinstance(error, DeptError):
            traceback.print_exc()
            reason = next(iter(told.splitlines()), "")
            told = f"{_name(rank, group.processes)}: {type(error).__name__}: {reason}"
        write_whole(group.folder / f"error-{rank}", told)
        os._exit(1)  # at once: an orderly end would wait for the others


def _meet(rank: int, group: Group) -> torch.device:
    """Enter the group; returns this process's device."""
    # A file is a meeting place without a port, and loopback a way that nobody else can listen on.
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = _loopback()
    os.environ["NCCL_IB_DISABLE"] = "1"
    store = dist.FileStore(str(group.folder / "store"), group.processes)  # type: ignore[attr-defined]
    device = torch.device("cuda", rank) if group.device == "cuda" else torch.device("cpu")
    if on_gpu := device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=group.processes,
        device_id=device if on_gpu else None,
    )
    return device


def _loopback() -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == "127.0.0.1" for each in addresses):
            return name
    raise DeptError("no network interface has the address 127.0.0.1; bring loopback up")


def _reopened(array: Any) -> tuple[Any, ...]:
    """A memory-mapped token stream goes to another process as its file's name."""
    if not isinstance(array.base, mmap.mmap):  # a part of one: numpy does not tell which
        plain: tuple[Any, ...] = np.array(array).__reduce__()  # type: ignore[assignment]
        return plain
    return np.memmap, (array.filename, array.dtype, "r", array.offset, array.shape)


ForkingPickler.register(np.memmap, _reopened)
