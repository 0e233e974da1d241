"""`dept tokenizer`: trained on files, looked at, compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dept_fl.cli import app
from dept_fl.errors import DeptError
from dept_fl.tokenizer import load_tokenizer
from dept_fl.workbench import Written, card, common_pieces, pieces_of, written
from tests.conftest import WORDS, sentencepiece_model, write_text
from tests.pieces import BYTES, Pieces
from tests.test_data import Bytes
from tests.test_surface import word_piece
from tests.test_tokenizer import (  # noqa: F401  (fixtures)
    byte_level,
    folder,
    model,
    save_fast,
    trained,
)


def dept(*words: Any) -> Result:
    return CliRunner().invoke(app, ["tokenizer", *map(str, words)])


def told(*words: Any) -> dict[str, Any]:
    done = dept(*words, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    made = tmp_path / "data"
    made.mkdir()
    for silo in WORDS:
        write_text(made, silo)
    return made


# ---- how it writes -------------------------------------------------------------------------


def test_tokens_and_bytes_are_those_counted_by_hand() -> None:
    # A token a byte, each by a piece that writes one, and é is two of them.
    assert written(Bytes(), ["aé", "b"]) == Written(
        documents=2, text_bytes=4, tokens=4, unknown=0, byte_tokens=4, lossy_documents=0
    )
    assert written(Bytes(), ["aé", "b"]).bytes_per_token == 1.0


def test_what_no_piece_writes_is_unknown_or_in_bytes(tmp_path: Path) -> None:
    texts = ["the leaf is green"] * 50
    falls_back = tmp_path / "falls-back.model"
    falls_back.write_bytes(sentencepiece_model(texts, 275, hard_vocab_limit=False))
    without = tmp_path / "without.model"
    without.write_bytes(sentencepiece_model(texts, 40, byte_fallback=False, hard_vocab_limit=False))
    plain = written(load_tokenizer(falls_back), ["the leaf"])
    kot = written(load_tokenizer(falls_back), ["the leaf кот"])
    assert (plain.byte_tokens, plain.unknown, plain.lossy_documents) == (0, 0, 0)
    assert (kot.byte_tokens, kot.unknown, kot.lossy_documents) == (6, 0, 0)  # two bytes a letter
    lost = written(load_tokenizer(without), ["the leaf кот", "the leaf"])
    assert (lost.byte_tokens, lost.unknown, lost.lossy_documents) == (0, 1, 1)


def test_no_text_is_an_error() -> None:
    with pytest.raises(DeptError, match="no text in the data; give files with some"):
        written(Bytes(), [])


def test_pieces_in_common_are_those_that_write_the_same_bytes() -> None:
    one = Pieces(*BYTES, "▁the", "▁leaf", "é")
    other = Pieces(*BYTES, "▁the", "▁tree", "e", specials=["<unk>"])
    # The 256 bytes and " the"; "e" is what the other has, and one has in its byte piece.
    assert common_pieces([one, other]) == [[259, 257], [257, 258]]


# ---- what it is ----------------------------------------------------------------------------


def test_the_card_of_a_tokenizer_as_silos_train_it(trained: Any) -> None:  # noqa: F811
    found = card("x", trained)
    assert (found.kind, found.writes_bytes, found.lossless) == ("SentencePiece unigram", True, True)
    assert (found.end, found.specials) == ("</s>", ["<unk>"])
    assert found.pieces == trained.size
    assert found.fingerprint == trained.fingerprint


def test_the_card_of_others_says_what_they_lose(byte_level: Any, tmp_path: Path) -> None:  # noqa: F811
    found = card("x", byte_level)
    assert (found.kind, found.writes_bytes, found.lossless) == ("Hugging Face BPE", True, True)
    words = card("y", word_piece(tmp_path))
    assert (words.kind, words.writes_bytes, words.lossless) == (
        "Hugging Face WordPiece",
        False,
        False,
    )
    assert "  a   b " in words.lost


def test_the_pieces_of_a_text_are_those_of_its_ids(trained: Any) -> None:  # noqa: F811
    pieces = list(pieces_of(trained, "the leaf"))
    assert "".join(piece for _, piece in pieces).replace("▁", " ") == "the leaf"
    assert [i for i, _ in pieces] == trained.encode(["the leaf"])[0]


# ---- the commands --------------------------------------------------------------------------


def test_train_show_and_compare(data: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    made = told("train", data / "ant.jsonl", "--out", one, "--vocab-size", 300)
    assert (made["pieces"], made["lossless"]) == (300, True)
    assert [file.name for file in one.iterdir()] == ["tokenizer.model"]
    again = told("train", data / "ant.jsonl", "--out", other, "--vocab-size", 300)
    assert again["fingerprint"] == made["fingerprint"]  # the same text, the same tokenizer

    shown = told("show", one, "--text", "the leaf")
    assert shown["fingerprint"] == made["fingerprint"] == load_tokenizer(one).fingerprint
    assert "".join(piece for _, piece in shown["text"]).replace("▁", " ") == "the leaf"
    words = dept("show", one / "tokenizer.model", "--text", "\x1b[1m").stdout
    assert "\x1b" not in words  # nothing in a text steers the terminal
    assert "lossless      yes" in words

    told("train", data / "*.jsonl", "--out", tmp_path / "all", "--vocab-size", 340)
    found = told("compare", one, tmp_path / "all", "--data", data / "cat.jsonl")
    ant, every = found["tokenizers"]
    assert ant["text_bytes"] == every["text_bytes"] > 0
    assert ant["documents"] == 60
    assert ant["byte_tokens"] > every["byte_tokens"]  # it has never seen Cyrillic
    assert ant["bytes_per_token"] < every["bytes_per_token"]
    assert ant["lossy_documents"] == every["lossy_documents"] == 0
    # All but the specials, and a letter that a byte writes as well counts once.
    letters = [p for p in load_tokenizer(one).pieces() if len(p) == 1 and (p.isascii() or p == "▁")]
    assert found["common_pieces"][0][0] == 298 - len(letters)
    assert found["common_pieces"][0][1] == found["common_pieces"][1][0] >= 256
    table = dept("compare", one, tmp_path / "all", "--data", data / "cat.jsonl").stdout
    assert f"{ant['tokens']:,}" in table


def test_the_sample_is_spread_over_the_text(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    words = ["--vocab-size", 330, "--sample-bytes", 6000, "--out", out]
    assert told("train", data, *words)["pieces"] == 330
    cyrillic = [p for p in load_tokenizer(out).pieces() if "к" in p]
    assert cyrillic  # the last file is in it


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "nowhere.txt", "--vocab-size", "300"],
            "no file matches ['nowhere.txt']; check F",
        ),
        (["train", "DATA", "--vocab-size", "9000"], "no tokenizer of --vocab-size=9000 can be"),
        (
            ["train", "DATA", "--vocab-size", "300", "--column", "x"],
            "no column 'x'; columns: text;",
        ),
        (["train", "DATA", "--vocab-size", "300", "--set", "x=y"], "--set 'x=y': expected KEY=VAL"),
        (["compare", "a", "--data", "DATA"], "name two tokenizers or more"),
        (["compare", "a.model", "b.model", "--data", "DATA"], "tokenizer 'a.model': no such file"),
        (["show", "b.model"], "tokenizer 'b.model': no such file"),
    ],
)
def test_a_mistake_is_one_clear_error_and_leaves_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(data) if word == "DATA" else word for word in words]
    done = dept(*words, *(["--out", "new"] if words[0] == "train" else []))
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_there_is_never_overwritten(data: Path, tmp_path: Path) -> None:
    done = dept("train", data, "--out", tmp_path, "--vocab-size", 300)
    assert done.exit_code == 2
    assert "is there already; name a new folder" in done.stderr


def test_the_home_is_expanded_before_a_name_is_looked_up_on_the_hub(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        words = (data / "ant.jsonl").read_text(encoding="utf-8").splitlines()
        (tmp_path / f"{name}.model").write_bytes(sentencepiece_model(words))
    monkeypatch.setenv("HOME", str(tmp_path))
    found = told("compare", "~/a.model", "~/b.model", "--data", data / "ant.jsonl")
    named = [each["name"] for each in found["tokenizers"]]
    assert named == [str(tmp_path / "a.model"), str(tmp_path / "b.model")]
