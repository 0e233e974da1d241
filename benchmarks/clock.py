"""Seconds, bytes and memory of a round over a real deployment, beside Flower's FedAvg.

python -m benchmarks.clock [--parameters 100e6] [--silos 4] [--rounds 3]
                           [--wires fp32/fp32,bf16/bf16,int8/int8,int4/int8,int4/int4]
                           [--nvflare PYTHON]
                           [--json FILE] [--quick]

A SuperLink and SuperNodes on loopback, all on this machine. First FedAvg, with clients that send
back what arrives plus a number for each array: without and with the libraries that a client loads
which trains a language model, since each message has a process of its own. Then this project's app
with codecs up/down, with silos that train one step on one short sequence, so that the body's size
dominates. Rounds are timed where the server app runs, from one merged body to the next, with a
checkpoint of each; the first of a run is left out, since it sends the body whole. Training
(evaluation, too) is told apart. SuperNodes of this project's app start as `dept silo start` starts
them, each with its fork server.

--nvflare names the Python of an environment where NVFlare is installed, and adds a row of its own
FedAvg: a server and a process for each client on loopback, full weights in float32 both ways
(benchmarks/nvflare_peer.py tells the settings). Its clients keep one process for all rounds, where
Flower starts one for each message, and wait two seconds before they ask for the next task. Its
rounds end with the merged model; its bytes are those of the arrays' numbers; what stands as
SuperLink and ServerApp are its server, through which all passes, and the server's process of the
job.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from statistics import median

import psutil

from benchmarks import nvflare_peer
from benchmarks.processes import partners_own, server_peaks
from benchmarks.round_overhead import cores
from dept_fl.config import CODECS, load_recipe
from dept_fl.jobs import about
from dept_fl.model import layout
from dept_fl.report import Event, Ledger
from tests.conftest import write_text
from tests.deployment import CONNECTION, Federation

ROOT = Path(__file__).resolve().parents[1]
FEDAVG, LOADED = "FedAvg", "FedAvg, libraries loaded"
PLAIN = "fp32/fp32"  # codecs up and down
WIRES = f"{PLAIN},bf16/bf16,int8/int8,int4/int8,int4/int4"
Shapes = dict[str, tuple[int, ...]]
_STEP = ("evaluate_s", "train_s")
_AROUND = ("load_s", "settle_s", "encode_s", "save_s")

RECIPE = """
name: clock
seed: 1
vocab_size: 320
sequence_tokens: 16
rounds: {rounds}
min_silos: {silos}
round_timeout_s: 3600
validation_fraction: 0.2
sample_tokens: 1
evaluate_every: {rounds}
model:
  config:
    {{model_type: llama, hidden_size: {width}, intermediate_size: {inner},
     num_hidden_layers: {layers},
     num_attention_heads: 8, num_key_value_heads: 8, tie_word_embeddings: true}}
inner: {{local_steps: 1, batch_size: 1, learning_rate: 1.0e-4, warmup_steps: 1, state: reset}}
wire: {{up: {up}, down: {down}}}
"""

PYPROJECT = """
[project]
name = "clock-fedavg"
version = "1.0.0"
description = "FedAvg without training"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "dept-fl"

[tool.flwr.app.components]
serverapp = "fedavg:server"
clientapp = "fedavg:client"

[tool.flwr.app.config]
shapes = ""
silos = 0
rounds = 0
out = ""
loads = false
"""

APP = """
import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    if context.run_config["loads"]:
        from transformers import PreTrainedModel  # noqa: F401
    arrived = message.content["arrays"]
    change = np.random.default_rng().normal(0, 1e-4, len(arrived)).astype(np.float32)
    pairs = zip(arrived.items(), change, strict=True)
    arrays = ArrayRecord({name: Array(array.numpy() + by) for (name, array), by in pairs})
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    def configure_train(self, *given):
        self.began = time.monotonic()
        messages = list(super().configure_train(*given))
        self.down = sum(bytes_of(message) for message in messages)
        return messages

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        up = sum(bytes_of(reply) for reply in replies)
        found = super().aggregate_train(server_round, replies)
        row = {"seconds": time.monotonic() - self.began, "up": up, "down": self.down}
        with Path(self.out).open("a") as file:
            file.write(json.dumps(row) + "\\n")
        return found


def bytes_of(message):
    return sum(len(array.data) for array in message.content["arrays"].values())


@server.main()
def main(grid, context):
    config = context.run_config
    shapes = json.loads(Path(config["shapes"]).read_text())
    # Of different numbers each: Flower sends and keeps arrays of the same bytes once.
    draw = np.random.default_rng(1).standard_normal
    arrays = {name: Array(draw(shape, np.float32)) for name, shape in shapes.items()}
    silos = config["silos"]
    strategy = Timed(
        fraction_evaluate=0.0, min_train_nodes=silos, min_evaluate_nodes=0,
        min_available_nodes=silos,
    )
    strategy.out = config["out"]
    strategy.start(grid, ArrayRecord(arrays), num_rounds=config["rounds"])
