"""A fork server for a SuperNode: its messages need not wait for PyTorch to be imported.

Flower starts `flwr-clientapp` for each message, which takes seconds of CPU for imports alone. This
process has done them, and forks one instead. That one is as fresh as before: the app's code is
loaded in it, from what the server sent, and its memory, a GPU's too, goes with it. The SuperNode
finds forkclient.py as `flwr-clientapp` on its PATH, which becomes Flower's own wherever this
process does not answer, or says no.

Run as `python -P forkserver.py SOCKET`. Imports nothing of dept_fl: what runs in a forked process
is the app that the server sent, not what is installed here.

A request is the length of a JSON text in four bytes, which come with the caller's stdin, stdout and
stderr, and the text. The answer is one byte; then the caller's bytes are numbers of signals, and
four bytes with the exit code end it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORKED, REFUSED = b"+", b"-"
LENGTH, EXIT_CODE = struct.Struct(">I"), struct.Struct(">i")

# What the app imports, but for its own code.
PRELOADED = (
    "flwr.clientapp",
    "flwr.supernode.cli",
    "torch",
    "transformers.generation",
    "transformers.modeling_layers",
    "transformers.processing_utils",
    "transformers.tokenization_python",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mpt.modeling_mpt",
    "omegaconf",
    "safetensors.torch",
    "sentencepiece",
)
_STANDARD_FILES = (0, 1, 2)
_LARGEST_REQUEST = 1 << 24
_PATIENCE_S, _LOOK_S = 10.0, 1.0


@dataclass
class _Request:
    """What a forked process is to be.

    Attributes:
        command: a Python script and its arguments.
        files: the caller's stdin, stdout and stderr.
    """

    command: list[str]
    folder: str
    environment: dict[str, str]
    files: list[int]

    def fulfil(self) -> None:
        """Run the script here, as `python SCRIPT` would."""
        for file, number in zip(self.files, _STANDARD_FILES, strict=True):
            os.dup2(file, number)
            os.close(file)
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        sys.argv = self.command
        runpy.run_path(self.command[0], run_name="__main__")


@dataclass
class _Child:
    """A forked process and whom it is for.

    Where this server ends, it goes on; Flower's own watch of the SuperExec ends it with that.
    """

    pid: int
    process: int  # a file descriptor: the pid may be another's by the time it is signalled
    caller: socket.socket | None


class _Server:
    """Forks a process for each request.

    Args:
        listener: takes the callers' connections.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._children: list[_Child] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._installed: list[int] | None = None  # when it preloaded; None before
        self._refuses = False
        self._parent = os.getppid()

    def serve(self) -> _Request | None:
        """Serve until the process ends that started this one.

        Returns:
            in a forked process, what it is to be; None at the end.
        """
        while os.getppid() == self._parent:
            for key, _ in self._selector.select(_LOOK_S):
                if key.fileobj is self._listener:
                    if request := self._answer():
                        return request
                elif key.fileobj == key.data.process:
                    self._reap(key.data)
                elif key.fileobj is key.data.caller:  # none any more, where it was just reaped
                    self._hear(key.data)
        return None

    def _answer(self) -> _Request | None:
        try:
            caller, _ = self._listener.accept()
        except OSError:
            return None
        try:
            request = _read(caller)
        except Exception:  # no request
            caller.close()
            return None
        forked = self._fork(caller) if self._may_fork() else None
        if forked == 0:
            return request
        for file in request.files:
            os.close(file)
        if forked is None:
            with suppress(OSError), caller:
                caller.sendall(REFUSED)
        return None

    def _may_fork(self) -> bool:
        if self._installed is None:  # with the first: one that nobody asks costs nothing
            _preload()
            self._installed = _installed()
            if _has_opened_cuda():
                self._refuse("an import has opened CUDA, which no forked process could use")
        if not self._refuses and _installed() != self._installed:
            self._refuse("installed packages have changed; start the SuperNode again")
        return not self._refuses

    def _refuse(self, reason: str) -> None:
        self._refuses = True
        print(f"messages start slowly: {reason}", flush=True)

    def _fork(self, caller: socket.socket) -> int | None:
        """The new process's pid; 0 in it; None where there can be none."""
        try:
            with warnings.catch_warnings():
                # of threads: those of linear algebra, which see to forks themselves
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
        except OSError:
            return None
        if pid == 0:
            self._close(caller)
            return pid
        try:
            child = _Child(pid, os.pidfd_open(pid), caller)
        except OSError:  # too many files are open; the message must not run twice
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        self._children.append(child)
        self._selector.register(child.process, selectors.EVENT_READ, child)
        self._selector.register(caller, selectors.EVENT_READ, child)
        try:
            caller.sendall(FORKED)
        except OSError:  # it has given up, and may have started the message by itself
            signal.pidfd_send_signal(child.process, signal.SIGKILL)
        return pid

    def _close(self, caller: socket.socket) -> None:
        """Leave nothing of the server's open in a forked process."""
        self._selector.close()
        for each in (self._listener, caller, *(child.caller for child in self._children)):
            if each is not None:
                each.close()
        for child in self._children:
            os.close(child.process)

    def _hear(self, child: _Child) -> None:
        assert child.caller is not None
        try:
            numbers = child.caller.recv(16)
        except OSError:
            numbers = b""
        for number in numbers or [signal.SIGKILL]:  # a caller that is gone was killed
            with suppress(OSError, ValueError):
                signal.pidfd_send_signal(child.process, number)
        if not numbers:
            self._forget_caller(child)

    def _forget_caller(self, child: _Child) -> None:
        if child.caller is not None:
            self._selector.unregister(child.caller)
            child.caller.close()
            child.caller = None

    def _reap(self, child: _Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        if child.caller is not None:
            with suppress(OSError):
                child.caller.sendall(EXIT_CODE.pack(os.waitstatus_to_exitcode(status)))
        self._forget_caller(child)
        self._selector.unregister(child.process)
        os.close(child.process)
        self._children.remove(child)


def _read(caller: socket.socket) -> _Request:
    caller.settimeout(_PATIENCE_S)
    head, files, _, _ = socket.recv_fds(caller, LENGTH.size, len(_STANDARD_FILES))
    try:
        (length,) = LENGTH.unpack(head)
        if length > _LARGEST_REQUEST or len(files) != len(_STANDARD_FILES):
            raise ValueError("not a request")
        with caller.makefile("rb") as stream:
            asked: dict[str, Any] = json.loads(stream.read(length))
        return _Request(asked["command"], asked["folder"], asked["environment"], files)
    except BaseException:
        for file in files:
            os.close(file)
        raise


def _installed() -> list[int]:
    """Changes when packages are installed or removed: what is in memory is old then."""
    folders = [Path(entry) for entry in sys.path]
    return [each.stat().st_mtime_ns for each in folders if any(each.glob("*.dist-info"))]


def _has_opened_cuda() -> bool:
    """Whether this process has spoken to the driver, as not even a look at NVML does."""
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of the listing itself is closed by now
            if str(file.readlink()).startswith("/dev/nvidia-uvm"):
                return True
    return False


def _preload() -> None:
    # Else to ask whether there is a GPU would open a driver that a forked process cannot use.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for name in PRELOADED:
        with suppress(ImportError):  # then the forked process tries, and tells
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # pages that no collection touches are shared with all that is forked


def main() -> None:
    os.close(os.pidfd_open(os.getpid()))  # what cannot be done here ends it before anybody asks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        request = _Server(listener).serve()
    if request is not None:
        request.fulfil()


if __name__ == "__main__":
    main()
