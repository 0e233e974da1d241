"""The command line: one style, the same ends for all commands, quick to start."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from dept_fl.cli import app, runs
from dept_fl.cli.common import EXIT_CODES
from dept_fl.errors import DeptError, Failed
from dept_fl.report import Ledger

ROOT = Path(__file__).resolve().parents[1]
PLAN = {"experiment": "0123456789ab", "recipe": "spec-opt", "rounds": 2, "estimate_s": 1.0}


def groups_and_commands(command: click.Command, *path: str) -> Iterator[tuple[str, click.Command]]:
    yield " ".join(path), command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from groups_and_commands(inner, *path, name)


ALL = dict(groups_and_commands(typer.main.get_command(app), "dept"))
COMMANDS = {path: each for path, each in ALL.items() if not isinstance(each, click.Group)}


def shown(path: str, columns: int) -> str:
    words = [*path.split()[1:], "--help"]
    done = CliRunner().invoke(app, words, env={"COLUMNS": str(columns)})
    assert done.exit_code == 0
    return done.output


def one_line(text: str) -> str:
    return " ".join(re.sub("[╭╮╰╯│─]", " ", text).split())


# ---- help ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL)
def test_each_command_has_a_summary_and_an_example_that_is_a_command(path: str):
    summary, *more = (ALL[path].help or "").split("\n\n")
    assert summary.endswith(".")
    examples = [part for part in more if part.startswith("Example: ")]
    assert examples
    for example in examples:
        lines = [line.strip() for line in shown(path, 80).splitlines()]
        for line in example.splitlines():
            assert line.strip() in lines  # none is broken: it is to be copied
        _, *words = shlex.split(example.replace("\\\n", ""))
        assert " ".join(words).startswith(path)
        command = ALL[words.pop(0)]
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        command.make_context(example, words)  # raises for a wrong one


@pytest.mark.parametrize("path", ALL)
def test_help_says_all_that_it_is_to_say(path: str):
    """Words in brackets would be taken for markup and vanish."""
    text = one_line(shown(path, 120))
    assert one_line((ALL[path].help or "").partition("\n\n")[0]) in text
    for parameter in ALL[path].params:
        assert one_line(getattr(parameter, "help", None) or "") in text


def test_each_command_stands_in_a_group_of_its_kind():
    panels = re.findall("╭─ (.*?) ─", shown("dept", 100))
    assert panels == ["Options", "Pre-train", "Compare", "Use a model", "Silos and federations"]


def test_an_option_of_several_commands_has_the_same_words_in_all():
    words: dict[str, set[str]] = {}
    for parameter in (p for each in COMMANDS.values() for p in each.params):
        for option in parameter.opts:
            words.setdefault(option, set()).add(getattr(parameter, "help", None) or "")
    assert [len(words[option]) for option in ("--home", "--json", "--column")] == [1, 1, 1]


def test_all_that_ends_by_itself_speaks_json():
    silent = {path for path, each in COMMANDS.items()
              if "--json" not in [word for p in each.params for word in p.opts]}  # fmt: skip
    assert silent == {"dept stop", "dept silo start", "dept federation start"}


def test_the_exit_codes_are_told_in_one_place():
    assert one_line(EXIT_CODES) in one_line(shown("dept", 80))


def test_the_version_is_that_of_the_package():
    told = CliRunner().invoke(app, ["--version"]).output
    assert f'version = "{told.split()[1]}"' in (ROOT / "pyproject.toml").read_text()


# ---- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere.yaml"], "no such file"),
        (["conf/demo.yaml", "rounds=many"], "rounds='many'"),
        (["conf/demo.yaml", "rounds"], "expected key=value"),
        (["conf/demo.yaml", "--resume"], "give the run-dir of the stopped run as well"),
    ],
)
def test_a_mistake_is_one_clear_error(tmp_path: Path, words: list[str], reason: str):
    done = CliRunner().invoke(app, ["run", *words, "--home", str(tmp_path)])
    assert done.exit_code == 2
    assert reason in done.stderr
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_without_silos_is_refused_before_any_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dept_fl.cli.runs.simulate", None)  # would be called in vain
    done = CliRunner().invoke(app, ["run", "conf/demo.yaml", "silos={}", "--home", str(tmp_path)])
    assert done.exit_code == 2
    assert "silos: none; name at least one" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_relative_home_from_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DEPT_HOME", "somewhere")
    done = CliRunner().invoke(app, ["run"])
    assert done.exit_code == 2
    assert "must be absolute" in done.stderr


WRITERS = {
    "compare": "compare conf/demo.yaml --out",
    "adapt": "adapt random --recipe conf/demo.yaml --out",
    "train": "tokenizer train conf/*.yaml --vocab-size 300 --out",
    "finetune": "finetune nowhere --task sst2 --out",
    "export": "export nowhere --silo fr --out",
    "split": "silo split conf/demo.yaml --silos 2 --out",
}


@pytest.mark.parametrize("words", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("below", ["", "/x", "/x/y"])
def test_a_file_in_place_of_the_output_is_told_before_any_work(
    tmp_path: Path, words: str, below: str
):
    file = tmp_path / "f.txt"
    file.write_text("mine")
    done = CliRunner().invoke(app, [*words.split(), f"{file}{below}"])
    line = f"error: --out {file}{below}: {file} is a file; name a folder\n"
    assert (done.exit_code, done.stderr) == (2, line)
    assert file.read_text() == "mine"


def test_an_output_that_may_not_be_written_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    done = CliRunner().invoke(app, [*WRITERS["train"].split(), str(tmp_path / "new")])
    assert done.exit_code == 2
    assert f"you may not write to {tmp_path}; name another folder" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "run ~",
        "run --run-dir ~",
        "run --home ~",
        "status ~",
        "report ~",
        "cost --measured ~",
        "compare conf/demo.yaml --out ~",
        "adapt ~ --out out",
        "adapt random --out ~",
        "adapt random --own ~ --out out",
        "export ~ --silo fr --out out",
        "export --silo-file ~ --out out",
        "generate ~",
        "evaluate ~",
        "finetune ~ --task sst2",
        "silo new fr --data x --folder ~",
        "silo new fr --data x --home ~",
        "silo new fr --data x --tokenizer ~",
        "silo new fr --hub ~",
        "silo check ~",
        "silo start ~ --superlink a:1 --root-certificates ca.crt",
        "silo split x --silos 2 --out ~",
        "tokenizer train x --vocab-size 300 --out ~",
        "tokenizer show ~",
        "tokenizer compare ~ x --data x",
        "federation init ~ --host a.org",
        "federation start ~",
    ],
)
def test_a_home_of_nobody_is_one_clear_error(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runs, "simulate", None)  # would be called in vain
    monkeypatch.setenv("DEPT_HOME", str(tmp_path))
    path = "~nobody-of-this-name/x"
    done = CliRunner().invoke(app, words.replace("~", path).split())
    assert done.exit_code == 2, done.output
    assert f"error: {path}: ~nobody-of-this-name is no user's home here" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["tokenizer show x --text", "generate x --prompt"])
def test_text_that_is_not_utf_8_is_one_clear_error(words: str):
    given = os.fsdecode(b"ab\xffc")  # as Python reads it from a command line
    done = CliRunner().invoke(app, [*words.split(), given])
    option = words.split()[-1]
    assert done.exit_code == 2
    assert done.stderr == f"error: {option} 'ab\\udcffc': is not UTF-8; write it in that encoding\n"


@pytest.mark.parametrize("words", [["--resume"], ["--run-dir", "x"]])
def test_a_dry_run_takes_no_option_of_a_run(words: list[str], tmp_path: Path):
    done = CliRunner().invoke(app, ["run", "--dry-run", "--home", str(tmp_path), *words])
    assert done.exit_code == 2
    assert "give it without --resume and --run-dir" in done.stderr


def test_a_dry_run_misses_what_the_run_would_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dept_fl.trackers.find_spec", lambda _: None)
    words = ["run", "conf/demo.yaml", "trackers=[wandb]", "--dry-run", "--home", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "trackers=wandb: not installed" in done.stderr


# ---- ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (DeptError("x=1: must be 2"), 2, "error: x=1: must be 2\n"),
        (Failed("nginx did not start"), 1, "error: nginx did not start\n"),
        (OSError(errno.ENOSPC, "No space left", "/x"), 1, "error: /x: No space left\n"),
        (OSError(errno.EEXIST, "It is there", "/x"), 1, "error: /x: It is there\n"),
        (OSError(errno.EISDIR, "Is a folder", "/x"), 1, "error: /x: Is a folder\n"),
        (OSError(errno.ENAMETOOLONG, "Too long", "/x"), 1, "error: /x: Too long\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (KeyboardInterrupt("go on with --resume"), 130, "stopped; go on with --resume\n"),
        (typer.Exit(1), 1, ""),
    ],
)
def test_every_command_ends_in_the_same_ways(
    raised: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch
):
    def look(_: Path) -> None:
        raise raised

    monkeypatch.setattr(runs, "look", look)
    before = signal.getsignal(signal.SIGTERM)
    done = CliRunner().invoke(app, ["status", "."])
    assert (done.exit_code, done.stderr, done.stdout) == (code, line, "")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("raised", [ValueError("a slip of ours"), FileNotFoundError(2, "gone")])
def test_what_nobody_expects_keeps_its_traceback(
    raised: Exception, monkeypatch: pytest.MonkeyPatch
):
    def look(_: Path) -> None:
        raise raised

    monkeypatch.setattr(runs, "look", look)
    assert CliRunner().invoke(app, ["status", "."]).exception is raised


def test_a_word_that_no_command_knows_is_bad_input():
    assert CliRunner().invoke(app, ["status", "--bogus"]).exit_code == 2
    assert CliRunner().invoke(app, ["bogus"]).exit_code == 2


def started(*words: str, before: str = "") -> subprocess.Popen[str]:
    """`dept WORDS` as a process of its own, which hears Ctrl-C."""
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and one under nohup this
{before}
from dept_fl.__main__ import main
sys.argv = ["dept", *{list(words)!r}]
main()
"""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_costs_one_line(tmp_path: Path, end: signal.Signals):
    ledger = tmp_path / "metrics.jsonl"
    os.mkfifo(ledger)
    # It opens once the command is reading it.
    with started("status", str(tmp_path)) as process, ledger.open("w"):
        process.send_signal(end)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "stopped\n")


