"""What a SuperNode starts as `flwr-clientapp`: has the fork server fork it (forkserver.py).

Run as `python -IS forkclient.py SOCKET COMMAND ARGUMENTS...`. Where the fork server does not
answer, or says no, this process becomes the command. Imports only what starts at once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys

_FORKED = b"+"
_LENGTH, _EXIT_CODE = struct.Struct(">I"), struct.Struct(">i")
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_PATIENCE_S = 120.0  # a fork server that hangs must not hold up what starts without it
_SIGNALLED = 128  # what a shell adds to a signal's number


def main() -> None:
    address, *command = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until it is known whom they are for
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(address)
            forked = _ask(server, command)
        except OSError:
            forked = False
        if forked:
            sys.exit(_follow(server))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    os.execv(command[0], command)


def _ask(server: socket.socket, command: list[str]) -> bool:
    folder = os.getcwd()  # noqa: PTH109 (pathlib takes as long as all else here)
    asked = {"command": command, "folder": folder, "environment": dict(os.environ)}
    text = json.dumps(asked).encode()
    server.settimeout(_PATIENCE_S)
    socket.send_fds(server, [_LENGTH.pack(len(text))], [0, 1, 2])
    server.sendall(text)
    forked = server.recv(1) == _FORKED
    server.settimeout(None)
    return forked


def _follow(server: socket.socket) -> int:
    """Pass signals on to the forked process; its exit status."""
    for each in _PASSED_ON:
        signal.signal(each, lambda number, _: server.sendall(bytes([number])))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    told = server.recv(_EXIT_CODE.size)
    if not told:  # the fork server was killed; what it forked goes on by itself
        return 1
    code: int = _EXIT_CODE.unpack(told)[0]
    return code if code >= 0 else _SIGNALLED - code


if __name__ == "__main__":
    main()
