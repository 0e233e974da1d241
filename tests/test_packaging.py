from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OVERRIDES = [Requirement(r) for r in PROJECT["tool"]["uv"]["override-dependencies"]]
TOPS = ("dept_fl", "server_app", "client_app")
EXTRAS = PROJECT["project"]["optional-dependencies"].values()
NAMED = [*PROJECT["project"]["dependencies"], *(r for extra in EXTRAS for r in extra)]
DIRECT = [Requirement(r) for r in dict.fromkeys(NAMED)]  # `dev` has those of other extras again
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def name(requirement: Requirement) -> str:
    return canonicalize_name(requirement.name)


# ---- the checkout ------------------------------------------------------------------------


def test_the_folder_of_trained_tokenizers_is_no_package() -> None:
    assert not (ROOT / "tokenizers.py").exists()
    assert not list((ROOT / "tokenizers").rglob("*.py"))


def test_hugging_faces_tokenizers_is_the_one_imported_from_here() -> None:
    code = "import tokenizers, transformers; print(tokenizers.Tokenizer, tokenizers.__file__)"
    code += "; from transformers import PreTrainedTokenizerFast"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "tokenizers.Tokenizer" in done.stdout
    assert str(ROOT / "tokenizers") not in done.stdout


def test_the_packages_are_listed_one_by_one() -> None:
    files = [f for top in TOPS for f in (ROOT / top).rglob("__init__.py")]
    found = [".".join(f.parent.relative_to(ROOT).parts) for f in files]
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert re.search(r"Apache License\s+Version 2\.0", text)
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_the_readme_that_is_named_exists() -> None:
    assert (ROOT / PROJECT["project"]["readme"]).is_file()


# ---- requirements ------------------------------------------------------------------------


def test_every_requirement_is_overridden_for_flower() -> None:
    assert sorted(map(name, OVERRIDES)) == sorted(map(name, DIRECT))


@pytest.mark.parametrize("override", OVERRIDES, ids=name)
def test_an_override_holds_on_no_python(override: Requirement) -> None:
    assert override.marker is not None
    assert not override.marker.evaluate()


@pytest.mark.parametrize("requirement", DIRECT, ids=name)
def test_a_requirement_is_pinned_within_its_range(requirement: Requirement) -> None:
    (pin,) = (p for p in PINS if name(p) == name(requirement))
    (exact,) = pin.specifier
    assert exact.operator == "=="
    assert requirement.specifier.contains(exact.version)


def test_nothing_else_is_pinned() -> None:
    assert sorted(map(name, PINS)) == sorted(map(name, DIRECT))


def test_uv_toml_is_there_and_says_nothing() -> None:
    text = (ROOT / "uv.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text) == {}
    assert text.startswith("#")


# ---- the app bundle ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git has or would take, under a name that Flower accepts."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    copy = tmp_path_factory.mktemp("checkout") / "dept-fl"
    for path in filter(None, listed.split("\0")):
        if (ROOT / path).is_file():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, copy / path)
    return copy


@pytest.fixture(scope="module")
def bundle_file(checkout: Path) -> Path:
    """What `flwr build` makes of a checkout in which runs have left their things."""
    leavings = ["tokenizers/ant/0123/tokenizer.model", "silos/ant/text/train.jsonl"]
    for path in [*leavings, "dept_fl/__pycache__/config.pyc", "conf/tokenizer.model"]:
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_bytes(b"x")
    environment = {
        **os.environ,
        "FLWR_HOME": str(checkout.parent / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    flwr = str(Path(sys.executable).with_name("flwr"))
    done = subprocess.run(
        [flwr, "build", "--app", str(checkout)],
        cwd=checkout.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = checkout.parent.glob("*.fab")
    return file


@pytest.fixture(scope="module")
def bundled(bundle_file: Path) -> list[str]:
    return zipfile.ZipFile(bundle_file).namelist()


@pytest.fixture
def bundle(bundle_file: Path, tmp_path: Path) -> Path:
    zipfile.ZipFile(bundle_file).extractall(tmp_path / "app")
    return tmp_path / "app"


def test_the_bundle_has_all_of_the_app(bundled: list[str]) -> None:
    sources = [p for top in TOPS for p in (ROOT / top).rglob("*.py")]
    recipes = list((ROOT / "conf").rglob("*.yaml"))
    expected = {p.relative_to(ROOT).as_posix() for p in (*sources, *recipes)}
    assert expected | {"LICENSE", "pyproject.toml"} <= set(bundled)


def test_the_bundle_has_nothing_but_the_app(bundled: list[str]) -> None:
    # Flower adds its own list of contents, .info/CONTENT.
    expected = r"(dept_fl|server_app|client_app)/.+\.py|conf/.+\.yaml|LICENSE|pyproject\.toml"
    strangers = [p for p in bundled if not re.fullmatch(expected + r"|\.info/CONTENT", p)]
    assert strangers == []


def test_the_bundle_is_small(bundle_file: Path) -> None:
    assert bundle_file.stat().st_size < 1_000_000


def test_a_recipe_loads_from_the_bundle_alone(bundle: Path, tmp_path: Path) -> None:
    code = "import dept_fl.config as c; print(c.__file__, c.load_recipe('conf/demo.yaml').name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(bundle)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(bundle / "dept_fl" / "config.py"), "demo"]


def sync(bundle: Path) -> subprocess.CompletedProcess[str]:
    """`uv sync` as Flower's SuperLink calls it, without a network and without a cache."""
    command = [sys.executable, "-m", "uv", "sync", "--python", sys.executable]
    command += ["--no-install-project", "--no-install-package", "flwr", "--inexact"]
    environment = {
        **os.environ,
        "UV_PROJECT_ENVIRONMENT": str(bundle.parent / "environment"),
        "UV_CACHE_DIR": str(bundle.parent / "cache"),
        "UV_OFFLINE": "1",
    }
    return subprocess.run(
        command, cwd=bundle, env=environment, capture_output=True, text=True, check=False
    )


def test_flower_installs_nothing_for_a_run(bundle: Path) -> None:
    done = sync(bundle)
    assert done.returncode == 0, done.stderr
    assert list((bundle.parent / "environment").rglob("pyvenv.cfg"))
    assert list((bundle.parent / "environment").rglob("*.dist-info")) == []


def test_flower_would_download_everything_without_the_overrides(bundle: Path) -> None:
    file = bundle / "pyproject.toml"
    head, table, _ = file.read_text(encoding="utf-8").partition("[tool.uv]")
    assert table
    file.write_text(head, encoding="utf-8")
    assert sync(bundle).returncode != 0
