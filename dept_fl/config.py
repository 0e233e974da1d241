"""The recipe of a run: frozen dataclasses filled by OmegaConf, every problem reported at once."""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError

from dept_fl import ROOT
from dept_fl.errors import ConfigError, DeptError

CONF_DIR = ROOT / "conf"
RUN_NAME = re.compile(r"(?![.\s])[^/\\\x00-\x1f]{1,100}")
LEAST_PIECES = 300  # the 256 bytes, specials, and some pieces of text
SILO_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

# Settings of how a run is carried out, and with whom.
FREE_ON_RESUME = frozenset(
    {
        "name",
        "without",
        "min_silos",
        "quorum",
        "patience",
        "round_attempts",
        "round_timeout_s",
        "largest_delta",
        "device",
        "processes",
        "parallel",
        "share_samples",
        "sample_tokens",
        "evaluate_every",
        "keep_best",
        "arms",
        "trackers",
        "model.start",
        "inner.micro_batch_size",
    }
)

VARIANTS = ("glob", "trim", "spec")
TOKENIZERS = ("own", "shared")
STARTS = ("random", "copy", "mix")
INNER_STATES = ("keep", "reset")
PRECISIONS = ("auto", "fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")
PARALLEL = ("ddp", "fsdp")
INNER_OPTIMIZERS = ("adamw", "muon")
OUTER_OPTIMIZERS = ("average", "nesterov", "adam")
CODECS = ("fp32", "bf16", "int8", "int4")
MERGES = ("mean", "median", "trimmed-mean")
# FIELD=VALUE and its like. The first sign counts: a value may have others in it.
CONDITION = re.compile(r"(?P<field>.+?)(?P<sign>!=|>=|<=|=)(?P<value>.+)", re.DOTALL)
SAMPLE_BY = ("auto", "document", "paragraph", "line")
CONTENTS = ("text", "code", "docstrings")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")  # each by its package's name


@dataclass(frozen=True)
class DataConfig:
    """Where documents come from, one of `files`, `hub`, `packages`, and which of them are taken.

    Attributes:
        files: paths, folders or globs of .txt, .jsonl, .parquet, .csv and .tsv, compressed or not.
        validation_files: likewise, and then all of `files` is for training and these alone for
            validation; empty: a part of `files` by a digest of each document.
        hub: name of a hub data set, streamed; with `hub_config` and `hub_split`.
        hub_config: which part of the hub data set, where it has several, such as a language.
        hub_split: its split to read.
        hub_validation_split: the hub data set's own split for validation, in the same way.
        hub_files: which files of the hub data set make a split, SPLIT=PATTERN, where it does not
            tell itself: `validation=val.jsonl.zst`.
        hub_where: `where` for the hub alone, and of conditions FIELD=VALUE alone.
        packages: installed distributions whose files are read; `stdlib` is Python itself.
        include: file patterns within the packages; the standard library's paths start in it.
        exclude: file patterns to leave out of those.
        content: what to take of a package file: `text` as it is, `code` without its leading
            licence comment, or the `docstrings` of Python files.
        column: the text column of data that has columns: all but .txt and packages.
        columns: several of them instead, joined by a blank line.
        where: conditions that a row must meet, each on a field of the row, dotted where it lies
            within another: `meta.pile_set_name=ArXiv`, `language!=en`, `score>=0.8`, `age<=3`.
            With `=` and `!=`, what is no text is compared as JSON writes it, dates and decimals
            as they are written without quotes: `2020-01-31`, `1.50`.
        min_characters, max_characters: leave out documents that are shorter, or longer; 0: none.
        sample_by: what one document of a .txt file is: the whole `document`, a `paragraph` or
            a `line`; `auto` takes whole files where there are many small ones, else paragraphs.
        encoding: of .txt and .jsonl files.
        max_bytes: stop after this many bytes of documents; 0 takes all. Where validation has
            files or a split of its own, these are bounded by `validation_max_bytes` alone.
    """

    files: list[str] = field(default_factory=list)
    validation_files: list[str] = field(default_factory=list)
    hub: str = ""
    hub_config: str = ""
    hub_split: str = "train"
    hub_validation_split: str = ""
    hub_files: list[str] = field(default_factory=list)
    hub_where: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    include: list[str] = field(default_factory=lambda: ["*.py"])
    exclude: list[str] = field(default_factory=list)
    content: str = "text"
    column: str = "text"
    columns: list[str] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    min_characters: int = 0
    max_characters: int = 0
    sample_by: str = "auto"
    encoding: str = "utf-8"
    max_bytes: int = 0


D = TypeVar("D", bound=DataConfig)


@dataclass(frozen=True)
class SourceConfig(DataConfig):
    """One of several sources of a silo's text.

    Attributes:
        weight: this over the sum of all is the source's share of the training text's bytes; 0
            for all of them: each is read once, so that their shares are by their size.
    """

    weight: float = 0.0


@dataclass(frozen=True)
class SiloConfig(DataConfig):
    """A silo: its documents, from a place of its own or from several `sources`; its tokenizer.

    Attributes:
        sources: by name. With weights, one that has less text than its share is read again from
            its beginning; nothing is cut, unless by max_bytes: then a source is read up to its
            share of that.
        tokenizer: a SentencePiece file, a Hugging Face folder or name; empty: trained on the
            silo's text, or the recipe's shared one.
        vocab_size: pieces of a tokenizer that is trained; 0 takes the recipe's.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: str = ""
    vocab_size: int = 0

    @property
    def shares(self) -> dict[str, float]:
        """Of the training text, by the sources' names, sorted; empty where none has a weight."""
        total = sum(source.weight for source in self.sources.values())
        return {n: self.sources[n].weight / total for n in sorted(self.sources)} if total else {}


