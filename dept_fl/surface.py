"""What a tokenizer's pieces write, in one form for all tokenizers: bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dept_fl.tokenizer import Tokenizer, byte_level_alphabet

_MARKER = "▁"  # U+2581, a space in SentencePiece and its kin
_BYTE_PIECES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
_CONTINUES = "##"  # in front of a WordPiece that does not begin a word


class Surface(NamedTuple):
    """What one piece writes.

    Attributes:
        kind: `text`; `byte`, for the pieces that write what no other piece can; `special`;
            `end`, which separates documents, whatever a tokenizer calls it.
        value: the bytes it writes; the name of a special; nothing for an end.
    """

    kind: str
    value: bytes


def surfaces(tokenizer: Tokenizer) -> list[Surface]:
    """[V] what each piece writes."""
    pieces, specials = tokenizer.pieces(), tokenizer.specials()
    spell = _spelling([piece for i, piece in enumerate(pieces) if i not in specials])
    found = [
        Surface("special", piece.encode()) if i in specials or not piece else spell(piece)
        for i, piece in enumerate(pieces)
    ]
    found[tokenizer.end_id] = Surface("end", b"")
    return found


def _spelling(pieces: Sequence[str]) -> Callable[[str], Surface]:
    """How to read these pieces, which no tokenizer says of itself."""
    known = set(pieces)
    marked = any(_MARKER in piece for piece in known)
    alphabet = byte_level_alphabet()
    if not marked and known.issuperset(alphabet):  # a byte-level U+2581 is spelled as three bytes
        byte_of = {character: byte for byte, character in enumerate(alphabet)}
        return lambda piece: Surface("text", bytes(byte_of[c] for c in piece))
    if not marked and sum(p.startswith(_CONTINUES) for p in known) > len(known) // 100:
        return _word_piece
    fallback = _BYTE_PIECES if known.issuperset(_BYTE_PIECES) else {}
    return lambda piece: (
        Surface("byte", fallback[piece])
        if piece in fallback
        else Surface("text", piece.replace(_MARKER, " ").encode())
    )


def _word_piece(piece: str) -> Surface:
    if piece.startswith(_CONTINUES):
        return Surface("text", piece.removeprefix(_CONTINUES).encode())
    begins_word = piece[:1].isalnum()
    return Surface("text", (" " * begins_word + piece).encode())


class SurfaceIndex:
    """Where a vocabulary has a piece that writes the same as one of another vocabulary."""

    def __init__(self, held: Sequence[Surface]) -> None:
        self._place: dict[Surface, int] = {}
        for i, surface in enumerate(held):
            self._place.setdefault(surface, i)
        self._place.pop(Surface("special", b""), None)  # an id without a piece

    def find(self, surface: Surface) -> int | None:
        """The place of the same surface, else of the other piece that writes this one byte."""
        place = self._place.get(surface)
        if place is None and len(surface.value) == 1 and surface.kind in ("text", "byte"):
            other = "byte" if surface.kind == "text" else "text"
            return self._place.get(Surface(other, surface.value))
        return place
