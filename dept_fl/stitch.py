"""A linear map from foreign embeddings into a body's space, trained on text; all else is frozen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from dept_fl.checkpoint import Tensors
from dept_fl.config import Recipe
from dept_fl.data import Batches, TokenStream
from dept_fl.errors import DeptError
from dept_fl.model import Layout, assemble, layout, seed_of
from dept_fl.train import Schedule, pick_device, train
from dept_fl.transfer import Transferred, stitched


class StitchedModel(nn.Module):
    """A causal LM whose token embeddings are own rows [V, own width] under maps W that train.

    Attributes:
        maps: W of each name in `names`; nothing else has gradients.
    """

    def __init__(self, model: PreTrainedModel, own: Tensors, maps: Tensors, found: Layout) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.names = list(maps)
        self.maps = nn.ParameterList(nn.Parameter(maps[name].clone()) for name in self.names)
        self._found = found
        for i, name in enumerate(self.names):
            self.register_buffer(f"own_{i}", own[name], persistent=False)

    def forward(self, **inputs: Any) -> Any:
        own = {name: self.get_buffer(f"own_{i}") for i, name in enumerate(self.names)}
        tokens = stitched(own, dict(zip(self.names, self.maps, strict=True)), self._found)
        return functional_call(self.model, tokens, kwargs=inputs)  # ties hold there too


def refine(
    start: Transferred,
    own: Tensors,
    body: Tensors,
    stream: TokenStream,
    recipe: Recipe,
    steps: int,
    learning_rate: float = 1e-3,
) -> Transferred:
    """Train the maps of a `stitch` on the target's text, with body, own rows and positions frozen.

    Args:
        start: what `transfer` gave for method "stitch".
        own: the target's own embeddings, as `transfer` got them.
        stream: the target's.
        recipe: for the model, the batches and the inner optimiser.
        steps: of the inner optimiser, with a cosine of their own.

    Returns:
        embeddings and maps after these steps, with the report of `start`.

    Raises:
        DeptError: `start` has no maps, there are no steps, or the loss is not finite.
    """
    if not start.maps:
        raise DeptError(f"method={start.report.method!r} made no maps; refine what stitch made")
    if steps < 1:
        raise DeptError(f"steps={steps}: must be at least 1")
    found = layout(recipe.model, recipe.sequence_tokens)
    base = assemble(
        recipe.model, recipe.sequence_tokens, body, start.embeddings, stream.vocabulary.size
    )
    device = pick_device(recipe.device)
    model = StitchedModel(base, own, start.maps, found).to(device)
    inner = replace(
        recipe.inner,
        local_steps=steps,
        learning_rate=learning_rate,
        warmup_steps=min(recipe.inner.warmup_steps, steps // 10),
        weight_decay=0.0,  # nothing speaks for small maps
    )
    seed = seed_of(recipe.seed, "stitch")
    batches = Batches(stream, recipe.sequence_tokens, seed)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # dropout, where the body has it
        torch.manual_seed(seed)
        train(model, batches, inner, Schedule(0, steps), position=0, moments={})
    trained = (parameter.detach().cpu() for parameter in model.maps)
    maps = dict(zip(model.names, trained, strict=True))
    embeddings = {**start.embeddings, **stitched(own, maps, found)}
    return replace(start, embeddings=embeddings, maps=maps)
