"""The pair that a SuperNode shows, as OpenSSH and Flower take it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from dept_fl.errors import DeptError
from dept_fl.node_key import check_key, make_key, public_file


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    make_key(tmp_path / "fr.key")
    return tmp_path / "fr.key"


def reason(key_file: Path) -> str:
    with pytest.raises(DeptError) as caught:
        check_key(key_file)
    return str(caught.value)


def test_a_pair_is_as_flower_wants_it(key_file: Path) -> None:
    key = serialization.load_ssh_private_key(key_file.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    public = serialization.load_ssh_public_key(public_file(key_file).read_bytes())
    assert public == key.public_key()
    assert public_file(key_file).name == "fr.pub"
    check_key(key_file)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
def test_openssh_reads_it(key_file: Path) -> None:
    told = subprocess.run(
        ["ssh-keygen", "-y", "-f", key_file], capture_output=True, text=True, check=True
    )
    assert told.stdout.split()[:2] == public_file(key_file).read_text().split()


def test_the_private_half_is_for_its_owner_alone(key_file: Path) -> None:
    assert key_file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["fr.key", "fr.pub"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError):
        make_key(tmp_path / "fr.key")
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_may_read_is_refused(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    assert reason(key_file) == (f"others may read {key_file} (mode {mode:o}): chmod 600 {key_file}")


def test_other_kinds_of_keys_are_refused(key_file: Path) -> None:
    pem, ssh = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
    other = rsa.generate_private_key(65537, 2048)
    key_file.write_bytes(other.private_bytes(pem, ssh, serialization.NoEncryption()))
    assert "ssh-keygen -t ecdsa" in reason(key_file)
    key, plain = ec.generate_private_key(ec.SECP384R1()), serialization.NoEncryption()
    key_file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    assert "not readable as an OpenSSH key without a passphrase" in reason(key_file)
    key_file.write_text("no key")
    assert "not readable as an OpenSSH key" in reason(key_file)


def test_a_public_half_of_another_key_is_noticed(key_file: Path, tmp_path: Path) -> None:
    make_key(tmp_path / "sw.key")
    public_file(key_file).write_bytes((tmp_path / "sw.pub").read_bytes())
    assert "fr.pub is of another key; ssh-keygen -y -f" in reason(key_file)
    public_file(key_file).unlink()
    assert "fr.pub: missing; ssh-keygen -y -f" in reason(key_file)


def test_a_comment_in_the_public_half_does_not_matter(key_file: Path) -> None:
    line = public_file(key_file).read_text().strip()
    public_file(key_file).write_text(f"{line} me@home\n")
    check_key(key_file)
