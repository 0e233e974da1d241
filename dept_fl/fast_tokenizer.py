"""A SentencePiece model as a pipeline of Hugging Face's `tokenizers` that gives the same ids.

The libraries' own converters are not used: they take text such as `<0x41>`, `</s>` or `▁` for
pieces, and do not read every version of the file. Unigram models with byte fall-back become a
lattice over bytes, in which no name of a special piece is ever the best way to write a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dept_fl.errors import DeptError
from dept_fl.tokenizer import (
    Ids,
    SentencePieceTokenizer,
    Tokenizer,
    Vocabulary,
    byte_level_alphabet,
    sentencepiece_proto,
)
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

_SPACE = "▁"  # U+2581, which SentencePiece writes for a space
_NO_CHARACTER = "\U0010fffe"  # of Unicode, now or ever
_UNIGRAM, _BPE = 1, 2  # of TrainerSpec.model_type
_NORMAL, _UNKNOWN, _USER_DEFINED, _BYTE = 1, 2, 4, 6  # of SentencePiece.type
_UNKNOWN_PENALTY = 10.0  # SentencePiece: an unknown character scores so much below every piece
_NEVER = -1e30  # a score with which no piece is ever taken


def fast_tokenizer(model: bytes, vocabulary: Vocabulary) -> Backend:
    """The pipeline for a SentencePiece model, whose ids are local ids of the vocabulary.

    With a part V_k of a unigram model's ids, a text gets the model's own ids where those lie in
    V_k, as all of the training split's do; else the likeliest pieces within V_k.

    Raises:
        DeptError: the model is of a kind that has no such pipeline.
    """
    proto = sentencepiece_proto(model)
    kind, falls_back = proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback
    if kind not in (_UNIGRAM, _BPE) or proto.trainer_spec.treat_whitespace_as_suffix:
        raise DeptError(
            "its tokenizer is a SentencePiece model of a kind that no Hugging Face tokenizer "
            "writes; only unigram and BPE models with spaces at the front of pieces can be exported"
        )
    if kind == _BPE:
        made = Backend(_bpe(proto))
    elif falls_back:
        made = Backend(models.Unigram(_byte_lattice(proto, vocabulary.ids.tolist())))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        made = Backend(models.Unigram(_lattice(proto), _unknown(proto)))
    if steps := list(_normalizers(proto)):
        made.normalizer = normalizers.Sequence(steps)
    bytewise = made.pre_tokenizer is not None
    made.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.ByteLevel() if bytewise else decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []),
        ]
    )
    return made


def writes_parts(tokenizer: Tokenizer) -> bool:
    """Whether `fast_tokenizer` can write a part of this tokenizer's ids."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return False
    spec = sentencepiece_proto(tokenizer.model).trainer_spec
    return bool(spec.model_type == _UNIGRAM and spec.byte_fallback)


def _score(piece: Any, best: float) -> float:
    if piece.type == _NORMAL:
        return float(piece.score)
    if piece.type == _USER_DEFINED:  # always taken
        return len(piece.piece.encode()) * best - 0.1
    return _NEVER


def _scores(proto: Any) -> tuple[float, float]:
    """The lowest and highest score of a piece."""
    scores = [piece.score for piece in proto.pieces if piece.type == _NORMAL]
    return min(scores), max(scores)


