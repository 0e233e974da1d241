"""What silos hold of the server's parameters, where only its changes are sent to them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dept_fl.checkpoint import Tensors, under_prefix, with_prefix
from dept_fl.codec import Encoded, encode


class Downlink:
    """A copy of the parameters that follows them in encoded changes, as the silos' copies do.

    What a change's codec loses is in the next change, which is taken from this copy. All silos
    train from it, those that get it whole too.

    Attributes:
        published: the copy, fp32.
        change: what it was last changed by; None where there is none to send.
    """

    def __init__(self, codec: str, parameters: Tensors) -> None:
        self._codec = codec
        self.published = {name: tensor.clone() for name, tensor in parameters.items()}
        self.change: Encoded | None = None

    def follow(self, parameters: Tensors, names: Iterable[str]) -> None:
        """Come as near to the parameters of these names as one change does."""
        change = {}
        for name in names:
            own = self.published[name]
            ahead = parameters[name] - own
            arrived = torch.empty(own.shape)
            change[name] = encode(self._codec, ahead, arrived)
            own += arrived
        shapes = {name: tuple(self.published[name].shape) for name in change}
        self.change = Encoded(self._codec, change, shapes)

    def state(self) -> Tensors:
        """For a checkpoint. The change is not kept: behind a restart all silos get the whole."""
        return with_prefix("published", self.published)

    def load(self, tensors: Tensors) -> None:
        for name, tensor in under_prefix("published", tensors).items():
            self.published[name].copy_(tensor)
        self.change = None
