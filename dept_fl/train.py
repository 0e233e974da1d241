"""The inner loop: N_local AdamW steps of one silo on its own text."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from dept_fl.checkpoint import Tensors
from dept_fl.config import InnerConfig
from dept_fl.data import Batches
from dept_fl.errors import DeptError
from dept_fl.outer import load_optimizer_state, optimizer_state


@dataclass(frozen=True)
class Training:
    """What `train` did.

    Attributes:
        loss: mean training loss over the steps, nats per token; `last_loss`: of the last step.
        gradient_norm: mean over the steps, before clipping.
        optimizer: the optimiser's state behind the last step.
    """

    loss: float
    last_loss: float
    gradient_norm: float
    tokens: int
    seconds: float
    optimizer: Tensors


def train(
    model: nn.Module,
    batches: Batches,
    inner: InnerConfig,
    first_step: int,
    total_steps: int,
    position: int,
    moments: Tensors,
) -> Training:
    """Train `model` in place for N_local steps.

    Args:
        first_step: (t-1) * N_local; the schedule runs over `total_steps` (paper, section 3).
        position: sequences that the silo has taken from its stream so far.
        moments: the optimiser's state of the silo's last round; empty to begin afresh.

    Raises:
        DeptError: the loss is not finite.
    """
    device = next(model.parameters()).device
    precision = autocast(inner.precision, device)
    optimizer = _adamw(model, inner)
    load_optimizer_state(optimizer, dict(model.named_parameters()), moments)
    losses, norms = [], []
    began = time.perf_counter()
    model.train()
    for step in range(first_step, first_step + inner.local_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(inner, step, total_steps)
        sequences = torch.from_numpy(batches.at(position, inner.batch_size)).to(device)
        position += inner.batch_size
        losses.append(_accumulate(model, sequences, inner.sequences_per_pass, precision))
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), inner.clip_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    loss = torch.stack(losses).double().cpu()
    if not bool(torch.isfinite(loss).all()):
        raise DeptError(
            f"the training loss became {float(loss[~torch.isfinite(loss)][0])} in steps "
            f"{first_step}..{step}; lower inner.learning_rate={inner.learning_rate}"
        )
    return Training(
        loss=float(loss.mean()),
        last_loss=float(loss[-1]),
        gradient_norm=float(torch.stack(norms).mean()),
        tokens=inner.local_steps * inner.batch_size * (sequences.shape[1] - 1),
        seconds=time.perf_counter() - began,
        optimizer=optimizer_state(optimizer, dict(model.named_parameters())),
    )


def _accumulate(
    model: nn.Module,
    sequences: torch.Tensor,
    per_pass: int,
    precision: AbstractContextManager[None],
) -> torch.Tensor:
    """Gradients of the mean loss over all sequences, a few of them at a time."""
    total = torch.zeros((), device=sequences.device)
    for part in sequences.split(per_pass):
        with precision:
            share = next_token_loss(model, part) * (len(part) / len(sequences))
        share.backward()
        total += share.detach()
    return total


def next_token_loss(
    model: nn.Module, sequences: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Cross-entropy in nats of tokens 1..L given those before. sequences: [B, L + 1] ids."""
    logits = model(input_ids=sequences[:, :-1]).logits
    targets = sequences[:, 1:].flatten()
    return functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction=reduction)


def learning_rate(inner: InnerConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then one cosine over all T * N_local steps (paper, section 3)."""
    if step < inner.warmup_steps:
        return inner.learning_rate * (step + 1) / inner.warmup_steps
    span = max(total_steps - inner.warmup_steps, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(step - inner.warmup_steps, span) / span))
    floor = inner.final_learning_rate_fraction
    return inner.learning_rate * (floor + (1.0 - floor) * cosine)


def _adamw(model: nn.Module, inner: InnerConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # norms and biases do not decay
    groups = [
        {"params": matrices, "weight_decay": inner.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (inner.betas[0], inner.betas[1])
    return torch.optim.AdamW(groups, lr=inner.learning_rate, betas=betas, fused=True)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """bf16 autocast where asked for, or by `auto` where a GPU computes it fast."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if precision == "bf16" or (precision == "auto" and fast):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def pick_device(name: str) -> torch.device:
    """The device of a `device` setting.

    Raises:
        DeptError: a GPU is asked for where there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DeptError("device=cuda: PyTorch sees no GPU here; set device=auto or device=cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
