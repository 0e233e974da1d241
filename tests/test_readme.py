"""What the README tells people to type is understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from dept_fl.config import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNS = re.findall(r"^dept run conf/demo.yaml (.*?)(?:  +#.*)?$", README, re.MULTILINE)


def test_there_are_examples():
    assert len(RUNS) >= 5


@pytest.mark.parametrize("words", RUNS)
def test_every_run_of_the_demo_is_a_good_recipe(words: str):
    overrides = " ".join(shlex.quote(word) for word in shlex.split(words))
    assert load_recipe(ROOT / "conf/demo.yaml", overrides) != load_recipe(ROOT / "conf/demo.yaml")


def test_the_silos_shown_are_good_silos(tmp_path: Path):
    shown = re.search(r"```yaml\n(silos:.*?)```", README, re.DOTALL)
    assert shown is not None
    settings = yaml.safe_load((ROOT / "conf/demo.yaml").read_text())
    settings["silos"] = yaml.safe_load(shown[1])["silos"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert load_recipe(tmp_path / "recipe.yaml").silo_names == ["fr", "py", "sw"]


@pytest.mark.parametrize("target", ["demo", "test", "check", "bench", "stop", "format"])
def test_every_make_target_it_names_exists(target: str):
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_file_it_links_exists():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []
