"""What a run starts from: fresh parameters, or an open model's, to pre-train it on new text."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dept_fl.checkpoint import Tensors
from dept_fl.config import ModelConfig, Recipe
from dept_fl.errors import ConfigError
from dept_fl.model import Layout, initial_body, initial_embeddings, layout, load, parameters
from dept_fl.tokenizer import Vocabulary, load_tokenizer
from dept_fl.transfer import Source, Target, transfer

_WANTED = ("*.json", "*.model", "*.txt", "*.safetensors")  # of a hub's repository
_COPIES = "consolidated*"  # the same weights once more, as those who trained them keep them
_COUNTED = {"config.json", "*.safetensors", "*.model", "tokenizer.json", "tokenizer_config.json"}
_COUNTED |= {"special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"}
_COUNTED |= {"merges.txt"}
# What a config says of its checkpoint or its tokenizer, not of the model.
_NOT_THE_MODELS = {"architectures", "dtype", "transformers_version", "vocab_size", "use_cache"}
_NOT_THE_MODELS |= {"bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id"}


# ---- the setting -------------------------------------------------------------------------


def written_out(model: ModelConfig) -> ModelConfig:
    """`model.start` with the open model's own config and fingerprint beside it.

    Raises:
        ConfigError: there is no such model, it cannot be a start, or it is not what is set.
    """
    folder = _folder(model.start)
    config, fingerprint = _read_config(model.start, folder), _fingerprint(folder)
    if model.start_fingerprint not in ("", fingerprint):
        raise _other_model(model, fingerprint)
    settings = _settings(model.start, config)
    differing = [key for key, value in model.config.items() if settings.get(key) != value]
    if differing:
        raise ConfigError(
            [
                f"model.config.{key}={model.config[key]!r}: {model.start!r} has "
                f"{settings.get(key)!r}; remove it, such as with 'model.config={{}}'"
                for key in differing
            ]
        )
    return replace(model, config=settings, start_fingerprint=fingerprint)


def _settings(name: str, config: PretrainedConfig) -> dict[str, Any]:
    """What a config says of the model, as it comes back from a checkpoint and from the server."""
    known = type(config)()  # a checkpoint's config may say more than transformers knows
    try:
        settings = {
            key: value
            for key, value in config.to_diff_dict().items()
            if hasattr(known, key) and key not in _NOT_THE_MODELS
        }
    except Exception as error:  # a setting that differs by layer is not told of the whole
        reason = f"its config cannot be written out: {shorten(str(error), 200)}"
        raise _unusable(name, reason) from error
    found: dict[str, Any] = json.loads(json.dumps({**settings, "model_type": config.model_type}))
    return found


def _folder(name: str) -> Path:
    """Where the files lie, fetched from the hub where the name is no folder."""
    if Path(name).is_dir():
        return Path(name)
    try:
        fetched = snapshot_download(
            name, allow_patterns=list(_WANTED), ignore_patterns=["*/*", _COPIES]
        )
        return Path(fetched)
    except Exception as error:  # of several libraries, none of them documented
        reason = shorten(str(error), 200) or type(error).__name__
        raise _unusable(
            name, f"no such folder, and not to be had from the hub: {reason}"
        ) from error


def _read_config(name: str, folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise _unusable(name, "has no config.json")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # likewise
        raise _unusable(name, f"transformers cannot read it: {shorten(str(error), 200)}") from error
    made_for = config.architectures or []
    if made_for and not set(made_for) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise _unusable(name, f"is a {', '.join(made_for)}, not a causal LM")
    if getattr(config, "quantization_config", None):
        raise _unusable(name, "its weights are quantised, which cannot be trained on")
    if not any(file.suffix == ".safetensors" for file in _counted(folder)):
        raise _unusable(
            name, "has no *.safetensors, and pickled weights are not loaded (save it anew)"
        )
    return config


def _fingerprint(folder: Path) -> str:
    """Of config, weights and tokenizer, by what is in the files."""
    return _digest(tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in _counted(folder)))


def _counted(folder: Path) -> list[Path]:
    found = {file for pattern in _COUNTED for file in folder.glob(pattern)}
    return sorted(file for file in found if not file.match(_COPIES))


@functools.lru_cache(maxsize=4)  # weights are gigabytes, and asked for several times
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of files with their size and time, which change whenever they do."""
    found = hashlib.sha256()
    for file, *_ in files:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        found.update(f"{file.name} {digest}\n".encode())
    return found.hexdigest()


