"""Whole runs of a federation: SuperLink, SuperNodes, nginx, TLS and keys, as at real partners."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import yaml

from benchmarks.capture import agrees, compare
from benchmarks.capture import run as captured_run
from dept_fl.checkpoint import load_state, round_folder, rounds_on_disk, under_prefix
from dept_fl.config import load_recipe
from dept_fl.report import Event, Ledger
from dept_fl.rounds import Server, pretrain
from dept_fl.silo import Silo
from dept_fl.silo_file import load_silo_file
from tests.conftest import SETTINGS, write_text
from tests.deployment import (
    CONNECTION,
    Component,
    Federation,
    free_port,
    needs_nginx,
    processes_of,
    wait_until,
)
from tests.federation import same

pytestmark = [pytest.mark.flower, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[1]
Opens = Callable[..., Federation]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opens]:
    """opened(secure=True): a federation whose processes are ended with the test."""
    federations: list[Federation] = []

    def opens(secure: bool) -> Federation:
        federations.append(Federation(tmp_path, secure))
        return federations[-1]

    yield opens
    for federation in federations:
        federation.close()


def recipe_file(folder: Path, **settings: object) -> Path:
    """The tests' small recipe without its simulated silos."""
    file = folder / "recipe.yaml"
    common = yaml.safe_load(SETTINGS) | {"silos": {}}
    file.write_text(yaml.safe_dump(common | settings))
    return file


def silo_file(folder: Path, silo: str, vocabulary: int) -> Path:
    write_text(folder, silo)
    file = folder / f"{silo}.yaml"
    file.write_text(
        f"name: {silo}\nfiles: {silo}.jsonl\nvocab_size: {vocabulary}\nhome: home-{silo}\n"
        "validation_fraction: 0.2\n"
    )
    return file


def submit(federation: Federation, recipe: Path, run_dir: Path) -> Component:
    words = f'recipe="{recipe}" run-dir="{run_dir}"'
    command = ["flwr", "run", str(ROOT), CONNECTION, "--stream", "--run-config", words]
    return federation.start("operator", *command)


def while_lives(submitted: Component, condition: Callable[[], bool]) -> None:
    """Wait for a condition while the run goes on."""
    wait_until(lambda: condition() or not submitted.lives, 300, str(submitted.log))
    assert submitted.lives, submitted.output


def status_of_run(federation: Federation) -> str:
    listed = federation.flwr("list", CONNECTION, "--format", "json").stdout
    return str(json.loads(listed)["runs"][0]["status"])


def events(run_dir: Path, kind: str) -> list[Event]:
    return [event for event in Ledger(run_dir).read() if event["event"] == kind]


@needs_nginx
def test_partners_with_keys_a_late_silo_and_a_killed_node(opened: Opens, tmp_path: Path):
    """Three vocabularies, one of a new script that comes late; one SuperNode dies by SIGKILL."""
    federation = opened(secure=True)
    federation.superlink()
    nodes = {}
    for silo, vocabulary in (("ant", 320), ("bee", 330)):
        federation.register(silo)
        config = f'silo="{silo_file(tmp_path, silo, vocabulary)}"'
        nodes[silo] = federation.supernode(silo, config)
    federation.register("cat")
    recipe = recipe_file(
        tmp_path, rounds=6, min_silos=2, quorum=0.5, round_timeout_s=240, name="late"
    )
    run_dir = tmp_path / "run"
    submitted = submit(federation, recipe, run_dir)
    checkpoints = run_dir / "checkpoints"
    while_lives(submitted, lambda: 1 in rounds_on_disk(checkpoints))
    federation.supernode("cat", f'silo="{silo_file(tmp_path, "cat", 340)}"')
    while_lives(submitted, lambda: any(e["silo"] == "cat" for e in events(run_dir, "join")))
    nodes["bee"].process.send_signal(signal.SIGKILL)
    submitted.wait_for_exit(600)
    assert status_of_run(federation) == "finished:completed", submitted.output
    joined = next(e["round"] for e in events(run_dir, "join") if e["silo"] == "cat")
    rounds = events(run_dir, "round")
    assert [e["round"] for e in rounds] == [1, 2, 3, 4, 5, 6]
    for event in rounds:
        assert ("cat" in event["sampled"]) == (event["round"] > joined)
        assert "ant" in event["merged"]
    assert "bee" in rounds[0]["merged"]
    assert "bee" not in rounds[-1]["merged"]
    lost = [e["reason"] for e in events(run_dir, "failure") if e["silo"] == "bee"]
    assert lost  # Flower notices a dead node after a minute, and patience may end before that
    assert all("offline" in r or "Node Unavailable" in r or "patience" in r for r in lost)
    shown = federation.run("dept", "status", str(run_dir)).stdout
    assert "late, spec-opt" in shown
    assert "bee" in shown
    assert "round 6 of 6: ended" in shown


