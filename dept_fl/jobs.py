"""Trainings that do not need each other: run side by side, and gone on with where they stopped."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Protocol

import torch

from dept_fl.checkpoint import only_writer, write_whole
from dept_fl.errors import DeptError
from dept_fl.progress import Progress
from dept_fl.report import Event, Ledger, duration

_KEY = "key"
_LOOK_EVERY_S = 5.0  # at how far the jobs are


class Job(Protocol):
    """One training. It is sent to another process, so it holds settings, not tensors."""

    @property
    def name(self) -> str:
        """A folder's name, and what people see."""
        ...

    @property
    def key(self) -> str:
        """Changes whenever the result could."""
        ...

    @property
    def work(self) -> int:
        """Tokens it trains on, by which the time left is told."""
        ...

    def run(self, folder: Path, home: Path) -> Event:
        """Train, or go on with what is in `folder`; returns the result, which JSON can hold."""
        ...

    def line(self, result: Event) -> str:
        """The result in a few words."""
        ...

    def tidy(self, folder: Path, home: Path) -> None:
        """Drop what nobody needs once the result is kept."""
        ...


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    home: Path,
    parallel: int,
    say: Callable[[str], None],
    progress: Progress | None = None,
) -> tuple[list[Event], list[str]]:
    """Run what is not done yet.

    Args:
        out: has a folder of each job, with its result.json.
        parallel: jobs side by side; 0: one a core, or one where there is a GPU.
        progress: shows meanwhile how much is trained.

    Returns:
        the results of all that are done, in the order of the jobs, and a line for each failure.

    Raises:
        DeptError: another process writes there, or a folder is of a job with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    with only_writer(out):
        _check_folders(jobs, out)
        return _run_jobs(jobs, out, home, parallel, say, progress or Progress())


def _run_jobs(
    jobs: Sequence[Job],
    out: Path,
    home: Path,
    parallel: int,
    say: Callable[[str], None],
    progress: Progress,
) -> tuple[list[Event], list[str]]:
    found = {job.name: result_of(job, out) for job in jobs}
    left = [job for job in jobs if found[job.name] is None]
    cores = os.cpu_count() or 1
    # One thread a job: two that wait for each other at every operation lose more than they win.
    parallel = parallel or (1 if torch.cuda.is_available() else cores)
    say(f"{len(jobs)} jobs, {len(jobs) - len(left)} done already; {parallel} side by side")
    failures: list[str] = []
    began, done, whole = time.monotonic(), 0, sum(job.work for job in left)
    # Started afresh, not forked: threads of PyTorch do not survive a fork.
    threads = max(1, cores // parallel)
    with (
        ProcessPoolExecutor(parallel, get_context("spawn"), begin_worker, (threads,)) as pool,
        progress.stage("training"),
    ):
        try:
            with _deaf_to_ctrl_c():
                running: dict[Future[Event], Job] = {
                    pool.submit(run_job, job, out, home): job for job in left
                }
            before = sum(_trained(job, out) for job in left)
            while running:
                so_far = done + sum(_trained(job, out) for job in running.values())
                progress.at(max(0, so_far - before), whole - before, "tokens")
                ended, _ = wait(running, _LOOK_EVERY_S, FIRST_COMPLETED)
                for each in ended:
                    job = running.pop(each)
                    done += job.work
                    left_s = (whole - done) * (time.monotonic() - began) / done
                    more = f"; left: about {duration(left_s)}" if running else ""
                    try:
                        found[job.name] = result = each.result()
                    except DeptError as error:  # one that diverges must not cost the others
                        failures.append(f"{job.name}: {error}")
                        say(f"{failures[-1]}{more}")
                        continue
                    say(f"{job.line(result)}, {duration(result['wall_s'])}{more}")
        except BaseException:
            for worker in active_children():  # the pool would wait for hours of work
                worker.terminate()
            raise
    return [result for result in found.values() if result is not None], failures


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that are started in the block never hear Ctrl-C, and we hear it behind the block.

    A terminal sends it to all of them, and each would tell of it in its own way; we end them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _trained(job: Job, out: Path) -> int:
    """Tokens that a job has trained on, as its ledger tells."""
    events = Ledger(out / job.name).read()
    tokens = sum(int(e.get("tokens", 0)) for e in events if e["event"] == "silo_train")
    return min(tokens, job.work)


def _check_folders(jobs: Sequence[Job], out: Path) -> None:
    """Results of other settings are neither taken for these nor overwritten."""
    for job in jobs:
        file = out / job.name / _KEY
        if file.is_file() and file.read_text(encoding="utf-8") != job.key:
            raise DeptError(
                f"{file.parent}: made with other settings, another text or another model; name "
                "another --out, or remove this folder"
            )


def begin_worker(threads: int) -> None:
    """What a process does first that works for another: it ends when that one does."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would train on, and write where another one may."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_job(job: Job, out: Path, home: Path) -> Event:
    """Run one job and keep its result."""
    folder = out / job.name
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _KEY, job.key)
    began = time.perf_counter()
    facts = job.run(folder, home)
    wall_s = round(time.perf_counter() - began, 1)
    result = {"key": job.key, "threads": torch.get_num_threads(), "wall_s": wall_s, **facts}
    write_whole(folder / "result.json", json.dumps(result, indent=1, sort_keys=True) + "\n")
    job.tidy(folder, home)
    return result


def result_of(job: Job, out: Path) -> Event | None:
    """What an earlier call left of the same job; None if it is not whole, or another's."""
    try:
        found: Event = json.loads((out / job.name / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("key") == job.key else None


def about(command: str = "dept") -> Event:
    """When, on what and by which command results were made; its arguments are this process's."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "torch": torch.__version__,
        "command": " ".join([command, *sys.argv[1:]]),
    }
