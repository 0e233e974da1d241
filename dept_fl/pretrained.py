"""A pre-trained model with its tokenizer, from a silo's final folder or a Hugging Face one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dept_fl.checkpoint import Tensors
from dept_fl.config import Recipe
from dept_fl.data import tokens_folder
from dept_fl.errors import DeptError
from dept_fl.final import Final, open_final
from dept_fl.model import assemble, seed_of
from dept_fl.tokenizer import HuggingFaceTokenizer, Ids, Tokenizer, Vocabulary, load_tokenizer

CONTROLS = ("none", "random", "scratch")
_FALLBACK_TOKENS = 512  # for models that know no longest sequence


@dataclass(frozen=True)
class Pretrained:
    """A causal LM, its tokenizer and the ids it has embeddings of.

    Attributes:
        sequence_tokens: the longest sequence it takes.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    sequence_tokens: int


def load_pretrained(folder: Path) -> Pretrained:
    """The model of a silo's `final` folder, or of a Hugging Face folder.

    Raises:
        DeptError: it is neither, is damaged, or its tokenizer is not to be found.
    """
    if (folder / "config.json").is_file():
        return _exported(folder)
    if (folder / "state.json").is_file():
        return of_final(open_final(folder.resolve()))
    raise DeptError(
        f"{folder}: no model; give a silo's folder home/silos/SILO/state/EXPERIMENT/final, or a "
        "Hugging Face folder with config.json"
    )


def of_final(final: Final) -> Pretrained:
    """The model that a silo kept.

    Raises:
        DeptError: it is damaged, or its tokenizer is not to be found.
    """
    tokenizer = _tokenizer(final)
    vocabulary, recipe = _vocabulary(final, tokenizer), final.silo.recipe
    try:
        return joined(recipe, final.body, final.embeddings, tokenizer, vocabulary)
    except ValueError as error:
        raise DeptError(
            f"{final.folder}: its tensors are not those of its recipe: {error}"
        ) from error


def joined(
    recipe: Recipe,
    body: Tensors,
    embeddings: Tensors,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
) -> Pretrained:
    """A body with embeddings of these ids, as the recipe's model; ValueError where they differ."""
    end_id = int(vocabulary.local_ids()[tokenizer.end_id])
    model = assemble(
        recipe.model, recipe.sequence_tokens, body, embeddings, vocabulary.size, end_id
    )
    return Pretrained(model, tokenizer, vocabulary, recipe.sequence_tokens)


def _tokenizer(final: Final) -> Tokenizer:
    """The tokenizer that the silo trained with, known by its fingerprint."""
    recipe, home = final.silo.recipe, final.home
    silo = recipe.silos.get(final.silo.name)
    named = (silo.tokenizer if silo else "") or recipe.shared_tokenizer
    candidates = [str(file) for file in sorted(home.glob("tokenizers/*/*/tokenizer.model"))]
    for candidate in [*candidates, *([named] if named else [])]:
        try:
            found = load_tokenizer(candidate)
        except DeptError:
            continue
        if found.fingerprint == final.meta["tokenizer"]:
            return found
    raise DeptError(
        f"{final.folder}: the tokenizer that it was trained with is neither in "
        f"{home / 'tokenizers'} nor {named or 'named in its recipe'}; put the home back as it was"
    )


def _vocabulary(final: Final, tokenizer: Tokenizer) -> Vocabulary:
    """All of the tokenizer's ids, or in TRIM and SPEC those of the silo's own text, V_k."""
    parts = final.silo.layout
    rows = next(len(final.embeddings[name]) for name in parts.tokens if name in final.embeddings)
    if rows >= tokenizer.size:
        return Vocabulary.whole(tokenizer)
    file = used_tokens(final, tokenizer) / "vocabulary.npy"
    if not file.is_file():
        raise DeptError(
            f"{final.folder}: {file}, which tells the ids of its embeddings, is missing"
        )
    return Vocabulary(np.load(file, allow_pickle=False), tokenizer.size)


def used_tokens(final: Final, tokenizer: Tokenizer) -> Path:
    """The folder of the token stream from which V_k was taken."""
    return tokens_folder(final.meta["text"], tokenizer, True, final.silo.folder / "tokens")


def _exported(folder: Path) -> Pretrained:
    tokenizer = HuggingFaceTokenizer(str(folder))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # of several libraries, none of them documented
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DeptError(f"{folder}: transformers cannot load its model: {reason}") from error
    rows = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    if rows < tokenizer.size:
        raise DeptError(
            f"{folder}: its tokenizer has {tokenizer.size:,} ids, its model embeddings of {rows:,}"
        )
    model.config.use_cache = False
    lengths = (getattr(model.config, key, 0) for key in ("max_position_embeddings", "max_seq_len"))
    longest = next((length for length in lengths if length), _FALLBACK_TOKENS)
    return Pretrained(model, tokenizer, Vocabulary.whole(tokenizer), longest)


def with_control(pretrained: Pretrained, control: str, seed: int) -> PreTrainedModel:
    """The model to start from, its own copy.

    Args:
        control: `none`: as it was pre-trained; `random`: with a fresh body under its embeddings;
            `scratch`: with fresh embeddings too.
    """
    model = pretrained.model
    if control == "none":
        return copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed_of(seed, "control"))
        fresh: PreTrainedModel = AutoModelForCausalLM.from_config(
            model.config, dtype=torch.float32, trust_remote_code=False
        )
        kept = _embeddings(model) if control == "random" else {}
        for name, parameter in fresh.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])
    return fresh


def _embeddings(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Embedding tables, and an output layer of its own where the model has one."""
    tables: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    output = model.get_output_embeddings()
    own = {id(p) for m in [*tables, *([output] if output else [])] for p in m.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in own}


class Encoder:
    """Texts as the ids that a model has embeddings of.

    Attributes:
        end: the id that begins and ends every sequence.
        line_end: the ids of a line's end.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self._local = vocabulary.local_ids()
        restricted = vocabulary.size < tokenizer.size
        self._rewrite = vocabulary.rewriter(tokenizer) if restricted else list
        self.end = int(self._local[tokenizer.end_id])
        self.line_end = self(["\n"])[0]

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        encoded = self._tokenizer.encode(texts)
        return [self._local[self._rewrite(ids)].tolist() if ids else [] for ids in encoded]
