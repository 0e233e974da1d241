"""Cross-entropy of the next token, without all logits at once.

A model whose logits are just what its output layer returns computes them a slice of the tokens at a
time. This is found by trying, not by a model's name; any other model makes its logits whole.

torch.nn.functional.linear_cross_entropy (new in PyTorch 2.13) does the same for fp32, but adds up
its loss in bf16 where it is given bf16: 10 for 9.967 nats (docs/cost.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

_LOGITS_AT_ONCE = 1 << 26  # 256 MiB in fp32; fewer than some 200 tokens at once cost time
_heads: WeakKeyDictionary[nn.Module, nn.Linear | None] = WeakKeyDictionary()


def next_token_loss(
    model: nn.Module, sequences: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Cross-entropy in nats of tokens 1..L given those before. sequences: [B, L + 1] ids.

    reduction: "mean" or "sum". The loss has one backward pass.
    """
    inputs, targets = sequences[:, :-1], sequences[:, 1:].flatten()
    head = plain_head(model)
    if head is None:
        logits = model(input_ids=inputs).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction=reduction)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        graded = torch.is_grad_enabled()
        rows = hidden.flatten(0, 1)
        total: torch.Tensor = _Loss.apply(rows, head.weight, head.bias, targets, graded)  # type: ignore[no-untyped-call]
        total = total / len(targets) if reduction == "mean" else total
        return total.view(1, 1, 1)

    with _forward(head, loss):
        made: torch.Tensor = model(input_ids=inputs).logits
    return made.view(())


def tokens_at_once(vocabulary: int) -> int:
    """Tokens whose logits are there at the same time."""
    return max(1, _LOGITS_AT_ONCE // vocabulary)


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The model's output layer, if the model returns untouched what it returns."""
    if model not in _heads:
        _heads[model] = _find_head(model)
    return _heads[model]


@contextmanager
def without_logits(model: nn.Module) -> Iterator[None]:
    """Within the block the model saves itself its logits, if it can, and returns one zero."""
    head = plain_head(model)
    if head is None:
        yield
        return
    with _forward(head, lambda hidden: hidden.new_zeros(1, 1, 1)):
        yield


def _find_head(model: nn.Module) -> nn.Linear | None:
    inner = next((each for each in model.modules() if isinstance(each, PreTrainedModel)), None)
    head = None if inner is None else inner.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None
    put, taken = torch.zeros(1, 1, 1, device=head.weight.device), []

    def probe(hidden: torch.Tensor) -> torch.Tensor:
        taken.append(hidden.shape)
        return put

    ids = torch.zeros(1, 2, dtype=torch.long, device=put.device)
    training = model.training
    model.eval()  # dropout would draw random numbers
    try:
        with torch.no_grad(), _forward(head, probe):
            untouched = model(input_ids=ids).logits is put
    except Exception:  # of a model that wants logits of their shape; a real fault shows without us
        untouched = False
    finally:
        model.train(training)
    return head if untouched and taken == [(1, 2, head.in_features)] else None


@contextmanager
def _forward(head: nn.Linear, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Another forward pass for the head. It runs within the model's own, where whatever wraps the
    model (functional_call, DistributedDataParallel, fully_shard) has its parameters ready."""
    vars(head)["forward"] = forward
    try:
        yield
    finally:
        del vars(head)["forward"]


class _Loss(torch.autograd.Function):
    """Sum of the cross-entropies of hidden [N, d] @ weight.T [V, d] + bias [V], targets [N].

    The gradients are computed where the logits are, so these are computed once and never kept.
    Products are in autocast's precision; softmax, loss and the sum of gradients in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        graded: bool,
    ) -> torch.Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        wanted = [graded and needed for needed in ctx.needs_input_grad[:3]]
        slopes = [
            torch.zeros_like(each) if want and each is not None else None
            for want, each in zip(wanted, (hidden, weight, bias), strict=True)
        ]
        table, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        total = torch.zeros((), device=hidden.device)
        at_once = tokens_at_once(len(weight))
        with torch.autocast(kind, enabled=False):
            for first in range(0, len(hidden), at_once):
                part = slice(first, first + at_once)
                of_part = [None if slopes[0] is None else slopes[0][part], *slopes[1:]]
                total += _add_slice(hidden[part].to(dtype), table, shift, targets[part], of_part)
        ctx.slopes = slopes
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        slopes, ctx.slopes = ctx.slopes, None  # scaled in place, so they serve once
        scaled = (None if slope is None else slope.mul_(gradients[0]) for slope in slopes)
        return (*scaled, None, None)


def _add_slice(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    slopes: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """The loss of some tokens; its gradients by hidden, weight and bias are added to `slopes`."""
    chosen = targets.unsqueeze(1)
    logits = functional.linear(hidden, weight, bias).float()
    logits -= logits.amax(1, keepdim=True)
    right = logits.gather(1, chosen)
    total = logits.exp_().sum(1, keepdim=True)
    losses = total.log() - right
    by_hidden, by_weight, by_bias = slopes
    if by_hidden is not None or by_weight is not None or by_bias is not None:
        softmax = logits.div_(total)
        less_one = softmax.scatter_(1, chosen, torch.expm1(-losses)).to(weight.dtype)
        if by_hidden is not None:
            _add_product(by_hidden, less_one, weight)
        if by_weight is not None:
            _add_product(by_weight, less_one.T, hidden)
        if by_bias is not None:
            by_bias += less_one.sum(0)
    return losses.sum()


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == right.dtype:
        torch.addmm(total, left, right, out=total)  # no product beside it, as large as phi
    else:
        total += left @ right
