"""The inner loop: N_local optimiser steps of one silo on its own text."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dept_fl.checkpoint import Tensors
from dept_fl.config import InnerConfig
from dept_fl.errors import DeptError
from dept_fl.loss import next_token_loss, plain_head
from dept_fl.outer import load_optimizer_state, optimizer_state
from dept_fl.world import World


@dataclass(frozen=True)
class Training:
    """What `train` did.

    Attributes:
        loss: mean training loss over the steps, nats per token; `last_loss`: of the last step.
        gradient_norm: mean over the steps, before clipping.
        seconds: of all steps; `step_s`: of the last one, which pays for no warming up.
        gpu_peak_bytes: the most memory that this process had at once on its GPU; 0 on the CPU.
        optimizer: the optimiser's state behind the last step.
    """

    loss: float
    last_loss: float
    gradient_norm: float
    tokens: int
    seconds: float
    step_s: float
    gpu_peak_bytes: int
    optimizer: Tensors


class Sequences(Protocol):
    """Training sequences by position, such as `data.Batches`."""

    def at(self, position: int, count: int) -> npt.NDArray[np.int64]: ...


@dataclass(frozen=True)
class Schedule:
    """Which optimiser steps these are.

    Attributes:
        first: steps done before, (t - 1) * N_local.
        total: T * N_local, over which warm-up and cosine run (paper, section 3).
        forget_every: embeddings have a warm-up and cosine of their own over so many steps, since
            they are drawn anew as often (active forgetting); 0: they follow the body's.
    """

    first: int
    total: int
    forget_every: int = 0

    def body_rate(self, inner: InnerConfig, step: int) -> float:
        return learning_rate(inner, step, self.total) * self._rewarmed(inner, step)

    def embedding_rate(self, inner: InnerConfig, step: int) -> float:
        highest = inner.learning_rate
        if inner.embedding_learning_rate is not None:
            highest = inner.embedding_learning_rate
        own = replace(inner, learning_rate=highest)
        if not self.forget_every:
            return learning_rate(own, step, self.total) * self._rewarmed(inner, step)
        own = replace(own, warmup_steps=min(inner.warmup_steps, self.forget_every // 10))
        return learning_rate(own, step % self.forget_every, self.forget_every)

    def _rewarmed(self, inner: InnerConfig, step: int) -> float:
        """The share of the rate that a round's first steps take."""
        if self.first == 0:
            return 1.0
        return min(1.0, (step - self.first + 1) / (inner.rewarm_steps + 1))


def train(
    model: nn.Module,
    batches: Sequences,
    inner: InnerConfig,
    schedule: Schedule,
    position: int,
    moments: Tensors,
    embeddings: Collection[str] = (),
    world: World | None = None,
) -> Training:
    """Train `model` in place for N_local steps.

    Args:
        position: sequences that were taken from the stream so far.
        moments: the optimiser's state of the silo's last round; empty to begin afresh.
        embeddings: names of the parameters that are no part of the body.
        world: the processes that share each step; None: this one is alone.

    Raises:
        DeptError: the loss is not finite.
    """
    world = world or World()
    model.train()
    objective = world.share(Objective(model))  # first: FSDP replaces the model's parameters
    device = next(model.parameters()).device
    precision = autocast(inner.precision, device)
    named = dict(model.named_parameters())
    optimizers = _optimizers(named, inner, embeddings)
    moments = world.split(moments, named)
    for optimizer in optimizers:
        load_optimizer_state(optimizer, named, _of_optimizer(optimizer, named, moments))
    own = inner.batch_size // world.size
    losses: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []
    began = last_began = time.perf_counter()
    for step in range(schedule.first, schedule.first + inner.local_steps):
        if losses and step == schedule.first + inner.local_steps - 1:
            losses[-1].item()  # a GPU works behind Python's back
            last_began = time.perf_counter()
        rates = {
            "body": schedule.body_rate(inner, step),
            "embeddings": schedule.embedding_rate(inner, step),
        }
        sequences = put(torch.from_numpy(batches.at(position + world.rank * own, own)), device)
        position += inner.batch_size
        passes = sequences.split(inner.sequences_per_pass)
        losses.append(_accumulate(objective, passes, precision, world))
        norm = nn.utils.clip_grad_norm_(model.parameters(), inner.clip_norm)
        norms.append(world.whole(norm))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rates[group["part"]]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    loss = world.mean(torch.stack(losses)).double().cpu()
    ended = time.perf_counter()
    if not bool(torch.isfinite(loss).all()):
        raise DeptError(
            f"the training loss became {float(loss[~torch.isfinite(loss)][0])} in steps "
            f"{schedule.first}..{step}; lower inner.learning_rate={inner.learning_rate}"
        )
    gradient_norm = float(torch.stack(norms).mean())
    if not math.isfinite(gradient_norm):
        raise DeptError(
            f"the norm of gradients became {gradient_norm} in steps {schedule.first}..{step}; "
            f"lower inner.learning_rate={inner.learning_rate}"
        )
    return Training(
        loss=float(loss.mean()),
        last_loss=float(loss[-1]),
        gradient_norm=gradient_norm,
        tokens=inner.local_steps * inner.batch_size * (sequences.shape[1] - 1),
        seconds=ended - began,
        step_s=ended - last_began,
        gpu_peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        optimizer=world.gather(
            {k: v for each in optimizers for k, v in optimizer_state(each, named).items()}
        ),
    )


