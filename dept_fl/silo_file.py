"""A partner's own file about its silo: what no message from a server can set or change."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dept_fl.config import (
    SILO_NAME,
    Recipe,
    SiloConfig,
    absolute,
    home_dir,
    path_if_there,
    read_yaml,
    with_settings,
)
from dept_fl.errors import ConfigError
from dept_fl.variants import variant

# Settings that a recipe has for its simulated silos and a partner has for its own, with the
# recipe's defaults: the server's values of these are never looked at.
_LOCAL = {
    "tokenizer_train_bytes": "tokenizer_train_bytes",
    "validation_fraction": "validation_fraction",
    "validation_max_bytes": "validation_max_bytes",
    "deduplicate": "deduplicate",
    "near_duplicates": "near_duplicates",
    "device": "device",
    "processes": "processes",
    "parallel": "parallel",
    "share_samples": "share_samples",
    "micro_batch_size": "inner.micro_batch_size",
    "start": "model.start",
}
_SOURCE = [f.name for f in fields(SiloConfig)]
KEYS = ["name", "home", *_SOURCE, *_LOCAL, "share_embeddings"]

# What each key means, in the order in which `as_yaml` writes them.
_WORDS = {
    "name": "under which the federation knows this silo",
    "home": "where its cleaned text, tokenizer, embeddings and state lie",
    "files": "files, folders, patterns: .txt, .jsonl, .parquet, .csv, packed",
    "validation_files": "those for validation; none: a part of files",
    "hub": "a hub data set, streamed, instead of files",
    "hub_config": "of the hub data set",
    "hub_split": "of the hub data set",
    "hub_validation_split": "of the hub data set; none: a part of hub_split",
    "hub_files": "which of its files make a split, [SPLIT=PATTERN, ...]",
    "hub_where": "take rows with these fields alone, [FIELD=VALUE, ...]",
    "packages": "for trials: installed packages, whose files are its text",
    "include": "patterns of the files in the packages",
    "exclude": "patterns of files to leave out",
    "content": "of those files: text, code (without licences), docstrings",
    "column": "that holds the text in .jsonl, .parquet, .csv and hub data",
    "columns": "several instead, joined by a blank line",
    "where": "take rows alone with [FIELD=VALUE, score>=0.8, ...]",
    "min_characters": "leave out shorter documents",
    "max_characters": "leave out longer documents; 0: none",
    "sample_by": "what a .txt file is cut into: document, paragraph, line, auto",
    "encoding": "of .txt and .jsonl files",
    "max_bytes": "stop after so many bytes of documents; 0: take all",
    "sources": "several instead, by name, each with its settings and a weight",
    "tokenizer": "one to adopt: SentencePiece .model, Hugging Face folder or name",
    "vocab_size": "pieces of the tokenizer that is trained on this text",
    "start": "the open model that the federation starts from, where it asks",
    "tokenizer_train_bytes": "how much of the text it is trained on",
    "deduplicate": "drop documents that came before",
    "near_duplicates": "and those so similar to one before, such as 0.8; 0: none",
    "validation_fraction": "share of the documents kept for validation",
    "validation_max_bytes": "but no more than so much text",
    "device": "auto, cpu or cuda",
    "processes": "that train together, one on each GPU",
    "parallel": "ddp: the whole model on each GPU; fsdp: a part on each",
    "micro_batch_size": "sequences in one pass; fewer take less memory, 0: a batch",
    "share_samples": "whether the server gets a text that the model writes",
    "share_embeddings": "whether GLOB and TRIM may send its embeddings",
}
_WORDS_COLUMN = 34


@dataclass(frozen=True)
class SiloFile:
    """One silo of a deployment, from the YAML file that its SuperNode names.

    Attributes:
        name: of the silo in the federation.
        home: where its tokenizer, text, tokens and state lie.
        settings: by the dotted names that a recipe gives them.
        share_embeddings: consent to the variants in which embeddings travel.
    """

    path: Path
    name: str
    home: Path
    settings: Mapping[str, Any]
    share_embeddings: bool = False

    def over(self, recipe: Recipe) -> Recipe:
        """The server's recipe as it holds for this silo.

        Raises:
            ConfigError: the two do not go together, or the file has problems.
        """
        common = replace(
            recipe, silos={}, only=[], without=[], silos_per_round=0, shared_tokenizer=""
        )
        try:
            own = with_settings(common, self.settings)
        except ConfigError as error:
            problems = [f"{self.path}: {self.in_its_words(p)}" for p in error.problems]
            raise ConfigError(problems) from error
        if not own.own_tokenizers and not own.silos[self.name].tokenizer:
            raise ConfigError(
                [f"{self.path}: tokenizer: missing; the federation shares one, name its file here"]
            )
        travel = variant(own.variant).embeddings_travel
        if own.model.gives_embeddings and not travel and not own.model.start:
            raise ConfigError(
                [
                    f"{self.path}: start: missing; the federation starts from the embeddings of "
                    f"{recipe.model.start!r}, name its folder or hub name on this machine here"
                ]
            )
        if travel and not self.share_embeddings:
            raise ConfigError(
                [
                    f"{self.path}: share_embeddings: false, but variant={own.variant} sends this "
                    "silo's embeddings to the server; set it to true where that is agreed"
                ]
            )
        return own

    def alone(self) -> Recipe:
        """A recipe without a server's part: enough for the text, the tokenizer and the tokens."""
        batch = 1
        for factor in (self.settings["inner.micro_batch_size"], self.settings["processes"]):
            batch *= factor if isinstance(factor, int) and factor > 0 else 1
        least = {"inner.batch_size": batch, "sequence_tokens": 2}  # no text is too short for it
        return self.over(
            with_settings(Recipe(), {"model.config": {"model_type": "llama"}, **least})
        )

    def in_its_words(self, problem: str) -> str:
        """A problem that names settings as a recipe does, with the names they have in this file."""
        for key, dotted in _LOCAL.items():
            problem = problem.replace(dotted, key)
        silo = f"silos.{self.name}"
        for head in (f"{silo}: ", f"silo {self.name}: "):
            problem = problem.removeprefix(head)
        problem = problem.replace(f"silo {self.name}.", "")  # a source of it
        problem = problem.replace(f"{silo}.", "")
        return re.sub(rf"\b{re.escape(silo)}\b", "its data", problem)


