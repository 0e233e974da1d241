"""The outer optimiser: torch's own, on the delta that the silos' deltas were merged into."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dept_fl.checkpoint import Tensors
from dept_fl.config import OuterConfig


class OuterOptimizer:
    """torch's optimiser, which climbs along the averaged delta as if it were a gradient.

    With `average` (SGD, 1.0, no momentum) parameters become parameters + mean delta, the
    paper's plain averaging.
    """

    def __init__(
        self, config: OuterConfig, parameters: Tensors, row_tensors: Collection[str]
    ) -> None:
        self._row_tensors = frozenset(row_tensors)
        self.parameters = {
            name: nn.Parameter(tensor.clone(), requires_grad=True)
            for name, tensor in parameters.items()
        }
        rows = [p for name, p in self.parameters.items() if name in self._row_tensors]
        others = [p for name, p in self.parameters.items() if name not in self._row_tensors]
        self._optimizer = _torch_optimizer(config, others, rows)

    def step(self, merged: Iterable[tuple[str, torch.Tensor]], unheld: torch.Tensor) -> None:
        """One step of the parameters named in `merged`, one at a time.

        Token rows in `unheld` keep their value and their moments.
        """
        for name, delta in merged:
            parameter, by_row = self.parameters[name], name in self._row_tensors
            before = {k: t[unheld] for k, t in self._by_row(parameter).items()} if by_row else {}
            parameter.grad = delta
            self._optimizer.step()
            parameter.grad = None
            if by_row:
                for kind, tensor in self._by_row(parameter).items():
                    tensor[unheld] = before.get(kind, 0.0)  # moments made just now start at 0

    def _by_row(self, parameter: nn.Parameter) -> Tensors:
        """A row tensor and its moments, by kind."""
        state = self._optimizer.state[parameter].items()
        moments = {k: t for k, t in state if torch.is_tensor(t) and t.shape == parameter.shape}
        return {"": parameter.data, **moments}

    def state(self) -> Tensors:
        """The optimiser's moments by `<kind>/<parameter>`, for a checkpoint."""
        return optimizer_state(self._optimizer, self.parameters)

    def load(self, state: Tensors) -> None:
        load_optimizer_state(self._optimizer, self.parameters, state)


def _torch_optimizer(
    config: OuterConfig, others: list[nn.Parameter], rows: list[nn.Parameter]
) -> torch.optim.Optimizer:
    rate = config.learning_rate
    if rate is None:
        rate = {"adam": 1e-3, "nesterov": 0.7}.get(config.optimizer, 1.0)
    groups: list[dict[str, Any]] = [{"params": others}]
    if rows:
        groups.append({"params": rows, "lr": _or(config.embedding_learning_rate, rate)})
    # Fused: in one pass and without temporaries, which would be as large as the tensor.
    how: dict[str, Any] = {"lr": rate, "maximize": True, "fused": True}
    if config.optimizer == "adam":
        betas = (config.betas[0], config.betas[1])
        return torch.optim.Adam(groups, betas=betas, eps=config.epsilon, **how)
    if config.optimizer == "nesterov":
        momentum = _or(config.momentum, 0.9)
        return torch.optim.SGD(groups, momentum=momentum, nesterov=True, **how)
    return torch.optim.SGD(groups, **how)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> Tensors:
    """A torch optimiser's per-parameter tensors by `<kind>/<parameter>`."""
    return {
        f"{kind}/{name}": value
        for name, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
        if torch.is_tensor(value)
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Tensors
) -> None:
    """Put back what `optimizer_state` took, all of it on the parameter's device.

    Step counts too: a fused optimiser reads them there.
    """
    for key, value in state.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        optimizer.state[parameter][kind] = value.to(parameter.device, copy=True)
