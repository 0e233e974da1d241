"""A federation at its operator: a folder with certificates and settings, and both servers."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv6Address, ip_address
from pathlib import Path

from flwr.cli.constant import DEFAULT_FLOWER_CONFIG_TOML, FLOWER_CONFIG_FILE
from flwr.supercore.utils import get_flwr_home

from dept_fl.certificates import (
    fingerprint,
    make_authority,
    make_server,
    read_certificate,
    read_issued,
)
from dept_fl.checkpoint import whole_folder, write_whole
from dept_fl.errors import DeptError, Failed
from dept_fl.gateway import nginx_conf
from dept_fl.interrupt import ENDING, interrupted_by
from dept_fl.local import (
    APP,
    IN_CHECKOUT,
    app_folder,
    flower_environment,
    listens,
    wait_until_up,
)
from dept_fl.servers import Watch, serving

_SETTINGS = "federation.json"
_RENEW_WITHIN = timedelta(days=30)
_SBIN = ("/usr/local/sbin", "/usr/sbin")  # where nginx lies, and a user's PATH does not lead


@dataclass(frozen=True)
class Settings:
    """What an operator chose.

    Attributes:
        hosts: names and IP addresses under which partners reach the gateway.
        port: where the gateway listens.
        superlink_port: where the SuperLink listens, on this machine alone.
        connection: its name in Flower's configuration, as in `flwr run . partners`.
    """

    hosts: list[str]
    port: int
    superlink_port: int
    connection: str


@dataclass(frozen=True)
class Federation:
    """The folder that `init` made, and what was chosen."""

    folder: Path
    settings: Settings

    @property
    def ca_file(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def app(self) -> str:
        """What `flwr run` takes: a checkout is run from within, a wheel has no pyproject.toml."""
        return "." if IN_CHECKOUT else str(self.folder / APP)

    @property
    def ca_fingerprint(self) -> str:
        return fingerprint(read_certificate(self.ca_file))

    @property
    def ends(self) -> datetime:
        """When the server's certificate ends."""
        return read_certificate(self.folder / "server" / "server.crt").not_valid_after_utc

    @property
    def address(self) -> str:
        """What partners give to `flower-supernode --superlink`."""
        host = self.settings.hosts[0]
        return f"{_in_brackets(host)}:{self.settings.port}"

    def to_json(self) -> str:
        facts = {
            "folder": str(self.folder),
            **asdict(self.settings),
            "address": self.address,
            "ca_file": str(self.ca_file),
            "ca_sha256": self.ca_fingerprint,
            "certificate_ends": f"{self.ends:%Y-%m-%dT%H:%M:%SZ}",
        }
        return json.dumps(facts, ensure_ascii=False)


def _in_brackets(host: str) -> str:
    try:
        return f"[{host}]" if isinstance(ip_address(host), IPv6Address) else host
    except ValueError:
        return host


# ---- the folder --------------------------------------------------------------------------


def init(folder: Path, settings: Settings) -> Federation:
    """Make the folder, and the connection to it in Flower's configuration; all or nothing.

    Raises:
        DeptError: the folder is in use, a setting is bad, or the connection's name is taken.
        Failed: the disk does not take it.
    """
    federation = Federation(folder.absolute(), settings)
    _check(settings)
    _check_free(federation.folder)
    config = get_flwr_home() / FLOWER_CONFIG_FILE
    connected = with_connection(config, federation)
    try:
        with whole_folder(federation.folder) as draft:
            draft.chmod(0o700)  # before any key is in it
            _fill(draft, settings)
            app_folder(draft)
            if connected is not None:
                config.parent.mkdir(parents=True, exist_ok=True)
                write_whole(config.resolve(), connected)
    except OSError as error:
        raise Failed(f"not writable: {error}") from error
    return federation


def _check(settings: Settings) -> None:
    if settings.port == settings.superlink_port:
        raise DeptError(
            f"port {settings.port} is both the gateway's and the SuperLink's: choose another "
            "--superlink-port"
        )
    if not re.fullmatch(r"[A-Za-z0-9_-]+", settings.connection):
        raise DeptError(f"name {settings.connection!r}: use letters, digits, `-` and `_` only")


def _check_free(folder: Path) -> None:
    if (folder / _SETTINGS).exists():
        raise DeptError(
            f"{folder} is a federation already: start it, renew its certificate with --renew, or "
            "name another folder"
        )
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DeptError(f"{folder} is in use: name a new folder")


