"""Documents that are nearly the same, found by MinHash and locality-sensitive hashing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_WORDS_IN_A_ROW = 5
_SLOTS = 128  # of a sketch: the estimate is off by 0.04 (one standard deviation) at most
_SEED = 1
# Two documents are compared where all slots of one band agree. Of 32 bands one does, for all that
# are similar enough; with the fewer that rensa takes by itself many would not be compared.
_BANDS = 32
# Scripts without spaces have no words to find: each character stands for one.
_WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿]|[^\W_]+")


class NearCopies:
    """Documents met so far, for which it can be asked whether another is nearly one of them.

    Two documents are as similar as the sets of their five words in a row: the Jaccard index,
    estimated from sketches (Broder 1997), which take a few kilobytes each whatever the length.
    Case and all but letters and digits play no part.

    Args:
        threshold: least similarity of what is nearly the same.
    """

    def __init__(self, threshold: float) -> None:
        from rensa import RMinHashDeduplicator

        self._index: Any = RMinHashDeduplicator(
            threshold, _SLOTS, True, num_bands=_BANDS, seed=_SEED
        )
        self._last: tuple[str, Any] = ("", None)
        self._count = 0

    def has(self, text: str) -> bool:
        return bool(self._index.is_duplicate("", self._sketch(text)))

    def add(self, text: str) -> None:
        self._count += 1
        self._index.add(str(self._count), self._sketch(text))

    def _sketch(self, text: str) -> Any:
        from rensa import RMinHash

        if self._last[1] is None or self._last[0] != text:  # it is asked for before it is added
            sketch = RMinHash(_SLOTS, _SEED)
            sketch.update(list(shingles(text)))
            self._last = (text, sketch)
        return self._last[1]


def shingles(text: str) -> Iterator[str]:
    """Five words in a row, from each word on; the words of a shorter text as they are."""
    words = _WORD.findall(text.lower()) or [text]
    for start in range(max(1, len(words) - _WORDS_IN_A_ROW + 1)):
        yield " ".join(words[start : start + _WORDS_IN_A_ROW])
