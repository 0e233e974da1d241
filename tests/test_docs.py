"""What the documentation says of settings, messages, commands and files is so."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import click
import pytest
import yaml

from dept_fl import config
from dept_fl.config import load_recipe
from dept_fl.errors import ConfigError
from tests.shown import shell_commands

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def hook(name: str) -> ModuleType:
    """A module of docs/hooks, which are loaded by path by MkDocs too."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs/hooks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = hook("reference")


# ---- settings ----------------------------------------------------------------------------


def groups() -> list[type]:
    found = [each for each in vars(config).values() if dataclasses.is_dataclass(each)]
    return [each for each in found if each.__module__ == config.__name__]


@pytest.mark.parametrize("owner", groups(), ids=lambda owner: owner.__name__)
def test_every_setting_has_its_words(owner: type):
    words, names = reference.described(owner), [f.name for f in dataclasses.fields(owner)]
    groups = [f.name for f in dataclasses.fields(owner) if "Config" in str(f.type)]
    assert set(words) <= set(names)
    assert set(names) - set(words) <= set(groups)


def test_the_reference_has_every_setting_with_what_it_takes():
    page = reference.settings()
    row = re.search(r"\| .*`inner.micro_batch_size` \|(.*)", page)
    assert row is not None
    default, takes, meaning, _ = (cell.strip() for cell in row[1].split(" |"))
    assert (default, takes) == ("`0`", "a whole number, at least 0")
    assert "gradient accumulation" in meaning
    assert "May change when a run is resumed" in meaning
    assert [n for n in config.setting_names() if f"`{n}` |" not in page] == ["silos"]
    assert "`silos.NAME.tokenizer` |" in page


def test_what_a_setting_takes_is_what_the_checks_say():
    assert reference.takes("variant", "str") == "one of glob, trim, spec"
    assert reference.takes("quorum", "float") == "a number, above 0 and at most 1"
    assert reference.takes("silos.NAME.content", "str") == "one of text, code, docstrings"
    assert reference.takes("share_samples", "bool | None") == "true or false or null"


def test_the_partners_file_in_the_reference_has_every_key():
    from dept_fl.silo_file import KEYS

    shown = reference.silo_file()
    assert [key for key in KEYS if not re.search(rf"^(# )?{key}: ", shown, re.MULTILINE)] == []


# ---- commands ----------------------------------------------------------------------------

COMMANDS = dict(reference.all_commands())


def test_the_reference_has_every_command_with_every_option():
    page = reference.commands()
    for name, command in COMMANDS.items():
        assert f"## {name}\n" in page
        for each in command.params:
            what = (
                each.opts[-1]
                if isinstance(each, click.Option)
                else each.make_metavar(click.Context(command))
            )
            assert f"{what}" in page


def test_arguments_have_their_words():
    """Click 8.5 takes them from Typer."""
    assert "an exported folder" in reference.commands()


DEPT = [
    pytest.param(command, id=f"{page}: {command[:60]}")
    for page, text in {**PAGES, "README.md": README}.items()
    for command in shell_commands(text)
    if command.startswith("dept ")
]


@pytest.mark.parametrize("line", DEPT)
def test_every_dept_command_that_is_shown_is_understood(line: str):
    """Names, options and their values; nothing is carried out."""
    words = shlex.split(line)
    name = next(n for size in (3, 2) if (n := " ".join(words[:size])) in COMMANDS)
    given = words[len(name.split()) :]
    COMMANDS[name].make_context(name, given).close()
    if name == "dept run" and given[:1] == ["conf/demo.yaml"]:
        overrides = [word for word in given[1:] if re.match(r"[\w.]+=", word)]
        load_recipe(ROOT / "conf/demo.yaml", shlex.join(overrides))


@pytest.mark.parametrize("name", [n for n, t in PAGES.items() if "```python" in t])
def test_python_that_is_shown_is_python(name: str):
    for block in re.findall(r"^```python\n(.*?)^```", PAGES[name], re.MULTILINE | re.DOTALL):
        ast.parse(block)


