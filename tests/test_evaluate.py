"""Bits per byte by hand, and every token counted once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dept_fl.config import InnerConfig, ModelConfig
from dept_fl.data import TokenStream
from dept_fl.evaluate import _windows, bits_per_byte, evaluate
from dept_fl.model import build
from dept_fl.tokenizer import Vocabulary

SIZE = 8
CONFIG = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8}
CONFIG |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def stream(tokens: int, text_bytes: int) -> TokenStream:
    ids = (np.arange(tokens) % SIZE).astype(np.uint16)
    share = np.full(SIZE, 1 / SIZE)
    return TokenStream(ids, ids, Vocabulary(np.arange(SIZE), SIZE), share, text_bytes, text_bytes)


def test_one_nat_is_1_44_bits_shared_by_the_bytes():
    assert bits_per_byte(nats=8 * math.log(2), utf8_bytes=4) == pytest.approx(2.0)


def test_a_model_of_zeros_is_uniform():
    model = build(ModelConfig(config=CONFIG), SIZE, 4, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # 22 predicted tokens of log2(8) = 3 bits over 33 bytes: 2 bits per byte.
    found = evaluate(model, stream(tokens=23, text_bytes=33), 4, InnerConfig(batch_size=3))
    assert found.validation_tokens == 22
    assert found.bits_per_byte == pytest.approx(2.0)
    assert found.perplexity == pytest.approx(8.0)
    assert found.unigram_bits_per_byte == pytest.approx(2.0)
    assert found.unigram_perplexity == pytest.approx(8.0)


@pytest.mark.parametrize("tokens", [2, 4, 5, 6, 9, 10, 23])
def test_windows_predict_every_token_but_the_first_once(tokens: int):
    batches = _windows(torch.arange(tokens), 4)
    targets = torch.cat([row[1:] for batch in batches for row in batch])
    assert targets.tolist() == list(range(1, tokens))


def test_the_figure_does_not_depend_on_the_batch_size():
    model = build(ModelConfig(config=CONFIG), SIZE, 4, seed=3)
    figures = [
        evaluate(model, stream(23, 33), 4, InnerConfig(batch_size=size)).bits_per_byte
        for size in (1, 2, 16)
    ]
    assert figures == pytest.approx([figures[0]] * 3)
