"""How well a model predicts text: bits per byte, perplexity, and a sample of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dept_fl.config import InnerConfig
from dept_fl.data import TokenStream
from dept_fl.errors import DeptError
from dept_fl.loss import next_token_loss, without_logits
from dept_fl.tokenizer import Ids, Tokenizer
from dept_fl.train import autocast, put

Tell = Callable[[int, int], None]  # takes how much of the work is done, and how much there is


def _tell_nobody(done: int, of: int) -> None:
    pass


@dataclass(frozen=True)
class Evaluation:
    """A model on a silo's validation split.

    Attributes:
        validation_loss: mean cross-entropy in nats per token, document ends included.
        bits_per_byte: total bits over the UTF-8 bytes of the text: comparable across
            tokenizers, which perplexity is not.
        unigram_bits_per_byte: the same of the training split's unigram distribution, the
            floor that needs no context (paper: UNIGRAM-CE).
        activation_norm: mean L2 norm over positions of what enters the last block, on one
            batch; behind it the final norm would hide any growth.
    """

    validation_loss: float
    perplexity: float
    bits_per_byte: float
    unigram_bits_per_byte: float
    unigram_perplexity: float
    validation_tokens: int
    activation_norm: float


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    stream: TokenStream,
    sequence_tokens: int,
    inner: InnerConfig,
    tell: Tell = _tell_nobody,
) -> Evaluation:
    """Every validation token is predicted once, in windows that do not overlap."""
    device = next(model.parameters()).device
    local = torch.from_numpy(stream.vocabulary.local_ids()[stream.validation])
    windows = _windows(local, sequence_tokens)
    model.eval()
    parts = [part for batch in windows for part in batch.split(inner.sequences_per_pass)]
    sums = []  # read at the end: reading one would wait for the GPU
    with autocast(inner.precision, device):
        for done, part in enumerate(parts):
            tell(done, len(parts))
            sums.append(next_token_loss(model, put(part, device), reduction="sum"))
        norm = _activation_norm(model, windows[0][: inner.sequences_per_pass].to(device))
    nats = float(torch.stack(sums).double().sum())
    if not math.isfinite(nats + norm):
        raise DeptError(
            f"the loss on validation text became {nats}: the model has diverged; lower "
            f"inner.learning_rate={inner.learning_rate}"
        )
    tokens = len(local) - 1
    unigram = stream.unigram_nats()
    return Evaluation(
        validation_loss=nats / tokens,
        perplexity=_exp(nats / tokens),
        bits_per_byte=bits_per_byte(nats, stream.validation_bytes),
        unigram_bits_per_byte=bits_per_byte(unigram * tokens, stream.validation_bytes),
        unigram_perplexity=_exp(unigram),
        validation_tokens=tokens,
        activation_norm=norm,
    )


def bits_per_byte(nats: float, utf8_bytes: int) -> float:
    return nats / math.log(2) / utf8_bytes


def _exp(nats: float) -> float:
    return math.exp(min(nats, 600.0))  # a diverged model has a finite figure too


def _windows(tokens: torch.Tensor, length: int) -> list[torch.Tensor]:
    """[n] tokens as batches of [B, length + 1] windows and one shorter, each sharing one
    token with the next, so that all tokens but the first are predicted once."""
    whole = (len(tokens) - 1) // length
    batches = []
    if whole:
        batches.append(tokens[: whole * length + 1].unfold(0, length + 1, length))
    rest = tokens[whole * length :]
    if len(rest) > 1:
        batches.append(rest.unsqueeze(0))
    return batches


def _activation_norm(model: PreTrainedModel, sequences: torch.Tensor) -> float:
    with without_logits(model):
        states = model(input_ids=sequences[:, :-1], output_hidden_states=True).hidden_states
    entering = states[-2]
    return float(entering.float().norm(dim=-1).mean())


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    stream: TokenStream,
    tokenizer: Tokenizer,
    length: int,
    window: int,
    seed: int,
) -> str:
    """Text of `length` tokens that the model writes behind a document's end.

    The model sees the last `window` tokens of it.
    """
    local = stream.vocabulary.local_ids()
    written = write_on(model, [int(local[tokenizer.end_id])], length, window, seed)
    return tokenizer.decode([int(stream.vocabulary.ids[i]) for i in written])


@torch.no_grad()
def write_on(
    model: PreTrainedModel,
    start: Ids,
    length: int,
    window: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int = 0,
    end: int | None = None,
    tell: Tell = _tell_nobody,
) -> Ids:
    """Up to `length` ids that the model writes behind `start`, which it sees the last `window` of.

    Args:
        temperature: 0 takes the likeliest id each time.
        top_k: draw among so many likeliest ids; 0: among all.
        end: the id at which it stops, which is left out.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([start], device=device)
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for done in range(length):
            tell(done, length)
            logits = model(input_ids=ids[:, -window:]).logits[:, -1].float()
            drawn = _drawn(logits, temperature, top_k)
            if drawn.item() == end:
                break
            ids = torch.cat([ids, drawn], dim=1)
    written: Ids = ids[0, len(start) :].tolist()
    return written


def _drawn(logits: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """[1, 1] an id, by [1, V] logits."""
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1)
