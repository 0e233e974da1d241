"""Any transformers causal LM, and which of its parameters are body, tokens and positions.

The only room that knows parameter names, and it learns them: two empty models that differ in
vocabulary tell which parameters belong to tokens, two that differ in length tell positions.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from dept_fl.checkpoint import Tensors
from dept_fl.config import ModelConfig, Recipe
from dept_fl.errors import ConfigError
from dept_fl.fused import FusedMptAttention, fuse
from dept_fl.loss import plain_head

_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
# Those that transformers has itself. Others it would fetch from the hub, and run.
_IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
# What old checkpoints hold of GPT-2's kin, and no model asks for: masks of the future.
_OLD_MASKS = re.compile(r"\.(attn|attention)\.(masked_)?bias$")
_BLOCK = re.compile(r".*?\.\d+\.")  # of the parameters of one block: "model.layers.3."
_PROBE_VOCABULARY = 307  # any size; a body tensor of this size on any axis does not matter


@dataclass(frozen=True)
class Layout:
    """The parts of a model by parameter name; tied parameters count once.

    Attributes:
        body: theta, every block and the final norm, with shapes.
        tokens: phi, [V, ...] parameters: input embeddings, an untied head, its bias; with
            their shapes behind the first axis.
        positions: psi, learned positions and any other embedding table, with shapes.
    """

    body: dict[str, tuple[int, ...]]
    tokens: dict[str, tuple[int, ...]]
    positions: dict[str, tuple[int, ...]]

    def embeddings(self, vocabulary: int) -> dict[str, tuple[int, ...]]:
        """Shapes of phi and psi for a vocabulary of this size."""
        rows = {name: (vocabulary, *rest) for name, rest in self.tokens.items()}
        return {**rows, **self.positions}

    def split(self, parameters: Mapping[str, torch.Tensor]) -> tuple[Tensors, Tensors]:
        """Body and embeddings of a model's parameters; `join` is the inverse."""
        body = {name: parameters[name] for name in self.body}
        embeddings = {name: parameters[name] for name in (*self.tokens, *self.positions)}
        return body, embeddings

    def fragments(self, count: int) -> list[dict[str, tuple[int, ...]]]:
        """The body in `count` parts of whole blocks: block i is in part i mod `count`.

        What lies behind a block, such as the final norm, goes with it.

        Raises:
            ConfigError: the body has fewer blocks.
        """
        found = [_BLOCK.match(name) for name in self.body]
        blocks = list(dict.fromkeys(match[0] for match in found if match))
        if count > max(len(blocks), 1):
            have = f"the model has {len(blocks)} blocks; set it to as many at most"
            raise ConfigError([f"wire.fragments={count}: {have}"])
        parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(count)]
        block = 0
        for (name, shape), match in zip(self.body.items(), found, strict=True):
            block = blocks.index(match[0]) if match else block
            parts[block % count][name] = shape
        return parts

    def synchronised(self, recipe: Recipe, round_: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the body's tensors whose deltas are merged in a round: with fragments, some."""
        fragments = self.fragments(recipe.wire.fragments)
        due = [fragments[i] for i in recipe.fragments_due(round_)]
        return {name: shape for fragment in due for name, shape in fragment.items()}

    def body_parameters(self) -> int:
        return _count(self.body)

    def embedding_parameters(self, vocabulary: int) -> int:
        return _count(self.embeddings(vocabulary))


@dataclass(frozen=True)
class Blocks:
    """What of a model, beside the shapes of its parameters, decides what training keeps in memory.

    Attributes:
        count: blocks of the body; width: d; heads: of attention in one block. 0 where the
            model's config knows no such thing.
        keeps_scores: attention is computed in steps that keep its [L, L] scores for the
            backward pass; a fused kernel (SDPA) computes them again.
        slices_logits: the loss computes its logits a slice of the tokens at a time.
    """

    count: int
    width: int
    heads: int
    keeps_scores: bool
    slices_logits: bool


def blocks(model: ModelConfig, sequence_tokens: int) -> Blocks:
    """Ask an empty model of this kind.

    Raises:
        ConfigError: transformers does not know the model.
    """
    with FakeTensorMode(), _own_generator(0):  # unlike the meta device's, such tensors run
        empty = _from_config(_config(model, _PROBE_VOCABULARY, sequence_tokens, end_id=0))
        head = plain_head(empty)
    config = empty.config
    fused = any(isinstance(module, FusedMptAttention) for module in empty.modules())
    count, width, heads = (
        value if isinstance(value := getattr(config, key, 0), int) else 0
        for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    return Blocks(
        count=count,
        width=width,
        heads=heads,
        keeps_scores=config._attn_implementation == "eager" and not fused,
        slices_logits=head is not None,
    )


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def join(model: nn.Module, body: Mapping[str, torch.Tensor], embeddings: Tensors) -> None:
    """Copy body and embeddings into a model, every parameter exactly once."""
    given = {**body, **embeddings}
    own = dict(model.named_parameters())
    differing = (given.keys() ^ own.keys()) | (body.keys() & embeddings.keys())
    if differing:
        raise ValueError(f"parameters missing, unknown or given twice: {sorted(differing)}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != given[name].shape:
                raise ValueError(f"{name}: {tuple(given[name].shape)} for {tuple(parameter.shape)}")
            parameter.copy_(given[name])


def parameters(model: nn.Module) -> Tensors:
    """The model's parameters, detached, sharing its memory."""
    return {name: p.detach() for name, p in model.named_parameters()}


def norm(tensors: Tensors) -> float:
    """L2 norm over all of the tensors."""
    return float(torch.stack([t.norm() for t in tensors.values()] or [torch.zeros(())]).norm())


@functools.lru_cache(maxsize=8)
def layout(model: ModelConfig, sequence_tokens: int) -> Layout:
    """Find out which parameters are body, tokens and positions.

    Raises:
        ConfigError: transformers does not know the model, or its vocabulary is not the first
            axis of a parameter that depends on it.
    """
    base = _probe(model, _PROBE_VOCABULARY, sequence_tokens)
    wider = _shapes(_probe(model, _PROBE_VOCABULARY + 1, sequence_tokens))
    longest = max(sequence_tokens, *(getattr(base.config, key, 0) for key in _LENGTH_KEYS))
    longer = _shapes(_probe(model, _PROBE_VOCABULARY, 2 * longest))
    tables = {f"{name}.weight" for name, m in base.named_modules() if isinstance(m, nn.Embedding)}
    found = Layout(body={}, tokens={}, positions={})
    for name, shape in _shapes(base).items():
        if wider[name] != shape:
            if wider[name] != (shape[0] + 1, *shape[1:]):
                raise ConfigError([f"model: {name} {shape} has its vocabulary on another axis"])
            found.tokens[name] = shape[1:]
        elif longer[name] != shape or name in tables:
            found.positions[name] = shape
        else:
            found.body[name] = shape
    if not found.tokens or not found.body:
        raise ConfigError(["model: has no token embeddings or no body; is it a causal LM?"])
    return found


def _probe(model: ModelConfig, vocabulary: int, sequence_tokens: int) -> PreTrainedModel:
    with torch.device("meta"), _own_generator(0):
        return _from_config(_config(model, vocabulary, sequence_tokens, end_id=0))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def build(
    model: ModelConfig, vocabulary: int, sequence_tokens: int, seed: int, end_id: int = 0
) -> PreTrainedModel:
    """A model with fresh parameters that depend on `seed` alone, fp32 on the CPU."""
    with _own_generator(seed):
        return _from_config(_config(model, vocabulary, sequence_tokens, end_id))


def load(model: ModelConfig, vocabulary: int, folder: Path) -> PreTrainedModel:
    """The model with the parameters in a Hugging Face folder, in fp32 whatever they are there.

    Raises:
        ConfigError: they are not those of the model, or not in safetensors.
    """
    config = _config(model, vocabulary, 1, end_id=0)
    disable_progress_bar()  # in the logs of every silo
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # of several libraries, none of them documented
        problem = f"model.start={str(folder)!r}: transformers cannot load it: {_reason(error)}"
        raise ConfigError([problem]) from error
    made: PreTrainedModel = loaded[0]
    if problem := _other_weights(made, loaded[1]):
        raise ConfigError([f"model.start={str(folder)!r}: {problem}"])
    return made


def _other_weights(loaded: PreTrainedModel, told: Mapping[str, Any]) -> str:
    """What a checkpoint has less or more than the parameters of its config's model, in words.

    Args:
        told: transformers' own account, without the keys that a model is known not to need.
    """
    if missing := sorted(told["missing_keys"]):
        return f"has no {', '.join(missing[:3])}; is it a causal LM?"
    if unknown := sorted(key for key in told["unexpected_keys"] if not _OLD_MASKS.search(key)):
        return (
            f"has {', '.join(unknown[:3])}, which the model of its config.json has not; correct "
            "its config.json"
        )
    if changed := _changed_buffers(loaded):
        return (
            f"its buffers {', '.join(changed[:3])} are not those of a fresh model, and parameters "
            "alone come over; choose a model without such buffers"
        )
    return ""


def _changed_buffers(loaded: PreTrainedModel) -> list[str]:
    """Buffers of a checkpoint, such as the biases of a router, unlike those of a fresh model."""
    kept = loaded.state_dict().keys()
    own = {name: buffer for name, buffer in loaded.named_buffers() if name in kept}
    if not own:
        return []
    with _Undrawn(), _own_generator(0):
        fresh = dict(with_config(copy.deepcopy(loaded.config)).named_buffers())
    # What is computed may have been rounded in the checkpoint.
    return [
        name
        for name, buffer in own.items()
        if buffer.shape != fresh[name].shape
        or not torch.allclose(buffer.float(), fresh[name].float(), rtol=2**-7, atol=0)
    ]


def with_config(config: PretrainedConfig) -> PreTrainedModel:
    """A model like the one that has this config, with fresh parameters."""
    return _from_config(config)


def assemble(
    model: ModelConfig, sequence_tokens: int, body: Tensors, embeddings: Tensors, vocabulary: int,
    end_id: int = 0,
) -> PreTrainedModel:  # fmt: skip
    """A model of this body and these embeddings, fp32 on the CPU.

    Raises:
        ValueError: they are not those of the model.
    """
    with _Undrawn():
        made = build(model, vocabulary, sequence_tokens, 0, end_id)
    join(made, body, embeddings)
    return made


class _Undrawn(TorchFunctionMode):
    """Leaves out the random numbers of fresh parameters: most of the time that building takes.

    All else, buffers such as rotary frequencies too, comes out as it should.
    """

    # By name: torch, torch.nn.init and transformers each have their own.
    _DRAWS = frozenset({"normal_", "uniform_", "kaiming_uniform_", "trunc_normal_"})

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self._DRAWS:
            drawn = args[0] if args else kwargs["tensor"]
            if isinstance(drawn, nn.Parameter):
                return drawn
        return func(*args, **kwargs)


def initial_body(model: ModelConfig, sequence_tokens: int, found: Layout, seed: int) -> Tensors:
    """theta before round 1: the same for every variant of a seed."""
    fresh = build(model, _PROBE_VOCABULARY, sequence_tokens, seed_of(seed, "body"))
    return found.split(parameters(fresh))[0]


def initial_embeddings(
    model: ModelConfig, vocabulary: int, sequence_tokens: int, found: Layout, seed: int, owner: str
) -> Tensors:
    """phi and psi before round 1: the server's (owner "") or one silo's."""
    fresh = build(model, vocabulary, sequence_tokens, seed_of(seed, "embeddings", owner))
    return found.split(parameters(fresh))[1]


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed of its own for each purpose, from the run's seed and names."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


@contextmanager
def _own_generator(seed: int) -> Iterator[None]:
    # Building a model draws from torch's global generator; nobody else may notice.
    # torch.manual_seed would seed the GPUs' generators as well, which fork_rng does not put back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _config(
    model: ModelConfig, vocabulary: int, sequence_tokens: int, end_id: int
) -> PretrainedConfig:
    settings: dict[str, Any] = copy.deepcopy(model.config)  # transformers writes into mappings
    kind = _known_kind(settings.pop("model_type", None))
    try:
        config = AutoConfig.for_model(kind, **settings)
        config.vocab_size = vocabulary
        _lengthen(config, sequence_tokens, is_open=bool(model.start_fingerprint))
        problems = [*_unknown_settings(config, settings), *_indivisible(config)]
    except Exception as error:  # transformers raises whatever the config's checks raise
        raise ConfigError([f"model.config (model_type={kind!r}): {_reason(error)}"]) from error
    problems += dict.fromkeys([*_foreign(model.config), *_foreign(config)])
    if problems:
        raise ConfigError(problems)
    config.bos_token_id = config.eos_token_id = end_id
    config.pad_token_id = None  # packed sequences need no padding, whose row would never learn
    config.use_cache = False
    if hasattr(config, "is_decoder"):
        config.is_decoder = True  # BERT and its kin would look ahead otherwise
    return config


def _lengthen(config: PretrainedConfig, sequence_tokens: int, is_open: bool) -> None:
    """Set the longest sequence; an open model's is at least its own.

    Where its positions are rotary it stays as it is: frequencies may be scaled by it, and no
    parameter depends on it.
    """
    if is_open and getattr(config, "rope_parameters", None):
        return
    for key in _LENGTH_KEYS:
        if hasattr(config, key):
            own = getattr(config, key) if is_open else 0
            setattr(config, key, max(own, sequence_tokens))


def _known_kind(kind: Any) -> str:
    if isinstance(kind, str) and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return kind
    close = difflib.get_close_matches(str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "such as llama, gpt2, mpt"
    raise ConfigError(
        [f"model.config.model_type={kind!r}: transformers has no causal LM of this type; {hint}"]
    )


def _unknown_settings(
    config: PretrainedConfig, settings: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    # A config keeps a key that it does not know as an attribute; one that it translates, such
    # as rope_theta, leaves none.
    known = type(config)()
    for key, value in settings.items():
        inner = getattr(config, key, None)
        if isinstance(value, Mapping) and isinstance(inner, PretrainedConfig):
            yield from _unknown_settings(inner, value, f"{prefix}{key}.")
        elif hasattr(config, key) and not hasattr(known, key):
            close = difflib.get_close_matches(key, known.to_dict(), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            kind = type(config).__name__
            yield f"model.config.{prefix}{key}: {kind} has no such setting{hint}"


def _indivisible(config: PretrainedConfig) -> Iterator[str]:
    """Heads that do not divide, which some models notice only in their first forward pass."""
    width = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None)
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1:
        return
    own_width = getattr(config, "head_dim", None)
    if own_width is None and width % heads:
        yield f"model.config: hidden size {width} is not a multiple of {heads} attention heads"
    if isinstance(groups, int) and groups > 0 and heads % groups:
        yield f"model.config: {heads} attention heads do not divide over {groups} key-value heads"


def _foreign(part: Any) -> Iterator[str]:
    """Kernels of others, named anywhere in the settings or in a config with its parts."""
    if isinstance(part, PretrainedConfig):
        part = vars(part)
    if isinstance(part, list | tuple):
        part = dict(enumerate(part))
    if not isinstance(part, Mapping):
        return
    for key, value in part.items():
        kind = str(key).strip("_").removesuffix("_internal")
        if kind not in _IMPLEMENTATIONS:
            yield from _foreign(value)
            continue
        for name in value.values() if isinstance(value, Mapping) else [value]:
            if name is not None and name not in _IMPLEMENTATIONS[kind]:
                own = ", ".join(_IMPLEMENTATIONS[kind])
                yield f"model.config.{kind}={name!r}: must be one of {own}"


def _from_config(config: PretrainedConfig) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:
        cause = _reason(error)
        raise ConfigError([f"model.config: transformers cannot build it: {cause}"]) from error
    fuse(model)
    return model


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
