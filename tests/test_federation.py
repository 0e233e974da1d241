"""What an operator does to open a federation to partners, with real servers and SuperNodes."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import ssl
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from click.testing import Result
from flwr.cli.constant import DEFAULT_FLOWER_CONFIG_TOML
from typer.testing import CliRunner

from dept_fl import certificates
from dept_fl.certificates import read_issued
from dept_fl.cli import app
from dept_fl.errors import DeptError
from dept_fl.federation import load, start
from tests.deployment import (
    ROOT,
    Federation,
    free_port,
    make_key,
    needs_nginx,
    processes_of,
    public_file,
    speak,
    wait_until,
)
from tests.test_gateway import TARGETS, request, status

HOST = ["--host", "fl.example.org"]
Dept = Callable[..., Result]


@pytest.fixture
def dept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dept:
    """dept("init", ...): `dept federation init ...` with Flower's configuration under tmp_path."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    return lambda *words: CliRunner().invoke(app, ["federation", *map(str, words)])


@pytest.fixture
def folder(dept: Dept, tmp_path: Path) -> Path:
    done = dept("init", tmp_path / "fed", *HOST)
    assert done.exit_code == 0, done.output
    return tmp_path / "fed"


def config(tmp_path: Path) -> Path:
    return tmp_path / "flwr" / "config.toml"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# ---- init --------------------------------------------------------------------------------


def test_init_says_what_it_made_and_what_comes_next(dept: Dept, tmp_path: Path):
    folder = tmp_path / "fed"
    done = dept("init", folder, "--host", "fl.example.org", "--host", "10.1.2.3", "--port", 8080)
    assert done.exit_code == 0
    steps = [
        "for fl.example.org, 10.1.2.3; ends 20",
        f"dept federation start {folder}\n",
        f"flwr supernode register {folder}/partners/fr.pub partners --name fr",
        f"{folder}/ca.crt and the address fl.example.org:8080\n",
        "flwr run . partners --stream",
    ]
    found = [done.stdout.find(step) for step in steps]
    assert -1 not in found and found == sorted(found), done.stdout
    fingerprint = ["openssl", "x509", "-fingerprint", "-sha256", "-noout", "-in", folder / "ca.crt"]
    told = subprocess.run(fingerprint, capture_output=True, text=True, check=True).stdout
    assert told.strip().rpartition("=")[2] in done.stdout


def test_init_tells_a_machine_too(dept: Dept, tmp_path: Path):
    told = json.loads(dept("init", tmp_path / "fed", *HOST, "--port", 8080, "--json").stdout)
    made = load(tmp_path / "fed")
    assert (told["address"], told["hosts"]) == ("fl.example.org:8080", ["fl.example.org"])
    assert (told["ca_file"], told["ca_sha256"]) == (str(made.ca_file), made.ca_fingerprint)
    assert told["connection"] == "partners"
    again = json.loads(dept("init", tmp_path / "fed", "--renew", "--json").stdout)
    assert again["ca_sha256"] == told["ca_sha256"]
    assert again["certificate_ends"] >= told["certificate_ends"]


def test_all_is_closed_to_others(folder: Path):
    assert [mode(folder), mode(folder / "ca"), mode(folder / "server")] == [0o700] * 3
    secret = [path for path, data in contents(folder).items() if b"PRIVATE KEY" in data]
    assert [mode(Path(path)) for path in secret] == [0o600] * 2


def test_the_certificate_is_for_the_hosts_and_this_machine(folder: Path):
    for host in ("fl.example.org", "localhost"):
        command = ["openssl", "verify", "-x509_strict", "-verify_hostname", host, "-CAfile"]
        subprocess.run([*command, folder / "ca.crt", folder / "server" / "server.crt"], check=True)


def test_a_second_init_is_refused_and_changes_nothing(dept: Dept, folder: Path, tmp_path: Path):
    before = contents(tmp_path)
    done = dept("init", folder, *HOST)
    assert done.exit_code == 2
    assert f"{folder} is a federation already" in done.stderr
    assert "--renew" in done.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("made", ["file", "folder"])
def test_a_place_in_use_is_refused(dept: Dept, tmp_path: Path, made: str):
    place = tmp_path / "mine" if made == "folder" else tmp_path / "file"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    (tmp_path / "file").write_text("x")
    before = contents(tmp_path)
    done = dept("init", place, *HOST)
    assert done.exit_code == 2
    assert f"{place} is in use: name a new folder" in done.stderr
    assert contents(tmp_path) == before