@dataclass(frozen=True)
class ModelConfig:
    """A transformers causal LM: a preset of conf/models, a config of one's own, or both; or an
    open model that is trained on (`start.py`).

    Attributes:
        preset: name of a file in conf/models, or the path of such a file.
        config: keyword arguments of the transformers config, `model_type` among them; they
            go over those of the preset. Vocabulary and sequence length are filled in.
        start: a Hugging Face folder or name, whose config is the model's and whose body is the
            run's first; its vocabulary too, where the tokenizer is shared and none is named.
        start_embeddings: those of another vocabulary than its own are `random`, or made of its
            own without training: `copy` takes rows of pieces that write the same and draws the
            others like them, `mix` mixes the others from rows of similar pieces. `random` draws
            those of its own vocabulary anew too.
        start_fingerprint: of its files, filled in; a silo that reads others is refused.
    """

    preset: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    start_embeddings: str = "copy"
    start_fingerprint: str = ""

    @property
    def gives_embeddings(self) -> bool:
        """Whether embeddings start from those of an open model."""
        return bool(self.start_fingerprint) and self.start_embeddings != "random"

    def __hash__(self) -> int:
        return hash(frozenset(self.config))  # so that what follows from a model can be kept


@dataclass(frozen=True)
class InnerConfig:
    """A silo's own training: AdamW with warm-up and cosine over all rounds (paper, section 3).

    Attributes:
        optimizer: `adamw` for all parameters, or `muon` (torch's own) for the body's matrices
            and AdamW for the rest.
        learning_rate: the highest, behind the warm-up.
        embedding_learning_rate: highest rate of the embeddings; null: `learning_rate`.
        rewarm_steps: steps at the beginning of each round but the first over which the rate
            comes up to its schedule.
        local_steps: N_local, optimiser steps of a silo in one round.
        batch_size: sequences in one step.
        micro_batch_size: sequences in one forward pass of one process (gradient accumulation);
            0: all that a process has of a batch.
        betas: of AdamW's moments.
        weight_decay: decoupled, of matrices; norms and biases do not decay.
        warmup_steps: steps of the whole run over which the rate rises from 0.
        final_learning_rate_fraction: share of the highest rate that the cosine ends at.
        clip_norm: gradients are scaled down to this norm.
        state: `keep` the optimiser's moments on the silo between rounds, or `reset` them.
        precision: of forward and backward pass: `auto` is bf16 on a GPU that has it, else fp32.
        newcomer_steps: steps with the body frozen that a silo with fresh embeddings of its own
            takes before its first round, if that is not round 1: a trained body would otherwise
            first be pulled towards random embeddings.
    """

    local_steps: int = 24
    batch_size: int = 16
    micro_batch_size: int = 0
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    embedding_learning_rate: float | None = None
    rewarm_steps: int = 0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    warmup_steps: int = 20
    final_learning_rate_fraction: float = 0.1
    clip_norm: float = 1.0
    state: str = "keep"
    precision: str = "auto"
    newcomer_steps: int = 0

    @property
    def sequences_per_pass(self) -> int:
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True)
class OuterConfig:
    """The server's optimiser on the averaged delta, torch's own.

    Attributes:
        optimizer: `average` (SGD 1.0 without momentum: plain averaging, as in the paper),
            `nesterov` (DiLoCo's 0.7 and 0.9) or `adam`.
        learning_rate, momentum: null takes the optimiser's own default given above.
        embedding_learning_rate: of the token embeddings in GLOB and TRIM; null: `learning_rate`.
        merge: how deltas become one: the `mean` (paper), or for federations that do not trust
            every silo, coordinate by coordinate, the `median` or the `trimmed-mean`.
        betas, epsilon: of `adam`.
        trim_fraction: share of the silos that the trimmed mean drops at either end.
        clip_delta: a silo's delta is scaled down to this many times the running median of the
            norms of deltas merged before; 0 never does.
    """

    optimizer: str = "average"
    merge: str = "mean"
    trim_fraction: float = 0.2
    clip_delta: float = 4.0
    learning_rate: float | None = None
    embedding_learning_rate: float | None = None
    momentum: float | None = None
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    epsilon: float = 1e-3


