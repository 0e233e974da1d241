"""The server's merge: peak memory over that of an idle server, and its pace, by number of silos.

python -m benchmarks.merge [--layers 8] [--silos 2,8,64] [--json FILE] [--quick]

Each number of silos has a process of its own. Synthetic silos send deltas of a Llama of width 512;
the server checks and spools each as it comes, then merges all and steps (`Server.add`,
`close_round`). Memory is what the process holds for itself (RssAnon): pages of the spool's files
are the kernel's, which takes them back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dept_fl.config import ModelConfig, Recipe, with_settings
from dept_fl.jobs import about
from dept_fl.report import Event
from dept_fl.rounds import Server, SharedTokenizer
from dept_fl.silo import Registration, Update

_WIDTH = 512
_TOKENS = 32_768
_LOOK_EVERY_S = 0.002
CASES = {
    "spec": "",
    "spec, nesterov": "outer.optimizer=nesterov",
    "trim, nesterov": "variant=trim outer.optimizer=nesterov",
    "spec, median": "outer.merge=median",
    "spec, down int8": "wire.down=int8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="3.2 M parameters each")
    parser.add_argument("--silos", default="2,8,64")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two layers, 2 and 8 silos")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.layers, options.silos = 2, "2,8"
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.layers)))
        return
    rows = []
    for case in CASES:
        for silos in options.silos.split(","):
            command = [sys.executable, "-m", "benchmarks.merge", "--layers", str(options.layers)]
            done = subprocess.run(
                [*command, "--one", case, silos], check=True, stdout=subprocess.PIPE, text=True
            )
            rows.append(json.loads(done.stdout))
            print(f"{case}, {silos} silos", file=sys.stderr, flush=True)
    print(table(rows))
    if options.json:
        facts = {"machine": about("python -m benchmarks.merge"), "rows": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


def measure(case: str, silos: int, layers: int) -> Event:
    """One round of so many silos, all with the same deltas."""
    torch.set_num_threads(1)
    server = Server(recipe_of(case, layers), "0" * 12, SharedTokenizer(_TOKENS, "f"))
    names = [f"silo-{i}" for i in range(silos)]
    for i, name in enumerate(names):
        server.register(registration(name, rows_of(i, server.recipe)))
    idle = held() - nbytes(server.outgoing) * (1 + (server.recipe.wire.down != "fp32"))
    with tempfile.TemporaryDirectory() as folder, peak() as most:
        merge = server.open_round(Path(folder))
        began = time.perf_counter()
        for name in names:
            server.add(merge, update_of(server, name))
        add_s = time.perf_counter() - began
        began = time.perf_counter()
        server.close_round(merge)
        close_s = time.perf_counter() - began
    sent = sum(
        nbytes(server.task(name).body) + nbytes(server.task(name).embeddings) for name in names
    )
    return {
        "case": case,
        "silos": silos,
        "parameters": nbytes(server.outgoing) // 4,
        "peak_bodies": (most[0] - idle) / nbytes(server.outgoing),
        "add_gb_per_s": sent / add_s / 1e9,
        "close_gb_per_s": sent / close_s / 1e9,
        "in_place_gb_per_s": in_place(server),
    }


def recipe_of(case: str, layers: int) -> Recipe:
    model = ModelConfig(
        config={
            "model_type": "llama",
            "hidden_size": _WIDTH,
            "intermediate_size": 1376,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        }
    )
    words = dict(word.split("=") for word in CASES[case].split())
    base = Recipe(model=model, tokenizer="shared", shared_tokenizer="x", rounds=2)
    return with_settings(base, words)


def rows_of(silo: int, recipe: Recipe) -> torch.Tensor | None:
    """Half of the ids, each silo another half."""
    if recipe.variant != "trim":
        return None
    generator = torch.Generator().manual_seed(silo)
    return torch.randperm(_TOKENS, generator=generator)[: _TOKENS // 2].sort().values


def registration(name: str, rows: torch.Tensor | None) -> Registration:
    return Registration(
        silo=name,
        vocabulary=_TOKENS if rows is None else len(rows),
        tokenizer_size=_TOKENS,
        fingerprint="f",
        train_tokens=1,
        train_bytes=1,
        validation_bytes=1,
        train_documents=1,
        duplicates=0,
        lossy_documents=0,
        unigram_bits_per_byte=1.0,
        step_s=0.0,
        prepare_s=0.0,
        on_gpu=False,
        rows=rows,
    )


def update_of(server: Server, silo: str) -> Update:
    """A small step everywhere, as views that cost no memory: what arrives is the transport's."""
    small = torch.tensor(1e-4)
    task = server.task(silo)
    body = {name: small.expand(tensor.shape) for name, tensor in task.body.items()}
    own = {name: small.expand(tensor.shape) for name, tensor in task.embeddings.items()}
    return Update(silo, task.round, body, own, {})


def in_place(server: Server) -> float:
    """GB/s of adding arrays of the same shapes in memory, which no merge can beat."""
    arrays = {name: torch.ones_like(tensor) for name, tensor in server.outgoing.items()}
    sums = {name: torch.zeros_like(tensor) for name, tensor in arrays.items()}
    fastest = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for name, array in arrays.items():
            sums[name].add_(array)
        fastest = min(fastest, time.perf_counter() - began)
    return nbytes(arrays) / fastest / 1e9


def nbytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * 4 for tensor in tensors.values())


def held() -> int:
    """Bytes that this process alone has in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status tells no RssAnon; run this on Linux")


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most that is held within the block, looked at again and again."""
    most, over = [held()], threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_EVERY_S):
            most[0] = max(most[0], held())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


def table(rows: list[Event]) -> str:
    """Markdown: memory in sizes of what the server holds once, pace in those of a plain add."""
    lines = ["| merge | silos | M parameters | peak, bodies | checked and spooled | merged |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {r['case']} | {r['silos']} | {r['parameters'] / 1e6:.1f} | {r['peak_bodies']:.2f} | "
        f"{r['add_gb_per_s'] / r['in_place_gb_per_s']:.2f} | "
        f"{r['close_gb_per_s'] / r['in_place_gb_per_s']:.2f} |"
        for r in rows
    ]
    note = "checked and spooled, merged: bytes a second, as a share of an in-place add's in memory"
    return "\n".join([*lines, "", note])


if __name__ == "__main__":
    main()
