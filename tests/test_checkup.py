"""`dept silo check`: what is well is called ok, what is not is named with its mend."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dept_fl import checkup, trial
from dept_fl.checkpoint import save_state
from dept_fl.checkup import Checkup, Finding, Subject, clock_finding, line
from dept_fl.cli import app
from dept_fl.config import load_recipe
from dept_fl.errors import DeptError
from dept_fl.model import initial_body
from dept_fl.partner import Order, new_silo
from dept_fl.progress import Progress
from dept_fl.silo import Silo, Task
from dept_fl.silo_file import load_silo_file
from dept_fl.trial import Trial, try_step
from tests.conftest import SETTINGS, sentencepiece_model, write_text
from tests.test_superlink import https_server, no_proxy  # noqa: F401 (a fixture)

CHECKS = [
    "file", "recipe", "data", "tokenizer", "tokens", "step", "memory", "round", "disk", "key",
    "superlink", "clock",
]  # fmt: skip
FAST = Trial(step_s=0.01, peak_bytes=1 << 20)


@pytest.fixture
def silo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a new silo, ant."""
    write_text(tmp_path, "ant")
    monkeypatch.chdir(tmp_path)
    order = Order(
        "ant", tmp_path, data=["ant.jsonl"], home="home", more={"validation_fraction": 0.2}
    )
    new_silo(order, Progress())
    return tmp_path / "ant.yaml"


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is trained."""
    monkeypatch.setattr(checkup, "try_step", lambda *_: FAST)


def findings(file: Path, recipe: Path, **subject: Any) -> dict[str, Finding]:
    return dict(Checkup(Subject(file, str(recipe), **subject), Progress()).run())


def states(found: Mapping[str, Finding]) -> dict[str, str]:
    return {name: finding.state for name, finding in found.items()}


def edited(file: Path, **settings: object) -> Path:
    """The silo's file with other settings."""
    text = file.read_text(encoding="utf-8")
    for key, value in settings.items():
        text, count = re.subn(rf"^(# )?{key}: .*$", f"{key}: {json.dumps(value)}", text, flags=re.M)
        assert count == 1
    file.write_text(text, encoding="utf-8")
    return file


# ---- the command -------------------------------------------------------------------------


def test_a_silo_that_is_well_can_join(silo: Path, tiny_file: Path, tmp_path: Path) -> None:
    with https_server(tmp_path) as address:
        words = ["--recipe", str(tiny_file), "--superlink", address, "--json"]
        words += ["--root-certificates", "ca.crt"]
        done = CliRunner().invoke(app, ["silo", "check", "ant.yaml", *words])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["ok"] is True
    assert list(told["checks"]) == CHECKS
    assert {name: each["state"] for name, each in told["checks"].items()} == dict.fromkeys(
        CHECKS, "ok"
    )
    facts = {key: value for each in told["checks"].values() for key, value in each.items()}
    assert facts["documents"] == 60 - facts["duplicates"]
    assert facts["changed"] is False
    assert facts["lossy_documents"] == 0
    assert facts["pieces"] == 300
    assert 0 < facts["unigram_bits_per_byte"] < 8
    assert 0 < facts["step_s"] < 60
    assert facts["round_s"] == pytest.approx(2 * facts["step_s"])
    assert 50e6 < facts["needed_bytes"] < facts["machine_bytes"]
    assert facts["clock_ahead_s"] == 0


@pytest.mark.usefixtures("fast")
def test_one_line_a_check_and_exit_code_1_where_one_fails(silo: Path, tiny_file: Path) -> None:
    silo.with_suffix(".key").chmod(0o644)
    words = [str(silo), "--recipe", str(tiny_file)]
    done = CliRunner().invoke(app, ["silo", "check", *words])
    assert done.exit_code == 1
    heads = [told.split()[:2] for told in done.stdout.splitlines()]
    assert [name for _, name in heads] == CHECKS
    assert [name for state, name in heads if state == "FAILED"] == ["key"]
    assert "chmod 600" in done.stdout
    assert [name for state, name in heads if state == "skipped"] == ["superlink", "clock"]