@dataclass(frozen=True)
class WireConfig:
    """What travels between silos and server, and as what (`codec.py`).

    Attributes:
        up: codec of the silos' deltas: `fp32` as in the paper, `bf16`, `int8` or `int4`.
        error_feedback: whether a silo keeps what the codec lost and adds it to its next delta.
        down: codec of the body's (and embeddings') change since the round before. `fp32` without
            fragments sends them whole; else they go whole, in fp32, where a silo does not have
            those of the round before (its first round, one that it missed, a server that was
            started again), and in the end.
        fragments: parts of the body that are synchronised in turn, one a round, and all in the
            last (Streaming DiLoCo, Douillard et al. 2025); of the others each silo trains its own.
            1 synchronises the whole body in each round. With silos_per_round few silos have been
            in the round before, and most get the body whole.
    """

    up: str = "fp32"
    error_feedback: bool = True
    down: str = "fp32"
    fragments: int = 1

    @property
    def sends_changes(self) -> bool:
        """Whether what comes down builds on what the silo has of the round before."""
        return self.down != "fp32" or self.fragments > 1


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on but its paths. Sent to the silos as JSON with each message.

    Attributes:
        name: of the run; the folder of a new one begins with it.
        seed: of everything that is drawn: parameters, batches, sampled silos, text.
        variant: `glob`, `trim` or `spec` (paper, section 2).
        tokenizer: `own` (one for each silo; with `spec` this is the paper's SPEC-OPT) or
            `shared`.
        shared_tokenizer: a SentencePiece file, a Hugging Face folder or name. Empty: that of
            `model.start`, or trained over the text of all silos, which only a simulation can do.
        vocab_size: pieces of a tokenizer that is trained here.
        shared_vocab_size: the same of the shared one; 0 takes `vocab_size`.
        tokenizer_train_bytes: how much text a tokenizer is trained on.
        sequence_tokens: L, tokens in one training sequence.
        validation_fraction: share of a silo's documents kept for validation, where no files and
            no split of its own are.
        validation_max_bytes: but no more than so much text.
        silos: the silos of a simulation by name. In a deployment every silo is described by a
            file of its own (`silo_file.py`) and this is not read.
        only: restricts a run to some silos.
        without: silos that take no part any more, such as a partner that left; may change on
            resume.
        min_silos: a deployment's first round waits for so many silos.
        rounds: T, how often the silos' work is merged.
        silos_per_round: how many silos are sampled for a round; 0 = all.
        quorum: least fraction of the sampled silos whose updates a round needs.
        patience: a deployment's round that has its quorum waits for the other silos until this
            many times what the quorum took have passed, and not at all for those that are lost.
        round_attempts: how often silos without an accepted update are asked in a round below
            the quorum before the run stops.
        round_timeout_s: how long the server waits for a silo, and the silo may work; in
            simulation, where silos queue for the machine, for each silo of the round.
        largest_delta: a silo's delta is refused if its norm is over this many times the running
            median of the norms merged before.
        deduplicate: whether documents that came before, but for white space, are dropped.
        near_duplicates: also those whose similarity to one before, by the words in a row that
            they share (an estimate of the Jaccard index), is at least this; 0 drops none.
        evaluate_every: silos evaluate the body that arrives in round 1 and every so many rounds
            behind it; the final body always.
        keep_best: whether each silo keeps the best model that it has evaluated (and the server, in
            GLOB and TRIM, the best body and embeddings) beside the last; `dept export --round
            best` takes it. Costs disk, and a write whenever an evaluation is the best so far.
        device: `auto` takes a GPU where there is one.
        processes: that share each step of a silo's training, one on each of its GPUs; they give
            what one would give. Evaluation is the first GPU's.
        parallel: how they share it: `ddp`, with the whole model on each GPU, or `fsdp`, with a
            part of it on each.
        share_samples: whether silos send text that their model wrote to the server; null
            means yes in simulation; in a deployment the silo's file decides.
        sample_tokens: length of that text.
        arms: what arms of a comparison (`dept compare`) have of their own, such as
            ``["std-* inner.learning_rate=4e-3"]``; nothing else reads it.
        trackers: that show a run's figures besides `metrics.jsonl` (`trackers.py`), each an extra
            to install: `tensorboard`, `wandb`, `mlflow`, `trackio`.
    """

    name: str = "run"
    seed: int = 1
    variant: str = "spec"
    tokenizer: str = "own"
    shared_tokenizer: str = ""
    vocab_size: int = 4096
    shared_vocab_size: int = 0
    tokenizer_train_bytes: int = 4_000_000
    sequence_tokens: int = 128
    rounds: int = 10
    silos_per_round: int = 0
    quorum: float = 1.0
    patience: float = 2.0
    round_attempts: int = 2
    round_timeout_s: float = 3600.0
    largest_delta: float = 100.0
    model: ModelConfig = field(default_factory=ModelConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    silos: dict[str, SiloConfig] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    min_silos: int = 1
    validation_fraction: float = 0.05
    validation_max_bytes: int = 200_000
    evaluate_every: int = 1
    keep_best: bool = True
    deduplicate: bool = True
    near_duplicates: float = 0.0
    device: str = "auto"
    processes: int = 1
    parallel: str = "ddp"
    share_samples: bool | None = None
    sample_tokens: int = 64
    arms: list[str] = field(default_factory=list)
    trackers: list[str] = field(default_factory=list)

    @property
    def silo_names(self) -> list[str]:
        """The silos of a simulation, sorted, so that their order never depends on a file's."""
        return sorted(set(self.only or self.silos) - set(self.without))

    @property
    def total_steps(self) -> int:
        """T * N_local: the length of a silo's learning-rate schedule."""
        return self.rounds * self.inner.local_steps

    @property
    def round_tokens(self) -> int:
        """Tokens that a silo trains on in one round."""
        return self.inner.local_steps * self.inner.batch_size * self.sequence_tokens

    @property
    def first_model(self) -> int:
        """The first round whose body is a model: round 0 has a drawn one, or an open model's."""
        # Not `start`, which at a partner is the partner's own word.
        return 0 if self.model.start_fingerprint else 1

    def evaluates(self, rounds_done: int) -> bool:
        """Whether the body is evaluated behind so many rounds."""
        return rounds_done % self.evaluate_every == 0 or rounds_done == self.rounds

    def fragments_due(self, round_: int) -> list[int]:
        """The fragments of the body that are synchronised in a round, from 0."""
        count = self.wire.fragments
        return list(range(count)) if round_ >= self.rounds else [(round_ - 1) % count]

    @property
    def own_tokenizers(self) -> bool:
        return self.tokenizer == "own"

    @property
    def common_tokenizer(self) -> str:
        """The one that silos share, where the recipe tells."""
        return self.shared_tokenizer or self.model.start

    @property
    def label(self) -> str:
        """The variant as the paper names it."""
        return "spec-opt" if self.variant == "spec" and self.own_tokenizers else self.variant

    def to_json(self) -> str:
        return self._json

    @functools.cached_property
    def _json(self) -> str:  # goes with every message
        return json.dumps(asdict(self), sort_keys=True)


def load_recipe(path: str | Path, overrides: str = "", folder: Path | None = None) -> Recipe:
    """Read a recipe and apply overrides such as ``"variant=trim inner.local_steps=8"``.

    A relative path is looked up in `folder`, the working directory if None, then beside
    `conf/`. Relative data paths in the file are relative to the file.

    Raises:
        ConfigError: listing every problem found, each with its value and the mend.
    """
    file = _find_recipe(_expanded(str(path)), folder or Path.cwd())
    problems: list[str] = []
    settings = list(_leaves(read_yaml(file, problems)))
    settings += _overrides(overrides, problems)
    recipe = _build(settings, problems)
    written_out = _with_start if recipe.model.start else _with_preset
    model = written_out(recipe.model, file.parent, problems)
    if problems:
        raise ConfigError(problems)
    return _resolve_paths(replace(recipe, model=model), file.parent)


@functools.lru_cache(maxsize=2)  # a simulation's worker gets the same one in each message
def recipe_from_json(text: str) -> Recipe:
    """The recipe that the server sent. Interpolations are refused: they would read this host.

    Raises:
        ConfigError: it is no recipe, or one with problems.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"a recipe from the server is not JSON: {error}"]) from error
    if not isinstance(tree, dict):
        raise ConfigError(["a recipe from the server is not a mapping of settings"])
    if "${" in json.dumps(tree, ensure_ascii=False):  # JSON can spell the '$' in several ways
        raise ConfigError(["a recipe from the server may not hold '${': write the value itself"])
    problems: list[str] = []
    recipe = _build(list(_leaves(tree)), problems)
    if problems:
        raise ConfigError(problems)
    return recipe


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with some settings by dotted name replaced, checked as a whole.

    Raises:
        ConfigError: listing every problem found.
    """
    problems: list[str] = []
    made = _build([*_leaves(asdict(recipe)), *settings.items()], problems)
    if problems:
        raise ConfigError(problems)
    return made


def assignments(overrides: str) -> dict[str, Any]:
    """Overrides such as ``"variant=trim rounds=4"`` as settings by dotted name.

    Raises:
        ConfigError: listing every word that is none, or tells of an open model: to read that
            takes a recipe's file (`load_recipe`).
    """
    problems: list[str] = []
    found = dict(_overrides(overrides, problems))
    problems += [
        f"{key}={value!r}: what a run starts from is read with its recipe, for `dept adapt` it "
        "is --start; set it there"
        for key, value in found.items()
        if key.startswith("model.start")
    ]
    if problems:
        raise ConfigError(problems)
    return found


def require_silos(recipe: Recipe) -> None:
    """A simulation takes its silos from the recipe: raise ConfigError where it names none."""
    if not recipe.silos:
        raise ConfigError(["silos: none; name at least one, such as silos.fr.files=['fr/*.txt']"])


def by_name(recipe: Recipe) -> dict[str, Any]:
    """All settings by dotted name."""
    return dict(_leaves(asdict(recipe)))


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The settings in which two recipes differ, as lines ``key: old -> new``."""
    a, b = by_name(old), by_name(new)
    keys = sorted(a.keys() | b.keys())
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in keys if a.get(k) != b.get(k)]


def _find_recipe(path: Path, folder: Path) -> Path:
    tried = [path] if path.is_absolute() else [folder / path, CONF_DIR.parent / path]
    for candidate in tried:
        if _is_file(candidate):
            return candidate.resolve()
    have = ", ".join(sorted(f"conf/{p.name}" for p in CONF_DIR.glob("*.yaml")))
    raise ConfigError([f"recipe={str(path)!r}: no such file; recipes that come along: {have}"])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, a folder that may not be read
        return False


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~ of a user that this machine does not have
        return Path(path)


def read_yaml(file: Path, problems: list[str]) -> Mapping[str, Any]:
    """The mapping in a YAML file, interpolations resolved; adds to `problems` if there is none."""
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except Exception as error:  # any YAML or interpolation error, of several libraries
        problems.append(f"{file}: not readable as YAML: {_one_line(error)}")
        return {}
    if not isinstance(loaded, dict):
        problems.append(f"{file}: expected a mapping of settings at the top")
        return {}
    return cast(Mapping[str, Any], loaded)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _overrides(text: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    for word in _words(text, problems):
        key, found, value = word.partition("=")
        if key and found:
            assigned = yaml_value(value)
            whole = isinstance(assigned, Mapping) and "model_type" in assigned
            if key == "model.config" and whole:
                yield key, None  # another model: nothing of the one before may stay
            yield from _leaves({key: assigned})
        else:
            problems.append(f"override {word!r}: expected key=value, such as rounds=4")


def _words(overrides: str, problems: list[str]) -> list[str]:
    try:
        return shlex.split(overrides)
    except ValueError as error:
        problems.append(f"overrides={overrides!r}: {error}; quote the value")
        return []


def yaml_value(text: str) -> Any:
    """The value of a setting as people type it."""
    if not text:  # `key=` empties a setting; null is written out
        return ""
    try:
        return OmegaConf.to_container(OmegaConf.create(f"v: {text}"))["v"]  # type: ignore[index,call-overload]
    except Exception:  # not YAML: the type check of the setting will say what is wrong
        return text


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        # A model's config is transformers' own vocabulary, and its values may be mappings.
        if isinstance(value, Mapping) and value and not prefix.startswith("model.config"):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _build(settings: list[tuple[str, Any]], problems: list[str]) -> Recipe:
    """The recipe, adding to `problems`; a setting that has one keeps its default."""
    config = _writable(OmegaConf.structured(Recipe))
    for key, value in settings:
        for problem in _assign(config, key, value):
            if problem not in problems:
                problems.append(problem)
    try:
        recipe = cast(Recipe, OmegaConf.to_object(config))
    except (OmegaConfBaseException, RecursionError) as error:  # '???', '${...}'
        key = getattr(error, "full_key", None) or "overrides"
        missing = isinstance(error, MissingMandatoryValue)
        reason = "'???' means no value" if missing else str(error).partition("\n")[0]
        raise ConfigError([*problems, f"{key}: {reason}; write the value itself"]) from error
    # Contradictions with settings that could not be read would only confuse.
    checks = (_choices, _ranges) if problems else (contradictions,)
    for check in checks:
        problems += check(recipe)
    return recipe


def _assign(config: DictConfig, key: str, value: Any) -> Iterator[str]:
    unknown = _unknown_key(key)
    if unknown:
        yield unknown
        return
    try:
        _have_nodes(config, key)
        if (key in _MAPPINGS or _is_sources(key)) and value in (None, {}):
            OmegaConf.update(config, key, {}, merge=False)
            return
        if _is_nested(value) and not key.startswith("model.config"):
            raise ValidationError  # which OmegaConf lets through in a list[str]
        OmegaConf.update(config, key, value, force_add=True)
    except (OmegaConfBaseException, RecursionError):
        yield f"{key}={value!r}: must be {_expected(key)}"


def _have_nodes(config: DictConfig, key: str) -> None:
    """The silo, and the source of it, that a setting is of."""
    first, *rest = key.split(".")
    if first != "silos" or len(rest) < 2:
        return
    if rest[0] not in config.silos:
        config.silos[rest[0]] = _writable(OmegaConf.structured(SiloConfig))
    sources = config.silos[rest[0]].sources
    if rest[1] == "sources" and len(rest) > 2 and rest[2] not in sources:
        sources[rest[2]] = _writable(OmegaConf.structured(SourceConfig))


def _is_sources(key: str) -> bool:
    """Whether this is the setting that holds a silo's sources."""
    first, *rest = key.split(".")
    return first == "silos" and rest[1:] == ["sources"]


def _is_nested(value: Any) -> bool:
    """Whether this is a list of anything but plain values."""
    return isinstance(value, list) and any(
        each is None or isinstance(each, list | Mapping) for each in value
    )


def _writable(config: Any) -> DictConfig:
    # OmegaConf makes the node of a frozen dataclass read-only, each on its own.
    OmegaConf.set_readonly(config, False)
    for key in config:
        if OmegaConf.is_dict(config[key]):
            _writable(config[key])
    return cast(DictConfig, config)


_MAPPINGS = ("silos", "model.config")
_GROUPS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "inner": InnerConfig,
    "outer": OuterConfig,
    "wire": WireConfig,
}
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list[str]": "a list, such as [a, b]",
    "list[float]": "a list of numbers, such as [0.9, 0.95]",
    "dict[str, SiloConfig]": "a mapping of silos by name",
    "dict[str, SourceConfig]": "a mapping of sources by name, such as {web: {files: ['*.txt']}}",
    "dict[str, Any]": "a mapping of settings",
}