def test_a_place_that_cannot_be_written_is_one_clear_error(dept: Dept, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    done = dept("init", tmp_path / "file" / "fed", *HOST)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("error: not writable: ")
    assert not config(tmp_path).exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "--host is missing"),
        (["--host", "https://a.org"], "host 'https://a.org': expected a name such as"),
        ([*HOST, "--port", "8443"], "port 8443 is both the gateway's and the SuperLink's"),
        ([*HOST, "--name", "a.b"], "name 'a.b': use letters"),
    ],
)
def test_a_bad_setting_is_one_clear_error_and_leaves_nothing(
    dept: Dept, tmp_path: Path, words: list[str], reason: str
):
    done = dept("init", tmp_path / "fed", *words)
    assert done.exit_code == 2
    assert reason in done.stderr
    assert contents(tmp_path) == {}


# ---- Flower's configuration --------------------------------------------------------------


def test_a_new_configuration_is_flowers_own_with_the_connection(folder: Path, tmp_path: Path):
    text = config(tmp_path).read_text()
    assert text.startswith(DEFAULT_FLOWER_CONFIG_TOML)
    connection = {"address": "127.0.0.1:8443", "root-certificates": str(folder / "ca.crt")}
    assert tomllib.loads(text)["superlink"]["partners"] == connection


def test_an_old_configuration_keeps_every_byte(dept: Dept, tmp_path: Path):
    old = '# mine\n[superlink]\ndefault = "x" # why\n\n[superlink.x]\naddress = "a:1"'
    config(tmp_path).parent.mkdir()
    config(tmp_path).write_text(old)
    assert dept("init", tmp_path / "fed", *HOST).exit_code == 0
    assert config(tmp_path).read_text().startswith(f"{old}\n\n[superlink.partners]\n")


def test_the_same_connection_is_left_alone(dept: Dept, folder: Path, tmp_path: Path):
    shutil.rmtree(folder)
    before = config(tmp_path).read_bytes(), config(tmp_path).stat().st_mtime_ns
    assert dept("init", folder, *HOST).exit_code == 0
    assert (config(tmp_path).read_bytes(), config(tmp_path).stat().st_mtime_ns) == before


def test_another_connection_of_the_name_is_refused(dept: Dept, folder: Path, tmp_path: Path):
    before = contents(tmp_path)
    done = dept("init", tmp_path / "other", *HOST)
    assert done.exit_code == 2
    assert "another connection 'partners': choose another with --name" in done.stderr
    assert contents(tmp_path) == before
    assert dept("init", tmp_path / "other", *HOST, "--name", "other").exit_code == 0
    assert {"partners", "other"} <= set(tomllib.loads(config(tmp_path).read_text())["superlink"])


@pytest.mark.parametrize("text", ["superlink = [", "superlink = 3", "superlink = {a = 1}"])
def test_a_configuration_that_cannot_be_added_to_is_named(dept: Dept, tmp_path: Path, text: str):
    config(tmp_path).parent.mkdir()
    config(tmp_path).write_text(text)
    done = dept("init", tmp_path / "fed", *HOST)
    assert done.exit_code == 2
    assert f"{config(tmp_path)}" in done.stderr
    assert config(tmp_path).read_text() == text
    assert not (tmp_path / "fed").exists()


# ---- renew -------------------------------------------------------------------------------


def test_renew_keeps_the_authority_and_the_hosts(dept: Dept, folder: Path):
    before = contents(folder)
    done = dept("init", folder, "--renew")
    assert re.search("new certificate until 20[0-9-]+; used from the next start on", done.stdout)
    changed = {path for path, data in contents(folder).items() if before[path] != data}
    assert changed == {str(folder / "server" / name) for name in ("server.key", "server.crt")}
    assert mode(folder / "server") == 0o700
    assert mode(folder / "server" / "server.key") == 0o600
    test_the_certificate_is_for_the_hosts_and_this_machine(folder)
    made = read_issued(folder / "server" / "server.key", folder / "server" / "server.crt")
    assert made.certificate.public_key() == made.key.public_key()


