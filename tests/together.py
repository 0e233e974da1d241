"""Helper of the tests: what several processes train; it is loaded in each of them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from dept_fl.checkpoint import Tensors
from dept_fl.config import InnerConfig, ModelConfig
from dept_fl.data import Batches, TokenStream
from dept_fl.model import build, parameters
from dept_fl.parallel import Workers
from dept_fl.tokenizer import Vocabulary
from dept_fl.train import Schedule, Training, train
from dept_fl.world import WORLDS, World

TINY = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
VOCABULARY = 33  # which does not divide by two
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
INNER = InnerConfig(
    local_steps=3, batch_size=8, learning_rate=0.01, warmup_steps=2, weight_decay=0.1, clip_norm=0.5
)

CASES = {
    "plain": INNER,
    "in passes": replace(INNER, micro_batch_size=2),
    "a round behind another": INNER,
    "body frozen": INNER,
    "bf16": replace(INNER, precision="bf16"),
    "muon": replace(INNER, optimizer="muon"),
}
RUNS = [(parallel, case) for parallel in WORLDS for case in CASES]
RUNS.remove(("fsdp", "muon"))  # a recipe with both is refused


class Random(Batches):
    """Sequences of random tokens."""

    def __init__(self) -> None:
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, 400).astype(np.uint16)
        ids = np.arange(VOCABULARY)
        vocabulary = Vocabulary(ids, VOCABULARY)
        super().__init__(TokenStream(tokens, tokens, vocabulary, ids / ids.sum(), 1, 1), 8, seed=5)


def small_model(tied: bool = False) -> PreTrainedModel:
    return build(ModelConfig(config={**TINY, "tie_word_embeddings": tied}), VOCABULARY, 8, seed=1)


def run(case: str, world: World | None = None) -> tuple[PreTrainedModel, Training]:
    inner, model = CASES[case], small_model(tied=case == "in passes")
    if world is None:  # rounding in bfloat16 depends on how many sequences are in a pass
        inner = replace(inner, micro_batch_size=inner.micro_batch_size or 4)
    moments: Tensors = {}
    if case == "a round behind another":
        moments = train(model, Random(), INNER, Schedule(0, 6), 0, {}, EMBEDDINGS).optimizer
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case != "body frozen" or name in EMBEDDINGS)
    first = 3 if moments else 0
    schedule, position = Schedule(first, 6), first * INNER.batch_size
    training = train(model, Random(), inner, schedule, position, moments, EMBEDDINGS, world)
    return model, training


def run_all(rank: int, device: torch.device, folder: Path) -> None:
    for parallel, case in RUNS:
        world = WORLDS[parallel](device)
        model, training = run(case, world)
        found = world.gather(parameters(model))
        if rank == 0:
            torch.save((found, training), folder / f"{parallel} {case}")
        else:
            assert not found and not training.optimizer
    if rank == 1:
        raise ValueError("no more\ncases")
    dist.barrier()


THIRD_STEP = 20  # where the second process begins it, with half of 8 sequences each


@dataclass
class Until(Random):
    """Sequences, until the second process sends a signal in its third step."""

    to_parent: bool
    signal: int

    def __post_init__(self) -> None:
        super().__init__()

    def at(self, position: int, count: int) -> np.ndarray:
        if position == THIRD_STEP:
            os.kill(os.getppid() if self.to_parent else os.getpid(), self.signal)
            time.sleep(600)
        return super().at(position, count)


def train_until(batches: Until, scratch: Path) -> None:
    Workers(2, "ddp", scratch).train(small_model(), batches, INNER, Schedule(0, 6), 0, {})