def _names(owner: type[Any]) -> list[str]:
    return [f.name for f in fields(owner)]


def _expected(key: str) -> str:
    """What a known setting takes, in words."""
    first, *rest = key.split(".")
    owner: type[Any] = Recipe
    name = first
    if first == "silos" and rest:
        owner = SourceConfig if rest[1] == "sources" and len(rest) > 2 else SiloConfig
        name = rest[-1]
    elif first in _GROUPS:
        owner, name = _GROUPS[first], rest[0]
    kind = next(str(f.type) for f in fields(owner) if f.name == name)
    optional = " or null" if kind.endswith(" | None") else ""
    return _EXPECTED[kind.removesuffix(" | None")] + optional


def _unknown_key(key: str) -> str:
    first, *rest = key.split(".")
    if first == "silos" and rest:
        return _unknown_in_silos(key, rest)
    if first in _GROUPS and not rest:
        known = ", ".join(_names(_GROUPS[first]))
        return f"{key}: this is a group of settings; name one of {known}"
    path, deeper = (f"{first}.{rest[0]}", rest[1:]) if first in _GROUPS else (first, rest)
    if path not in setting_names():
        return f"{key}: no such setting{_hint(path)}"
    if deeper and (path not in _MAPPINGS or "" in deeper):
        return f"{key}: no such setting; {path} is {_expected(path)}"
    return ""


