"""Tokenizers: train or load SentencePiece, adopt a Hugging Face one, restrict either to V_k."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece as spm

from dept_fl.errors import DeptError

Ids = list[int]
MODEL_FILE = "tokenizer.model"  # of a SentencePiece tokenizer in a folder of its own
_SPACE = "▁"  # U+2581, which SentencePiece writes for a space
_SCORE_STEPS = 64  # a nat; sums up to 2**18 nats are exact
_LONGEST_LINE = 1000  # characters; the trainer skips lines over 4192 bytes without a word
_KEPT = 8  # tokenizers in memory; to make one of 50,000 pieces takes half a second


class Tokenizer(Protocol):
    """What the project needs of a tokenizer.

    Attributes:
        size: number of ids, V.
        end_id: the id that separates documents.
        fingerprint: equal for two tokenizers only if they give the same ids.
    """

    size: int
    end_id: int
    fingerprint: str

    @property
    def kind(self) -> str:
        """What people call it, such as SentencePiece unigram."""
        ...

    def arrays(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """The ids of each text, by the calling thread alone: whoever has many texts has threads."""
        ...

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return [ids.tolist() for ids in self.arrays(texts)]

    def decode(self, ids: Sequence[int]) -> str: ...

    def pieces(self) -> list[str]:
        """The V pieces as strings, in the tokenizer's own alphabet."""
        ...

    def specials(self) -> set[int]:
        """Ids that no text is written with."""
        ...


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. One from `train_sentencepiece` is lossless: decode(encode(x)) == x."""

    def __init__(self, model: bytes) -> None:
        self._processor = spm.SentencePieceProcessor(model_proto=model)
        self.size: int = self._processor.get_piece_size()
        end = self._processor.eos_id()
        if end < 0:
            raise DeptError("a SentencePiece model without an end-of-sentence id")
        self.end_id: int = end
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()

    @property
    def kind(self) -> str:
        spec = sentencepiece_proto(self.model).trainer_spec
        return f"SentencePiece {spec.ModelType.Name(spec.model_type).lower()}"

    def arrays(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        found: list[npt.NDArray[np.int32]] = self._processor.encode(
            list(texts), num_threads=1, return_type="numpy"
        )
        for i, text in enumerate(texts):
            if _SPACE in text:
                found[i] = np.asarray(self._encode_with_literal_marker(text), dtype=np.int32)
        return found

    def _encode_with_literal_marker(self, text: str) -> Ids:
        # SentencePiece cannot tell a U+2581 of the text from the marker it puts for a
        # space, so that it would decode as a space. As byte pieces it survives.
        marker = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        if any(self._processor.is_unknown(piece) for piece in marker):
            return list(self._processor.encode(text))
        ids: Ids = []
        for i, part in enumerate(text.split(_SPACE)):
            ids += (marker if i else []) + self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(i) for i in ids])
        return text

    def pieces(self) -> list[str]:
        return [self._processor.id_to_piece(i) for i in range(self.size)]

    def specials(self) -> set[int]:
        is_special = (self._processor.is_control, self._processor.is_unknown)
        return {i for i in range(self.size) if any(test(i) for test in is_special)}


class HuggingFaceTokenizer(Tokenizer):
    """A fast Hugging Face tokenizer, from a folder or by name."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # of several libraries, none of them documented
            reason = shorten(str(error), 200) or type(error).__name__
            raise _unusable(name, f"transformers cannot load it: {reason}") from error
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _unusable(name, "a slow tokenizer")
        end = self._tokenizer.eos_token_id
        end = self._tokenizer.sep_token_id if end is None else end
        if end is None:
            raise _unusable(name, "has no eos or sep token to end documents")
        self.end_id: int = end
        vocabulary = self._tokenizer.get_vocab()
        if set(vocabulary.values()) <= self.specials():  # made up where its files are missing
            raise _unusable(name, "has no pieces")
        self.size: int = max(vocabulary.values()) + 1
        self._byte_level = set(byte_level_alphabet()) <= vocabulary.keys()
        self.fingerprint = hashlib.sha256(f"{end} {backend.to_str()}".encode()).hexdigest()
        backend.no_truncation()
        backend.no_padding()
        # Text that looks like a special token is text: it must not end a document.
        backend.encode_special_tokens = True
        self._backend = backend
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # read at each call

    @property
    def kind(self) -> str:
        return f"Hugging Face {type(self._backend.model).__name__}"

    def arrays(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        # Fast: without the places of the pieces in the text.
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(each.ids, dtype=np.int32) for each in found]

    def decode(self, ids: Sequence[int]) -> str:
        listed = [int(i) for i in ids]
        return str(self._tokenizer.decode(listed, clean_up_tokenization_spaces=False))

    def save(self, folder: Path) -> None:
        """Write it to a folder from which it can be loaded again."""
        self._tokenizer.save_pretrained(folder)

    def pieces(self) -> list[str]:
        alphabet = byte_level_alphabet()
        known = set(alphabet)
        names = [""] * self.size
        for piece, index in self._tokenizer.get_vocab().items():
            if self._byte_level and not known.issuperset(piece):  # added to it as plain text
                names[index] = "".join(alphabet[byte] for byte in piece.encode())
            else:
                names[index] = piece
        return names

    def specials(self) -> set[int]:
        return set(self._tokenizer.all_special_ids)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """A SentencePiece file (`.model`) or a folder with tokenizer.model alone; else Hugging Face's.

    Raises:
        DeptError: naming the tokenizer and the mend, where it cannot be used.
    """
    path = Path(name)
    if [file.name for file in path.glob("*.*")] == [MODEL_FILE]:
        path = path / MODEL_FILE
    if path.suffix != ".model":
        return _hugging_face(str(name), _stamp(path))
    if not path.is_file():
        raise _unusable(name, "no such file")
    try:
        return sentencepiece(path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise _unusable(name, "not readable as a SentencePiece model") from error
    except DeptError as error:
        raise _unusable(name, str(error)) from error


@functools.lru_cache(_KEPT)
def sentencepiece(model: bytes) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model)