def _unusable(name: str, reason: str) -> ConfigError:
    return ConfigError(
        [
            f"model.start={name!r}: {reason}; give the folder or hub name of a causal LM that "
            "transformers knows, with config.json and *.safetensors"
        ]
    )


def _other_model(model: ModelConfig, fingerprint: str) -> ConfigError:
    return ConfigError(
        [
            f"model.start={model.start!r}: its files ({fingerprint[:12]}) are not those of the run "
            f"({model.start_fingerprint[:12]}); give the same revision of the same model"
        ]
    )


# ---- what is before round 1 --------------------------------------------------------------


def check_start(recipe: Recipe) -> None:
    """Raise DeptError where the open model that a run starts from does not do."""
    if recipe.model.gives_embeddings:
        open_model(recipe)
    elif recipe.model.start_fingerprint:
        _parts(recipe)


def first_body(recipe: Recipe, found: Layout) -> Tensors:
    """theta before round 1: the open model's, else drawn from the seed.

    Raises:
        ConfigError: the open model is not to be had, or not what the run started from.
    """
    if recipe.model.start_fingerprint:
        return _parts(recipe)[0]
    return initial_body(recipe.model, recipe.sequence_tokens, found, recipe.seed)


def first_embeddings(recipe: Recipe, target: Target) -> Tensors:
    """phi and psi before round 1 for the target's vocabulary.

    With the open model's own tokenizer its rows, else those that `model.start_embeddings` makes
    of them, or fresh ones that depend on the seed and the target's name.

    Raises:
        ConfigError: see `open_model`.
    """
    found = layout(recipe.model, recipe.sequence_tokens)
    if not recipe.model.gives_embeddings:
        size = target.vocabulary.size
        return initial_embeddings(
            recipe.model, size, recipe.sequence_tokens, found, recipe.seed, target.name
        )
    source = open_model(recipe)
    if source.tokenizer.fingerprint != target.tokenizer.fingerprint:
        return transfer(recipe.model.start_embeddings, [source], target, recipe).embeddings
    rows = torch.from_numpy(target.vocabulary.ids)
    return {
        name: tensor[rows] if name in found.tokens else tensor
        for name, tensor in source.embeddings.items()
    }


def open_model(recipe: Recipe) -> Source:
    """The embeddings of the model that the run starts from, with its tokenizer.

    Raises:
        ConfigError: it is not to be had, not what the run started from, or its tokenizer or
            learned positions do not do.
    """
    name = recipe.model.start
    embeddings, found = _parts(recipe)[1], layout(recipe.model, recipe.sequence_tokens)
    for position, shape in found.positions.items():
        if (own := tuple(embeddings[position].shape)) != shape:
            raise ConfigError(
                [
                    f"sequence_tokens={recipe.sequence_tokens}: {name!r} has learned positions "
                    f"({position}) for {own[0]:,} only; lower it"
                ]
            )
    tokenizer = load_tokenizer(_folder(name))
    rows = min(len(embeddings[token]) for token in found.tokens)
    if tokenizer.size > rows:
        raise _unusable(
            name, f"its tokenizer has {tokenizer.size:,} ids, its embeddings {rows:,} rows"
        )
    # A table with more rows than ids is padded, for speed.
    cut = {n: t[: tokenizer.size] if n in found.tokens else t for n, t in embeddings.items()}
    whole = Vocabulary.whole(tokenizer)
    return Source(name, tokenizer, whole, cut, counts=np.ones(whole.size, dtype=np.int64))


def _parts(recipe: Recipe) -> tuple[Tensors, Tensors]:
    """Body and embeddings of the open model, which is the one that the run started from."""
    model = recipe.model
    folder = _folder(model.start)
    if (fingerprint := _fingerprint(folder)) != model.start_fingerprint:
        raise _other_model(model, fingerprint)
    rows = _read_config(model.start, folder).vocab_size
    own = parameters(load(model, rows, folder))
    found = layout(model, recipe.sequence_tokens)
    if differing := own.keys() ^ {*found.body, *found.embeddings(rows)}:
        raise _unusable(
            model.start,
            f"weights and config do not agree on {', '.join(sorted(differing))} "
            "(tie_word_embeddings?)",
        )
    return found.split(own)