@pytest.mark.usefixtures("fast")
def test_the_recipe_of_partners_is_taken_where_none_is_given(silo: Path) -> None:
    found = dict(Checkup(Subject(silo), Progress()).run())
    assert "conf/partners.yaml" in found["recipe"].words
    assert "--recipe" in found["recipe"].words


def test_a_line_goes_on_below_its_words() -> None:
    told = line("disk", Finding("FAILED", "a b " * 20 + "x" * 90), 60).splitlines()
    assert told[0].startswith("FAILED   disk       a b a b")
    assert all(each.startswith(" " * 20) for each in told[1:])
    assert max(map(len, told[:-1])) <= 60
    assert told[-1].strip() == "x" * 90  # a path is never cut


# ---- the silo ----------------------------------------------------------------------------


def test_what_needs_a_failed_check_is_skipped(tmp_path: Path, tiny_file: Path) -> None:
    (tmp_path / "ant.yaml").write_text("name: ant\ncolum: x\n")
    found = findings(tmp_path / "ant.yaml", tiny_file)
    assert found["file"].state == "FAILED"
    assert "did you mean 'column'?; " in found["file"].words  # and the other problems
    assert "vocab_size: missing" in found["file"].words
    assert set(states(found).values()) == {"FAILED", "skipped"}
    assert found["data"].words == "needs the check of recipe"


def test_a_file_that_is_not_there(tmp_path: Path, tiny_file: Path) -> None:
    assert "no such file" in findings(tmp_path / "ant.yaml", tiny_file)["file"].words


def test_a_recipe_that_does_not_go_with_the_file(silo: Path, tiny_file: Path) -> None:
    recipe = silo.with_name("shared.yaml")
    recipe.write_text(f"{tiny_file.read_text()}\ntokenizer: shared\n")
    found = findings(silo, recipe)
    assert found["recipe"].state == "FAILED"
    assert "tokenizer: missing; the federation shares one" in found["recipe"].words


def test_data_that_is_gone_is_named_in_words_of_the_file(silo: Path, tiny_file: Path) -> None:
    silo.with_name("ant.jsonl").unlink()
    found = findings(silo, tiny_file)["data"]
    assert found.state == "FAILED"
    assert found.words.startswith("no file matches")
    assert found.words.endswith("; check files")


@pytest.mark.usefixtures("fast")
def test_data_that_changed_is_told(silo: Path, tiny_file: Path) -> None:
    first = findings(silo, tiny_file)["data"]
    assert "; as on 20" in first.words
    lines = silo.with_name("ant.jsonl").read_text(encoding="utf-8").splitlines()
    silo.with_name("ant.jsonl").write_text("\n".join(lines[:50]), encoding="utf-8")
    found = findings(silo, tiny_file)["data"]
    assert (found.state, found.facts["changed"]) == ("ok", True)
    assert f"when it had {first.facts['documents']} documents" in found.words
    assert findings(silo, tiny_file)["data"].facts["changed"] is False


@pytest.mark.usefixtures("fast")
def test_data_of_a_silo_that_never_read_any(silo: Path, tiny_file: Path, tmp_path: Path) -> None:
    edited(silo, home=str(tmp_path / "new home"))
    found = findings(silo, tiny_file)["data"]
    assert found.words.endswith("read for the first time")
    assert found.facts["changed"] is False


@pytest.mark.usefixtures("fast")
def test_text_that_a_run_would_refuse_is_a_warning(
    silo: Path, tiny_file: Path, tmp_path: Path
) -> None:
    state = tmp_path / "home/silos/ant/state/0123456789ab/round-00003"
    save_state(state, {}, {"text": "of before"})
    found = findings(silo, tiny_file)["data"]
    assert found.state == "warning"
    assert "not the text that run 0123456789ab began with" in found.words
    (state / "state.json").write_text("damaged")
    assert findings(silo, tiny_file)["data"].state == "ok"