def setting_names() -> list[str]:
    """The settings of a recipe by dotted name."""
    grouped = [f"{group}.{name}" for group, owner in _GROUPS.items() for name in _names(owner)]
    return [name for name in _names(Recipe) if name not in _GROUPS] + grouped


def _hint(path: str) -> str:
    known = setting_names()
    name = path.rpartition(".")[2]
    elsewhere = [k for k in known if k.rpartition(".")[2] == name]
    close = elsewhere or difflib.get_close_matches(path, known, n=1)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    group = path.partition(".")[0]
    owner = _GROUPS.get(group, Recipe)
    return f"; known: {', '.join(_names(owner))}"


def _unknown_in_silos(key: str, rest: list[str]) -> str:
    what, example, owner = "silo", "files: ['data/*.txt']", _names(SiloConfig)
    if len(rest) > 2 and rest[1] == "sources":
        if not SILO_NAME.fullmatch(rest[0]):
            return _bad_name(f"silos.{rest[0]}", rest[0], what)
        what, owner, rest = "source", _names(SourceConfig), rest[2:]
    if len(rest) == 1:
        return f"{key}: a {what} needs a mapping, such as {{{example}}}"
    name, setting = ".".join(rest[:-1]), rest[-1]
    if setting in owner:
        return "" if SILO_NAME.fullmatch(name) else _bad_name(key.rpartition(".")[0], name, what)
    close = difflib.get_close_matches(rest[1], owner, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(owner)}"
    return f"{key}: no such setting of a {what}{hint}"


def _bad_name(key: str, name: str, what: str) -> str:
    quote = "; quote a name that YAML takes for true or false" if name in ("True", "False") else ""
    return (
        f"{key}: a {what}'s name has lower-case letters, digits, '-' and '_' only, "
        f"at most 64, and starts with a letter or digit{quote}"
    )


