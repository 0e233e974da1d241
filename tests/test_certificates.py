"""Certificates that every strict verifier takes, for the hosts they were made for and no other."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from dept_fl import certificates
from dept_fl.certificates import fingerprint, make_authority, make_server, read_issued
from dept_fl.errors import DeptError

HOSTS = ["fl.example.org", "10.1.2.3", "2001:db8::7", "LOCALHOST", "localhost"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    authority = make_authority()
    authority.write(tmp_path / "ca.key", tmp_path / "ca.crt")
    make_server(authority, HOSTS).write(tmp_path / "server.key", tmp_path / "server.crt")
    return tmp_path


def openssl(*words: object) -> str:
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "host",
    ["-verify_hostname fl.example.org", "-verify_ip 10.1.2.3", "-verify_ip 2001:db8::7"],
)
def test_openssl_verifies_the_server_strictly(folder: Path, host: str):
    words = ["verify", "-x509_strict", "-purpose", "sslserver", *host.split()]
    told = openssl(*words, "-CAfile", folder / "ca.crt", folder / "server.crt")
    assert told.strip() == f"{folder}/server.crt: OK"


def test_openssl_refuses_another_host_and_another_authority(folder: Path):
    words = ["verify", "-CAfile", folder / "ca.crt", folder / "server.crt"]
    assert "hostname mismatch" in openssl(*words[:1], "-verify_hostname", "example.org", *words[1:])
    make_authority().write(folder / "other.key", folder / "other.crt")
    assert "unable to get local issuer" in openssl("verify", "-CAfile", folder / "other.crt",
                                                   folder / "server.crt")  # fmt: skip


def test_the_server_cannot_vouch_for_another(folder: Path):
    false = read_issued(folder / "server.key", folder / "server.crt")
    make_server(false, ["evil.example.org"]).write(folder / "evil.key", folder / "evil.crt")
    words = ["-CAfile", folder / "ca.crt", "-untrusted", folder / "server.crt"]
    assert "invalid CA certificate" in openssl("verify", *words, folder / "evil.crt")


def test_python_connects_to_localhost(folder: Path):
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    client = ssl.create_default_context(cafile=folder / "ca.crt")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accept = threading.Thread(
            target=lambda: server.wrap_socket(listener.accept()[0], server_side=True).close()
        )
        accept.start()
        with (
            socket.create_connection(listener.getsockname()) as plain,
            client.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            assert secure.version() == "TLSv1.3"
        accept.join()


def test_each_host_is_named_once(folder: Path):
    names = read_issued(folder / "server.key", folder / "server.crt").certificate.extensions
    named = names.get_extension_for_class(x509.SubjectAlternativeName).value
    dns, ip = named.get_values_for_type(x509.DNSName), named.get_values_for_type(x509.IPAddress)
    assert dns == ["fl.example.org", "localhost"]
    assert [str(address) for address in ip] == ["10.1.2.3", "2001:db8::7"]


def test_keys_are_for_their_owner_alone_and_never_overwritten(folder: Path):
    for name in ("ca.key", "server.key"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        make_authority().write(folder / "ca.key", folder / "new.crt")


def test_a_server_ends_after_a_year_and_never_after_its_authority(monkeypatch: pytest.MonkeyPatch):
    authority, now = make_authority(), datetime.now(UTC)
    ends = make_server(authority, ["localhost"]).certificate.not_valid_after_utc
    assert abs(ends - now - timedelta(days=365)) < timedelta(minutes=1)
    assert authority.certificate.not_valid_after_utc - now > timedelta(days=3650)
    monkeypatch.setattr(certificates, "_AUTHORITY_DAYS", 10)
    short = make_authority()
    ends = make_server(short, ["localhost"]).certificate.not_valid_after_utc
    assert ends == short.certificate.not_valid_after_utc


def test_the_fingerprint_is_that_of_openssl(folder: Path):
    shown = openssl("x509", "-fingerprint", "-sha256", "-noout", "-in", folder / "ca.crt")
    authority = read_issued(folder / "ca.key", folder / "ca.crt")
    assert shown.strip().endswith(f"={fingerprint(authority.certificate)}")


@pytest.mark.parametrize(
    "host",
    ["", "https://a.org", "a.org:443", "a.org/", "a b", "*.a.org", "-a.org", "a..org", "ä.org",
     "10.0.0.300", "10.0.0.0/8", "a" * 64 + ".org", "a_b.org", "a.org\n"],
)  # fmt: skip
def test_what_is_no_host_is_refused(host: str):
    with pytest.raises(DeptError, match="without `https://` and without a port"):
        make_server(make_authority(), [host])


def test_a_damaged_key_is_named(folder: Path):
    (folder / "ca.key").write_text("no key")
    with pytest.raises(DeptError, match=r"ca\.key: not readable as a private key"):
        read_issued(folder / "ca.key", folder / "ca.crt")