@functools.lru_cache(_KEPT)
def _hugging_face(name: str, _: tuple[tuple[str, int, int], ...]) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(name)


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of the files in it, which change whenever they do."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    return tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)


def _unusable(name: str | Path, reason: str) -> DeptError:
    return DeptError(
        f"tokenizer {str(name)!r}: {reason}; give a SentencePiece .model with an end id, "
        "or the folder or hub name of a fast Hugging Face tokenizer with an eos token"
    )


def train_sentencepiece(owner: str, documents: Iterable[str], vocab_size: int) -> bytes:
    """Train a lossless unigram model with byte fall-back (paper, section 3: SPEC-OPT).

    Nothing is normalised and white space is kept, so that every byte of the text comes back.
    Scores are rounded to multiples of 1/64: sums of them are exact in single precision, and what
    pieces a word gets does not depend on how much text lies before it.

    Args:
        owner: named in errors.
        documents: the training text; lines of it are what the trainer sees.
        vocab_size: pieces, with the 256 bytes and the specials among them.

    Raises:
        DeptError: the text has too few different pieces for `vocab_size`.
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_lines(documents),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=4,  # fixed: the sums of the E-step, and so the model, depend on it
            minloglevel=3,
        )
    except RuntimeError as error:
        raise DeptError(
            f"silo {owner}: no tokenizer of vocab_size={vocab_size} can be trained on its text: "
            f"{_trainer_reason(str(error))}"
        ) from error
    proto = sentencepiece_proto(model.getvalue())
    for piece in proto.pieces:
        piece.score = round(piece.score * _SCORE_STEPS) / _SCORE_STEPS
    rounded: bytes = proto.SerializeToString(deterministic=True)
    return rounded


def sentencepiece_proto(model: bytes) -> Any:
    """The `ModelProto` of a SentencePiece file."""
    # The class that SentencePiece brings itself wants a later protobuf than Flower allows.
    from transformers.utils import sentencepiece_model_pb2_new

    schema: Any = sentencepiece_model_pb2_new  # generated, without types
    return schema.ModelProto.FromString(model)


def _trainer_reason(message: str) -> str:
    """The trainer's error with the mend, from the numbers in it."""
    if most := re.search(r"size too high .* <= (\d+)", message):
        return f"it has pieces for {most[1]} at most; lower vocab_size or give more text"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"its characters alone take {least[1]}; raise vocab_size"
    reason = message.strip().splitlines()[-1]
    return f"the trainer finds no text it can use ({reason}); give more text"


def _lines(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for line in document.splitlines():
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]


