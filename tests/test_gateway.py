"""nginx as configured, in front of a server that writes down every byte it is sent."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from posixpath import normpath
from urllib.parse import unquote

import pytest

from dept_fl.gateway import nginx_conf
from tests.deployment import Federation, free_port, needs_nginx, speak

pytestmark = [pytest.mark.flower, needs_nginx]

APIS = ["control/list-runs", "runtime/pull-task-input"]
TRICKS = [
    "/v1/{api}",
    "/V1/{api}",
    "//v1/{api}",
    "/v1//{api}",
    "/./v1/{api}",
    "/v1/{api}/",
    "/v1/{api}?/v1/fleet/",
    "/v1/fleet/../{api}",
    "/v1/fleet/./../{api}",
    "/v1/fleet/..//{api}",
    "/v1/fleet//../../{api}",
    "/v1/fleet/%2e%2e/{api}",
    "/v1/fleet/%2E./{api}",
    "/v1/fleet/..%2f{api}",
    "/v1/fleet/%2e%2e%2F{api}",
    "/v1%2ffleet/../{api}",
    "/v1/fleet%2f..%2f{api}",
    "/v1/fleet/%252e%252e/{api}",
    "/v1/fleet/..%252f{api}",
    "/v1/fleet/..;/{api}",
    "/v1/fleet;/../{api}",
    "/v1/fleet/x;/../../{api}",
    "/v1/fleet/..\\{api}",
    "/v1/fleet/..%5c{api}",
    "/v1/fleet/..%c0%af{api}",
    "/v1/fleet/%00/../../{api}",
    "/v1/fleet/%0d%0a/../../{api}",
    "/v1/fleet/pull-messages/../../{api}",
    "/v1/fleet/pull-messages?/../../{api}",
    "/v1/fleet/pull-messages#/../../{api}",
    "/v1/FLEET/../{api}",
    "/v1/%63ontrol/../{api}",
    "/health/../v1/{api}",
    "/health/v1/{api}",
    "/health?/../v1/{api}",
    "https://localhost/v1/{api}",
    "http://127.0.0.1/v1/fleet/../{api}",
]
OTHERS = [
    "/",
    "*",
    "/docs",
    "/openapi.json",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/a/b",
    "/metrics",
]
TARGETS = [trick.format(api=api) for trick in TRICKS for api in APIS] + OTHERS


@dataclass
class Recorder:
    """A TLS server that keeps what each connection brings, and answers each with one text."""

    context: ssl.SSLContext
    answer: bytes = b"well"
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    behind: bytes = b""  # bytes that follow a request: a second one, smuggled in

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed: the test is over
                return
            threading.Thread(target=self._keep, args=(connection,), daemon=True).start()

    def _keep(self, plain: socket.socket) -> None:
        with self.context.wrap_socket(plain, server_side=True) as connection:
            head, _, body = self._until(connection, b"\r\n\r\n").partition(b"\r\n\r\n")
            announced = re.search(rb"^content-length: *([0-9]+)\r?$", head, re.M | re.I)
            while announced and len(body) < int(announced[1]):
                body += connection.recv(65_536)
            if not head:  # the caller did not trust the certificate
                return
            self.heads.append(head)
            self.bodies.append(body)
            size = str(len(self.answer)).encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: " + size + b"\r\n\r\n")
            connection.sendall(self.answer)
            connection.settimeout(0.2)
            with suppress(OSError):
                self.behind += connection.recv(65_536)

    @staticmethod
    def _until(connection: ssl.SSLSocket, end: bytes) -> bytes:
        data = b""
        while end not in data and (more := connection.recv(65_536)):
            data += more
        return data

    @property
    def lines(self) -> list[str]:
        return [head.decode("latin-1").splitlines()[0] for head in self.heads]


Gateway = tuple[Callable[..., bytes], Recorder]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with Federation(tmp_path_factory.mktemp("gateway"), secure=True) as made:
        yield made


def open_gateway(
    federation: Federation, change: Callable[[str], str] = str, certificate: Path | None = None
) -> Iterator[Gateway]:
    """nginx with a changed configuration before a recorder with the federation's certificate."""
    port, behind, folder = free_port(), free_port(), federation.init_folder
    server = certificate or folder / "server" / "server.crt"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server, server.with_suffix(".key"))
    conf = folder / "nginx" / f"{port}.conf"
    conf.write_text(change(nginx_conf(port, behind)))
    recorder = Recorder(context)
    with socket.create_server(("127.0.0.1", behind)) as listener:
        serving = threading.Thread(target=recorder.serve, args=(listener,))
        serving.start()
        nginx = federation.nginx(conf.name, port)
        try:
            yield partial(speak, port, federation.ca_file), recorder
        finally:
            nginx.end()
            listener.shutdown(socket.SHUT_RDWR)
    serving.join()


@pytest.fixture(scope="module")
def running(federation: Federation) -> Iterator[Gateway]:
    yield from open_gateway(federation)


@pytest.fixture
def gateway(running: Gateway) -> Gateway:
    running[1].heads.clear()
    running[1].bodies.clear()
    running[1].behind = b""
    return running


