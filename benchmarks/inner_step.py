"""Tokens a second of the inner loop beside a plain PyTorch loop, and nanoGPT's, in one run.

python -m benchmarks.inner_step [--models gpt2-125m,...] [--nanogpt FOLDER] [--compile]
                                [--peak-tflops 989] [--json FILE] [--quick]

The plain loop is what one would write by hand: the same transformers model, whole logits, fused
AdamW, clipping, the same batches. --nanogpt names a clone of github.com/karpathy/nanoGPT, whose
model and training step are timed at GPT-2's size. All take turns; what counts is their ratio in a
turn. --compile runs ours through torch.compile as well, and tells what the first turn costs: with
TORCHINDUCTOR_CACHE_DIR set to one folder, a second run tells it of a fresh process with a warm
cache. On a GPU all run in bf16, and MFU is told beside --peak-tflops.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from benchmarks.measure import RandomSequences, interleaved, keep, markdown, ratio
from dept_fl.checkpoint import Tensors
from dept_fl.compare import flops_per_token
from dept_fl.config import InnerConfig, Recipe, load_recipe
from dept_fl.model import build
from dept_fl.report import Event
from dept_fl.train import Schedule, autocast, pick_device, put, train

# Preset, vocabulary, sequences of so many tokens.
CASES = [
    ("llama-nano", 2_048, 16, 128),
    ("llama-tiny", 4_096, 16, 128),
    ("llama-tiny", 50_257, 16, 128),
    ("llama-tiny", 250_112, 4, 128),
    ("gpt2-125m", 50_257, 2, 512),
    ("mpt-125m", 50_257, 2, 512),
]
QUICK = [("llama-nano", 2_048, 4, 64), ("llama-nano", 50_257, 2, 64)]
_DEVICE = pick_device("auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="of each loop in a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    parser.add_argument("--nanogpt", type=Path, help="a clone of karpathy/nanoGPT")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the GPU, in bf16")
    parser.add_argument("--models", default="", help="some of the presets alone, comma-separated")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two small cases, few turns")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.repeats = 2, 3
    wanted = [name for name in options.models.split(",") if name]
    rows = []
    for case in QUICK if options.quick else CASES:
        if wanted and case[0] not in wanted:
            continue
        rows.append(measure(case, options))
        print(table(rows[-1:], options.peak_tflops).splitlines()[-1], flush=True)
    print("\n" + table(rows, options.peak_tflops))
    keep(options.json, "benchmarks.inner_step", rows)


def measure(case: tuple[str, int, int, int], options: argparse.Namespace) -> Event:
    preset, vocabulary, batch, length = case
    recipe = load_recipe("conf/demo.yaml", f"model.preset={preset} sequence_tokens={length}")
    inner = InnerConfig(local_steps=options.steps, batch_size=batch, warmup_steps=0)
    batches = RandomSequences(vocabulary, length)
    loops = {
        "ours": ours(recipe, vocabulary, inner, batches),
        "plain": plain(recipe, vocabulary, inner, batches),
    }
    if options.nanogpt and preset.startswith("gpt2"):
        loops["nanogpt"] = nanogpt(options.nanogpt, recipe, vocabulary, inner, batches)
    if options.compile:
        loops["compiled"] = ours(recipe, vocabulary, inner, batches, compiled=True)
    turns = interleaved(loops, options.repeats)
    seconds = {name: each[1:] for name, each in turns.items()}
    step_s = {name: median(each) / options.steps for name, each in seconds.items()}
    found: Event = {
        "model": preset,
        "vocabulary": vocabulary,
        "batch": batch,
        "sequence_tokens": length,
        "tokens_per_s": batch * length / step_s["ours"],
        "speed": {name: ratio(seconds[name], seconds["ours"]) for name in loops if name != "ours"},
        "flops_per_token": flops_per_token(recipe, vocabulary),
    }
    if options.compile:
        saved_s = step_s["ours"] - step_s["compiled"]
        compile_s = turns["compiled"][0] - median(seconds["compiled"])
        found["compile_s"] = compile_s
        found["break_even_steps"] = compile_s / saved_s if saved_s > 0 else None
    return found


def ours(
    recipe: Recipe,
    vocabulary: int,
    inner: InnerConfig,
    batches: RandomSequences,
    compiled: bool = False,
) -> Callable[[], float]:
    model = build(recipe.model, vocabulary, recipe.sequence_tokens, 0).to(_DEVICE)
    if compiled:
        model.base_model.compile(dynamic=False)
    moments: Tensors = {}

    def turn() -> float:
        done = train(model, batches, inner, Schedule(0, 1000), 0, moments)
        moments.update(done.optimizer)  # as a silo's next round goes on
        return done.seconds

    return turn


def plain(
    recipe: Recipe, vocabulary: int, inner: InnerConfig, batches: RandomSequences
) -> Callable[[], float]:
    model = build(recipe.model, vocabulary, recipe.sequence_tokens, 0).to(_DEVICE).train()
    as_in_transformers(model)
    adamw = torch.optim.AdamW(model.parameters(), lr=inner.learning_rate, fused=True)

    def step(ids: torch.Tensor) -> torch.Tensor:
        with autocast("auto", _DEVICE):
            logits = model(input_ids=ids[:, :-1]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return after(loss, model, adamw, inner)

    return lambda: timed(step, inner, batches)


def as_in_transformers(model: torch.nn.Module) -> None:
    """Take back what runs fused in ours alone."""
    for module in model.modules():
        if type(module).__module__ == "dept_fl.fused":
            module.__class__ = type(module).__base__


def nanogpt(
    folder: Path, recipe: Recipe, vocabulary: int, inner: InnerConfig, batches: RandomSequences
) -> Callable[[], float]:
    """Its own model and optimiser, and the step of its train.py."""
    source: Any = importlib.util.spec_from_file_location("nanogpt", folder / "model.py")
    module: Any = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    size = recipe.model.config
    with redirect_stdout(StringIO()):
        model = module.GPT(
            module.GPTConfig(
                block_size=recipe.sequence_tokens,
                vocab_size=vocabulary,
                n_layer=size["n_layer"],
                n_head=size["n_head"],
                n_embd=size["n_embd"],
                dropout=0.0,
                bias=True,
            )
        ).to(_DEVICE)
        adamw = model.configure_optimizers(
            inner.weight_decay, inner.learning_rate, tuple(inner.betas), _DEVICE.type
        )

    def step(ids: torch.Tensor) -> torch.Tensor:
        with autocast("auto", _DEVICE):
            _, loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        return after(loss, model, adamw, inner)

    return lambda: timed(step, inner, batches)


def after(
    loss: torch.Tensor, model: torch.nn.Module, adamw: torch.optim.Optimizer, inner: InnerConfig
) -> torch.Tensor:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), inner.clip_norm)
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    return loss.detach()


def timed(
    step: Callable[[torch.Tensor], torch.Tensor], inner: InnerConfig, batches: RandomSequences
) -> float:
    began = time.perf_counter()
    for i in range(inner.local_steps):
        rows = batches.at(i * inner.batch_size, inner.batch_size)
        loss = step(put(torch.from_numpy(rows), _DEVICE))
    loss.item()  # a GPU is done when this is known
    return time.perf_counter() - began


def table(rows: list[Event], peak_tflops: float) -> str:
    """Markdown: speed of our loop in that of the others; the median turn, lowest and highest."""
    head = ["model", "vocabulary", "batch", "tokens/s", "plain loop", "nanoGPT", "compiled"]
    head += ["compiling"] + (["MFU"] if peak_tflops else [])
    return markdown(head, [_row(row, peak_tflops) for row in rows])


def _row(row: Event, peak_tflops: float) -> list[str]:
    speed = row["tokens_per_s"]
    cells = [
        row["model"],
        f"{row['vocabulary']:,}",
        f"{row['batch']} x {row['sequence_tokens']}",
        f"{speed:,.0f}",
    ]
    for other in ("plain", "nanogpt", "compiled"):
        found = row["speed"].get(other)
        cells.append("{median:.2f} ({low:.2f} to {high:.2f})".format(**found) if found else "")
    cells.append(_compiling(row))
    if peak_tflops:
        cells.append(f"{speed * row['flops_per_token'] / peak_tflops / 1e12:.1%}")
    return cells


def _compiling(row: Event) -> str:
    if "compile_s" not in row:
        return ""
    steps = row["break_even_steps"]
    saved = "never" if steps is None else f"after {steps:,.0f} steps"
    return f"{row['compile_s']:.0f} s, pays {saved}"


if __name__ == "__main__":
    main()
