"""What transformers computes in steps, by a fused kernel that keeps less for the backward pass.

MPT's attention, whose steps keep the [L, L] scores, and the GELU of GPT-2 and its kin, whose steps
keep three tensors as wide as the feed-forward layer. The modules here have the same parameters and
names, so a model with them is saved as, and loaded from, any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.models.mpt.modeling_mpt import (
    MptAttention,
    MptModel,
    build_mpt_alibi_tensor,
)


def fuse(model: nn.Module) -> None:
    """Let the parts of a model run fused for which there is a class here."""
    fused = {
        MptModel: FusedMptModel,
        MptAttention: FusedMptAttention,
        NewGELUActivation: FusedGelu,
        FastGELUActivation: FusedGelu,
    }
    for module in model.modules():
        module.__class__ = fused.get(type(module), type(module))


class FusedGelu(NewGELUActivation):
    """GELU by tanh: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.gelu(input, approximate="tanh")


class FusedMptModel(MptModel):
    """Makes one ALiBi bias for all blocks, [heads, L, L] with the future at -inf.

    With padding or a cache it leaves that to transformers, whose bias is [heads, 1, L].
    """

    def forward(self, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        cached = kwargs.get("use_cache", self.config.use_cache)
        plain = not (args or cached or kwargs.get("past_key_values"))
        plain = plain and input_ids is not None and kwargs.get("attention_mask") is None
        self._length = input_ids.shape[1] if plain else 0
        return super().forward(input_ids, *args, **kwargs)

    def build_mpt_alibi_tensor(
        self, num_heads: int, sequence_length: int, alibi_bias_max: int = 8, device: Any = None
    ) -> Any:
        length = self._length or sequence_length
        bias = build_mpt_alibi_tensor(num_heads, length, alibi_bias_max, device)
        if not self._length:
            return bias
        # Relative to the query, where the differences that matter are small numbers: exact in bf16.
        bias = bias - bias.transpose(1, 2)
        kind = bias.device.type
        if torch.is_autocast_enabled(kind):  # once here, or each block would keep its own copy
            bias = bias.to(torch.get_autocast_dtype(kind))
        future = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        return bias.masked_fill_(future, -torch.inf)


class FusedMptAttention(MptAttention):
    """Attention with the bias of FusedMptModel; with any other it is transformers' own."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if position_bias.shape[1] == 1:
            return super().forward(hidden_states, position_bias, past_key_values, attention_mask)
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in mixed.chunk(3, -1)
        )
        context = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=position_bias.unsqueeze(0),
            dropout_p=self.attn_dropout_p if self.training else 0.0,
            scale=self.softmax_scale,
        )
        return self.out_proj(context.transpose(1, 2).flatten(2)), None
