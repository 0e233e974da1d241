"""The key pair with which a partner's SuperNode shows who it is."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dept_fl.errors import DeptError

_PEM, _OPENSSH = serialization.Encoding.PEM, serialization.Encoding.OpenSSH


def public_file(key_file: Path) -> Path:
    """Where the half lies that the operator gets."""
    return key_file.with_suffix(".pub")


def make_key(key_file: Path) -> None:
    """Write a pair as `ssh-keygen -t ecdsa -b 384 -N ""` makes it; neither may be there yet.

    The private half is for its owner alone.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        _PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = _line(key)
    with os.fdopen(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(private)
    with public_file(key_file).open("xb") as out:
        out.write(public + b"\n")


def check_key(key_file: Path) -> None:
    """See that Flower can use the pair, and that nobody else can read its private half.

    Raises:
        DeptError: with the mend.
    """
    mode = key_file.stat().st_mode & 0o777
    if mode & 0o077:
        raise DeptError(f"others may read {key_file} (mode {mode:o}): chmod 600 {key_file}")
    try:
        key = serialization.load_ssh_private_key(key_file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DeptError(
            f"{key_file}: not readable as an OpenSSH key without a passphrase: {error}"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DeptError(f"{key_file}: Flower takes elliptic curve keys only: ssh-keygen -t ecdsa")
    public = public_file(key_file)
    if not public.is_file():
        raise DeptError(f"{public}: missing; ssh-keygen -y -f {key_file} > {public}")
    if public.read_bytes().split()[:2] != _line(key).split():
        raise DeptError(
            f"{public} is of another key; ssh-keygen -y -f {key_file} > {public}, and send it to "
            "the operator again"
        )


def _line(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(_OPENSSH, serialization.PublicFormat.OpenSSH)