def _accumulate(
    objective: nn.Module,
    passes: Sequence[torch.Tensor],
    precision: AbstractContextManager[None],
    world: World,
) -> torch.Tensor:
    """Gradients of the mean loss over all sequences, a few of them at a time."""
    total = torch.zeros((), device=passes[0].device)
    sequences = sum(map(len, passes))
    for part in passes:
        with world.a_pass(objective, last=part is passes[-1]):
            with precision:
                share = objective(part) * (len(part) / sequences)
            share.backward()
        total += share.detach()
    return total


class Objective(nn.Module):
    """A model's loss as a module: DDP and FSDP do their work around a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        plain_head(model)  # tries the model, which must be before it is shared

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        return next_token_loss(self.model, sequences)


def put(batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A batch on the device. A GPU fetches it by itself, behind the steps it has still to compute,
    so that this process goes on to read the next one."""
    if device.type == "cuda":
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


def learning_rate(inner: InnerConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then one cosine over all T * N_local steps (paper, section 3)."""
    if step < inner.warmup_steps:
        return inner.learning_rate * (step + 1) / inner.warmup_steps
    span = max(total_steps - inner.warmup_steps, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(step - inner.warmup_steps, span) / span))
    floor = inner.final_learning_rate_fraction
    return inner.learning_rate * (floor + (1.0 - floor) * cosine)


def _optimizers(
    named: Mapping[str, nn.Parameter], inner: InnerConfig, embeddings: Collection[str]
) -> list[torch.optim.Optimizer]:
    """AdamW for all; with optimizer=muon the body's matrices are Muon's, the rest AdamW's."""
    parts: dict[str, dict[str, nn.Parameter]] = {"body": {}, "embeddings": {}}
    for name, parameter in named.items():
        parts["embeddings" if name in embeddings else "body"][name] = parameter
    muon = inner.optimizer == "muon"
    groups = []
    for part, own in parts.items():
        own = {n: p for n, p in own.items() if not (muon and part == "body" and p.dim() == 2)}
        matrices = [p for p in own.values() if p.dim() >= 2]
        vectors = [p for p in own.values() if p.dim() < 2]  # norms and biases do not decay
        groups += [
            {"params": matrices, "weight_decay": inner.weight_decay, "part": part},
            {"params": vectors, "weight_decay": 0.0, "part": part},
        ]
    groups = [group for group in groups if group["params"]]
    betas = (inner.betas[0], inner.betas[1])
    made: list[torch.optim.Optimizer] = []
    if groups:
        made.append(torch.optim.AdamW(groups, lr=inner.learning_rate, betas=betas, fused=True))
    if muon:
        matrices = [p for p in parts["body"].values() if p.dim() == 2]
        made.append(
            torch.optim.Muon(
                [{"params": matrices, "weight_decay": inner.weight_decay, "part": "body"}],
                lr=inner.learning_rate,
                adjust_lr_fn="match_rms_adamw",  # so that AdamW's learning rates hold for it
            )
        )
    return made


def _of_optimizer(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], state: Tensors
) -> Tensors:
    """The part of a saved state that belongs to one optimiser."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {k: v for k, v in state.items() if id(named[k.split("/", 1)[1]]) in own}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """bf16 autocast where asked for, or by `auto` where a GPU computes it fast."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if precision == "bf16" or (precision == "auto" and fast):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def pick_device(name: str, processes: int = 1) -> torch.device:
    """The device of a `device` setting, the first of as many as there are processes.

    Raises:
        DeptError: a GPU is asked for where there is none, or more than there are.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DeptError("device=cuda: PyTorch sees no GPU here; set device=auto or device=cpu")
    if not available or name == "cpu":
        return torch.device("cpu")
    if (there := torch.cuda.device_count()) < processes:
        raise DeptError(
            f"processes={processes}: PyTorch sees {there} GPUs here, and each process needs one of "
            f"its own; set processes={there} or fewer"
        )
    return torch.device("cuda")