def request(target: str, method: str = "POST", *headers: str, body: bytes = b"") -> bytes:
    named = [f"{method} {target} HTTP/1.1", "Connection: close", *headers]
    if not any(each.lower().startswith("host:") for each in headers):
        named.append("Host: localhost")
    if not any("content-length" in h.lower() or "encoding" in h.lower() for h in headers):
        named.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*named, "", ""]).encode("latin-1") + body


def status(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.[01] ([0-9]{3})", answer)
    return int(found[1]) if found else 0


def test_calls_of_a_supernode_pass_with_their_body_and_their_headers(gateway: Gateway):
    send, recorder = gateway
    answer = send(request("/v1/fleet/pull-messages", "POST", "flwr-signature: abc", body=b"12"))
    assert (status(answer), answer[-4:]) == (200, b"well")
    assert recorder.lines == ["POST /v1/fleet/pull-messages HTTP/1.1"]
    assert recorder.bodies == [b"12"]
    assert b"flwr-signature: abc" in recorder.heads[0]


def test_health_passes(gateway: Gateway):
    send, recorder = gateway
    assert status(send(request("/health", "GET"))) == 200
    assert recorder.lines == ["GET /health HTTP/1.1"]


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_else_passes(gateway: Gateway, target: str):
    send, recorder = gateway
    assert status(send(request(target))) in (400, 404)
    assert status(send(request(target, "GET"))) in (400, 404)
    assert recorder.heads == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS", "TRACE", "CONNECT", "post"])
def test_no_other_method_passes(gateway: Gateway, method: str):
    send, recorder = gateway
    assert status(send(request("/v1/fleet/pull-messages", method))) in (400, 404, 405)
    if method not in ("GET", "HEAD"):
        assert status(send(request("/health", method))) in (400, 404, 405)
    assert recorder.heads == []


def test_an_older_http_is_no_way_round(gateway: Gateway):
    send, recorder = gateway
    assert status(send(b"POST /v1/control/list-runs HTTP/1.0\r\n\r\n")) == 404
    send(b"GET /v1/control/list-runs\r\n")
    assert b"well" not in send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert recorder.heads == []


def test_an_absolute_target_and_an_older_http_reach_what_they_may(gateway: Gateway):
    send, recorder = gateway
    assert status(send(request("https://elsewhere/v1/fleet/get-run"))) == 200
    assert status(send(b"POST /v1/fleet/get-run HTTP/1.0\r\nContent-Length: 0\r\n\r\n")) == 200
    assert recorder.lines == ["POST /v1/fleet/get-run HTTP/1.1"] * 2


@pytest.mark.parametrize(
    "host", ["evil.example.org", "127.0.0.1:8443", "a?b", "a#b", "a@b", "[::1]"]
)
def test_the_host_that_a_caller_names_goes_no_further(gateway: Gateway, host: str):
    """An application may rebuild a request's path from it."""
    send, recorder = gateway
    answer = send(request("/v1/fleet/get-run", "POST", f"Host: {host}"))
    named = {line for head in recorder.heads for line in head.splitlines() if b"Host:" in line}
    assert status(answer) in (200, 400)
    assert all(re.fullmatch(rb"Host: 127\.0\.0\.1:[0-9]+", line) for line in named)


def test_a_caller_cannot_say_where_it_comes_from(gateway: Gateway):
    send, recorder = gateway
    lies = ["X-Forwarded-For: 6.6.6.6", "X-Forwarded-Proto: http", "Forwarded: for=6.6.6.6"]
    assert status(send(request("/v1/fleet/get-run", "POST", *lies))) == 200
    assert b"6.6.6.6" not in recorder.heads[0]
    assert b"X-Forwarded-For: 127.0.0.1\r\n" in recorder.heads[0]
    assert b"X-Forwarded-Proto: https\r\n" in recorder.heads[0]


INNER = b"POST /v1/control/list-runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(INNER), INNER)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (["Content-Length: 4", "Transfer-Encoding: chunked"], b"0\r\n\r\n" + INNER),
        (["Transfer-Encoding: chunked", "Content-Length: 4"], b"0\r\n\r\n" + INNER),
        (["Transfer-Encoding: chunked"], CHUNKED),
        (["Transfer-Encoding: chunked"], b"0\r\n\r\n" + INNER),
        (["Transfer-Encoding: identity"], INNER),
        (["Transfer-Encoding: xchunked", "Content-Length: 0"], CHUNKED),
        (["Transfer-Encoding : chunked", "Content-Length: 0"], CHUNKED),
        (["Transfer_Encoding: chunked", "Content-Length: 0"], CHUNKED),
        (["X: y\nTransfer-Encoding: chunked", "Content-Length: 0"], CHUNKED),
        (["Transfer-Encoding:\n chunked", "Content-Length: 0"], CHUNKED),
        (["Content-Length: 0", f"Content-Length: {len(INNER)}"], INNER),
        (["Content-Length: +4"], b"1234" + INNER),
        (["Content-Length: 0"], INNER),
        (["Connection: keep-alive, Content-Length", f"Content-Length: {len(INNER)}"], INNER),
        (["Expect: 100-continue", "Content-Length: 0"], INNER),
    ],
)
def test_no_request_hides_in_another(gateway: Gateway, headers: list[str], body: bytes):
    send, recorder = gateway
    outer = request("/v1/fleet/get-run", "POST", *headers).replace(b"Connection: close\r\n", b"")
    send(outer + body, 1.0)
    assert recorder.behind == b""
    assert set(recorder.lines) <= {"POST /v1/fleet/get-run HTTP/1.1"}
    for head, kept in zip(recorder.heads, recorder.bodies, strict=True):
        assert b"transfer-encoding" not in head.lower()
        assert head.lower().count(b"content-length") <= 1
        assert kept in (b"", INNER)  # as a body, and of an announced length, it is harmless


