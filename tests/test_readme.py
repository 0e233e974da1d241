"""What the README and the tutorial tell people to type is understood, and run by a test."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dept_fl.config import load_recipe
from tests.conftest import SETTINGS, write_text
from tests.federation import trained
from tests.shown import bash_blocks, shell_commands

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TUTORIAL = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
RUNS = re.findall(r"^dept run conf/demo.yaml (.*?)(?:  +#.*)?$", README, re.MULTILINE)

# Which test runs a command of the README, at reduced size where it is long; or why none does.
RUN_BY = {
    r"make demo": "none: five minutes of `dept run`, which test_flower.py runs in small",
    r"make test": "none: it is what runs this test",
    r"python3 -m venv .*": "none: `make check` does it before any test",
    r"\. \.venv/bin/activate": "none: the same",
    r"pip install .*": "none: the same",
    r"flwr run \. --stream.*": "flower::test_plain_flwr_run_works_where_flwr_was_never_run",
    r"dept run conf/demo\.yaml .*": "readme::test_every_run_of_the_demo_trains_in_small",
    r"dept run my\.yaml --dry-run": "readme::test_the_tutorial_from_an_empty_folder",
    r"dept run my\.yaml --run-dir out.*": "flower::"
    "test_a_killed_run_resumed_gives_the_tensors_of_an_unbroken_one",
    r"dept silo new .*": "partner::test_a_new_silo_is_ready_for_any_recipe",
    r"dept silo check .*": "checkup::test_a_silo_that_is_well_can_join",
    r"flower-supernode .*": "deployment::test_partners_with_keys_a_late_silo_and_a_killed_node",
    r"dept federation init .*": "federation::test_init_says_what_it_made_and_what_comes_next",
    r"dept federation start .*": "federation::"
    "test_partners_in_the_folder_are_registered_again_at_each_start",
    r"flwr run \. partners .*": "deployment::test_partners_with_keys_a_late_silo_and_a_killed_node",
    r"dept export RUN_DIR --silo .*": "export::"
    "test_generate_writes_the_same_from_the_silos_folder_and_the_exported_one",
    r"dept export --silo-file .*": "export::test_a_partner_exports_its_newest_final",
    r"dept export RUN_DIR --global .*": "export::test_the_servers_model_is_exported",
    r"dept generate .*": "export::"
    "test_generate_writes_the_same_from_the_silos_folder_and_the_exported_one",
    r"python -m benchmarks\.handbook": "handbook::test_each_language_gets_two_files_and_a_row",
    r"dept run conf/handbook\.yaml": "none: minutes; test_compare.py runs such recipes in small",
    r"dept compare .*": "compare::test_the_command_writes_tables_and_plots",
    r"dept adapt .*": "adapt::test_the_command",
    r"dept finetune .*": "finetune::test_the_command_on_a_silos_model",
    r"dept cost --paper": "paper::test_the_command_prints_every_figure_in_100_columns",
    r"dept silo split .*": "clusters::test_the_command_prints_silos_terms_and_agreement",
}


def test_every_command_of_the_readme_is_run_by_a_test_or_has_a_reason():
    shown = list(shell_commands(README))
    places = [[p for p in RUN_BY if re.fullmatch(p, command)] for command in shown]
    assert [c for c, found in zip(shown, places, strict=True) if len(found) != 1] == []
    assert {place for (place,) in places} == RUN_BY.keys()


@pytest.mark.parametrize("test", sorted({t for t in RUN_BY.values() if not t.startswith("none")}))
def test_the_test_that_runs_a_command_is_there(test: str):
    file, name = test.split("::")
    text = (ROOT / f"tests/test_{file}.py").read_text(encoding="utf-8")
    assert re.search(rf"^def {name}\(", text, re.MULTILINE)


def test_there_are_examples():
    assert len(RUNS) >= 5


@pytest.mark.parametrize("words", RUNS)
def test_every_run_of_the_demo_is_a_good_recipe(words: str):
    overrides = shlex.join(shlex.split(words))
    assert load_recipe(ROOT / "conf/demo.yaml", overrides) != load_recipe(ROOT / "conf/demo.yaml")


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' small recipe with the demo's names of silos."""
    folder = tmp_path_factory.mktemp("demo")
    settings = yaml.safe_load(SETTINGS)
    names = zip(["cpp", "prose", "python"], settings.pop("silos"), strict=True)
    settings["silos"] = {name: {"files": [f"{text}.jsonl"]} for name, text in names}
    for source in settings["silos"].values():
        write_text(folder, Path(source["files"][0]).stem)
    (folder / "demo.yaml").write_text(yaml.safe_dump(settings))
    return folder / "demo.yaml"


@pytest.mark.parametrize("words", RUNS)
def test_every_run_of_the_demo_trains_in_small(words: str, small_demo: Path, home: Path):
    overrides = shlex.join([*shlex.split(words), "rounds=2", "inner.local_steps=2"])
    server, _ = trained(load_recipe(small_demo, overrides), home)
    assert server.round == 2
    assert all(len(member.merged) <= 2 for member in server.members.values())
    assert sum(len(member.merged) for member in server.members.values()) >= 2


def test_the_silos_shown_are_good_silos(tmp_path: Path):
    shown = re.search(r"```yaml\n(silos:.*?)```", README, re.DOTALL)
    assert shown is not None
    settings = yaml.safe_load((ROOT / "conf/demo.yaml").read_text())
    settings["silos"] = yaml.safe_load(shown[1])["silos"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert load_recipe(tmp_path / "recipe.yaml").silo_names == ["fr", "py", "sw"]


@pytest.mark.parametrize("target", ["demo", "test", "check", "docs", "bench", "stop", "format"])
def test_every_make_target_it_names_exists(target: str):
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_file_it_links_exists():
    links = re.findall(r"\]\(((?!http)[^)#]+)(?:#([^)]+))?\)", README)
    assert len(links) > 8
    assert [file for file, _ in links if not (ROOT / file).exists()] == []
    for file, anchor in links:
        if anchor:
            titles = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]


# ---- the tutorial ------------------------------------------------------------------------


@pytest.mark.flower
def test_the_tutorial_from_an_empty_folder(tmp_path: Path):
    """All its commands as they stand there, with fewer rounds, and this test's own installation."""
    installation, *blocks = bash_blocks(TUTORIAL)
    assert "pip install" in installation
    assert "\nrounds: 6\n" in TUTORIAL
    blocks = [block.replace("\nrounds: 6\n", "\nrounds: 3\n") for block in blocks]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "DEPT_"))}
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**kept, "HOME": str(tmp_path), "PATH": scripts}
    command = ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "dept-tutorial"
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    final = [event for event in map(json.loads, lines) if event.get("final")]
    assert {event["silo"] for event in final} == {"code", "manual"}
    for event in final:
        assert event["bits_per_byte"] < event["unigram_bits_per_byte"]
    assert (folder / "run/report.html").is_file()
    assert (folder / "code-model/model.safetensors").is_file()
    said = done.stdout.splitlines()
    assert any(line.startswith("def ") for line in said)
    assert any(line.startswith("import ") for line in said)