def _byte_lattice(proto: Any, ids: Ids) -> list[tuple[str, float]]:
    """Pieces in the byte-level alphabet, each byte among them, with their scores.

    A character without a piece is written in bytes, at the price of an unknown one: its first
    byte has it, the others are free. No piece starts or ends within a character, so that the
    best path is that of SentencePiece.
    """
    alphabet = byte_level_alphabet()
    worst, best = _scores(proto)
    pieces = [proto.pieces[i] for i in ids]
    texts = {piece.piece for piece in pieces if piece.type in (_NORMAL, _USER_DEFINED)}
    made = []
    for piece in pieces:
        name, score = _spaced(piece.piece), _score(piece, best)
        if piece.type in (_NORMAL, _USER_DEFINED):
            name = "".join(alphabet[byte] for byte in name.encode())
        elif piece.type == _UNKNOWN:
            name = proto.trainer_spec.unk_surface  # as it is read, should a model ever write it
        elif piece.type == _BYTE:
            byte = int(piece.piece[3:5], 16)
            # A byte whose character is a piece is never written; it keeps its name to be read.
            if (_SPACE if byte == 0x20 else chr(byte)) not in texts or byte >= 0x80:
                name = alphabet[byte]
                score = 0.0 if 0x80 <= byte < 0xC0 else worst - _UNKNOWN_PENALTY
        made.append((name, score))
    return made


def _lattice(proto: Any) -> list[tuple[str, float]]:
    # Names of special pieces begin with what the normalizer leaves no text with. Their score may
    # not be the lowest, which says what an unknown character costs.
    _, best = _scores(proto)
    return [
        (_spaced(p.piece), _score(p, best))
        if p.type in (_NORMAL, _USER_DEFINED)
        else (_SPACE + p.piece, 0.0)
        for p in proto.pieces
    ]


def _bpe(proto: Any) -> models.BPE:
    """Every way to put a piece together is a merge, the best piece first, as SentencePiece does."""
    names = [_spaced(piece.piece) for piece in proto.pieces]
    names[_unknown(proto)] = proto.trainer_spec.unk_surface
    index = {name: i for i, name in enumerate(names)}
    ranked = sorted(
        (i for i, piece in enumerate(proto.pieces) if piece.type == _NORMAL),
        key=lambda i: -proto.pieces[i].score,
    )
    merges = [
        (names[i][:cut], names[i][cut:])
        for i in ranked
        for cut in range(1, len(names[i]))
        if _is_text(proto, index, names[i][:cut]) and _is_text(proto, index, names[i][cut:])
    ]
    return models.BPE(
        vocab=index,
        merges=merges,
        unk_token=names[_unknown(proto)],
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _is_text(proto: Any, index: dict[str, int], name: str) -> bool:
    return name in index and proto.pieces[index[name]].type == _NORMAL


def _unknown(proto: Any) -> int:
    return next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)


def _spaced(piece: str) -> str:
    return piece.replace(_SPACE, " ")


def _normalizers(proto: Any) -> Iterator[normalizers.Normalizer]:
    """What SentencePiece does to a text first, with spaces as they are.

    With byte fall-back, our own tokenizer writes a U+2581 of the text as bytes and encodes what
    lies between two of them each by itself; without, SentencePiece takes it for a space.
    """
    spec, splits = proto.normalizer_spec, proto.trainer_spec.byte_fallback
    if spec.precompiled_charsmap and splits:  # which may make a space of it
        yield normalizers.Replace(_SPACE, _NO_CHARACTER)
    if spec.precompiled_charsmap:
        yield normalizers.Precompiled(spec.precompiled_charsmap)
    if spec.precompiled_charsmap and splits:
        yield normalizers.Replace(_NO_CHARACTER, _SPACE)
    if spec.remove_extra_whitespaces:
        around = rf"(?<![^{_SPACE}]) | (?![^{_SPACE}])" if splits else rf"\A |[ {_SPACE}]+\z"
        yield normalizers.Replace(Regex(" {2,}"), " ")
        yield normalizers.Replace(Regex(around), "")
    if spec.add_dummy_prefix:
        yield normalizers.Prepend(" ")
    if spec.add_dummy_prefix and splits:
        yield normalizers.Replace(Regex(rf"\A (?={_SPACE})"), "")
        yield normalizers.Replace(Regex(rf"{_SPACE}(?=[^{_SPACE}])"), f"{_SPACE} ")
    if not splits:
        yield normalizers.Replace(_SPACE, " ")