def test_the_check_of_an_architecture_runs(capsys: pytest.CaptureFixture[str]):
    (block,) = re.findall(
        r"^```python\n(.*?)^```", PAGES["architecture.md"], re.MULTILINE | re.DOTALL
    )
    exec(block, {})
    assert "embed_in" in capsys.readouterr().out


@pytest.mark.parametrize("name", [n for n, t in PAGES.items() if "\nsilos:\n" in t])
def test_silos_that_are_shown_are_good_silos(name: str, tmp_path: Path):
    for block in re.findall(r"^```yaml\n(silos:.*?)```", PAGES[name], re.MULTILINE | re.DOTALL):
        settings = yaml.safe_load((ROOT / "conf/demo.yaml").read_text())
        settings["silos"] = yaml.safe_load(block)["silos"]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
        assert load_recipe(tmp_path / "recipe.yaml").silo_names == sorted(settings["silos"])


def test_the_reading_order_names_every_file():
    tree = PAGES["round.md"].partition("## Every file")[2]
    files = [path.name for path in (ROOT / "dept_fl").glob("[a-z]*.py")]
    folders = [f"{path.parent.name}/" for path in (ROOT / "dept_fl").glob("*/__init__.py")]
    assert [name for name in (*files, *folders) if name not in tree] == []


# ---- error messages ----------------------------------------------------------------------

MESSAGES = re.findall(
    r"^\*\*`(.+?)`\*\*(?: \(from `(.+)`\))?(?:<br>)?$", PAGES["faq.md"], re.MULTILINE
)
PRODUCED = [(message, word) for message, word in MESSAGES if word]
QUOTED = [message for message, word in MESSAGES if not word]
LEAST_LITERAL = 0.45  # share of a message that must stand in the code word for word


def templates() -> list[tuple[int, re.Pattern[str]]]:
    """Every text in the code as a pattern, with how many of its characters are literal."""
    found = []
    for package in ("dept_fl", "server_app", "client_app"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                texts = [p.value if isinstance(p, ast.Constant) else None for p in parts]
                literal = sum(len(t) for t in texts if isinstance(t, str))
                pattern = "".join(re.escape(t) if isinstance(t, str) else ".*" for t in texts)
                if literal > 10:
                    found.append((literal, re.compile(pattern, re.DOTALL)))
    return found


TEMPLATES = templates()


def stands_in_the_code(message: str) -> bool:
    """As one text, or as one that ends with another behind a colon."""
    cuts = [cut.end() for cut in re.finditer(": ", message)]
    return one_text(message) or any(one_text(message[:i]) and one_text(message[i:]) for i in cuts)


def one_text(message: str) -> bool:
    least = LEAST_LITERAL * len(message)
    return any(literal >= least and p.fullmatch(message) for literal, p in TEMPLATES)


def test_there_are_messages_of_both_kinds():
    assert len(PRODUCED) >= 8
    assert len(QUOTED) >= 20
    assert PAGES["faq.md"].count("\n**`") == len(MESSAGES)


@pytest.mark.parametrize(("message", "word"), PRODUCED)
def test_a_message_comes_of_the_word_that_is_said_to_give_it(message: str, word: str):
    with pytest.raises(ConfigError) as caught:
        load_recipe(ROOT / "conf/demo.yaml", word)
    pattern = re.escape(message).replace(re.escape("..."), ".*")
    assert any(re.fullmatch(pattern, problem) for problem in caught.value.problems)


@pytest.mark.parametrize("message", QUOTED)
def test_a_message_stands_in_the_code(message: str):
    assert stands_in_the_code(message)


def test_a_message_that_nobody_prints_is_found_out():
    good = QUOTED[0]
    assert not stands_in_the_code(good.replace(" ", "  ", 1)[:-1] + "!?")
    assert not stands_in_the_code("silo fr: something went wrong; try again")