def _fill(folder: Path, settings: Settings) -> None:
    authority = make_authority()
    (folder / "ca").mkdir(0o700)
    authority.write(folder / "ca" / "ca.key", folder / "ca.crt")
    (folder / "server").mkdir(0o700)
    server = make_server(authority, _all_hosts(settings))
    server.write(folder / "server" / "server.key", folder / "server" / "server.crt")
    for name in ("nginx", "partners", "flower"):
        (folder / name).mkdir()
    conf = nginx_conf(settings.port, settings.superlink_port)
    (folder / "nginx" / "nginx.conf").write_text(conf, encoding="utf-8")
    (folder / _SETTINGS).write_text(json.dumps(asdict(settings), indent=1), encoding="utf-8")


def _all_hosts(settings: Settings) -> list[str]:
    return [*settings.hosts, "localhost", "127.0.0.1"]  # the last two for this machine itself


def renew_certificate(folder: Path, hosts: list[str]) -> Federation:
    """A new server key and certificate from the same authority, for other hosts if any are given.

    Partners need nothing new; the servers take it at their next start.
    """
    federation = load(folder)
    folder, settings = federation.folder, federation.settings
    settings = replace(settings, hosts=hosts or settings.hosts)
    authority = read_issued(folder / "ca" / "ca.key", federation.ca_file)
    server = make_server(authority, _all_hosts(settings))
    with whole_folder(folder / "server", overwrite=True) as draft:
        draft.chmod(0o700)
        server.write(draft / "server.key", draft / "server.crt")
    write_whole(folder / _SETTINGS, json.dumps(asdict(settings), indent=1))
    return Federation(folder, settings)


def load(folder: Path) -> Federation:
    """The federation that `init` made.

    Raises:
        DeptError: there is none.
    """
    try:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        return Federation(folder.absolute(), Settings(**settings))
    except FileNotFoundError as error:
        raise DeptError(f"{folder} is no federation: `dept federation init` makes one") from error
    except (OSError, ValueError, TypeError) as error:
        raise DeptError(f"{folder / _SETTINGS}: not readable: {error}") from error


def instructions(federation: Federation) -> str:
    """What was made, and the operator's next commands in their order."""
    folder, settings = federation.folder, federation.settings
    partners, name = folder / "partners", settings.connection
    return f"""\
{folder}, for you alone (keep ca/ca.key safe: who has it can pass for your server)
  ca.crt             for your partners; SHA-256 {federation.ca_fingerprint}
  server/            for {", ".join(settings.hosts)}; ends {federation.ends:%Y-%m-%d}
  nginx/nginx.conf   port {settings.port}; passes calls of SuperNodes, nothing else
  partners/          the public keys of your partners
connection {name!r} in {get_flwr_home() / FLOWER_CONFIG_FILE}

next:
  dept federation start {folder}
  for each partner, with its public key:
    cp fr.pub {partners}/    # `start` registers the keys in there
    flwr supernode register {partners}/fr.pub {name} --name fr    # while it runs
  send to your partners: {federation.ca_file} and the address {federation.address}
  flwr run {shlex.quote(federation.app)} {name} --stream"""


# ---- Flower's configuration --------------------------------------------------------------


def with_connection(file: Path, federation: Federation) -> str | None:
    """What Flower's config.toml has to say; None if it says so already.

    Raises:
        DeptError: another connection has the name, or the file is no TOML.
    """
    name, section = federation.settings.connection, _section(federation)
    text = file.read_text(encoding="utf-8") if file.exists() else DEFAULT_FLOWER_CONFIG_TOML
    there = _connections(text, file).get(name)
    if there == tomllib.loads(section)["superlink"][name]:
        return None
    if there is not None:
        raise DeptError(
            f"{file} has another connection {name!r}: choose another with --name, or remove "
            f"[superlink.{name}] there"
        )
    text = f"{text.rstrip()}\n\n{section}"
    _connections(text, file)  # an inline table cannot be added to
    return text


def _section(federation: Federation) -> str:
    settings = federation.settings
    return (
        f"[superlink.{settings.connection}]\n"
        f'address = "127.0.0.1:{settings.superlink_port}"\n'
        f"root-certificates = {json.dumps(str(federation.ca_file), ensure_ascii=False)}\n"
    )


