"""NVFlare's FedAvg without training: the server's part of the job, and as a script a client's.

NVFlare's interpreter alone runs this, in a job that `benchmarks.nvflare_peer` writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import nvflare.client as flare
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.fedavg import FedAvg


class Timed(FedAvg):
    """FedAvg that draws its first model, and tells of each round once that is merged."""

    def __init__(self, shapes: str, out: str, **settings: object) -> None:
        super().__init__(**settings)
        self.shapes, self.out = Path(shapes), Path(out)

    def load_model(self) -> FLModel:
        draw = np.random.default_rng(1).standard_normal
        shapes = json.loads(self.shapes.read_text())
        return FLModel(params={name: draw(shape, np.float32) for name, shape in shapes.items()})

    def send_model(
        self,
        *,
        data: FLModel,
        targets: Sequence[str],
        callback: Callable[[FLModel], bool],
        **more: object,
    ) -> None:
        def counted(result: FLModel) -> bool:
            self.up += bytes_of(result.params)
            return callback(result)

        self.began = time.monotonic()
        self.up, self.down = 0, len(targets) * bytes_of(data.params)
        super().send_model(data=data, targets=targets, callback=counted, **more)

    def update_model(self, model: FLModel, aggr_result: FLModel) -> FLModel:
        merged = super().update_model(model, aggr_result)
        row = {"seconds": time.monotonic() - self.began, "up": self.up, "down": self.down}
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return merged


def bytes_of(arrays: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())


def client() -> None:
    """Send back what arrives plus a number for each array, until the job ends."""
    flare.init()
    while flare.is_running():
        arrived = flare.receive()
        if arrived is None:
            return
        change = np.random.default_rng().normal(0, 1e-4, len(arrived.params)).astype(np.float32)
        pairs = zip(arrived.params.items(), change, strict=True)
        flare.send(FLModel(params={name: array + by for (name, array), by in pairs}))


if __name__ == "__main__":
    client()
