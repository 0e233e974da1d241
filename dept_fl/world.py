"""One process that trains, or several that share every step: torch's DDP and FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dept_fl.checkpoint import Tensors


class World:
    """A process that trains by itself; its subclasses are the others' part of a step.

    Attributes:
        rank, size: which of how many processes this is; each takes as many of a step's sequences.
    """

    rank, size = 0, 1

    def share(self, objective: nn.Module) -> nn.Module:
        """The module whose backward pass leaves the whole step's gradients in each process."""
        return objective

    def a_pass(self, objective: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around one of the passes whose gradients add up to a step's."""
        return nullcontext()

    def split(self, state: Tensors, parameters: Mapping[str, nn.Parameter]) -> Tensors:
        """An optimiser's state, as this process keeps it; `gather` is the inverse."""
        return state

    def gather(self, tensors: Tensors) -> Tensors:
        """Whole tensors in the process of rank 0, none in the others."""
        return tensors

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """One tensor, in every process."""
        return tensor

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the processes, in every process."""
        return values


class Replicas(World):
    """DDP: each process of the group has the whole model, on its device."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device

    def share(self, objective: nn.Module) -> nn.Module:
        ids = [self._device.index] if self._device.type == "cuda" else None
        return DistributedDataParallel(
            objective.to(self._device),
            device_ids=ids,
            broadcast_buffers=False,  # a language model's never change
            gradient_as_bucket_view=True,
        )

    def a_pass(self, objective: nn.Module, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else cast(DistributedDataParallel, objective).no_sync()

    def gather(self, tensors: Tensors) -> Tensors:
        return {n: t.detach().cpu() for n, t in tensors.items()} if self.rank == 0 else {}

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size


class Shards(Replicas):
    """FSDP2: each process keeps a part of every parameter, of its gradient and its moments.

    A block's parameters are whole while it computes; those outside the blocks (embeddings, head)
    through the whole pass.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._mesh = init_device_mesh(device.type, (self.size,))

    def share(self, objective: nn.Module) -> nn.Module:
        for block in _blocks(objective):
            fully_shard(block, mesh=self._mesh)
        return cast(nn.Module, fully_shard(objective, mesh=self._mesh))

    def a_pass(self, objective: nn.Module, last: bool) -> AbstractContextManager[None]:
        return nullcontext()  # gradients of all passes are kept in parts

    def split(self, state: Tensors, parameters: Mapping[str, nn.Parameter]) -> Tensors:
        return {
            key: self._as(value, parameters[key.split("/", 1)[1]]) for key, value in state.items()
        }

    def _as(self, value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        if value.shape != parameter.shape:  # a count of steps
            return value
        placements = cast(DTensor, parameter).placements
        # Every process has read the whole tensor: nothing is sent.
        return distribute_tensor(value.to(self._device), self._mesh, placements, src_data_rank=None)

    def gather(self, tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():  # one by one, so that no GPU ever has them all
            whole = self.whole(tensor.detach())
            if self.rank == 0:
                found[name] = whole.cpu()
        return found

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


WORLDS = {"ddp": Replicas, "fsdp": Shards}


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What lies in lists of modules, but not in lists within them."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