class Vocabulary:
    """The ids a silo uses: all of a tokenizer's, or the subset V_k with which it writes any text.

    Ids of the tokenizer outside V_k are written as several pieces of V_k; V_k holds every
    byte piece, so that this is always possible. Local ids are 0..|V_k|-1.

    Attributes:
        ids: [|V_k|] int64, ascending: the tokenizer's id of each local id.
        full: V, the tokenizer's size.
    """

    def __init__(self, ids: npt.NDArray[np.int64], full: int) -> None:
        self.ids = ids
        self.full = full

    @classmethod
    def whole(cls, tokenizer: Tokenizer) -> Vocabulary:
        return cls(np.arange(tokenizer.size, dtype=np.int64), tokenizer.size)

    @classmethod
    def of_training_split(
        cls, tokenizer: Tokenizer, used: npt.NDArray[np.int64], owner: str
    ) -> Vocabulary:
        """V_k: the ids in the training split (paper, section 2) plus specials and bytes."""
        always = tokenizer.specials() | set(byte_ids(tokenizer, owner)) | {tokenizer.end_id}
        ids = np.union1d(used, np.fromiter(always, dtype=np.int64))
        return cls(ids.astype(np.int64), tokenizer.size)

    @property
    def size(self) -> int:
        return len(self.ids)

    def local_ids(self) -> npt.NDArray[np.int64]:
        """[V] int64: the local id of each of the tokenizer's ids, -1 outside V_k."""
        table = np.full(self.full, -1, dtype=np.int64)
        table[self.ids] = np.arange(self.size)
        return table

    def rewriter(self, tokenizer: Tokenizer) -> Rewriter:
        return Rewriter(tokenizer, set(self.ids.tolist()))


class Rewriter:
    """Writes ids outside a vocabulary with the fewest pieces inside it, longest first on ties."""

    def __init__(self, tokenizer: Tokenizer, allowed: set[int]) -> None:
        self._allowed = allowed
        self._pieces = tokenizer.pieces()
        self._bytes = byte_ids(tokenizer, "") if len(allowed) < tokenizer.size else []
        self._byte_fallback = "<0x00>" in self._pieces
        texts = allowed - tokenizer.specials() - set(self._bytes if self._byte_fallback else [])
        self._id_of = {self._pieces[i]: i for i in sorted(texts)}
        self._longest = max((len(piece) for piece in self._id_of), default=1)
        self._memory: dict[int, Ids] = {}

    def __call__(self, ids: Sequence[int]) -> Ids:
        out: Ids = []
        for i in ids:
            if i in self._allowed:
                out.append(i)
            else:
                if i not in self._memory:
                    self._memory[i] = self._split(self._pieces[i])
                out += self._memory[i]
        return out

    def _split(self, piece: str) -> Ids:
        # best[start]: the fewest ids that write piece[start:]
        best: list[Ids] = [[] for _ in range(len(piece) + 1)]
        for start in reversed(range(len(piece))):
            options = [
                [self._id_of[piece[start:end]], *best[end]]
                for end in range(min(len(piece), start + self._longest), start, -1)
                if piece[start:end] in self._id_of
            ]
            options.append(self._character(piece[start]) + best[start + 1])
            best[start] = min(options, key=len)  # of equals the first, which is the longest
        return best[0]

    def _character(self, character: str) -> Ids:
        known = self._id_of.get(character)
        if known is not None:
            return [known]
        text = " " if character == _SPACE else character
        return [self._bytes[byte] for byte in text.encode()]


def byte_ids(tokenizer: Tokenizer, owner: str) -> Ids:
    """[256] the ids of the pieces that write single bytes.

    Raises:
        DeptError: the tokenizer has none, so that a part of it cannot write any text.
    """
    index: dict[str, int] = {}
    for i, piece in enumerate(tokenizer.pieces()):
        index.setdefault(piece, i)
    for names in ([f"<0x{byte:02X}>" for byte in range(256)], byte_level_alphabet()):
        if all(name in index for name in names):
            return [index[name] for name in names]
    raise DeptError(
        f"silo {owner}: the shared tokenizer has no byte pieces, so that a silo's part of its "
        "vocabulary cannot write every text; use variant=glob or a tokenizer with byte fall-back"
    )


def byte_level_alphabet() -> list[str]:
    """The printable stand-in of each byte in byte-level BPE (GPT-2): shifted where unprintable."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(256, 512))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]
