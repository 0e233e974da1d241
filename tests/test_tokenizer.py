"""Tokenizers: lossless where trained here, deterministic, and writable with a part of them."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dept_fl.errors import DeptError
from dept_fl.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    Vocabulary,
    byte_ids,
    load_tokenizer,
    train_sentencepiece,
)
from tests.conftest import sentencepiece_model
from tests.pieces import BYTES, Pieces

AWKWARD = (
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<0x41>",
    "<|end|>",
    "▁",
    "▁▁the",
    " ",
    "    ",
    "\t\t",
    "\r\n",
    "\n\n",
    "\0",
    "\x85\u2028",
    "é",
    "e\u0301",
    "é the",
    "👩‍👩‍👧",
    "\ufeff",
    "\ufffd",
    "\U0010ffff",
    "日本",
    "the leaf",
    "leaf",
)
# Any Unicode text, with what a tokenizer may trip over more often than chance gives it.
TEXT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(AWKWARD)), max_size=8).map("".join)
PROPERTY = settings(
    deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def words() -> list[str]:
    """Documents of a few words each, some of them awkward."""
    draw = random.Random(1)
    plain = ["the", "leaf", "is", "under", "a", "small", "green", "tree", "кот", "été\tx();"]
    awkward = ["</s>", "<0x41>", "▁", "</s>"]
    return [" ".join(draw.choices(plain + awkward, k=40)) + "\r\n" for _ in range(50)]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece("ant", words(), 290)


@pytest.fixture(scope="module")
def trained(model: bytes) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with an end token and added plain words, saved as a folder."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(words(), trainer)
    target = tmp_path_factory.mktemp("bpe")
    save_fast(backend, target, eos_token="<|end|>", added=["    ", "é "])
    return target


def save_fast(backend: object, target: Path, added: Sequence[str] = (), **special: str) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    fast.add_tokens(list(added))
    fast.save_pretrained(target)


@pytest.fixture(scope="module")
def byte_level(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def word_level(target: Path, **special: str) -> Path:
    """A tokenizer of two words without byte pieces, saved as a folder."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    pieces = {"[UNK]": 0, "[END]": 1, "the": 2, "leaf": 3}
    backend = Backend(models.WordLevel(pieces, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    save_fast(backend, target, **special)
    return target


# ---- training --------------------------------------------------------------------------------


@PROPERTY
@given(text=TEXT)
@example(text="".join(AWKWARD))
@example(text="")
def test_a_trained_tokenizer_gives_every_text_back(
    trained: SentencePieceTokenizer, text: str
) -> None:
    assert trained.decode(trained.encode([text])[0]) == text


@PROPERTY
@given(text=TEXT)
@example(text="".join(AWKWARD))
def test_no_text_is_written_with_a_special_piece(
    trained: SentencePieceTokenizer, text: str
) -> None:
    assert not trained.specials() & set(trained.encode([text])[0])


def test_texts_encoded_together_have_the_ids_of_each_alone(
    trained: SentencePieceTokenizer,
) -> None:
    texts = [*AWKWARD, *words()[:3]]
    assert trained.encode(texts) == [trained.encode([text])[0] for text in texts]


def test_training_twice_gives_the_same_bytes(model: bytes) -> None:
    assert train_sentencepiece("bee", words(), 290) == model


def test_training_in_another_process_gives_the_same_bytes(model: bytes) -> None:
    script = (
        "import hashlib, json, sys; from dept_fl.tokenizer import train_sentencepiece as train;"
        "print(hashlib.sha256(train('ant', json.load(sys.stdin), 290)).hexdigest())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(words()),
        text=True,
        check=True,
        capture_output=True,
    )
    assert ran.stdout.strip() == hashlib.sha256(model).hexdigest()


def test_a_line_longer_than_the_trainer_takes_is_learned_from() -> None:
    line = "".join(words()).replace("\r\n", " ")
    assert len(line) > 2 * 4192
    assert SentencePieceTokenizer(train_sentencepiece("ant", [line], 286)).size == 286


@pytest.mark.parametrize(
    ("text", "size", "mend"),
    [
        # Two specials, 256 bytes and the seven characters; then the 1,024 characters.
        ("the leaf", 5000, "pieces for 265 at most; lower vocab_size or give more text"),
        ("".join(map(chr, range(0x4E00, 0x5200))), 300, "take 1282; raise vocab_size"),
        ("\0", 300, "give more text"),
    ],
)
def test_an_impossible_vocabulary_size_names_silo_value_and_mend(
    text: str, size: int, mend: str
) -> None:
    with pytest.raises(DeptError) as raised:
        train_sentencepiece("ant", [text], size)
    assert f"silo ant: no tokenizer of vocab_size={size} " in str(raised.value)
    assert mend in str(raised.value)


# ---- a part of a vocabulary ----------------------------------------------------------------------


def part(tokenizer: Tokenizer, text: str) -> Vocabulary:
    used = np.unique(tokenizer.encode([text])[0])
    return Vocabulary.of_training_split(tokenizer, used, "ant")


@pytest.mark.parametrize("kind", ["trained", "byte_level"])
def test_a_part_holds_the_used_ids_the_specials_the_end_and_all_bytes(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    text = "the leaf"
    used = set(tokenizer.encode([text])[0])
    held = set(part(tokenizer, text).ids.tolist())
    bytes_ = set(byte_ids(tokenizer, "ant"))
    assert len(bytes_) == 256
    assert held == used | tokenizer.specials() | {tokenizer.end_id} | bytes_
    assert len(held) < tokenizer.size


@pytest.mark.parametrize("kind", ["trained", "byte_level"])
def test_byte_pieces_write_their_bytes(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    ids = byte_ids(tokenizer, "ant")
    assert tokenizer.decode([ids[byte] for byte in "aé日😀 \n".encode()]) == "aé日😀 \n"


@pytest.mark.parametrize("kind", ["trained", "byte_level"])
@PROPERTY
@given(text=TEXT)
@example(text="".join(AWKWARD))
@example(text="green small tree кот    é x();")
def test_any_text_can_be_written_with_a_part_alone(
    kind: str, text: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    vocabulary = part(tokenizer, "the leaf")
    ids = vocabulary.rewriter(tokenizer)(tokenizer.encode([text])[0])
    assert set(ids) <= set(vocabulary.ids.tolist())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["trained", "byte_level"])
def test_text_of_the_training_split_is_unchanged_by_the_rewriter(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(["the leaf", "green small tree"])
    rewrite = part(tokenizer, "the leaf").rewriter(tokenizer)
    assert rewrite(ids[0]) == ids[0]
    assert rewrite(ids[1]) != ids[1]


@pytest.mark.parametrize(
    ("outside", "allowed", "written"),
    [
        # Greedily "abc" and the two bytes of é would be three.
        ("abcé", ["abc", "ab", "cé"], ["ab", "cé"]),
        ("abcd", ["ab", "cd", "abc", "d"], ["abc", "d"]),  # a tie: longest first
        ("▁x", ["y"], ["<0x20>", "<0x78>"]),  # the marker stands for a space
        ("▁ab", ["▁", "ab"], ["▁", "ab"]),
        ("日", ["y"], ["<0xE6>", "<0x97>", "<0xA5>"]),
        ("</s>ab", ["ab"], ["<0x3C>", "<0x2F>", "<0x73>", "<0x3E>", "ab"]),  # never the special
        ("<0x41>b", ["b"], [*(f"<0x{byte:02X}>" for byte in b"<0x41>"), "b"]),
    ],
)
def test_the_rewriter_takes_the_fewest_pieces(
    outside: str, allowed: list[str], written: list[str]
) -> None:
    tokenizer = Pieces(*BYTES, *allowed, outside)
    used = np.arange(257, tokenizer.size - 1)
    vocabulary = Vocabulary.of_training_split(tokenizer, used, "ant")
    ids = vocabulary.rewriter(tokenizer)([tokenizer.size - 1])
    assert [tokenizer.pieces()[i] for i in ids] == written


def test_local_ids_are_the_inverse_of_ids() -> None:
    vocabulary = Vocabulary(np.array([1, 4, 5]), full=7)
    assert vocabulary.size == 3
    assert vocabulary.local_ids().tolist() == [-1, 0, -1, -1, 1, 2, -1]


def test_a_whole_vocabulary_keeps_every_id_and_rewrites_nothing(byte_level: Tokenizer) -> None:
    vocabulary = Vocabulary.whole(byte_level)
    ids = list(range(byte_level.size))
    assert vocabulary.local_ids().tolist() == ids
    assert vocabulary.rewriter(byte_level)(ids) == ids


def test_a_tokenizer_without_byte_pieces_is_refused_for_a_part(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(word_level(tmp_path, eos_token="[END]"))
    with pytest.raises(DeptError, match=r"silo ant: the shared tokenizer has no byte pieces.*glob"):
        part(tokenizer, "the leaf")


# ---- Hugging Face ----------------------------------------------------------------------------


def test_a_folder_is_loaded_as_a_hugging_face_tokenizer(byte_level: Tokenizer) -> None:
    assert isinstance(byte_level, HuggingFaceTokenizer)
    assert byte_level.pieces()[byte_level.end_id] == "<|end|>"


@PROPERTY
@given(text=TEXT)
@example(text="".join(AWKWARD))
@example(text="")
def test_ids_are_those_that_transformers_gives(
    byte_level: Tokenizer, folder: Path, text: str
) -> None:
    reference = reference_of(folder)
    expected = reference([text], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert byte_level.encode([text]) == expected


@cache
def reference_of(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_a_tokenizer_saved_to_cut_and_fill_texts_does_neither(folder: Path, tmp_path: Path) -> None:
    backend = copy.deepcopy(reference_of(folder).backend_tokenizer)
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    save_fast(backend, tmp_path, eos_token="<|end|>")
    cutting = load_tokenizer(tmp_path)
    text = "the leaf is under"
    assert cutting.decode(cutting.encode([text, "the"])[0]) == text
    assert cutting.end_id not in cutting.encode([text, "the"])[1]


def test_a_folder_that_changed_is_loaded_anew(folder: Path, tmp_path: Path) -> None:
    changing = tmp_path / "changing"
    shutil.copytree(folder, changing)
    before = load_tokenizer(changing)
    assert load_tokenizer(changing) is before
    file = changing / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "eos_token": "leaf"}))
    assert load_tokenizer(changing).fingerprint != before.fingerprint


def test_text_that_looks_like_the_end_token_ends_no_document(byte_level: Tokenizer) -> None:
    text = "the <|end|> leaf"
    ids = byte_level.encode([text])[0]
    assert byte_level.end_id not in ids
    assert byte_level.decode(ids) == text


def test_words_added_to_a_byte_level_tokenizer_are_spelled_in_its_alphabet(
    byte_level: Tokenizer,
) -> None:
    ids = byte_level.encode(["é     "])[0]
    assert [byte_level.pieces()[i] for i in ids] == ["Ã©Ġ", "ĠĠĠĠ"]


# ---- loading ---------------------------------------------------------------------------------


def test_fingerprints_tell_tokenizers_apart(model: bytes, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.model"
    file.write_bytes(model)
    first, second = load_tokenizer(file), SentencePieceTokenizer(model)
    other = SentencePieceTokenizer(train_sentencepiece("ant", words(), 286))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != other.fingerprint
    assert load_tokenizer(folder).fingerprint == load_tokenizer(folder).fingerprint


def test_tokenizers_that_end_documents_differently_have_different_fingerprints(
    tmp_path: Path,
) -> None:
    pairs = (("[END]", "[UNK]"), ("[UNK]", "[END]"))
    loaded = [
        load_tokenizer(word_level(tmp_path / end, eos_token=end, pad_token=pad))
        for end, pad in pairs
    ]
    assert loaded[0].end_id != loaded[1].end_id
    assert loaded[0].fingerprint != loaded[1].fingerprint


MEND = "give a SentencePiece .model with an end id, or the folder or hub name"


def refused(name: Path) -> str:
    with pytest.raises(DeptError) as raised:
        load_tokenizer(name)
    message = str(raised.value)
    assert f"tokenizer {str(name)!r}: " in message
    assert MEND in message
    return message


def test_a_missing_model_file_is_named_with_the_mend(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "missing.model")


@pytest.mark.parametrize("content", [b"", b"no model\n" * 10])
def test_a_file_that_is_no_model_is_named_with_the_mend(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "wrong.model"
    file.write_bytes(content)
    assert "SentencePiece model" in refused(file)


def test_a_model_without_an_end_id_is_named_with_the_mend(tmp_path: Path) -> None:
    file = tmp_path / "endless.model"
    file.write_bytes(sentencepiece_model(words(), eos_id=-1))
    assert "without an end-of-sentence id" in refused(file)


def test_a_folder_that_is_no_tokenizer_is_named_with_the_mend(tmp_path: Path) -> None:
    assert "transformers cannot load it: " in refused(tmp_path)


def test_a_folder_without_an_end_token_is_named_with_the_mend(tmp_path: Path) -> None:
    assert "no eos or sep token" in refused(word_level(tmp_path))


def test_a_sep_token_ends_documents_where_there_is_no_eos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(word_level(tmp_path, sep_token="[END]"))
    assert tokenizer.end_id == 1
