"""The recipe of a run: frozen dataclasses filled by OmegaConf, every problem reported at once."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dept_fl.errors import ConfigError, DeptError

CONF_DIR = Path(__file__).resolve().parents[1] / "conf"
SILO_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

VARIANTS = ("glob", "trim", "spec")
TOKENIZERS = ("own", "shared")
INNER_STATES = ("keep", "reset")
PRECISIONS = ("auto", "fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")
OUTER_OPTIMIZERS = ("average", "nesterov", "adam")
SAMPLE_BY = ("auto", "document", "paragraph", "line")
CONTENTS = ("text", "code", "docstrings")


@dataclass(frozen=True)
class DataSource:
    """Where a silo's documents come from: exactly one of `files`, `hub` and `packages`.

    Attributes:
        files: paths, folders or globs of .txt, .jsonl and .parquet, compressed or not.
        hub: name of a hub data set, streamed; with `hub_config` and `hub_split`.
        packages: installed distributions whose files are read; `stdlib` is Python itself.
        include: file patterns within the packages.
        content: what to take of a package file: `text` as it is, `code` without its leading
            licence comment, or the `docstrings` of Python files.
        column: the text column of JSONL, Parquet and hub data.
        sample_by: what one document of a .txt file is (`datasets`' own words); `auto` takes
            whole files where there are many small ones, else paragraphs.
        max_bytes: stop after this many bytes of documents; 0 takes all.
    """

    files: list[str] = field(default_factory=list)
    hub: str = ""
    hub_config: str = ""
    hub_split: str = "train"
    packages: list[str] = field(default_factory=list)
    include: list[str] = field(default_factory=lambda: ["*.py"])
    content: str = "text"
    column: str = "text"
    sample_by: str = "auto"
    encoding: str = "utf-8"
    max_bytes: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A transformers causal LM: a preset of conf/models, a config of one's own, or both.

    Attributes:
        preset: name of a file in conf/models, or the path of such a file.
        config: keyword arguments of the transformers config, `model_type` among them; they
            go over those of the preset. Vocabulary and sequence length are filled in.
    """

    preset: str = ""
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InnerConfig:
    """A silo's own training: AdamW with warm-up and cosine over all rounds (paper, section 3).

    Attributes:
        local_steps: N_local, optimiser steps of a silo in one round.
        batch_size: sequences in one step.
        micro_batch_size: sequences in one forward pass (gradient accumulation); 0 = batch_size.
        state: `keep` the optimiser's moments on the silo between rounds, or `reset` them.
    """

    local_steps: int = 24
    batch_size: int = 16
    micro_batch_size: int = 0
    learning_rate: float = 2e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    warmup_steps: int = 20
    final_learning_rate_fraction: float = 0.1
    clip_norm: float = 1.0
    state: str = "keep"
    precision: str = "auto"

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
    """

    optimizer: str = "average"
    learning_rate: float | None = None
    momentum: float | None = None
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    epsilon: float = 1e-3


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on but its paths. Sent to the silos as JSON with each message.

    Attributes:
        variant: `glob`, `trim` or `spec` (paper, section 2).
        tokenizer: `own` (one for each silo; with `spec` this is the paper's SPEC-OPT) or
            `shared`.
        shared_tokenizer: a SentencePiece file, a Hugging Face folder or name. Empty: trained
            over the text of all silos, which only a simulation can do.
        vocab_size: pieces of a tokenizer that is trained here.
        sequence_tokens: L, tokens in one training sequence.
        silos: the silos of a simulation by name; `only` restricts a run to some of them.
        silos_per_round: how many silos are sampled for a round; 0 = all.
        quorum: least fraction of the sampled silos whose updates a round needs.
        round_attempts: how often a round below the quorum is tried before the run stops.
        share_samples: whether silos send text that their model wrote to the server; null
            means yes in simulation, no elsewhere.
    """

    name: str = "run"
    seed: int = 1
    variant: str = "spec"
    tokenizer: str = "own"
    shared_tokenizer: str = ""
    vocab_size: int = 4096
    tokenizer_train_bytes: int = 4_000_000
    sequence_tokens: int = 128
    rounds: int = 10
    silos_per_round: int = 0
    quorum: float = 1.0
    round_attempts: int = 2
    round_timeout_s: float = 3600.0
    model: ModelConfig = field(default_factory=ModelConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    silos: dict[str, DataSource] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)
    validation_fraction: float = 0.05
    validation_max_bytes: int = 200_000
    deduplicate: bool = True
    device: str = "auto"
    share_samples: bool | None = None
    sample_tokens: int = 64

    @property
    def silo_names(self) -> list[str]:
        """The silos of this run, sorted, so that their order never depends on a file's."""
        return sorted(self.only or self.silos)

    @property
    def total_steps(self) -> int:
        """T * N_local: the length of a silo's learning-rate schedule."""
        return self.rounds * self.inner.local_steps

    @property
    def tokens_per_round(self) -> int:
        """Tokens that one sampled silo trains on in one round."""
        return self.inner.local_steps * self.inner.batch_size * self.sequence_tokens

    @property
    def own_tokenizers(self) -> bool:
        return self.tokenizer == "own"

    @property
    def label(self) -> str:
        """The variant as the paper names it."""
        return "spec-opt" if self.variant == "spec" and self.own_tokenizers else self.variant

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def load_recipe(path: str | Path, overrides: str = "") -> Recipe:
    """Read a recipe and apply overrides such as ``"variant=trim inner.local_steps=8"``.

    A relative path is looked up in the working directory, then beside `conf/`. Relative data
    paths in the file are relative to the file.

    Raises:
        ConfigError: listing every problem found, each with its value and the mend.
    """
    file = _find_recipe(Path(path))
    problems: list[str] = []
    tree = _read_yaml(file, problems)
    assignments = [(key, value) for key, value in _leaves(tree)]
    for word in _words(overrides, problems):
        key, found, value = word.partition("=")
        if found:
            assignments.append((key, _yaml_value(value)))
        else:
            problems.append(f"override {word!r}: expected key=value, such as rounds=4")
    recipe = _build(assignments, problems)
    return _resolve_paths(recipe, file.parent)


def recipe_from_json(text: str) -> Recipe:
    """The recipe that the server sent. Interpolations are refused: they would read this host."""
    if "${" in text:
        raise ConfigError(["a recipe from the server may not hold '${': write the value itself"])
    return _build(list(_leaves(json.loads(text))), [])


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The settings in which two recipes differ, as lines ``key: old -> new``."""
    a, b = dict(_leaves(asdict(old))), dict(_leaves(asdict(new)))
    keys = sorted(a.keys() | b.keys())
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in keys if a.get(k) != b.get(k)]


def _find_recipe(path: Path) -> Path:
    tried = [path] if path.is_absolute() else [Path.cwd() / path, CONF_DIR.parent / path]
    for candidate in tried:
        if candidate.is_file():
            return candidate.resolve()
    have = ", ".join(sorted(f"conf/{p.name}" for p in CONF_DIR.glob("*.yaml")))
    raise ConfigError([f"recipe={str(path)!r}: no such file; recipes that come along: {have}"])


def _read_yaml(file: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except Exception as error:  # any YAML or interpolation error, of several libraries
        problems.append(f"{file}: not readable as YAML: {error}")
        return {}
    if not isinstance(loaded, dict):
        problems.append(f"{file}: expected a mapping of settings at the top")
        return {}
    return cast(Mapping[str, Any], loaded)


def _words(overrides: str, problems: list[str]) -> list[str]:
    try:
        return shlex.split(overrides)
    except ValueError as error:
        problems.append(f"overrides={overrides!r}: {error}; quote the value")
        return []


def _yaml_value(text: str) -> Any:
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


def _build(assignments: list[tuple[str, Any]], problems: list[str]) -> Recipe:
    config = _writable(OmegaConf.structured(Recipe))
    for key, value in assignments:
        _assign(config, key, value, problems)
    if problems:  # contradictions among half-read settings would only confuse
        raise ConfigError(problems)
    recipe = cast(Recipe, OmegaConf.to_object(config))
    problems = list(contradictions(recipe))
    if problems:
        raise ConfigError(problems)
    return recipe


def _assign(config: DictConfig, key: str, value: Any, problems: list[str]) -> None:
    unknown = _unknown_key(key)
    if unknown:
        problems.append(unknown)
        return
    try:
        if key.startswith("silos.") and key.count(".") == 2:
            name = key.split(".")[1]
            if name not in config.silos:
                config.silos[name] = _writable(OmegaConf.structured(DataSource))
        OmegaConf.update(config, key, value, force_add=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        problems.append(f"{key}={value!r}: {reason}")


def _writable(config: Any) -> DictConfig:
    # OmegaConf makes the node of a frozen dataclass read-only, each on its own.
    OmegaConf.set_readonly(config, False)
    for key in config:
        if OmegaConf.is_dict(config[key]):
            _writable(config[key])
    return cast(DictConfig, config)


def _unknown_key(key: str) -> str:
    parts = key.split(".")
    known: list[str] = [f.name for f in fields(Recipe)]
    owner: Any = Recipe()
    for depth, part in enumerate(parts):
        if part not in known:
            close = difflib.get_close_matches(part, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
            return f"{key}: no such setting ({'.'.join(parts[: depth + 1])!r}){hint}"
        value = getattr(owner, part)
        if part == "silos" and depth == 0:
            if len(parts) == 1:
                return ""
            if len(parts) == 2:
                return f"{key}: a silo needs a mapping, such as {{files: ['data/*.txt']}}"
            return _unknown_in_source(key, parts[2:])
        if not is_dataclass(value):
            return "" if isinstance(value, dict) or depth + 1 == len(parts) else f"{key}: too deep"
        owner, known = value, [f.name for f in fields(value)]
    return f"{key}: this is a group of settings; name one of {', '.join(known)}"


def _unknown_in_source(key: str, parts: list[str]) -> str:
    known = [f.name for f in fields(DataSource)]
    if len(parts) == 1 and parts[0] in known:
        return ""
    close = difflib.get_close_matches(parts[0], known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
    return f"{key}: no such setting of a silo{hint}"


def contradictions(recipe: Recipe) -> Iterator[str]:
    """Every problem of a well-typed recipe, one line each."""
    yield from _choices(recipe)
    yield from _ranges(recipe)
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
    if not recipe.model.preset and "model_type" not in recipe.model.config:
        yield "model: set model.preset (a file of conf/models) or model.config.model_type"
    micro = recipe.inner.sequences_per_pass
    if recipe.inner.batch_size > 0 and (micro < 1 or recipe.inner.batch_size % micro):
        yield (
            f"inner.micro_batch_size={micro}: must divide inner.batch_size="
            f"{recipe.inner.batch_size}"
        )
    if recipe.inner.warmup_steps > recipe.total_steps:
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


def _choices(recipe: Recipe) -> Iterator[str]:
    for key, value, allowed in (
        ("variant", recipe.variant, VARIANTS),
        ("tokenizer", recipe.tokenizer, TOKENIZERS),
        ("device", recipe.device, DEVICES),
        ("inner.state", recipe.inner.state, INNER_STATES),
        ("inner.precision", recipe.inner.precision, PRECISIONS),
        ("outer.optimizer", recipe.outer.optimizer, OUTER_OPTIMIZERS),
    ):
        if value not in allowed:
            yield f"{key}={value!r}: must be one of {', '.join(allowed)}"


def _ranges(recipe: Recipe) -> Iterator[str]:
    at_least = (
        ("rounds", recipe.rounds, 1),
        ("vocab_size", recipe.vocab_size, 300),  # 256 byte pieces, specials, and some pieces
        ("tokenizer_train_bytes", recipe.tokenizer_train_bytes, 1000),
        ("sequence_tokens", recipe.sequence_tokens, 2),
        ("silos_per_round", recipe.silos_per_round, 0),
        ("round_attempts", recipe.round_attempts, 1),
        ("sample_tokens", recipe.sample_tokens, 0),
        ("validation_max_bytes", recipe.validation_max_bytes, 1),
        ("inner.local_steps", recipe.inner.local_steps, 1),
        ("inner.batch_size", recipe.inner.batch_size, 1),
        ("inner.micro_batch_size", recipe.inner.micro_batch_size, 0),
        ("inner.warmup_steps", recipe.inner.warmup_steps, 0),
        ("inner.weight_decay", recipe.inner.weight_decay, 0),
    )
    for key, value, least in at_least:
        if value < least:
            yield f"{key}={value}: must be at least {least}"
    between = (
        ("quorum", recipe.quorum, 0.0, 1.0),
        ("validation_fraction", recipe.validation_fraction, 0.0, 0.9),
        ("inner.learning_rate", recipe.inner.learning_rate, 0.0, 10.0),
        ("inner.clip_norm", recipe.inner.clip_norm, 0.0, 1e9),
        ("round_timeout_s", recipe.round_timeout_s, 0.0, 1e7),
    )
    for key, number, low, high in between:
        if not low < number <= high:
            yield f"{key}={number}: must be above {low:g} and at most {high:g}"
    fraction = recipe.inner.final_learning_rate_fraction
    if not 0.0 <= fraction <= 1.0:
        yield f"inner.final_learning_rate_fraction={fraction}: must be from 0 to 1"
    if recipe.outer.learning_rate is not None and not 0 < recipe.outer.learning_rate <= 10:
        yield f"outer.learning_rate={recipe.outer.learning_rate}: must be above 0 and at most 10"
    for key, betas in (("inner.betas", recipe.inner.betas), ("outer.betas", recipe.outer.betas)):
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            yield f"{key}={list(betas)}: must be two numbers from 0 to below 1"


def _silos(recipe: Recipe) -> Iterator[str]:
    for name, source in recipe.silos.items():
        if not SILO_NAME.fullmatch(name):
            yield (
                f"silos.{name}: a silo's name has lower-case letters, digits, '-' and '_' only, "
                "at most 64, and starts with a letter or digit"
            )
        yield from (f"silos.{name}{problem}" for problem in source_problems(source))
    for name in recipe.only:
        if name not in recipe.silos:
            yield f"only={name!r}: no such silo; silos: {', '.join(sorted(recipe.silos))}"
    if not recipe.silos:
        yield "silos: none; name at least one, such as silos.fr.files=['data/fr/*.txt']"
    elif recipe.silos_per_round > len(recipe.silo_names):
        yield (
            f"silos_per_round={recipe.silos_per_round}: the run has only "
            f"{len(recipe.silo_names)} silos; 0 samples all"
        )


def source_problems(source: DataSource) -> Iterator[str]:
    """Problems of one silo's data source, each a line that starts with the setting's name."""
    kinds = [key for key in ("files", "hub", "packages") if getattr(source, key)]
    if len(kinds) != 1:
        yield f": set exactly one of files, hub, packages (set: {', '.join(kinds) or 'none'})"
    if source.content not in CONTENTS:
        yield f".content={source.content!r}: must be one of {', '.join(CONTENTS)}"
    if source.sample_by not in SAMPLE_BY:
        yield f".sample_by={source.sample_by!r}: must be one of {', '.join(SAMPLE_BY)}"
    if source.max_bytes < 0:
        yield f".max_bytes={source.max_bytes}: must be at least 0 (0 = all)"


def _resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    def absolute(path: str) -> str:
        expanded = Path(path).expanduser()
        return str(expanded if expanded.is_absolute() else folder / expanded)

    silos = {
        name: replace(source, files=[absolute(f) for f in source.files])
        for name, source in recipe.silos.items()
    }
    shared = recipe.shared_tokenizer
    if shared and (folder / shared).exists():
        shared = absolute(shared)
    preset = recipe.model.preset
    if preset.endswith((".yaml", ".yml")):
        preset = absolute(preset)
    return replace(
        recipe, silos=silos, shared_tokenizer=shared, model=_with_preset(recipe.model, preset)
    )


def _with_preset(model: ModelConfig, preset: str) -> ModelConfig:
    """The preset's settings written out, so that a resolved recipe stands alone."""
    if not preset:
        return model
    file = Path(preset) if Path(preset).is_absolute() else CONF_DIR / "models" / f"{preset}.yaml"
    if not file.is_file():
        have = ", ".join(sorted(p.stem for p in (CONF_DIR / "models").glob("*.yaml")))
        raise ConfigError([f"model.preset={preset!r}: no such preset; presets: {have}"])
    problems: list[str] = []
    settings = _read_yaml(file, problems)
    if "model_type" not in {**settings, **model.config}:
        problems.append(f"{file}: model_type is missing")
    if problems:
        raise ConfigError(problems)
    return ModelConfig(preset="", config={**settings, **model.config})


def home_dir(home: str) -> Path:
    """The home: the run-config's, else $DEPT_HOME, else ~/.dept-fl. Must be absolute."""
    path = Path(home or os.environ.get("DEPT_HOME") or "~/.dept-fl").expanduser()
    if not path.is_absolute():
        raise DeptError(
            f"home={str(path)!r}: must be absolute, since Flower runs the app in another folder"
        )
    return path
