from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import dept_fl
from tests.deployment import free_port

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
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted([*found, *mapped])


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
def files() -> list[str]:
    """What git has or would take."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in listed.split("\0") if path and (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def checkout(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy under a name that Flower accepts, in which runs have left their things."""
    copy = tmp_path_factory.mktemp("checkout") / "dept-fl"
    for path in files:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    leavings = ["tokenizers/ant/0123/tokenizer.model", "silos/ant/text/train.jsonl"]
    for path in [*leavings, "dept_fl/__pycache__/config.pyc", "conf/tokenizer.model"]:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes(b"x")
    return copy


@pytest.fixture(scope="module")
def bundle_file(checkout: Path) -> Path:
    """What `flwr build` makes of a checkout."""
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


# ---- the distributions ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distributions(checkout: Path) -> Path:
    """The folder of what the build backend makes of a checkout: a wheel and a source archive."""
    code = (
        "from setuptools import build_meta as b; b.build_sdist('../dist'); b.build_wheel('../dist')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout.parent / "dist"


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (file,) = distributions.glob("*.whl")
    return file


def test_the_wheel_has_the_app_its_recipes_and_nothing_else(wheel: Path, files: list[str]) -> None:
    code = {p for p in files if p.startswith(tuple(f"{top}/" for top in TOPS))}
    beside = {p for p in files if re.fullmatch(r"pyproject\.toml|LICENSE|conf/.+\.yaml", p)}
    about = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    expected = code | {f"dept_fl/project/{p}" for p in beside}
    expected |= {f"dept_fl-{dept_fl.__version__}.dist-info/{name}" for name in about}
    assert set(zipfile.ZipFile(wheel).namelist()) == expected
    assert {f"{top}/py.typed" for top in TOPS} <= expected


def test_the_source_archive_has_what_git_has(distributions: Path, files: list[str]) -> None:
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {m.name.partition("/")[2] for m in opened.getmembers() if m.isfile()}
    made = {p for p in names if re.fullmatch(r"PKG-INFO|setup\.cfg|dept_fl\.egg-info/.+", p)}
    assert names - made == set(files)


@pytest.fixture(scope="module")
def outside(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment with the wheel and, below it, what this one has but for us."""
    folder = tmp_path_factory.mktemp("outside")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "-q"]
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # Paths that such a file adds have no such files of their own read: no editable install.
    (site / "below.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    for script in Path(sys.executable).parent.glob("fl*w*r*"):  # Flower's commands, run by this one
        text = re.sub(r"\A#!.*", f"#!{python}", script.read_text())
        (python.parent / script.name).write_text(text)
        (python.parent / script.name).chmod(0o755)
    return python.parent


def run_outside(scripts: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "DEPT_HOME": str(cwd)}
    return subprocess.run(
        [str(scripts / command[0]), *command[1:]],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_installed_wheel_knows_its_recipes_and_version(outside: Path, tmp_path: Path) -> None:
    code = "import dept_fl, dept_fl.config as c, server_app; print(dept_fl.__version__)"
    code += "; print(c.load_recipe('conf/demo.yaml').name, c.CONF_DIR, server_app.__file__)"
    done = run_outside(outside, tmp_path, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    version, name, *places = done.stdout.split()
    assert (version, name) == (PROJECT["project"]["version"], "demo")
    assert all(place.startswith(f"{outside.parent}/lib/") for place in places)


def test_the_command_of_an_installed_wheel_works(outside: Path, tmp_path: Path) -> None:
    assert "cost" in run_outside(outside, tmp_path, "dept", "--help").stdout
    sizes = [f"--vocabulary={silo}=4096" for silo in ("cpp", "prose", "python")]
    done = run_outside(outside, tmp_path, "dept", "cost", "conf/demo.yaml", *sizes, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_the_app_made_of_an_installed_wheel_is_that_of_the_checkout(
    outside: Path, bundled: list[str], tmp_path: Path
) -> None:
    code = "from pathlib import Path; from dept_fl.local import app_folder"
    code += "; from flwr.cli.build import build_fab_from_disk as build"
    code += "; Path('app.fab').write_bytes(build(app_folder(Path.cwd())))"
    done = run_outside(outside, tmp_path, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert sorted(zipfile.ZipFile(tmp_path / "app.fab").namelist()) == sorted(bundled)


def test_an_operator_with_an_installed_wheel_gets_the_app_with_the_federation(
    outside: Path, bundled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submitted(app: str) -> list[str]:
        code = "import sys; from pathlib import Path; from flwr.cli.build import *"
        code += "; Path('app.fab').write_bytes(build_fab_from_disk(Path(sys.argv[1])))"
        done = run_outside(outside, tmp_path, "python", "-c", code, app)
        assert done.returncode == 0, done.stderr
        return zipfile.ZipFile(tmp_path / "app.fab").namelist()

    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    federation = str(tmp_path / "my federation")
    ports = [f"--port={free_port()}", f"--superlink-port={free_port()}"]
    words = ["federation", "init", federation, "--host", "fl.example.org", *ports]
    done = run_outside(outside, tmp_path, "dept", *words)
    assert done.returncode == 0, done.stderr
    run, app, *more = shlex.split(done.stdout.splitlines()[-1].removeprefix("  flwr "))
    assert (run, more) == ("run", ["partners", "--stream"])
    assert sorted(submitted(app)) == sorted(bundled)

    # As an older version may have left it; the start fails at a word that Flower does not know.
    (Path(app) / "conf" / "demo.yaml").rename(Path(app) / "conf" / "old.yaml")
    (tmp_path / "nginx").write_text("#!/bin/sh")
    (tmp_path / "nginx").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    done = run_outside(outside, tmp_path, "dept", "federation", "start", federation, "--bogus")
    assert (done.returncode, "did not start" in done.stderr) == (1, True), done.stderr
    assert sorted(submitted(app)) == sorted(bundled)


@pytest.mark.flower
def test_an_installed_wheel_runs(outside: Path, tiny_file: Path, tmp_path: Path) -> None:
    words = [str(tiny_file), "rounds=1", f"--run-dir={tmp_path / 'run'}"]
    done = run_outside(outside, tmp_path, "dept", "run", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 1 of 1" in done.stdout
    assert str(ROOT) not in done.stdout + done.stderr
    assert list((tmp_path / "flower").iterdir()) == []


# ---- what others read ----------------------------------------------------------------------------


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_there_is_one_version() -> None:
    assert dept_fl.__version__ == PROJECT["project"]["version"]
    assert str(Version(dept_fl.__version__)) == dept_fl.__version__
    assert read_yaml("CITATION.cff")["version"] == dept_fl.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{dept_fl.__version__}]" in changes


def test_the_citation_names_the_paper() -> None:
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["project"]["license"]
    (paper,) = citation["references"]
    assert paper["authors"][0]["family-names"] == "Iacob"
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2410.05021"}]


def test_the_workflow_runs_what_a_change_must_pass_on_oldest_and_newest_python() -> None:
    (job,) = read_yaml(".github/workflows/check.yml")["jobs"].values()
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    assert "exec make check" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    range_ = SpecifierSet(PROJECT["project"]["requires-python"])
    allowed = [f"3.{minor}" for minor in range(30) if f"3.{minor}" in range_]
    assert job["strategy"]["matrix"]["python"] == [allowed[0], allowed[-1]]


def test_the_hooks_before_a_commit_are_checks_of_make() -> None:
    (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in local["hooks"]:
        program, *words = hook["entry"].removeprefix(".venv/bin/").split()
        assert " ".join([f"$(BIN)/{program}", *words[:1]]) in makefile, hook["id"]
        assert hook["language"] == "system"