@pytest.mark.usefixtures("fast")
def test_a_tokenizer_that_loses_text_is_a_warning(
    silo: Path, tiny_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.model").write_bytes(sentencepiece_model(["a b c d e"] * 9, 265))
    found = findings(edited(silo, tokenizer="own.model"), tiny_file)["tokenizer"]
    assert found.state == "warning"
    assert found.facts["lossy_documents"] == found.facts["validation_documents"] > 0
    assert "0 of " in found.words and "bits per byte will be too low" in found.words


def test_too_few_tokens_for_a_batch(silo: Path, tiny_file: Path) -> None:
    recipe = silo.with_name("large.yaml")
    recipe.write_text(tiny_file.read_text().replace("batch_size: 4", "batch_size: 4000"))
    found = findings(silo, recipe)
    assert found["tokens"].state == "FAILED"
    assert "one batch takes 64,001" in found["tokens"].words
    assert states(found)["step"] == states(found)["disk"] == "skipped"


# ---- the machine -------------------------------------------------------------------------


def kill_myself(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_step_that_the_system_kills_is_survived(
    silo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_try_step", kill_myself)
    with pytest.raises(DeptError, match="most likely for want of memory; set a lower micro_batch"):
        try_step(silo, load_recipe("conf/partners.yaml"))


def test_a_step_that_finds_no_memory_says_so(silo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def try_step(_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nC++ backtrace")

    monkeypatch.setattr(trial.Silo, "try_step", try_step)
    told = trial._try_step(silo, load_recipe("conf/partners.yaml"))
    assert told == (
        "DefaultCPUAllocator: can't allocate memory; set a lower micro_batch_size in the silo's "
        "file, or ask for a smaller model"
    )


def test_a_step_that_cannot_be_made_is_told_from_its_process(silo: Path, tiny_file: Path) -> None:
    found = findings(edited(silo, device="cuda"), tiny_file)
    assert found["step"].state == "FAILED"
    assert "PyTorch sees no GPU here" in found["step"].words
    assert found["round"].state == "skipped"


Memory = namedtuple("Memory", ["total", "available"])
HUNDRED_MB = 100_000_000


@pytest.mark.parametrize(
    ("total_mb", "available_mb", "state"),
    [(200, 150, "ok"), (200, 99, "warning"), (99, 50, "FAILED")],
)
def test_memory_is_compared_with_the_machines(
    silo: Path,
    tiny_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    total_mb: int,
    available_mb: int,
    state: str,
) -> None:
    monkeypatch.setattr(checkup, "try_step", lambda *_: Trial(0.1, HUNDRED_MB))
    there = Memory(total_mb * 1_000_000, available_mb * 1_000_000)
    monkeypatch.setattr(checkup.psutil, "virtual_memory", lambda: there)
    found = findings(silo, tiny_file)["memory"]
    assert found.state == state
    body = found.facts["needed_bytes"] - HUNDRED_MB
    assert body > 0 and body % (3 * 4) == 0  # three more copies of a body in fp32
    assert ("micro_batch_size" in found.words) == (state != "ok")


def test_memory_of_a_gpu_counts_where_there_is_one(
    silo: Path, tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = Trial(0.1, HUNDRED_MB, gpu_peak_bytes=30 * 10**9, gpu_bytes=24 * 10**9)
    monkeypatch.setattr(checkup, "try_step", lambda *_: on_gpu)
    found = findings(silo, tiny_file)
    assert found["memory"].state == "FAILED"
    assert found["memory"].words.startswith("30.0 GB of the GPU's 24.0 GB")
    assert found["step"].facts["on_gpu"] is True
    assert " on the GPU, " in found["step"].words
    two = findings(edited(silo, processes=2), tiny_file)["step"]
    assert " on 2 GPUs, " in two.words


@pytest.mark.parametrize(
    ("step_s", "state"), [(100.0, "ok"), (700.0, "warning"), (1000.0, "FAILED")]
)
def test_a_round_has_to_fit_into_the_servers_patience(
    silo: Path, tiny_file: Path, monkeypatch: pytest.MonkeyPatch, step_s: float, state: str
) -> None:
    recipe = silo.with_name("late.yaml")
    settings = tiny_file.read_text().replace("local_steps: 2", "local_steps: 2, newcomer_steps: 2")
    recipe.write_text(f"{settings}\nround_timeout_s: 3600\n")
    monkeypatch.setattr(checkup, "try_step", lambda *_: Trial(step_s, 1))
    found = findings(silo, recipe)["round"]
    assert found.state == state
    assert found.facts == {
        "round_s": 2 * step_s,
        "first_round_s": 4 * step_s,
        "round_timeout_s": 3600.0,
    }
    assert ("round_timeout_s" in found.words) == (state != "ok")


@pytest.mark.usefixtures("fast")
def test_a_full_disk_is_noticed_before_the_run(
    silo: Path, tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(silo.parent)
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    found = findings(silo, tiny_file)["disk"]
    assert found.state == "FAILED"
    assert "1.0 kB free" in found.words and "make room" in found.words


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("wire", ["{up: fp32}", "{up: int4, down: int8}", "{fragments: 2}"])
def test_the_states_on_disk_are_counted_as_they_are_written(
    silo: Path, tiny_file: Path, wire: str
) -> None:
    tiny_file = tiny_file.with_name("wired.yaml")
    tiny_file.write_text(f"{SETTINGS}wire: {wire}\n")
    file = load_silo_file(silo)
    recipe = file.over(load_recipe(tiny_file))
    own = Silo("ant", recipe, file.home, "0123456789ab")
    body = initial_body(recipe.model, recipe.sequence_tokens, own.layout, 1)
    own.train(Task("ant", 1, 0, 0, body, {}))
    (state,) = own.folder.glob("state/*/round-00001/tensors.safetensors")
    counted = findings(silo, tiny_file)["disk"].facts["state_bytes"]
    final = 4 * (own.layout.body_parameters() + own.layout.embedding_parameters(300))
    arrived = [file.stat().st_size for file in own.folder.glob("state/*/received/*/*.safetensors")]
    assert len(arrived) == recipe.wire.sends_changes
    expected = 3 * state.stat().st_size + 2 * sum(arrived)
    assert counted - final == pytest.approx(expected, rel=0.1)  # their headers


# ---- the federation ----------------------------------------------------------------------


@pytest.mark.usefixtures("fast")
def test_a_silo_without_a_key_beside_it(silo: Path, tiny_file: Path) -> None:
    silo.with_suffix(".key").unlink()
    found = findings(silo, tiny_file)["key"]
    assert found == Finding("skipped", f"no {silo.with_suffix('.key')} beside the file")


def test_a_superlink_that_is_not_reached(tmp_path: Path, tiny_file: Path) -> None:
    found = findings(tmp_path / "ant.yaml", tiny_file, superlink="localhost:1")
    assert found["superlink"].state == "FAILED"
    assert "refused: nothing listens there" in found["superlink"].words
    assert found["clock"].state == "skipped"


def test_a_clock_that_is_off_is_noticed(tmp_path: Path, tiny_file: Path) -> None:
    with https_server(tmp_path, ahead_s=90.0) as address:
        found = findings(
            tmp_path / "ant.yaml", tiny_file, superlink=address, ca_file=tmp_path / "ca.crt"
        )
    assert found["superlink"].state == "ok"
    assert found["clock"].state == "FAILED"
    assert re.match(r"(88|89|90) s ahead of the server's; Flower refuses", found["clock"].words)


@pytest.mark.parametrize(
    ("ahead_s", "state"),
    [(0.0, "ok"), (1.0, "ok"), (4.0, "warning"), (6.0, "FAILED"), (-50.0, "ok"),
     (-100.0, "warning"), (-301.0, "FAILED")],
)  # fmt: skip
def test_flower_is_stricter_with_clocks_that_are_ahead(ahead_s: float, state: str) -> None:
    found = clock_finding(ahead_s)
    assert found.state == state
    assert found.facts == {"clock_ahead_s": ahead_s}
    assert ("set the clock" in found.words) == (state != "ok")
