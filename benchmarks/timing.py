"""How long a piece of work takes when nothing else disturbs it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_REPEATS = 5


def fastest(work: Callable[[], object]) -> float:
    """Seconds, best of some repeats; the first ones pay for memory that was never touched."""
    seconds = math.inf
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        seconds = min(seconds, time.perf_counter() - began)
    return seconds
