"""The server's merge: peak memory over that of an idle server, and its pace, by number of silos.

python -m benchmarks.merge [--layers 8] [--silos 2,8,64] [--json FILE] [--quick]

Each number of silos has a process of its own. Synthetic silos send deltas of a Llama of width 512;
the server checks and spools each as it comes, then merges all and steps (`Server.add`,
`close_round`). Memory is what the process holds for itself (RssAnon), with the one update that is
in flight: pages of the spool's files are the kernel's, which takes them back when it needs them.
Times are the best of some rounds behind a first one, which makes the optimiser's moments.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch

from benchmarks.processes import held_bytes, repeated
from benchmarks.timing import fastest
from dept_fl.checkpoint import Tensors
from dept_fl.config import ModelConfig, Recipe, with_settings
from dept_fl.jobs import about
from dept_fl.merge import Delta, holders, merged
from dept_fl.report import Event
from dept_fl.rounds import Merge, Server, SharedTokenizer
from dept_fl.silo import Registration, Update

_WIDTH = 512
_TOKENS = 32_768
_LOOK_EVERY_S = 0.002
_ROUNDS = 4
_ARRAYS = 4
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
    sizes = nbytes(server.outgoing)
    idle = held_bytes() - sizes * (1 + (server.recipe.wire.down != "fp32"))
    with peak() as most:
        rounds = [one_round(server) for _ in range(_ROUNDS)]
    add_s, merge_s, close_s = (min(times) for times in zip(*rounds[1:], strict=True))
    sent = 4 * sum(prod(shape) for name in names for shape in shapes_of(server, name).values())
    return {
        "case": case,
        "silos": silos,
        "parameters": sizes // 4,
        "peak_bodies": (most[0] - idle) / sizes,
        "add_gb_per_s": sent / add_s / 1e9,
        "merge_gb_per_s": sent / merge_s / 1e9,
        "close_gb_per_s": sent / close_s / 1e9,
        "in_place_gb_per_s": in_place(server),
    }


def one_round(server: Server) -> tuple[float, float, float]:
    """Seconds for taking all updates in, for merging them alone, and for that with all the rest."""
    with tempfile.TemporaryDirectory() as folder:
        merge, arrived = server.open_round(Path(folder)), numbers_of(server)
        began = time.perf_counter()
        for name in merge.sampled:
            server.add(merge, update_of(server, name, arrived))
        add_s = time.perf_counter() - began
        del arrived
        merge_s = merge_alone_s(server, merge)
        began = time.perf_counter()
        server.close_round(merge)
        return add_s, merge_s, time.perf_counter() - began


def merge_alone_s(server: Server, merge: Merge) -> float:
    """Seconds until the deltas are one, without what is done with that: the same for any number."""
    deltas = []
    for name in merge.sampled:
        parts = [("body", server.layout.body), ("embeddings", server.shapes(name))]
        tensors = {n: t for part in parts for n, t in merge.spool.get(name, *part).items()}
        deltas.append(Delta(tensors, server.registrations[name].rows))
    shapes = {name: tuple(tensor.shape) for name, tensor in server.outgoing.items()}
    tokens = server.layout.tokens if server.embeddings else {}
    began = time.perf_counter()
    held = holders(deltas, _TOKENS if tokens else 0)
    for _ in merged(deltas, shapes, tokens, held, server.recipe.outer):
        pass
    return time.perf_counter() - began


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
    base = Recipe(model=model, tokenizer="shared", shared_tokenizer="x", rounds=_ROUNDS + 1)
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


def numbers_of(server: Server) -> Tensors:
    """Small steps everywhere; the transport's memory of the update that is in flight."""
    return {name: torch.full_like(tensor, 1e-4) for name, tensor in server.outgoing.items()}


def update_of(server: Server, silo: str, arrived: Tensors) -> Update:
    """An update of these numbers; in TRIM the silo sends its rows alone."""
    given = {n: arrived[n][: shape[0]] for n, shape in shapes_of(server, silo).items()}
    body = {name: given.pop(name) for name in server.layout.body}
    return Update(silo, server.round + 1, body, given, {})


def shapes_of(server: Server, silo: str) -> dict[str, tuple[int, ...]]:
    return {**server.layout.body, **server.shapes(silo)}


def in_place(server: Server) -> float:
    """GB/s of a plain add: arrays of the same shapes, all of them in memory already.

    There are several of each, as of a round, so that they do not stay in the processor's cache.
    """
    arrays = [numbers_of(server) for _ in range(_ARRAYS)]
    sums = numbers_of(server)

    def add() -> None:
        for each in arrays:
            for name, array in each.items():
                sums[name].add_(array)

    return _ARRAYS * nbytes(sums) / fastest(add) / 1e9


def nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most that is held within the block, looked at again and again."""
    most = [held_bytes()]

    def look() -> None:
        most[0] = max(most[0], held_bytes())

    with repeated(look, _LOOK_EVERY_S):
        yield most


def table(rows: list[Event]) -> str:
    """Markdown: memory in sizes of what the server holds once, pace in those of a plain add."""
    columns = ["add_gb_per_s", "merge_gb_per_s", "close_gb_per_s"]
    lines = ["| merge | silos | M parameters | peak, bodies | taken in | merged | and stepped |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in rows:
        paces = " | ".join(f"{r[column] / r['in_place_gb_per_s']:.2f}" for column in columns)
        size = f"{r['parameters'] / 1e6:.1f} | {r['peak_bodies']:.2f}"
        lines.append(f"| {r['case']} | {r['silos']} | {size} | {paces} |")
    note = "taken in: checked, and written to disk; bytes a second, as a share of an in-place add's"
    return "\n".join([*lines, "", note])


if __name__ == "__main__":
    main()
