"""References made from the code: `<!-- reference: NAME -->` in a page becomes one of these."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Collection, Iterator
from typing import Any

import click
import typer

from dept_fl import config
from dept_fl.cli import app
from dept_fl.config import Recipe, with_settings
from dept_fl.errors import ConfigError
from dept_fl.silo_file import as_yaml

_MARK = re.compile(r"^<!-- reference: ([a-z-]+) -->$", re.MULTILINE)
_ATTRIBUTE = re.compile(r"^    (\w+(?:, \w+)*): ", re.MULTILINE)
_TABLE = """<div class="settings" markdown>

| setting | default | takes | meaning |
|---|---|---|---|
{}

</div>
"""
# Values that the recipe's own checks refuse, which so tell what they would take.
_NO_TYPE: list[Any] = [[None]]
_OUT_OF_RANGE: dict[str, Any] = {
    "int": -(10**9),
    "float": float("nan"),
    "str": "?",
    "list[float]": [],
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _MARK.sub(lambda mark: _REFERENCES[mark[1]](), markdown)


# ---- settings ---------------------------------------------------------------------------


def settings() -> str:
    """Every setting of a recipe, a table for each group."""
    return "\n".join(_tables(Recipe, "", "The recipe"))


def _tables(
    owner: type[Any], prefix: str, title: str, above: Collection[str] = ()
) -> Iterator[str]:
    words, rows, groups, again = described(owner), [], [], []
    for each in dataclasses.fields(owner):
        name = prefix + each.name
        if group := re.search(r"\w+Config", str(each.type)):
            inner = f"{name}.NAME" if str(each.type).startswith("dict") else name
            groups.append((getattr(config, group[0]), inner))
        elif each.name in above:
            again.append(f"`{each.name}`")
        else:
            rows.append(_row(name, each, words.get(each.name, "")))
    summary = " ".join((inspect.getdoc(owner) or "").partition("\n\n")[0].split())
    yield f"## {title}\n\n{summary}\n\n" + _TABLE.format("\n".join(rows))
    if again:
        yield f"And as above: {', '.join(again)}.\n"
    inherited = [f.name for base in owner.__bases__ for f in _fields(base)]
    for inner_owner, name in groups:
        yield from _tables(inner_owner, f"{name}.", f"`{name}`", inherited)


def _fields(owner: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()


def _row(name: str, each: dataclasses.Field[Any], words: str) -> str:
    default = each.default_factory() if callable(each.default_factory) else each.default
    shown = json.dumps(default) if default not in ("", [], {}) else ""
    free = " *May change when a run is resumed.*" if name in config.FREE_ON_RESUME else ""
    cells = (
        f'<a id="{name}"></a>`{name}`',
        f"`{shown}`" if shown else "",
        takes(name, str(each.type)),
        words + free,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def described(owner: type[Any]) -> dict[str, str]:
    """What the docstrings of a dataclass, and of those that it builds on, say of attributes."""
    words = {}
    for each in reversed(owner.__mro__):
        _, _, attributes = inspect.cleandoc(each.__doc__ or "").partition("\n\nAttributes:\n")
        _, *pieces = _ATTRIBUTE.split(attributes)
        for names, text in zip(pieces[::2], pieces[1::2], strict=True):
            words.update(dict.fromkeys(names.split(", "), " ".join(text.split())))
    return words


def takes(name: str, kind: str) -> str:
    """What a setting takes, in the words in which the recipe's checks refuse all else."""
    key = name.replace("NAME", "fr").replace("[i]", "")
    kind = kind.removesuffix(" | None")
    told = [_refusal(key, _NO_TYPE)]
    if kind in _OUT_OF_RANGE:
        told.append(_refusal(key, _OUT_OF_RANGE[kind]))
    if told[-1].startswith("one of"):
        del told[0]
    return ", ".join(filter(None, told))


def _refusal(key: str, value: Any) -> str:
    try:
        with_settings(Recipe(), {key: value})
    except ConfigError as error:
        for problem in error.problems:
            if found := re.fullmatch(rf"{re.escape(key)}=.*: must be (.+)", problem):
                return found[1]
    return ""


def silo_file() -> str:
    """The file that `dept silo new` writes, with all its settings."""
    given = {"name": "fr", "home": "~/.dept-fl", "files": ["data/fr/*.jsonl"], "vocab_size": 32000}
    text = as_yaml(given)
    return f"```yaml\n{text}```"


# ---- commands ---------------------------------------------------------------------------


def commands() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    return "\n".join(_command(name, each) for name, each in all_commands())


def all_commands() -> Iterator[tuple[str, click.Command]]:
    """Each command by its whole name, such as ``dept silo new``."""

    def walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        parts = getattr(command, "commands", None)  # of a group
        if parts is None:
            yield name, command
            return
        for part in parts:
            yield from walk(f"{name} {part}", parts[part])

    yield from walk("dept", typer.main.get_command(app))


def _command(name: str, command: click.Command) -> str:
    context = command.context_class(command, info_name=name)
    usage = command.get_usage(context).removeprefix("Usage:").split()
    records = [each.get_help_record(context) for each in command.get_params(context)]
    rows = [f"| `{_plain(what)}` | {_plain(words)} |" for what, words in filter(None, records)]
    table = "\n".join(["| argument or option | meaning |", "|---|---|", *rows])
    return f"## {name}\n\n{_help(command)}\n\n```\n{' '.join(usage)}\n```\n\n{table}\n"


def _help(command: click.Command) -> str:
    text = inspect.cleandoc(command.help or "").replace("\b\n", "").replace("\\[", "[")
    return re.sub(r"^Examples?:\s*(.+)$", r"```bash\n\1\n```", text, flags=re.MULTILINE)


def _plain(text: str) -> str:
    return " ".join(text.replace("\\[", "[").split()).replace("|", "\\|")


_REFERENCES = {"settings": settings, "silo-file": silo_file, "commands": commands}