"""


@dataclass(frozen=True)
class Size:
    """Of a deployment."""

    width: int
    layers: int
    silos: int
    rounds: int

    @classmethod
    def of(cls, parameters: float, silos: int, rounds: int) -> Size:
        width = 1024 if parameters > 3e7 else 512
        layer = 4 * width**2 + 3 * width * cls.inner_of(width)
        return cls(width, max(1, round(parameters / layer)), silos, rounds)

    @staticmethod
    def inner_of(width: int) -> int:
        return 11 * width // 4

    def recipe(self, wire: str) -> str:
        facts = {"width": self.width, "layers": self.layers, "inner": self.inner_of(self.width)}
        run = {"silos": self.silos, "rounds": self.rounds}
        up, _, down = wire.partition("/")
        return RECIPE.format(**facts, **run, up=up, down=down)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=100e6, help="of the body")
    parser.add_argument("--silos", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="2 or more; the first is left out")
    parser.add_argument("--wires", default=WIRES, help="codecs UP/DOWN, with commas between")
    parser.add_argument("--nvflare", type=Path, help="Python of an environment with NVFlare")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="6 M parameters, 2 silos, 4 bits")
    options = parser.parse_args()
    size = Size.of(options.parameters, options.silos, options.rounds)
    wires = options.wires.split(",")
    for wire in wires:
        if not set(wire.split("/")) <= set(CODECS) or wire.count("/") != 1:
            parser.error(f"--wires {wire}: expected UP/DOWN, each one of {', '.join(CODECS)}")
    if options.quick:
        size, wires = Size.of(6e6, silos=2, rounds=2), ["int4/int8"]
    runs: list[Callable[[], Event]] = [partial(measure, wire, size) for wire in (FEDAVG, LOADED)]
    if options.nvflare:
        name = f"NVFlare FedAvg {nvflare_peer.version(options.nvflare)}"
        runs.append(partial(measure_nvflare, name, options.nvflare, size))
    runs += [partial(measure, wire, size) for wire in wires]
    rows = []
    for run in runs:
        rows.append(run())
        told = f"{rows[-1]['wire']}: {rows[-1]['seconds']:.1f} s a round"
        print(told, file=sys.stderr, flush=True)
    print(table(rows))
    if options.json:
        facts = {"machine": about("python -m benchmarks.clock"), "rows": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


def measure(wire: str, size: Size) -> Event:
    """One run of FedAvg, or of this project with a codec, in a federation of its own."""
    with tempfile.TemporaryDirectory(prefix="dept-clock-") as name:
        folder = Path(name)
        recipe, shapes = write_recipe(folder, size, wire if is_ours(wire) else PLAIN)
        threads = str(max(1, cores() // size.silos))  # so that silos do not wait for each other's
        with Federation(folder, secure=False) as federation, ExitStack() as ended:
            link = federation.superlink()
            for i in range(size.silos):
                name, node = f"node-{i}", f'silo="{silo_file(folder, i)}"'
                variables = {"OMP_NUM_THREADS": threads}
                if is_ours(wire):
                    variables = partners_own(federation, name, ended, **variables)
                federation.supernode(name, node, **variables)
            federation.wait_until_online(size.silos)
            with server_peaks(psutil.Process(link.process.pid), "flwr-serverapp") as memory:
                if is_ours(wire):
                    rounds = ours(federation, recipe)
                else:
                    rounds = fedavg(federation, shapes, size, loads=wire == LOADED)
        return row(wire, size, shapes, rounds, memory)


def measure_nvflare(name: str, python: Path, size: Size) -> Event:
    """One run of NVFlare's FedAvg, with the same arrays."""
    with tempfile.TemporaryDirectory(prefix="dept-clock-") as made:
        folder = Path(made)
        _, shapes = write_recipe(folder, size, PLAIN)
        rounds, memory = nvflare_peer.fedavg(python, folder, shapes, size.silos, size.rounds)
        return row(name, size, shapes, [{**each, "step_s": 0.0} for each in rounds], memory)


def is_ours(wire: str) -> bool:
    """Whether a row is of this project with codecs, not of a peer."""
    return "/" in wire