def test_renew_for_other_hosts(dept: Dept, folder: Path):
    dept("init", folder, "--renew", "--host", "new.example.org", "--host", "::1")
    verify = ["openssl", "verify", "-CAfile", folder / "ca.crt", "-verify_hostname"]
    certificate = folder / "server" / "server.crt"
    subprocess.run([*verify, "new.example.org", certificate], check=True)
    assert subprocess.run([*verify, "fl.example.org", certificate], check=False).returncode != 0
    assert load(folder).settings.hosts == ["new.example.org", "::1"]
    dept("init", folder, "--renew", "--host", "::1")
    assert load(folder).address == "[::1]:443"


def test_renew_refuses_what_it_does_not_change(dept: Dept, folder: Path, tmp_path: Path):
    done = dept("init", folder, "--renew", "--port", 1)
    assert "--renew changes the certificate" in done.stderr
    done = dept("init", tmp_path / "none", "--renew")
    assert f"{tmp_path / 'none'} is no federation" in done.stderr


# ---- start, before anything runs ---------------------------------------------------------


def started(folder: Path) -> tuple[str, list[str]]:
    """The error of a `start` that cannot succeed, and what it told before."""
    told: list[str] = []
    with pytest.raises(DeptError) as error:
        start(folder, [], told.append)
    return str(error.value), told


def test_start_needs_a_federation(tmp_path: Path):
    assert "is no federation: `dept federation init` makes one" in started(tmp_path)[0]