def contradictions(recipe: Recipe) -> Iterator[str]:
    """Every problem of a well-typed recipe, one line each."""
    yield from _choices(recipe)
    yield from _ranges(recipe)
    if not RUN_NAME.fullmatch(recipe.name):
        yield (
            f"name={recipe.name!r}: it becomes part of a folder's name; 1 to 100 characters "
            "without '/' and '\\', the first no '.' or space"
        )
    if recipe.own_tokenizers and recipe.variant in ("glob", "trim"):
        yield (
            f"variant={recipe.variant} with tokenizer=own: its embeddings are averaged, which "
            "needs one vocabulary; set tokenizer=shared, or variant=spec"
        )
    if recipe.own_tokenizers and recipe.shared_tokenizer:
        yield (
            f"shared_tokenizer={recipe.shared_tokenizer!r} with tokenizer=own: "
            "set tokenizer=shared to use it"
        )
    kind = recipe.model.config.get("model_type", recipe.model.preset or recipe.model.start)
    if not isinstance(kind, str) or not kind:
        yield (
            "model: set model.preset (a file of conf/models), model.config.model_type, or "
            "model.start"
        )
    if recipe.model.start_embeddings != ModelConfig.start_embeddings and not (
        recipe.model.start or recipe.model.start_fingerprint
    ):
        yield (
            f"model.start_embeddings={recipe.model.start_embeddings!r}: nothing without "
            "model.start; set that too"
        )
    yield from _shares(recipe)
    if recipe.near_duplicates and not recipe.deduplicate:
        yield (
            f"near_duplicates={recipe.near_duplicates} with deduplicate=false: copies would stay "
            "and what is nearly one go; set deduplicate=true, or near_duplicates=0"
        )
    if recipe.inner.warmup_steps > recipe.total_steps > 0:
        yield (
            f"inner.warmup_steps={recipe.inner.warmup_steps}: longer than the whole schedule of "
            f"rounds*inner.local_steps={recipe.total_steps} steps"
        )
    if recipe.outer.momentum is not None and recipe.outer.optimizer != "nesterov":
        yield (
            f"outer.momentum={recipe.outer.momentum} with outer.optimizer="
            f"{recipe.outer.optimizer}: only nesterov takes it"
        )
    yield from _silos(recipe)


def _shares(recipe: Recipe) -> Iterator[str]:
    """Batches that do not divide over processes and passes."""
    inner, processes = recipe.inner, recipe.processes
    batch, micro = inner.batch_size, inner.micro_batch_size
    if batch < 1 or micro < 0 or processes < 1:
        return  # told by `_ranges`
    of = f"inner.batch_size={batch}"
    if batch % processes:
        yield f"processes={processes}: must divide {of}"
    elif micro and batch // processes % micro:
        over = f" over processes={processes}" if processes > 1 else ""
        yield f"inner.micro_batch_size={micro}: must divide {of}{over}"
    if processes > 1 and recipe.parallel == "fsdp" and inner.optimizer == "muon":
        yield (
            "parallel=fsdp with inner.optimizer=muon: it needs whole matrices; set parallel=ddp or "
            "inner.optimizer=adamw"
        )


def _choices(recipe: Recipe) -> Iterator[str]:
    for key, value, allowed in (
        ("variant", recipe.variant, VARIANTS),
        ("tokenizer", recipe.tokenizer, TOKENIZERS),
        ("model.start_embeddings", recipe.model.start_embeddings, STARTS),
        ("device", recipe.device, DEVICES),
        ("parallel", recipe.parallel, PARALLEL),
        ("inner.optimizer", recipe.inner.optimizer, INNER_OPTIMIZERS),
        ("inner.state", recipe.inner.state, INNER_STATES),
        ("inner.precision", recipe.inner.precision, PRECISIONS),
        ("outer.optimizer", recipe.outer.optimizer, OUTER_OPTIMIZERS),
        ("outer.merge", recipe.outer.merge, MERGES),
        ("wire.up", recipe.wire.up, CODECS),
        ("wire.down", recipe.wire.down, CODECS),
        *(("trackers", name, TRACKERS) for name in recipe.trackers),
    ):
        if value not in allowed:
            yield f"{key}={value!r}: must be one of {', '.join(allowed)}"


def _ranges(recipe: Recipe) -> Iterator[str]:
    at_least = (
        ("rounds", recipe.rounds, 1),
        ("vocab_size", recipe.vocab_size, LEAST_PIECES),
        ("tokenizer_train_bytes", recipe.tokenizer_train_bytes, 1000),
        ("sequence_tokens", recipe.sequence_tokens, 2),
        ("silos_per_round", recipe.silos_per_round, 0),
        ("min_silos", recipe.min_silos, 1),
        ("round_attempts", recipe.round_attempts, 1),
        ("sample_tokens", recipe.sample_tokens, 0),
        ("validation_max_bytes", recipe.validation_max_bytes, 1),
        ("evaluate_every", recipe.evaluate_every, 1),
        ("processes", recipe.processes, 1),
        ("inner.local_steps", recipe.inner.local_steps, 1),
        ("inner.batch_size", recipe.inner.batch_size, 1),
        ("inner.micro_batch_size", recipe.inner.micro_batch_size, 0),
        ("inner.warmup_steps", recipe.inner.warmup_steps, 0),
        ("inner.rewarm_steps", recipe.inner.rewarm_steps, 0),
        ("inner.newcomer_steps", recipe.inner.newcomer_steps, 0),
        ("wire.fragments", recipe.wire.fragments, 1),
    )
    for key, value, least in at_least:
        if value < least:
            yield f"{key}={value}: must be at least {least}"
    # In the comparisons below nan is out of range too.
    above_zero = (
        ("quorum", recipe.quorum, 1.0),
        ("validation_fraction", recipe.validation_fraction, 0.9),
        ("inner.learning_rate", recipe.inner.learning_rate, 10.0),
        ("inner.embedding_learning_rate", recipe.inner.embedding_learning_rate, 10.0),
        ("inner.clip_norm", recipe.inner.clip_norm, 1e9),
        ("round_timeout_s", recipe.round_timeout_s, 1e7),
        ("largest_delta", recipe.largest_delta, 1e9),
        ("outer.learning_rate", recipe.outer.learning_rate, 10.0),
        ("outer.embedding_learning_rate", recipe.outer.embedding_learning_rate, 100.0),
        ("outer.epsilon", recipe.outer.epsilon, 1.0),
    )
    for key, number, high in above_zero:
        if number is not None and not 0.0 < number <= high:
            yield f"{key}={number}: must be above 0 and at most {high:g}"
    from_zero = (
        ("inner.weight_decay", recipe.inner.weight_decay, 100.0),
        ("inner.final_learning_rate_fraction", recipe.inner.final_learning_rate_fraction, 1.0),
        ("outer.clip_delta", recipe.outer.clip_delta, 1e9),
    )
    for key, number, high in from_zero:
        if not 0.0 <= number <= high:
            yield f"{key}={number}: must be from 0 to {high:g}"
    if recipe.near_duplicates and not 0.5 <= recipe.near_duplicates <= 1.0:
        yield f"near_duplicates={recipe.near_duplicates}: must be 0, or from 0.5 to 1"
    if not 1.0 <= recipe.patience <= 1e6:
        yield f"patience={recipe.patience}: must be from 1 to 1e+06"
    momentum = recipe.outer.momentum
    if momentum is not None and not 0.0 <= momentum < 1.0:
        yield f"outer.momentum={momentum}: must be from 0 to below 1"
    if not 0.0 <= recipe.outer.trim_fraction < 0.5:
        yield f"outer.trim_fraction={recipe.outer.trim_fraction}: must be from 0 to below 0.5"
    for key, betas in (("inner.betas", recipe.inner.betas), ("outer.betas", recipe.outer.betas)):
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            yield f"{key}={list(betas)}: must be two numbers from 0 to below 1"


