"""What takes too long ends: politely if it listens, at once if it does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dept_fl.deadline import ends_within
from dept_fl.errors import DeptError


@pytest.fixture(autouse=True)
def own_alarm():
    """The tests' own time limit uses the same signal."""
    handler, alarm = signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 0)
    yield
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, *alarm)


def sleep(_: Path) -> None:
    time.sleep(60)


def read_a_pipe_that_nobody_writes_to(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "pipe").open().read()


def wait_for_a_lock_that_nobody_opens(_: Path) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def compute(_: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    "busy",
    [
        sleep,
        read_a_pipe_that_nobody_writes_to,
        wait_for_a_lock_that_nobody_opens,
        compute,
    ],
)
def test_what_takes_too_long_is_ended_with_its_name(tmp_path: Path, busy: Callable[[Path], None]):
    began = time.monotonic()
    with (
        pytest.raises(DeptError, match=r"train of silo ant: not done within the 0\.2 s the server"),
        ends_within(0.2, "train of silo ant"),
    ):
        busy(tmp_path)
    assert 0.2 <= time.monotonic() - began < 30


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_done_in_time_leaves_no_trace(fails: bool):
    def mine(*_: object) -> None:
        raise AssertionError

    signal.signal(signal.SIGALRM, mine)
    signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        with ends_within(60, "train"):
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert signal.getsignal(signal.SIGALRM) is mine
    assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500


def test_after_the_end_nothing_is_left_to_go_off():
    with pytest.raises(DeptError), ends_within(0.05, "train"):
        sleep(Path())
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with ends_within(60, "train"):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


DEAF = {
    "the signal is blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])",
    "a call holds Python's lock": "[ctypes.PyDLL(None).pthread_mutex_lock(mutex) for _ in '12']",
    "the error is swallowed": "swallow()",
}
PROGRAM = """
import ctypes, signal, time
from dept_fl import deadline

def swallow():
    try:
        time.sleep(60)
    except Exception:
        pass

mutex = ctypes.create_string_buffer(64)
deadline._HARD_S = 0.5
with deadline.ends_within(0.3, "train"):
    {deaf}
    time.sleep(60)
print("still here")
"""


@pytest.mark.parametrize("deaf", DEAF.values(), ids=DEAF.keys())
def test_a_process_that_does_not_notice_its_end_is_killed(deaf: str):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(deaf=deaf)],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode not in (0, None)
    assert "still here" not in done.stdout
    assert "Timeout" in done.stderr and 'File "<string>"' in done.stderr
    assert time.monotonic() - began < 50


def test_a_process_that_is_done_in_time_is_not_killed_later():
    quick = "import time\nfrom dept_fl import deadline\ndeadline._HARD_S = 0.1\n"
    quick += "with deadline.ends_within(0.2, 'train'): pass\ntime.sleep(0.6)\nprint('done')"
    done = subprocess.run(
        [sys.executable, "-c", quick], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert (done.returncode, done.stdout) == (0, "done\n")
