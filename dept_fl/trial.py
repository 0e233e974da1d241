"""A step of training, tried out in a process of its own: how long it takes, how much memory."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from dept_fl.config import Recipe
from dept_fl.errors import DeptError
from dept_fl.silo import Silo
from dept_fl.silo_file import load_silo_file

_LESS_MEMORY = "set a lower micro_batch_size in the silo's file, or ask for a smaller model"


@dataclass(frozen=True)
class Trial:
    """What a step took.

    Attributes:
        step_s: seconds of one optimiser step.
        peak_bytes: the most memory that its processes had at once, all that is loaded included.
        gpu_peak_bytes: the same on a GPU; 0 without one.
        gpu_bytes: what the GPU has, the smallest of several.
    """

    step_s: float
    peak_bytes: int
    gpu_peak_bytes: int = 0
    gpu_bytes: int = 0


def try_step(file: Path, recipe: Recipe) -> Trial:
    """Train one step as the silo of this file would, on a model that is thrown away.

    Raises:
        DeptError: the step fails, or its process is killed for want of memory.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        try:
            found = pool.submit(_try_step, file, recipe).result()
        except BrokenProcessPool as error:
            raise DeptError(
                f"its process was killed, most likely for want of memory; {_LESS_MEMORY}"
            ) from error
    if isinstance(found, str):
        raise DeptError(found)
    return found


def _try_step(file: Path, recipe: Recipe) -> Trial | str:
    """The trial, or what went wrong: not every exception finds its way between processes."""
    silo_file = load_silo_file(file)
    try:
        training = Silo(silo_file.name, recipe, silo_file.home, "").try_step()
    except DeptError as error:
        return str(error)
    except (MemoryError, RuntimeError) as error:  # torch's own for want of memory is the latter
        return f"{next(iter(str(error).splitlines()), 'no memory')}; {_LESS_MEMORY}"
    workers = recipe.processes if recipe.processes > 1 else 0
    return Trial(
        training.step_s,
        peak_bytes() + workers * _peak_bytes_of_a_child(),
        training.gpu_peak_bytes,
        gpu_bytes=min(map(_gpu_bytes, range(recipe.processes))) if training.gpu_peak_bytes else 0,
    )


def _gpu_bytes(index: int) -> int:
    return torch.cuda.get_device_properties(index).total_memory


def _peak_bytes_of_a_child() -> int:
    """The same of the largest process that this one has started and seen the end of."""
    return _in_bytes(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def peak_bytes() -> int:
    """The most memory that this process had at once."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux counts into the figure below what the parent had at the fork
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) << 10
    return _in_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _in_bytes(maxrss: int) -> int:
    return maxrss if sys.platform == "darwin" else maxrss << 10
