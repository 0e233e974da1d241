"""What a partner is told of the way to a SuperLink, by a server that this test makes."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from dept_fl import certificates, superlink
from dept_fl.certificates import make_authority, make_server
from dept_fl.errors import DeptError
from dept_fl.superlink import ask_health

Serve = Callable[..., str]


@contextmanager
def https_server(
    folder: Path, hosts: tuple[str, ...] = ("localhost",), status: int = 200, ahead_s: float = 0.0
) -> Iterator[str]:
    """A server of GET /health with a new authority, folder/ca.crt; yields localhost:PORT.

    Args:
        ahead_s: how far the clock of whoever asks is ahead of this server's.
    """
    authority = make_authority()
    for name in ("ca.key", "ca.crt", "server.key", "server.crt"):
        (folder / name).unlink(missing_ok=True)
    authority.write(folder / "ca.key", folder / "ca.crt")
    make_server(authority, hosts).write(folder / "server.key", folder / "server.crt")

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status if self.path == "/health" else 404)
            self.send_header("Date", formatdate(time.time() - ahead_s, usegmt=True))
            self.end_headers()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    server = HTTPServer(("127.0.0.1", 0), Health)
    server.handle_error = lambda *_: None  # clients that do not believe it leave early
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"localhost:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def reason(address: str, ca_file: Path | None, patience_s: float = 5.0) -> str:
    with pytest.raises(DeptError) as caught:
        ask_health(address, ca_file, patience_s)
    return str(caught.value)


# ---- what is well ------------------------------------------------------------------------


def test_a_server_that_is_well_is_found_well(tmp_path: Path) -> None:
    with https_server(tmp_path) as address:
        answer = ask_health(address, tmp_path / "ca.crt")
    assert answer.ahead_s == 0
    assert answer.proxy == ""
    assert 0 < answer.seconds < 5


@pytest.mark.parametrize("ahead_s", [400.0, 30.0, -90.0, -400.0])
def test_the_clocks_difference_is_measured(tmp_path: Path, ahead_s: float) -> None:
    with https_server(tmp_path, ahead_s=ahead_s) as address:
        found = ask_health(address, tmp_path / "ca.crt").ahead_s
    assert found is not None
    assert abs(found - ahead_s) < 5
    assert abs(found) <= abs(ahead_s) + 0.5  # never more than there is


@pytest.mark.parametrize(
    ("date", "sent", "received", "ahead_s"),
    [
        (1000, 1000.2, 1000.3, 0.0),
        (1000, 1000.9, 1001.2, 0.0),  # the second went by in between
        (1000, 1004.5, 1004.6, 3.5),  # the server's clock showed up to 1001
        (1000, 990.0, 992.0, -8.0),
        (1000, 999.5, 1006.0, 0.0),  # a slow answer tells nothing
    ],
)
def test_the_least_difference_that_explains_the_date(
    date: float, sent: float, received: float, ahead_s: float
) -> None:
    found = superlink._ahead_s(formatdate(date, usegmt=True), sent, received)
    assert found == pytest.approx(ahead_s)


@pytest.mark.parametrize("date", [None, "", "soon"])
def test_no_date_tells_no_time(date: str | None) -> None:
    assert superlink._ahead_s(date, 0.0, 1.0) is None


# ---- what is not -------------------------------------------------------------------------


def test_another_authority_is_named(tmp_path: Path) -> None:
    make_authority().write(tmp_path / "other.key", tmp_path / "other.crt")
    with https_server(tmp_path) as address:
        told = reason(address, tmp_path / "other.crt")
        assert f"certificate is not from {tmp_path / 'other.crt'}" in told
        assert "right ca.crt" in told
        assert "give --root-certificates" in reason(address, None)


def test_a_certificate_for_other_hosts_tells_them(tmp_path: Path) -> None:
    with https_server(tmp_path, hosts=("fl.example.org", "10.1.2.3")) as address:
        told = reason(address, tmp_path / "ca.crt")
        assert "its certificate is for fl.example.org, 10.1.2.3;" in told
        assert "--host localhost" in told
        port = address.partition(":")[2]
        assert "for fl.example.org, 10.1.2.3;" in reason(f"127.0.0.1:{port}", tmp_path / "ca.crt")


def test_a_certificate_that_ended_is_told_with_this_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "_SERVER_DAYS", -0.01)
    with https_server(tmp_path) as address:
        told = reason(address, tmp_path / "ca.crt")
    assert "certificate has expired, by this machine's clock (" in told
    assert "--renew" in told


def test_nobody_there(tmp_path: Path) -> None:
    make_authority().write(tmp_path / "ca.key", tmp_path / "ca.crt")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert "refused: nothing listens there" in reason(f"localhost:{port}", tmp_path / "ca.crt")


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "the name fl.exampel.org does not resolve" in reason("fl.exampel.org:443", None)


def test_silence_is_not_waited_for_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        told = reason(f"localhost:{silent.getsockname()[1]}", None, patience_s=0.3)
    assert "no answer within 0.3 s; a firewall may swallow it" in told


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"\x15"])
def test_a_port_without_tls(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(10)
                connection.sendall(answer)

        thread = threading.Thread(target=speak)
        thread.start()
        told = reason(f"localhost:{listener.getsockname()[1]}", None)
        thread.join()
    assert "answers, but not with TLS" in told
    assert "is the port right?" in told


@pytest.mark.parametrize(
    ("status", "expected"),
    [(404, "answered with 404; is this the federation's gateway?"), (502, "SuperLink behind it")],
)
def test_a_server_that_is_none_of_ours(tmp_path: Path, status: int, expected: str) -> None:
    with https_server(tmp_path, status=status) as address:
        assert expected in reason(address, tmp_path / "ca.crt")


@pytest.mark.parametrize(
    "address",
    ["", "fl.example.org", "https://fl.example.org:443", "fl.example.org:https", "h:0", "h:99999",
     "me@h:443", "h:443/x", ":443", "::1", "h 443"],
)  # fmt: skip
def test_what_is_no_address(address: str) -> None:
    assert "expected HOST:PORT" in reason(address, None)


def test_an_ipv6_address_is_taken(tmp_path: Path) -> None:
    make_authority().write(tmp_path / "ca.key", tmp_path / "ca.crt")
    assert reason("[::1]:1", tmp_path / "ca.crt").startswith("[::1]:1: ")


def test_a_file_without_a_certificate(tmp_path: Path) -> None:
    assert "no such file; the operator gives you ca.crt" in reason("h:1", tmp_path / "ca.crt")
    (tmp_path / "ca.crt").write_text("no certificate")
    assert "holds no certificate" in reason("h:1", tmp_path / "ca.crt")


# ---- through a proxy ---------------------------------------------------------------------


@contextmanager
def proxy(answer: bytes, target: str = "") -> Iterator[tuple[int, list[bytes]]]:
    """A proxy for one tunnel; yields its port and what it is asked."""
    asked: list[bytes] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65_536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            asked.append(client.recv(65_536))
            client.sendall(answer)
            if target:
                with socket.create_connection(("127.0.0.1", int(target))) as server:
                    back = threading.Thread(target=pump, args=(server, client))
                    back.start()
                    pump(client, server)
                    back.join()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], asked
        thread.join()


def test_the_proxy_of_the_environment_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        https_server(tmp_path, hosts=("fl.example.org",)) as address,
        proxy(b"HTTP/1.1 200 OK\r\n\r\n", address.partition(":")[2]) as (port, asked),
    ):
        monkeypatch.setenv("https_proxy", f"http://me:a%20b@localhost:{port}")
        answer = ask_health("fl.example.org:443", tmp_path / "ca.crt")
    assert answer.proxy == "localhost"
    assert asked[0].startswith(b"CONNECT fl.example.org:443 ")
    assert b"Proxy-Authorization: Basic bWU6YSBi" in asked[0]


def test_a_proxy_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(b"HTTP/1.1 403 Forbidden\r\n\r\n") as (port, _):
        monkeypatch.setenv("https_proxy", f"http://localhost:{port}")
        told = reason("fl.example.org:443", None)
    assert told.startswith("fl.example.org:443 through the proxy localhost: ")
    assert "403 Forbidden" in told


def test_a_host_that_needs_no_proxy_gets_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://localhost:1")
    monkeypatch.setenv("no_proxy", "localhost")
    with https_server(tmp_path) as address:
        assert ask_health(address, tmp_path / "ca.crt").proxy == ""