def _connections(text: str, file: Path) -> dict[str, object]:
    try:
        connections = tomllib.loads(text).get("superlink", {})
    except tomllib.TOMLDecodeError as error:
        raise DeptError(f"{file} is not valid TOML, mend it first: {error}") from error
    if not isinstance(connections, dict):
        raise DeptError(f"{file}: `superlink` is no table, mend it first")
    return connections


# ---- both servers ------------------------------------------------------------------------


def start(folder: Path, words: Sequence[str], tell: Callable[[str], None]) -> None:
    """Run the SuperLink and the gateway until a signal ends them; leave no process behind.

    Args:
        words: more arguments for flower-superlink.
        tell: takes each line for the operator.

    Raises:
        DeptError: something is missing. Failed: one of the two did not start, or ended by itself.
    """
    federation = load(folder)
    _check_certificate(federation, tell)
    _check_ports(federation.settings)
    app_folder(federation.folder)  # dept may be a newer one than at the last start
    environment = _environment(federation)
    superlink = _superlink_command(federation, environment, words)
    nginx = _nginx_command(federation, environment)
    with interrupted_by(ENDING, once=True), serving(superlink, environment) as first:
        wait_until_up(first, federation.settings.superlink_port, "Flower's SuperLink")
        _register_partners(federation, environment, tell)
        with serving(nginx, environment) as second:
            wait_until_up(second, federation.settings.port, "nginx")
            tell(f"open to partners at {federation.address}; Ctrl-C ends it")
            _wait_for_end({"flower-superlink": first, "nginx": second})


def _check_certificate(federation: Federation, tell: Callable[[str], None]) -> None:
    left, mend = federation.ends - datetime.now(UTC), f"init {federation.folder} --renew"
    if left < timedelta(0):
        raise DeptError(
            f"the server's certificate ended on {federation.ends:%Y-%m-%d}; make a new one: "
            f"dept federation {mend}"
        )
    if left < _RENEW_WITHIN:
        tell(f"the server's certificate ends in {left.days} days: dept federation {mend}")


def _check_ports(settings: Settings) -> None:
    for port in (settings.superlink_port, settings.port):
        if listens(port):
            raise DeptError(
                f"something listens on port {port} already: if it is this federation, end it first"
            )


def _environment(federation: Federation) -> dict[str, str]:
    flower_home = federation.folder / "flower"
    write_whole(flower_home / FLOWER_CONFIG_FILE, _section(federation))
    environment = flower_environment(flower_home)
    # Flower's internal switches open ports of their own, past the gateway.
    return {k: v for k, v in environment.items() if not k.startswith("FLWR_INTERNAL_")}


def _superlink_command(
    federation: Federation, environment: dict[str, str], words: Sequence[str]
) -> list[str]:
    folder, port = federation.folder, federation.settings.superlink_port
    command = [_program("flower-superlink", environment, "pip install flwr"), *words]
    # Behind the operator's own words, so that none of these can be undone by mistake.
    command += ["--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth"]
    command += ["--ssl-ca-certfile", str(federation.ca_file)]
    command += ["--ssl-certfile", str(folder / "server" / "server.crt")]
    command += ["--ssl-keyfile", str(folder / "server" / "server.key")]
    return [*command, "--disable-runtime-dependency-installation"]


def _nginx_command(federation: Federation, environment: dict[str, str]) -> list[str]:
    command = [_program("nginx", environment, "for example: apt-get install nginx-light")]
    command += ["-p", str(federation.folder / "nginx"), "-c", "nginx.conf"]
    return [*command, "-e", "stderr", "-g", "daemon off;"]


def _program(name: str, environment: dict[str, str], how: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([environment["PATH"], *_SBIN]))
    if found is None:
        raise DeptError(f"{name} is not installed ({how})")
    return found


def _register_partners(
    federation: Federation, environment: dict[str, str], tell: Callable[[str], None]
) -> None:
    """Admit each key of the folder `partners`: a SuperLink forgets them all when it ends."""
    for key in sorted((federation.folder / "partners").glob("*.pub")):
        command = ["flwr", "supernode", "register", str(key), federation.settings.connection]
        command += ["--name", key.stem]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        reason = "" if done.returncode == 0 else f": {done.stdout}{done.stderr}"
        tell(f"partner {key.stem} {'NOT ' if reason else ''}registered{reason}")


def _wait_for_end(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    watches = {name: Watch(process) for name, process in processes.items()}
    while True:
        for name, watch in watches.items():
            if trouble := watch.trouble():
                raise Failed(f"{name} {trouble}; see above")
        time.sleep(0.5)
