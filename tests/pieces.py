"""Helper of the tests: a tokenizer of given pieces, which reads no text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dept_fl.tokenizer import Tokenizer, Vocabulary

END = "</s>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class Pieces(Tokenizer):
    """An end, then the given pieces, in the alphabet of SentencePiece unless they say otherwise."""

    end_id = 0
    fingerprint = "pieces"

    def __init__(self, *pieces: str, end: str = END, specials: Sequence[str] = ()) -> None:
        self._pieces = [end, *specials, *pieces]
        self._specials = set(range(1 + len(specials)))
        self.size = len(self._pieces)

    def arrays(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError

    def pieces(self) -> list[str]:
        return self._pieces

    def specials(self) -> set[int]:
        return self._specials

    def ids(self, *pieces: str) -> np.ndarray:
        return np.asarray([self._pieces.index(piece) for piece in pieces])

    @property
    def whole(self) -> Vocabulary:
        return Vocabulary.whole(self)
