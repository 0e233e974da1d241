"""The certificates of a federation: an authority of its own and the server it vouches for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from uuid import uuid4

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dept_fl.errors import DeptError

_AUTHORITY_DAYS = 3653
_SERVER_DAYS = 365
_CLOCKS_DIFFER = timedelta(hours=1)
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DNS_NAME = re.compile(rf"(?=.{{1,253}}$)(?:{_LABEL}\.)*(?![0-9]+$){_LABEL}")
# What a key may be used for, by the order of the arguments of x509.KeyUsage.
_USES = (
    "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
    "key_cert_sign crl_sign encipher_only decipher_only"
).split()


@dataclass(frozen=True)
class Issued:
    """A private key and the certificate of its public half."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def write(self, key_file: Path, certificate_file: Path) -> None:
        """Write both as PEM, the key for its owner alone; neither file may be there yet."""
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        key = self.key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
        with os.fdopen(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(key)
        with certificate_file.open("xb") as out:
            out.write(self.certificate.public_bytes(pem))


def read_issued(key_file: Path, certificate_file: Path) -> Issued:
    """Read what `Issued.write` wrote.

    Raises:
        DeptError: a file is missing or is no such key.
    """
    try:
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise DeptError(f"{key_file}: not readable as a private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DeptError(f"{key_file}: expected an elliptic curve key")
    return Issued(key, read_certificate(certificate_file))


def read_certificate(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DeptError(f"{file}: not readable as a certificate: {error}") from error


def make_authority() -> Issued:
    """A new key and its self-signed certificate, which may vouch for servers only."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _common_name(f"federation authority {uuid4().hex[:8]}")
    until = datetime.now(UTC) + timedelta(days=_AUTHORITY_DAYS)
    made = _unsigned(subject, subject, key.public_key(), until)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    made = made.add_extension(_only("key_cert_sign", "crl_sign"), critical=True)
    return Issued(key, made.sign(key, hashes.SHA256()))


def make_server(authority: Issued, hosts: Iterable[str]) -> Issued:
    """A new key and its certificate for a TLS server under each of the names and addresses.

    Raises:
        DeptError: a host is neither a DNS name nor an IP address.
    """
    names = list(dict.fromkeys(map(_general_name, hosts)))
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate
    until = min(datetime.now(UTC) + timedelta(days=_SERVER_DAYS), issuer.not_valid_after_utc)
    made = _unsigned(_common_name("federation server"), issuer.subject, key.public_key(), until)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    made = made.add_extension(_only("digital_signature"), critical=True)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    made = made.add_extension(usage, critical=False)
    made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    made = made.add_extension(signer, critical=False)
    return Issued(key, made.sign(authority.key, hashes.SHA256()))


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256, as `openssl x509 -fingerprint -sha256` prints it."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def _unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, until: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(datetime.now(UTC) - _CLOCKS_DIFFER).not_valid_after(until)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _only(*uses: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{use: use in uses for use in _USES})


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        if _DNS_NAME.fullmatch(host):
            return x509.DNSName(host.lower())
    raise DeptError(
        f"host {host!r}: expected a name such as fl.example.org or an IP address, without "
        "`https://` and without a port"
    )