def _silos(recipe: Recipe) -> Iterator[str]:
    for name, source in recipe.silos.items():
        yield from (f"silos.{name}{problem}" for problem in source_problems(source))
    for key, names in (("only", recipe.only), ("without", recipe.without)):
        for name in names:
            if recipe.silos and name not in recipe.silos:
                yield f"{key}={name!r}: no such silo; silos: {', '.join(sorted(recipe.silos))}"
            elif not SILO_NAME.fullmatch(name):
                yield _bad_name(f"silos.{name}", name, "silo")
        if len(set(names)) < len(names):
            yield f"{key}={list(names)}: names a silo twice; name each once"
    if recipe.silos and not recipe.silo_names:
        yield f"without={list(recipe.without)}: leaves no silo"
    elif recipe.silos and recipe.silos_per_round > len(recipe.silo_names):
        yield (
            f"silos_per_round={recipe.silos_per_round}: the run has only "
            f"{len(recipe.silo_names)} silos; 0 samples all"
        )


def source_problems(silo: SiloConfig) -> Iterator[str]:
    """Problems of one silo's data, each a line that starts with the setting's name."""
    kinds = [key for key in ("files", "hub", "packages", "sources") if getattr(silo, key)]
    if len(kinds) != 1:
        given = ", ".join(kinds) or "none"
        yield f": set exactly one of files, hub, packages, sources (set: {given})"
    yield from _data_problems(silo)
    if silo.sources:
        yield from _sources_problems(silo)
    if silo.vocab_size and silo.vocab_size < LEAST_PIECES:
        yield f".vocab_size={silo.vocab_size}: must be at least {LEAST_PIECES}, or 0"


def _sources_problems(silo: SiloConfig) -> Iterator[str]:
    plain = DataConfig(files=silo.files, hub=silo.hub, packages=silo.packages)
    for key in _names(DataConfig):
        if key != "max_bytes" and (given := getattr(silo, key)) != getattr(plain, key):
            yield f".{key}={given!r}: belongs to a source; move it to sources.NAME.{key}"
    for name, source in sorted(silo.sources.items()):
        kinds = [key for key in ("files", "hub", "packages") if getattr(source, key)]
        if len(kinds) != 1:
            given = ", ".join(kinds) or "none"
            yield f".sources.{name}: set exactly one of files, hub, packages (set: {given})"
        yield from (f".sources.{name}{problem}" for problem in _data_problems(source))
        if not 0.0 <= source.weight <= 1e6:
            yield f".sources.{name}.weight={source.weight}: must be from 0 to 1e+06"
    without = sorted(name for name, source in silo.sources.items() if not source.weight)
    if 0 < len(without) < len(silo.sources):
        yield (
            f".sources.{without[0]}.weight=0.0: other sources have one; give all a weight, or none"
        )
    elif without and silo.max_bytes:
        yield (
            f".max_bytes={silo.max_bytes}: of which source? give each a weight, or a max_bytes of "
            "its own"
        )


def _data_problems(source: DataConfig) -> Iterator[str]:
    if source.content not in CONTENTS:
        yield f".content={source.content!r}: must be one of {', '.join(CONTENTS)}"
    if source.sample_by not in SAMPLE_BY:
        yield f".sample_by={source.sample_by!r}: must be one of {', '.join(SAMPLE_BY)}"
    yield from _misplaced(source)
    yield from _hub_problems(source)
    yield from _where_problems(source)
    if "" in (*source.files, *source.validation_files, *source.packages):
        yield ": an empty path or package name; fill it in or remove it"
    if not _is_encoding(source.encoding):
        yield f".encoding={source.encoding!r}: no such text encoding; utf-8 is the usual one"
    for key in ("min_characters", "max_characters", "max_bytes"):
        if getattr(source, key) < 0:
            yield f".{key}={getattr(source, key)}: must be at least 0 (0 = {_NO_LIMIT[key]})"
    if 0 < source.max_characters < source.min_characters:
        yield (
            f".min_characters={source.min_characters}: above max_characters="
            f"{source.max_characters}, so that no document is left"
        )


_NO_LIMIT = {"min_characters": "none", "max_characters": "none", "max_bytes": "all"}


