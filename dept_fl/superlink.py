"""Whether this machine reaches a SuperLink as its SuperNode will, and how their clocks differ."""

from __future__ import annotations

import socket
import ssl
import time
from base64 import b64encode
from contextlib import closing, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from dept_fl.errors import DeptError

_PATIENCE_S = 10.0
_DATE_STEP_S = 1.0  # the Date header counts whole seconds
# OpenSSL's codes of certificates that are not believed.
_NOT_YET_VALID, _ENDED = 9, 10
_NO_KNOWN_ISSUER = (18, 19, 20, 21)
_OTHER_NAME, _OTHER_ADDRESS = 62, 64


@dataclass(frozen=True)
class Answer:
    """What the answer to GET /health tells.

    Attributes:
        seconds: of the question and the answer.
        ahead_s: how far this machine's clock is ahead of the server's, at least; below 0 it is
            behind; 0 where no difference shows, None where the server told no time.
        proxy: through which this machine got there; empty: directly.
    """

    seconds: float
    ahead_s: float | None
    proxy: str


def ask_health(address: str, ca_file: Path | None, patience_s: float = _PATIENCE_S) -> Answer:
    """Ask a SuperLink for its health over TLS, on the way that a SuperNode would take.

    Args:
        address: HOST:PORT.
        ca_file: the federation's own authority; None: those that this machine knows.
        patience_s: seconds that each step may take.

    Raises:
        DeptError: saying exactly what went wrong, and the mend.
    """
    way, context = _way(address), _context(ca_file)
    try:
        with closing(way.connection(context, patience_s)) as connection:
            connection.connect()
            sent = time.time()
            connection.request("GET", "/health")
            response = connection.getresponse()
            received = time.time()
    except (OSError, HTTPException, UnicodeError) as error:
        raise DeptError(f"{way}: {_reason(error, way, ca_file, patience_s)}") from error
    if response.status != HTTPStatus.OK:
        raise DeptError(f"{way}: {_refusal(response.status)}")
    ahead_s = _ahead_s(response.getheader("Date"), sent, received)
    return Answer(received - sent, ahead_s, way.proxy.hostname or "")


# ---- the way there -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """Where a SuperLink is, and the proxy of this machine's environment on the way there."""

    host: str
    port: int
    proxy: SplitResult

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        via = f" through the proxy {self.proxy.hostname}" if self.proxy.hostname else ""
        return f"{host}:{self.port}{via}"

    def connection(self, context: ssl.SSLContext, patience_s: float) -> HTTPSConnection:
        via = self.proxy
        if not via.hostname:
            return HTTPSConnection(self.host, self.port, timeout=patience_s, context=context)
        made = HTTPSConnection(via.hostname, via.port or 80, timeout=patience_s, context=context)
        made.set_tunnel(self.host, self.port, _login(via))
        return made


def _way(address: str) -> _Way:
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.netloc != address or "@" in address:
        raise DeptError(
            f"{address!r}: expected HOST:PORT as the operator gave it, such as "
            "fl.example.org:443, without https://"
        )
    return _Way(host, port, _proxy(host))


def _proxy(host: str) -> SplitResult:
    """The proxy of the environment, which SuperNodes take too; without a host: none."""
    known = getproxies()
    named = "" if proxy_bypass(host) else known.get("https") or known.get("all") or ""
    return urlsplit(named if "//" in named else f"//{named}")


def _login(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(login.encode()).decode()}"}


def _context(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except FileNotFoundError as error:
        raise DeptError(f"{ca_file}: no such file; the operator gives you ca.crt") from error
    except OSError as error:
        raise DeptError(
            f"{ca_file}: holds no certificate; the operator gives you ca.crt"
        ) from error


# ---- what went wrong ---------------------------------------------------------------------


def _reason(error: Exception, way: _Way, ca_file: Path | None, patience_s: float) -> str:
    match error:
        case socket.gaierror() | UnicodeError():
            where = way.proxy.hostname or way.host
            return f"the name {where} does not resolve; check its spelling and this machine's DNS"
        case ConnectionRefusedError():
            return (
                "refused: nothing listens there; is the port right, and does the operator's "
                "`dept federation start` run?"
            )
        case TimeoutError():
            return (
                f"no answer within {patience_s:g} s; a firewall may swallow it: SuperNodes need "
                f"outgoing TCP to port {way.port}"
            )
        case ssl.SSLCertVerificationError():
            return _disbelief(error, way, ca_file, patience_s)
        case ssl.SSLError() | HTTPException() | ConnectionResetError():
            return f"answers, but not with TLS and HTTP ({_short(error)}); is the port right?"
    return f"{_short(error)}; check this machine's network"


def _disbelief(
    error: ssl.SSLCertVerificationError, way: _Way, ca_file: Path | None, patience_s: float
) -> str:
    match error.verify_code:
        case c if c in _NO_KNOWN_ISSUER:
            whose = ca_file or "an authority that this machine knows (give --root-certificates)"
            return (
                f"its certificate is not from {whose}; ask the operator for the right ca.crt, and "
                "whether something on the way opens TLS"
            )
        case c if c in (_OTHER_NAME, _OTHER_ADDRESS):
            names = ", ".join(_certified_hosts(way, ca_file, patience_s)) or "other hosts"
            return (
                f"its certificate is for {names}; use one of these names, or ask the operator for "
                f"`dept federation init --renew --host {way.host}`"
            )
        case c if c in (_NOT_YET_VALID, _ENDED):
            return (
                f"{error.verify_message}, by this machine's clock ({time.strftime('%F %R %Z')}); "
                "set the clock right, or ask the operator for `dept federation init --renew`"
            )
    return f"its certificate is not believed: {error.verify_message}; ask the operator"


def _certified_hosts(way: _Way, ca_file: Path | None, patience_s: float) -> list[str]:
    """The names in a certificate that is from the right authority but for other hosts."""
    context = _context(ca_file)
    context.check_hostname = False
    with (
        suppress(OSError, HTTPException),
        closing(way.connection(context, patience_s)) as connection,
    ):
        connection.connect()
        certificate: Any = connection.sock.getpeercert()
        return [name for _, name in certificate["subjectAltName"]]
    return []


def _refusal(status: int) -> str:
    if status in (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE):
        return (
            f"the gateway answers ({status}), the SuperLink behind it does not; ask the operator "
            "whether `dept federation start` runs"
        )
    return f"GET /health is answered with {status}; is this the federation's gateway?"


def _short(error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return str(reason).strip() or type(error).__name__


# ---- clocks ------------------------------------------------------------------------------


def _ahead_s(date: str | None, sent: float, received: float) -> float | None:
    """The least difference of the clocks that goes with a Date header written in between."""
    try:
        second = parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return None
    return max(0.0, sent - second - _DATE_STEP_S) + min(0.0, received - second)