def test_a_deployment_in_process_isolation_gives_the_bits_of_the_plain_algorithm(
    opened: Opens, tmp_path: Path
):
    federation = opened(secure=False)
    federation.superlink("--isolation", "process")
    superexec(federation, "link", federation.superlink_port)
    recipe = recipe_file(tmp_path, rounds=2, min_silos=2, round_timeout_s=240)
    files = {"ant": silo_file(tmp_path, "ant", 320), "bee": silo_file(tmp_path, "bee", 330)}
    for silo, file in files.items():
        port = free_port()
        words = ("--isolation", "process", "--port", str(port))
        federation.supernode(silo, f'silo="{file}"', *words)
        superexec(federation, silo, port)
    submitted = submit(federation, recipe, tmp_path / "run")
    submitted.wait_for_exit(400)
    assert status_of_run(federation) == "finished:completed", submitted.output
    tensors, _ = load_state(round_folder(tmp_path / "run" / "checkpoints", 2))
    assert same(under_prefix("body", tensors), plain(recipe, files).body)
    assert under_prefix("embeddings", tensors) == {}


@needs_nginx
def test_forked_messages_give_the_bits_of_the_plain_algorithm(opened: Opens, tmp_path: Path):
    """As `dept silo start` has them; one of the silos trains in two processes."""
    federation = opened(secure=True)
    federation.superlink()
    recipe = recipe_file(tmp_path, rounds=2, min_silos=2, round_timeout_s=240)
    files = {"ant": silo_file(tmp_path, "ant", 320), "bee": silo_file(tmp_path, "bee", 330)}
    with files["bee"].open("a") as more:
        more.write("processes: 2\ndevice: cpu\n")
    nodes = {}
    for silo, file in files.items():
        federation.register(silo)
        command = ["dept", "silo", "start", file, "--key", federation.key(silo)]
        command += ["--superlink", f"localhost:{federation.port}"]
        command += ["--root-certificates", federation.ca_file, "--", "--port", free_port()]
        nodes[silo] = federation.start(silo, *map(str, command))
    submitted = submit(federation, recipe, tmp_path / "run")
    submitted.wait_for_exit(400)
    assert status_of_run(federation) == "finished:completed", submitted.output
    # A message's process that is just ending has the fork server's command line.
    wait_until(lambda: len(fork_servers(tmp_path)) == 2, 60)
    for each in fork_servers(tmp_path):  # both were asked, or they would have imported nothing
        assert any("libtorch" in mapped.path for mapped in each.memory_maps())
    for silo, node in nodes.items():
        assert f"silo {silo}: train" in node.output
        assert "messages start slowly" not in node.output
    tensors, _ = load_state(round_folder(tmp_path / "run" / "checkpoints", 2))
    assert same(under_prefix("body", tensors), plain(recipe, files).body)
    for node in nodes.values():
        node.process.send_signal(signal.SIGTERM)
        assert node.wait_for_exit(60) == 0, node.output
    assert fork_servers(tmp_path) == []


def fork_servers(folder: Path) -> list[psutil.Process]:
    found = []
    for process in processes_of(folder):
        with suppress(psutil.Error):  # it has just ended
            if "forkserver.py" in " ".join(process.cmdline()):
                found.append(process)
    return found


def superexec(federation: Federation, name: str, port: int) -> Component:
    command = ["flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"]
    return federation.start(f"superexec-{name}", *command)


def plain(recipe: Path, files: dict[str, Path]) -> Server:
    """The same training by the plain algorithm, without Flower."""
    experiment = uuid4().hex[:12]
    loaded = load_recipe(recipe)
    server = Server(loaded, experiment, shared=None)
    silos = {}
    for name, path in files.items():
        file = load_silo_file(path)
        silos[name] = Silo(name, file.over(loaded), file.home, experiment)
        server.register(silos[name].register())
    pretrain(server, silos)
    return server


def test_a_silo_that_works_past_the_deadline_ends_itself(opened: Opens, tmp_path: Path):
    """A round of days: the run stops, and the SuperNode is free for the next one."""
    federation = opened(secure=False)
    federation.superlink()
    node = federation.supernode("ant", f'silo="{silo_file(tmp_path, "ant", 320)}"')
    endless = recipe_file(
        tmp_path, rounds=1, round_attempts=1, round_timeout_s=40, inner={"local_steps": 10**7}
    )
    submitted = submit(federation, endless, tmp_path / "run")
    submitted.wait_for_exit(300)
    assert status_of_run(federation) == "finished:failed"
    assert "round 1: only 0 of 1 sampled silos answered well (missing: ant)" in submitted.output
    submitted = submit(federation, recipe_file(tmp_path, rounds=1), tmp_path / "another")
    submitted.wait_for_exit(300)
    assert status_of_run(federation) == "finished:completed", submitted.output
    assert "train of silo ant: not done within the 40 s the server gave" in node.output


def test_what_a_silo_sends_is_what_the_ledger_says(tmp_path: Path):
    captures, ledger, body_bytes = captured_run(tmp_path, rounds=1)
    rows = compare(captures, ledger, body_bytes)
    assert len(rows) == 2
    assert all(map(agrees, rows))
    pieces = captures["ant"].objects.values()
    assert not any("▁".encode() in content for content in pieces)  # no piece of a tokenizer