def test_ctrl_c_while_python_is_loading_costs_one_line():
    slow = "import os, signal; sys.meta_path.insert(0, type('Loading', (), {'find_spec': "
    slow += "lambda name, *_: os.kill(os.getpid(), signal.SIGINT) if name == 'typer' else None}))"
    with started("--help", before=slow) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "stopped\n")


@pytest.mark.parametrize("words", [["--help"], ["status", "{}"], ["status", "{}", "--json"]])
def test_a_reader_that_has_left_costs_no_line(tmp_path: Path, words: list[str]):
    Ledger(tmp_path).write("plan", **PLAN, silos={})
    with started(*(word.format(tmp_path) for word in words)) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # long before Python has started
        err = process.stderr.read()
        process.wait(60)
    assert (process.returncode, err) == (1, "")


# ---- quick to start ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", ["--help", "run --help", "silo list --home {}", "status {}", "export x --silo a"]
)
def test_what_needs_no_model_loads_no_pytorch(tmp_path: Path, words: str):
    """Nor does completion, for which the shell waits at each Tab."""
    Ledger(tmp_path).write("plan", **PLAN, silos={})
    code = """
import sys
from dept_fl.cli import app
try:
    app(prog_name="dept")
except SystemExit as end:
    assert not end.code
heavy = {"torch", "transformers", "flwr", "ray", "sklearn", "datasets", "matplotlib"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    made = words.format(tmp_path).split()
    completes = {"_DEPT_COMPLETE": "complete_bash", "COMP_WORDS": f"dept {' '.join(made)}"}
    environment = {**os.environ, "COMP_CWORD": str(len(made))}
    environment |= completes if made[0] == "export" else {}
    command = [sys.executable, "-c", code, *made]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# ---- completion --------------------------------------------------------------------------------


def completed(*words: str, home: Path | None = None) -> list[str]:
    """What bash is offered for the last word."""
    environment = {"_DEPT_COMPLETE": "complete_bash", "COMP_WORDS": shlex.join(["dept", *words])}
    environment |= {"COMP_CWORD": str(len(words)), "DEPT_HOME": str(home or "/nowhere")}
    return CliRunner().invoke(app, prog_name="dept", env=environment).output.split()


def test_the_shell_completes_settings_presets_arms_and_silos(tmp_path: Path):
    assert completed("run", "conf/demo.yaml", "inner.l") == [
        "inner.local_steps=",
        "inner.learning_rate=",
    ]
    presets = ["gpt2-125m", "gpt2-1b", "gpt2-350m"]
    assert completed("run", "a.yaml", "model.preset=gpt") == [f"model.preset={p}" for p in presets]
    assert completed("run", "a.yaml", "model.preset", "=", "gpt") == presets  # as bash cuts it
    assert completed("compare", "a.yaml", "--arms", "std-1,sp") == ["std-1,spec", "std-1,spec-opt"]
    for name in ("fr", "fi", "sw"):
        (tmp_path / "silos" / name).mkdir(parents=True)
    assert completed("export", "run", "--silo", "f", home=tmp_path) == ["fi", "fr"]
    assert completed("export", "run", "--silo", "", home=Path("relative")) == []


# ---- JSON --------------------------------------------------------------------------------------


def test_a_run_that_fails_says_so_in_json_and_in_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Flower itself is in tests/test_flower.py."""

    def simulate(config: dict[str, str], *_: object) -> str:
        Ledger(Path(config["run-dir"])).write("plan", **PLAN, silos={"fr": {}})
        return "finished:failed"

    monkeypatch.setattr(runs, "simulate", simulate)
    done = CliRunner().invoke(app, ["run", "--home", str(tmp_path), "--json"])
    assert done.exit_code == 1
    assert done.stderr.endswith("error: the run ended as finished:failed\n")
    told = json.loads(done.stdout)
    assert Path(told["run_dir"]).parent == tmp_path / "runs"
    assert (told["flower"], told["run"]["experiment"]) == ("finished:failed", "0123456789ab")


