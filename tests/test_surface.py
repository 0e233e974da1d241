"""Pieces of all kinds of tokenizers, read as the bytes they write."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given

from dept_fl.surface import Surface, SurfaceIndex, surfaces
from dept_fl.tokenizer import Tokenizer, byte_level_alphabet, load_tokenizer
from tests.pieces import BYTES, Pieces
from tests.test_tokenizer import (  # noqa: F401  (fixtures)
    AWKWARD,
    PROPERTY,
    TEXT,
    byte_level,
    folder,
    model,
    save_fast,
    trained,
)


def text(value: str | bytes) -> Surface:
    return Surface("text", value.encode() if isinstance(value, str) else value)


def word_piece(target: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    names = ["[UNK]", "[SEP]", "the", "leaf", "##let", "##s", "."]
    backend = Backend(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    save_fast(backend, target, unk_token="[UNK]", sep_token="[SEP]")
    return load_tokenizer(target)


@pytest.mark.parametrize("kind", ["trained", "byte_level"])
@PROPERTY
@given(written=TEXT)
@example(written="".join(AWKWARD))
def test_surfaces_of_a_texts_ids_are_its_bytes(
    kind: str, written: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    found = surfaces(tokenizer)
    ids = tokenizer.encode([written])[0]
    assert b"".join(found[i].value for i in ids) == written.encode()
    assert {found[i].kind for i in ids} <= {"text", "byte"}


def test_sentencepiece_marks_spaces_and_names_bytes() -> None:
    found = surfaces(Pieces(*BYTES, "▁the", "▁", "é", specials=["<unk>"]))
    assert found[:2] == [Surface("end", b""), Surface("special", b"<unk>")]
    assert found[2 + 0x41] == Surface("byte", b"A")
    assert found[-3:] == [text(" the"), text(" "), text("é")]


def test_byte_level_pieces_are_spelled_byte_by_byte() -> None:
    tokenizer = Pieces(*byte_level_alphabet(), "Ġthe", "Ã©", "Ċ", end="<|end|>")
    found = surfaces(tokenizer)
    assert found[1:257] == [text(bytes([byte])) for byte in range(256)]
    assert found[-3:] == [text(" the"), text("é"), text("\n")]


def test_word_pieces_begin_words_unless_they_say_otherwise(tmp_path: Path) -> None:
    found = surfaces(word_piece(tmp_path))
    assert found[0] == Surface("special", b"[UNK]")
    assert found[1] == Surface("end", b"")
    assert found[2:] == [text(" the"), text(" leaf"), text("let"), text("s"), text(".")]


def test_a_sentencepiece_model_with_every_letter_of_the_byte_alphabet_is_not_byte_level() -> None:
    found = surfaces(Pieces(*byte_level_alphabet(), "▁Ġ"))
    assert found[-1] == text(" Ġ")


def test_without_all_256_byte_pieces_a_piece_that_looks_like_one_is_text() -> None:
    assert surfaces(Pieces("<0x41>", "▁a"))[1] == text("<0x41>")


def test_ends_find_each_other_whatever_they_are_called() -> None:
    index = SurfaceIndex(surfaces(Pieces("▁the", end="<|endoftext|>")))
    assert index.find(surfaces(Pieces("▁leaf"))[0]) == 0


def test_specials_find_only_specials_of_their_name() -> None:
    index = SurfaceIndex(surfaces(Pieces("<pad>", "▁", specials=["<unk>"])))
    assert index.find(Surface("special", b"<unk>")) == 1
    assert index.find(Surface("special", b"<pad>")) is None
    assert index.find(text("<unk>")) is None


def test_a_byte_piece_and_the_text_of_its_byte_stand_in_for_each_other() -> None:
    sentencepiece = SurfaceIndex(surfaces(Pieces(*BYTES, "A", "▁")))
    bytewise = SurfaceIndex(surfaces(Pieces(*byte_level_alphabet())))
    assert sentencepiece.find(text("A")) == 1 + 256  # the text first
    assert sentencepiece.find(text("B")) == 1 + 0x42
    assert sentencepiece.find(Surface("byte", b"A")) == 1 + 0x41
    assert bytewise.find(Surface("byte", b"A")) == 1 + 0x41
    assert bytewise.find(Surface("byte", b"\xc3")) == 1 + 0xC3


def test_of_pieces_that_write_the_same_the_first_is_found() -> None:
    assert SurfaceIndex([text("a"), text("b"), text("b")]).find(text("b")) == 1


def test_ids_without_a_piece_find_nothing() -> None:
    hole = surfaces(Pieces("", "▁a"))[1]
    assert SurfaceIndex([hole]).find(hole) is None