def _misplaced(source: DataConfig) -> Iterator[str]:
    for key, owner in (
        ("validation_files", "files"),
        ("hub_validation_split", "hub"),
        ("hub_files", "hub"),
        ("hub_where", "hub"),
    ):
        if getattr(source, key) and not getattr(source, owner):
            yield f".{key}={getattr(source, key)!r}: only together with {owner}; remove it"
    for key in ("columns", "where"):
        if getattr(source, key) and source.packages:
            yield f".{key}={getattr(source, key)!r}: only together with files or hub; remove it"


def _where_problems(source: DataConfig) -> Iterator[str]:
    for condition in source.where:
        found = CONDITION.fullmatch(condition)
        if not found:
            yield (
                f".where: {condition!r} is no FIELD=VALUE, FIELD!=VALUE, FIELD>=NUMBER or "
                "FIELD<=NUMBER, such as language=fr or score>=0.8"
            )
        elif found["value"][0] in _SIGNS:
            yield f".where: {_two_signs(condition, **found.groupdict())}"
        elif found["sign"] in (">=", "<=") and not is_number(found["value"]):
            yield f".where: {condition!r}: {found['value']!r} is no number; write one, such as 0.8"


_SIGNS = "=<>"


def _two_signs(condition: str, field: str, sign: str, value: str) -> str:
    """What is wrong with `a==b`, `a!==b` and `a=>1`, where nobody means a value such as `=b`."""
    rest = value.lstrip(_SIGNS) or "VALUE"
    meant = f"{value[0]}=" if sign == "=" and value[0] in "<>" else sign
    return f"{condition!r}: {value!r} begins with a sign; write {field}{meant}{rest}"


def is_number(text: str) -> bool:
    """Whether this can be told to be more or less than another."""
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False


def _hub_problems(source: DataConfig) -> Iterator[str]:
    for key, form, example in (
        ("hub_files", "SPLIT=PATTERN", "validation=val.jsonl.zst"),
        ("hub_where", "FIELD=VALUE", "meta.pile_set_name=ArXiv"),
    ):
        for pair in getattr(source, key):
            parts = pair.partition("=")
            if not all(parts) or parts[2][0] in _SIGNS:
                yield f".{key}: {pair!r} is no {form}, such as {example}"
    if source.hub_validation_split and source.hub_validation_split == source.hub_split:
        yield (
            f".hub_validation_split={source.hub_validation_split!r}: is hub_split too; name "
            "another split, or none to keep a part of that one for validation"
        )


def _is_encoding(name: str) -> bool:
    try:
        " ".encode(name)
    except (LookupError, ValueError):
        return False
    return True


def absolute(path: str, folder: Path) -> str:
    """A path of a file's settings, relative to the folder of that file."""
    return str(folder / _expanded(path))  # an absolute path stands as it is


def _resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    silos = {
        name: replace(
            _with_paths(silo, folder),
            sources={n: _with_paths(source, folder) for n, source in silo.sources.items()},
            tokenizer=path_if_there(silo.tokenizer, folder),
        )
        for name, silo in recipe.silos.items()
    }
    shared = path_if_there(recipe.shared_tokenizer, folder)
    return replace(recipe, silos=silos, shared_tokenizer=shared)


def _with_paths(source: D, folder: Path) -> D:
    return replace(
        source,
        files=[absolute(f, folder) for f in source.files],
        validation_files=[absolute(f, folder) for f in source.validation_files],
    )


def path_if_there(name: str, folder: Path) -> str:
    """The same for what may be a Hugging Face name: it is a path only where one is there."""
    if name and Path(absolute(name, folder)).exists():
        return absolute(name, folder)
    return name


def _with_preset(model: ModelConfig, folder: Path, problems: list[str]) -> ModelConfig:
    """The preset's settings written out, so that a resolved recipe stands alone."""
    preset = model.preset
    if model.start_fingerprint:
        problems.append("model.start_fingerprint: nothing without model.start; set that too")
    if not preset:
        return model
    if preset.endswith((".yaml", ".yml")):
        file = Path(absolute(preset, folder))
    else:
        file = CONF_DIR / "models" / f"{preset}.yaml"
    if not _is_file(file):
        have = ", ".join(sorted(p.stem for p in (CONF_DIR / "models").glob("*.yaml")))
        problems.append(f"model.preset={preset!r}: no such preset; presets: {have}")
        return model
    before = len(problems)
    settings = read_yaml(file, problems)
    config = _over(settings, model.config)
    if len(problems) == before and not config.get("model_type"):
        problems.append(f"{file}: model_type is missing")
    if settings.get("model_type", "") not in ("", config.get("model_type")):
        problems.append(
            f"model.config.model_type={config['model_type']!r}: model.preset={preset!r} is of type "
            f"{settings['model_type']!r}; drop one of them, such as with 'model.config={{}}'"
        )
    return ModelConfig(preset="", config=config)


def _with_start(model: ModelConfig, folder: Path, problems: list[str]) -> ModelConfig:
    """The open model's own settings written out, likewise."""
    from dept_fl.start import written_out  # takes seconds that other recipes need not wait

    if model.preset:
        problems.append(
            f"model.preset={model.preset!r}: model.start={model.start!r} has a config of its own; "
            "drop one of them, such as with 'model.preset='"
        )
        return model
    try:
        return written_out(replace(model, start=path_if_there(model.start, folder)))
    except ConfigError as error:
        problems += error.problems
        return model


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mappings within them merged likewise."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            value = _over(merged[key], value)
        merged[key] = value
    return merged


def home_dir(home: str) -> Path:
    """The home: the run-config's, else $DEPT_HOME, else ~/.dept-fl. Must be absolute."""
    path = _expanded(home or os.environ.get("DEPT_HOME") or "~/.dept-fl")
    if not path.is_absolute():
        raise DeptError(
            f"home={str(path)!r}: must be absolute, since Flower runs the app in another folder"
        )
    return path