def test_a_run_that_never_began_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def simulate(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "simulate", simulate)
    done = CliRunner().invoke(app, ["run", "--home", str(tmp_path)])
    assert done.exit_code == 130
    assert done.stderr.endswith("stopped; before its first whole round\n")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("words", ["compare {0} --arms spec-opt", "adapt random --recipe {0}"])
def test_where_all_jobs_fail_the_json_is_an_empty_list(
    words: str, tiny_file: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dept_fl.jobs.run_jobs", lambda *_: ([], ["a: it diverged"]))
    more = ["--out", str(tmp_path / "out"), "--home", str(home)]
    for as_json, said in ((["--json"], "[]\n"), ([], "")):
        done = CliRunner().invoke(app, [*words.format(tiny_file).split(), *more, *as_json])
        assert (done.exit_code, done.stdout) == (1, said), done.output
        assert done.stderr.endswith("jobs failed:\na: it diverged\n")


@pytest.mark.parametrize(
    "words",
    [
        "compare {} --arms sdt-1",
        "compare {} --equal words",
        "adapt random",
        "adapt random --recipe {} --own {}",
    ],
)
def test_a_mistake_leaves_no_folder_for_results(words: str, tiny_file: Path, tmp_path: Path):
    given = words.replace("{}", str(tiny_file)).split()
    done = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert list(tmp_path.iterdir()) == []