def test_start_refuses_an_ended_certificate(
    dept: Dept, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(certificates, "_SERVER_DAYS", -0.01)
    dept("init", folder, "--renew")
    error, _ = started(folder)
    assert "the server's certificate ended on 20" in error
    assert f"dept federation init {folder} --renew" in error


def test_start_warns_of_an_end_that_is_near_and_names_a_missing_nginx(
    dept: Dept, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(certificates, "_SERVER_DAYS", 9.5)
    dept("init", folder, "--renew")
    monkeypatch.setattr("dept_fl.federation._SBIN", ())
    monkeypatch.setenv("PATH", str(folder))
    error, told = started(folder)
    assert error.startswith("nginx is not installed (for example: apt-get install nginx-light)")
    assert f"certificate ends in 9 days: dept federation init {folder} --renew" in told[0]


# ---- the real thing ----------------------------------------------------------------------


def real(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.flower(needs_nginx(test))


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """An open federation, with a connection `public` through the gateway for its operator."""
    with Federation(tmp_path_factory.mktemp("federation"), secure=True) as made:
        made.superlink("--host", "0.0.0.0")
        file = Path(made.environment("operator")["FLWR_HOME"]) / "config.toml"
        through = {"address": f"localhost:{made.port}", "root-certificates": f"{made.ca_file}"}
        section = "".join(f'{key} = "{value}"\n' for key, value in through.items())
        file.write_text(f"{file.read_text()}\n[superlink.public]\n{section}")
        yield made


def call(federation: Federation, port: int, path: str) -> int:
    """The status of an empty call of Flower's, over TLS that is verified."""
    context = ssl.create_default_context(cafile=federation.ca_file)
    connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=30)
    connection.request("POST", path, b"", {"content-type": "application/protobuf"})
    answer = connection.getresponse().status
    connection.close()
    return answer


@real
def test_flowers_other_apis_answer_the_operator_alone(federation: Federation):
    paths = ["/v1/control/list-runs", "/v1/runtime/acquire-task"]
    assert [call(federation, federation.superlink_port, path) for path in paths] == [200, 200]
    assert [call(federation, federation.port, path) for path in paths] == [404, 404]
    fleet = "/v1/fleet/pull-messages"  # without a key: refused, but by the SuperLink
    assert call(federation, federation.superlink_port, fleet) == 401
    assert call(federation, federation.port, fleet) == 401


@real
def test_the_operators_own_words_cannot_open_the_superlink(federation: Federation):
    output = (federation.folder / "superlink" / "log").read_text()
    assert f"Uvicorn running on https://127.0.0.1:{federation.superlink_port}" in output


@real
def test_no_trick_reaches_the_superlink(federation: Federation):
    log = federation.folder / "superlink" / "log"
    send = partial(speak, federation.port, federation.ca_file)
    protobuf = "Content-Type: application/protobuf"
    assert status(send(request("/v1/fleet/register-node", "POST", protobuf))) == 401
    wait_until(lambda: '"POST /v1/fleet/register-node' in log.read_text(), 10, "call logged")
    before = log.stat().st_size
    assert {status(send(request(target, "POST", protobuf))) for target in TARGETS} <= {400, 404}
    call(federation, federation.superlink_port, "/v1/control/list-runs")
    wait_until(lambda: log.stat().st_size > before, 10, "the operator's own call logged")
    (told,) = re.findall(r'"[A-Z]+ (.*) HTTP', log.read_bytes()[before:].decode())
    assert told == "/v1/control/list-runs"


@real
@pytest.mark.parametrize("words", [["list"], ["run", str(ROOT)], ["supernode", "list"]])
def test_flwr_through_the_gateway_is_refused(federation: Federation, words: list[str]):
    done = federation.flwr(*words, "public", check=False)
    assert done.returncode == 1
    assert "404 Not Found" in done.stdout + done.stderr


@real
def test_a_registered_supernode_comes_online(federation: Federation):
    node = federation.register("fr")
    supernode = federation.supernode("fr")
    wait_until(lambda: federation.nodes()[node] == "online", 120, "fr online")
    supernode.end()
    wait_until(lambda: federation.nodes()[node] == "offline", 120, "fr offline")


@real
def test_a_supernode_without_a_registered_key_is_refused(federation: Federation, tmp_path: Path):
    federation.register("sw")
    stranger = federation.supernode("stranger")
    impostor = federation.supernode("sw", key=make_key(tmp_path / "key"))
    address = ("--superlink", f"localhost:{federation.port}", "--port", str(free_port()))
    trust = ("--root-certificates", str(federation.ca_file))
    keyless = federation.start("keyless", "flower-supernode", *address, *trust)
    for refused in (stranger, impostor):
        assert refused.wait_for_exit() == 1
        assert "[code: 2004] Failed to activate SuperNode." in refused.output
    assert keyless.wait_for_exit() == 1
    assert "[code: 2001] SuperNode authentication is enabled." in keyless.output


@real
def test_a_supernode_trusts_its_own_authority_alone(federation: Federation, tmp_path: Path):
    other = Federation(tmp_path, secure=True)
    federation.register("es")
    supernode = federation.supernode("es", "", "--root-certificates", str(other.ca_file))
    assert supernode.wait_for_exit() == 1
    assert "certificate verify failed: unable to get local issuer" in supernode.output


@real
def test_partners_in_the_folder_are_registered_again_at_each_start(tmp_path: Path):
    with Federation(tmp_path, secure=True) as federation:
        partners = federation.init_folder / "partners"
        shutil.copy(public_file(federation.key("fr")), partners / "fr.pub")
        (partners / "sw.pub").write_text("no key")
        for end in (signal.SIGTERM, signal.SIGINT):  # a SuperLink that ends forgets them
            superlink = federation.superlink()
            assert "partner fr registered" in superlink.output
            assert "partner sw NOT registered: " in superlink.output
            assert list(federation.nodes().values()) == ["registered"]
            superlink.process.send_signal(end)
            assert superlink.wait_for_exit() == 0
            assert superlink.output.endswith("ended\n")
            assert processes_of(tmp_path) == []


@real
@pytest.mark.parametrize("name", ["flower-superlink", "nginx"])
def test_where_one_of_the_two_dies_both_end(tmp_path: Path, name: str):
    with Federation(tmp_path, secure=True) as federation:
        superlink = federation.superlink()
        assert "already: if it is this federation, end it first" in refused_start(federation, 2)
        (victim,) = (
            child
            for child in psutil.Process(superlink.process.pid).children()
            if name in " ".join(child.cmdline())
        )
        victim.kill()
        assert superlink.wait_for_exit() == 1
        assert f"error: {name} ended with exit status -9" in superlink.output
        assert processes_of(tmp_path) == []


def refused_start(federation: Federation, code: int) -> str:
    done = federation.run("dept", "federation", "start", str(federation.init_folder), check=False)
    assert done.returncode == code
    return done.stderr


@real
def test_a_configuration_that_nginx_refuses_is_told_and_nothing_is_left(tmp_path: Path):
    federation = Federation(tmp_path, secure=True)
    (federation.init_folder / "nginx" / "nginx.conf").write_text("events {}\nnonsense;\n")
    told = refused_start(federation, 1)
    assert 'unknown directive "nonsense"' in told
    assert "error: nginx did not start" in told
    assert processes_of(tmp_path) == []