def test_a_second_request_on_a_connection_is_looked_at_too(gateway: Gateway):
    send, recorder = gateway
    first = request("/v1/fleet/get-run").replace(b"Connection: close\r\n", b"")
    answer = send(first + request("/v1/control/list-runs"))
    assert re.findall(rb"HTTP/1\.1 ([0-9]{3})", answer) == [b"200", b"404"]
    assert recorder.lines == ["POST /v1/fleet/get-run HTTP/1.1"]


def test_a_whole_object_of_flower_passes_both_ways_and_more_does_not(gateway: Gateway):
    """nginx may write to no folder here: as root, its worker is `nobody`."""
    send, recorder = gateway
    body = os.urandom(6 << 20)
    recorder.answer = body
    try:
        answer = send(request("/v1/fleet/push-object", body=body))
    finally:
        recorder.answer = b"well"
    assert answer.partition(b"\r\n\r\n")[2] == body
    assert recorder.bodies == [body]
    assert status(send(request("/v1/fleet/push-object", body=bytes(9 << 20)))) == 413
    assert len(recorder.bodies) == 1


def test_a_busy_partner_is_not_refused(gateway: Gateway):
    """Eight SuperNodes behind one address, each with four requests under way."""
    send, _ = gateway
    with ThreadPoolExecutor(32) as pool:
        statuses = set(pool.map(lambda _: status(send(request("/v1/fleet/get-run"))), range(400)))
    assert statuses == {200}


def test_refusals_are_in_the_log_and_the_daily_round_is_not(
    federation: Federation, gateway: Gateway
):
    send, _ = gateway
    log = federation.init_folder / "nginx" / "access.log"
    before = log.stat().st_size
    send(request("/v1/fleet/pull-messages"))
    send(request("/v1/fleet/get-run"))
    send(request("/v1/fleet/../control/start-run"))
    told = re.findall(r'"(.*)" ([0-9]{3})', log.read_bytes()[before:].decode())
    assert told == [
        ("POST /v1/fleet/get-run HTTP/1.1", "200"),
        ("POST /v1/fleet/../control/start-run HTTP/1.1", "404"),
    ]


# ---- what the configuration rests on -----------------------------------------------------


def without_the_list(conf: str) -> str:
    changed = re.sub(r"if \(\$passes = 0\) \{\s+return 404;\s+\}", "", conf)
    assert changed != conf
    return changed


def with_the_list_alone(conf: str) -> str:
    """Whatever the list lets through is passed on untouched."""
    raw = re.search(r"proxy_pass https://[^/]+", conf)
    assert raw is not None
    head, _, tail = conf.partition("location /v1/fleet/")
    assert tail
    return f"{head}location / {{ {raw[0]}; }} }} }}"


def test_without_the_list_the_tidied_path_still_keeps_control_shut(federation: Federation):
    for send, recorder in open_gateway(federation, without_the_list):
        for target in TARGETS:
            send(request(target))
        paths = {line.split()[1].partition("?")[0] for line in recorder.lines}
        reached = {normpath(unquote(path)) for path in paths}
        assert len(reached) > 3
        assert all(re.match("/v1/fleet(/|$)|/health$", path) for path in reached)


def test_the_list_alone_keeps_control_shut(federation: Federation):
    for send, recorder in open_gateway(federation, with_the_list_alone):
        for target in TARGETS:
            assert status(send(request(target))) in (400, 404)
        assert recorder.heads == []
        assert status(send(request("/v1/fleet/get-run"))) == 200


def test_a_superlink_of_another_authority_is_sent_nothing(federation: Federation, tmp_path: Path):
    other = Federation(tmp_path, secure=True)
    certificate = other.init_folder / "server" / "server.crt"
    for send, recorder in open_gateway(federation, certificate=certificate):
        assert status(send(request("/v1/fleet/get-run"))) == 502
        assert recorder.heads == []


def test_the_configuration_is_whole(federation: Federation):
    tested = federation.run(*federation.nginx_command("nginx.conf"), "-t")
    assert "test is successful" in tested.stderr
    assert "warn" not in tested.stderr


def test_the_folder_can_be_moved(federation: Federation, tmp_path: Path):
    moved = tmp_path / "a folder, moved"
    shutil.copytree(federation.init_folder, moved)
    command = federation.nginx_command("nginx.conf")
    command[command.index("-p") + 1] = str(moved / "nginx")
    assert "test is successful" in federation.run(*command, "-t").stderr