def write_recipe(folder: Path, size: Size, wire: str) -> tuple[Path, Shapes]:
    """A recipe's file, and the shapes of its body."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(size.recipe(wire))
    loaded = load_recipe(recipe)
    return recipe, layout(loaded.model, loaded.sequence_tokens).body


def row(
    wire: str, size: Size, shapes: Shapes, rounds: list[Event], memory: dict[str, int]
) -> Event:
    """The medians of a run's rounds but the first, with what was measured of it all."""
    kept = [{**each, "rest_s": each["seconds"] - each["step_s"]} for each in rounds[1:]]
    return {
        "wire": wire,
        "silos": size.silos,
        "parameters": sum(map(prod, shapes.values())),
        **{key: median(each[key] for each in kept) for key in kept[0]},
        **{f"{name}_bytes": most for name, most in memory.items()},
        "rounds": rounds,
    }


def silo_file(folder: Path, number: int) -> Path:
    own = folder / f"silo-{number}"
    own.mkdir()
    write_text(own, "ant")
    file = own / "silo.yaml"
    file.write_text(
        f"name: silo-{number}\nfiles: ant.jsonl\nvocab_size: 320\nhome: home\ndevice: cpu\n"
        "validation_fraction: 0.2\n"
    )
    return file


def fedavg(federation: Federation, shapes: Shapes, size: Size, loads: bool) -> list[Event]:
    """Seconds and bytes by round."""
    app = federation.folder / "clock-fedavg"
    app.mkdir()
    (app / "pyproject.toml").write_text(PYPROJECT)
    (app / "fedavg.py").write_text(APP)
    out, given = app / "rounds.jsonl", federation.folder / "shapes.json"
    given.write_text(json.dumps(shapes))
    words = f'shapes="{given}" silos={size.silos} rounds={size.rounds} out="{out}" '
    words += f"loads={str(loads).lower()}"
    federation.flwr("run", str(app), CONNECTION, "--stream", "--run-config", words)
    return [{**json.loads(line), "step_s": 0.0} for line in out.read_text().splitlines()]


def ours(federation: Federation, recipe: Path) -> list[Event]:
    """Seconds and bytes by round with its checkpoint, from the run's ledger."""
    run_dir = federation.folder / "run"
    words = f'recipe="{recipe}" run-dir="{run_dir}" home="{federation.folder / "server-home"}"'
    done = federation.flwr("run", str(ROOT), CONNECTION, "--stream", "--run-config", words)
    events = Ledger(run_dir).read()
    if events[-1]["event"] != "end":
        raise SystemExit(f"the run failed:\n{done.stdout}")
    ends = [each["time"] for each in events if each["event"] in ("plan", "round")]
    return [
        round_of([each for each in events if each.get("round") == i], end - before)
        for i, (before, end) in enumerate(pairwise(ends), 1)
    ]


def round_of(events: list[Event], seconds: float) -> Event:
    """What the ledger tells of a round; seconds of silos are those of the slowest."""
    whole, saved = (one(events, kind) for kind in ("round", "checkpoint"))
    silos = [each for each in events if each["event"] == "silo_train"]
    return {
        "seconds": seconds,
        "up": sum(each["bytes_up_body"] for each in silos),
        "down": sum(each["bytes_down_body"] for each in silos),
        "step_s": max(sum(each.get(key, 0.0) for key in _STEP) for each in silos),
        "push_s": whole["push_s"],
        "silo_s": max(sum(each[key] for key in _AROUND) for each in silos),
        "fetch_s": sum(each["transfer_s"] for each in silos),
        "check_s": sum(each["merge_s"] for each in silos),
        "outer_s": whole["outer_s"],
        "save_s": saved["save_s"],
    }


def one(events: list[Event], kind: str) -> Event:
    return next(each for each in events if each["event"] == kind)


def table(rows: list[Event]) -> str:
    """Markdown: rounds beside those of FedAvg, and what a round of ours is made of."""
    plain = next(row["seconds"] for row in rows if row["wire"] == FEDAVG)
    body = 4 * rows[0]["parameters"]
    lines = [
        f"{body / 4e6:.1f} M parameters ({body / 1e9:.2f} GB), {rows[0]['silos']} silos",
        "",
        "| wire | s a round | of it training | the rest, of FedAvg's | MB up | MB down "
        "| SuperLink, GB | ServerApp, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        rest = r["rest_s"] / plain
        lines.append(
            f"| {r['wire']} | {r['seconds']:.1f} | {r['step_s']:.1f} | {rest:.2f} | "
            f"{r['up'] / 1e6:.1f} | {r['down'] / 1e6:.1f} | {r['superlink_bytes'] / 1e9:.2f} | "
            f"{r['serverapp_bytes'] / 1e9:.2f} |"
        )
    lines += ["", "| wire | push | silo, but for training | fetch | check | merge | checkpoint |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in rows:
        if is_ours(r["wire"]):
            parts = ("push_s", "silo_s", "fetch_s", "check_s", "outer_s", "save_s")
            lines.append(f"| {r['wire']} | " + " | ".join(f"{r[p]:.1f}" for p in parts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