def load_silo_file(path: str | Path) -> SiloFile:
    """Read a silo's file; its relative paths are relative to it.

    Raises:
        ConfigError: listing every problem found.
    """
    file = Path(path).expanduser()
    if not file.is_absolute():
        raise ConfigError([f"silo={str(path)!r}: must be an absolute path"])
    if not file.is_file():
        raise ConfigError([f"silo={str(path)!r}: no such file; `dept silo new` makes one"])
    problems: list[str] = []
    given = read_yaml(file, problems)
    if problems:
        raise ConfigError(problems)
    return silo_file(file, given)


def silo_file(file: Path, given: Mapping[str, Any]) -> SiloFile:
    """The silo that a file with these settings describes.

    Raises:
        ConfigError: listing every problem found.
    """
    given = {key: value for key, value in given.items() if value is not None}
    if problems := list(_problems(given)):
        raise ConfigError([f"{file}: {problem}" for problem in problems])
    name, home = given["name"], given.get("home", "")
    found = SiloFile(
        path=file,
        name=name,
        home=home_dir(absolute(home, file.parent) if home else ""),
        settings=_settings(name, given, file.parent),
        share_embeddings=given.get("share_embeddings", False),
    )
    found.alone()  # a file that can never do is refused before any server asks
    return found


def as_yaml(given: Mapping[str, Any]) -> str:
    """The text of a silo's file with these settings, and the others with their defaults."""
    rest = {key: value for key, value in _defaults().items() if key not in given}
    return "\n".join(
        [
            "# A silo of a federation. Its SuperNode reads this file at every task, and no recipe",
            "# of a server changes what it says. Relative paths start at the folder of this file.",
            "",
            *(_line(f"{key}: {_json(given[key])}", key) for key in _WORDS if key in given),
            "",
            "# Other settings, with their defaults:",
            *(_line(f"# {key}: {_json(rest[key])}", key) for key in _WORDS if key in rest),
            "",
        ]
    )


def _line(setting: str, key: str) -> str:
    if len(setting) < _WORDS_COLUMN:
        return f"{setting:<{_WORDS_COLUMN}}# {_WORDS[key]}"
    return f"# {_WORDS[key]}:\n{setting}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # which is YAML too


def _defaults() -> dict[str, Any]:
    recipe = asdict(Recipe())
    own = {key: recipe[key] for key in _LOCAL if key in recipe}
    shares = {"share_samples": False, "share_embeddings": False}
    return {**asdict(SiloConfig()), **own, **shares, "micro_batch_size": 0, "start": ""}


def _problems(given: Mapping[str, Any]) -> Iterator[str]:
    for key in given:
        if key not in KEYS:
            close = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(KEYS)}"
            yield f"{key}: no such setting of a silo; {hint}"
    if not isinstance(given.get("name"), str) or not SILO_NAME.fullmatch(given["name"]):
        yield (
            f"name={given.get('name')!r}: must be lower-case letters, digits, '-' and '_', at most "
            "64, and start with a letter or digit"
        )
    if not isinstance(given.get("home", ""), str):
        yield f"home={given['home']!r}: must be the path of a folder"
    if not isinstance(given.get("share_embeddings", False), bool):
        yield f"share_embeddings={given['share_embeddings']!r}: must be true or false"
    if not given.get("tokenizer") and not given.get("vocab_size"):
        yield "vocab_size: missing; set it, or name an existing tokenizer"


def _settings(name: str, given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    defaults = _defaults()
    settings = {dotted: given.get(key, defaults[key]) for key, dotted in _LOCAL.items()}
    for key in _SOURCE:
        if key in given:
            settings[f"silos.{name}.{key}"] = given[key]
    sources = settings.get(f"silos.{name}.sources")
    if isinstance(sources, Mapping):
        del settings[f"silos.{name}.sources"]
        for source, own in sources.items():
            at = f"silos.{name}.sources.{source}"
            settings |= {f"{at}.{k}": v for k, v in own.items()} if _is_some(own) else {at: own}
    return {key: _placed(key.rpartition(".")[2], value, folder) for key, value in settings.items()}


def _is_some(settings: Any) -> bool:
    return isinstance(settings, Mapping) and bool(settings)


def _placed(key: str, value: Any, folder: Path) -> Any:
    """The value of a setting, with its paths relative to the folder."""
    if key in ("files", "validation_files"):
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list):
            # An empty one would be the folder itself; what is no text is told with the others.
            return [absolute(f, folder) if f and isinstance(f, str) else f for f in value]
    if key in ("tokenizer", "hub", "start") and isinstance(value, str):
        return path_if_there(value, folder)
    return value
