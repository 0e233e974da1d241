"""`dept silo new`: from text to a silo that is ready to join, or one clear error and no files."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from cryptography.hazmat.primitives import serialization
from flwr.common.config import parse_config_args
from pyarrow import parquet
from typer.testing import CliRunner

from dept_fl import data as data_module
from dept_fl import partner, sources
from dept_fl import silo as silo_module
from dept_fl.cli import app
from dept_fl.config import Recipe
from dept_fl.data import Corpus
from dept_fl.errors import DeptError
from dept_fl.partner import Order, fitting_pieces, new_silo
from dept_fl.progress import Progress
from dept_fl.silo import Silo
from dept_fl.silo_file import load_silo_file
from tests.conftest import WORDS, sentencepiece_model, write_text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with text of two silos in data/, and a home of its own."""
    (tmp_path / "data").mkdir()
    for silo in ("ant", "bee"):
        write_text(tmp_path / "data", silo)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEPT_HOME", str(tmp_path / "home"))
    return tmp_path


class Done:
    """What a command left: exit code, all output, without what a terminal adds."""

    def __init__(self, *words: str) -> None:
        result = CliRunner().invoke(app, ["silo", "new", *words], env={"COLUMNS": "90"})
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr


def made(*words: str) -> str:
    done = Done(*words)
    assert done.code == 0, done.err
    return done.out


def refused(*words: str) -> str:
    done = Done(*words)
    assert done.code == 2
    assert done.out == ""
    (told,) = re.findall(r"^error: (.*)", done.err, re.MULTILINE | re.DOTALL)
    return str(told).strip()


def rows(folder: Path, name: str, row: Callable[[int, str], dict[str, Any]]) -> None:
    """JSONL in which each row is made of its number and a text."""
    texts = (folder / "data" / "ant.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.dumps(row(i, json.loads(text)["text"])) for i, text in enumerate(texts)]
    (folder / "data" / name).write_text("\n".join(lines), encoding="utf-8")


# ---- what is made ------------------------------------------------------------------------


def test_a_new_silo_is_ready_for_any_recipe(
    folder: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    made("ant", "--data", "data/ant.jsonl", "--vocab-size", "310")

    def never(*_: object) -> None:
        raise AssertionError("not from the cache")

    monkeypatch.setattr(data_module, "documents", never)
    monkeypatch.setattr(data_module, "_write_tokens", never)
    monkeypatch.setattr(silo_module, "train_sentencepiece", never)
    file = load_silo_file(folder / "ant.yaml")
    registration = Silo(file.name, file.over(recipe()), file.home, "0123456789ab").register()
    assert registration.vocabulary == 310
    assert registration.train_documents + registration.duplicates < 60
    assert registration.lossy_documents == 0


def test_the_file_keeps_paths_as_they_were_given(folder: Path) -> None:
    pattern = str(folder / "data" / "ant.*")
    made("fr", "--data", "data/b*.jsonl", "--data", pattern, "--folder", "partners/fr")
    text = (folder / "partners/fr/fr.yaml").read_text()
    assert f'files: ["../../data/b*.jsonl", "{pattern}"]' in text
    assert f'home: "{folder / "home"}"' in text  # a service has another $DEPT_HOME
    file = load_silo_file(folder / "partners/fr/fr.yaml")
    assert file.home == folder / "home"
    assert (folder / "partners/fr/fr.key").stat().st_mode & 0o777 == 0o600


def test_other_settings_come_into_the_file(folder: Path) -> None:
    words = ["--set", "validation_fraction=0.3", "--set", "deduplicate=false", "--home", "h"]
    made("ant", "--data", "data", *words)
    file = load_silo_file(folder / "ant.yaml")
    assert file.home == folder / "h"
    assert (file.alone().validation_fraction, file.alone().deduplicate) == (0.3, False)


def test_a_silo_may_have_several_sources(folder: Path) -> None:
    one, other = ({"files": [f"data/{n}.jsonl"], "weight": w} for n, w in (("ant", 1), ("bee", 1)))
    told = made("ant", "--set", f"sources={json.dumps({'one': one, 'other': other})}")
    assert re.search(r"sources +one 50%, read 1\.\d\d times, other 50%, read 1\.\d\d times", told)
    silo = load_silo_file(folder / "ant.yaml").alone().silos["ant"]
    assert silo.sources["one"].files == [str(folder / "data/ant.jsonl")]


def test_the_printed_commands_are_the_right_ones(folder: Path) -> None:
    (folder / "my files").mkdir()
    told = made("ant", "--data", "data/ant.jsonl", "--folder", "my files").replace("\\\n", "")
    check, supernode = re.findall(r"^  \d\. (dept|flower-supernode) (.*)", told, re.MULTILINE)
    words = shlex.split(check[1])
    assert words[:3] == ["silo", "check", str(folder / "my files/ant.yaml")]
    words = shlex.split(supernode[1])
    assert words[:4] == ["--superlink", "HOST:PORT", "--root-certificates", "ca.crt"]
    options = dict(zip(words[::2], words[1::2], strict=True))
    key = Path(options["--auth-supernode-private-key"]).read_bytes()
    public = serialization.load_ssh_private_key(key, password=None).public_key()
    sent = Path(re.findall(r"public key: (.*)", told)[0])
    assert serialization.load_ssh_public_key(sent.read_bytes()) == public
    node_config = parse_config_args([options["--node-config"]])
    assert node_config == {"silo": str(folder / "my files/ant.yaml")}


def test_the_partner_reads_what_stays_and_what_travels(folder: Path) -> None:
    told = made("ant", "--data", "data/ant.jsonl")
    corpus = Silo("ant", load_silo_file(folder / "ant.yaml").alone(), folder / "home", "").corpus
    assert f"{corpus.documents}; {corpus.duplicates} duplicates dropped" in told
    assert "300 pieces, chosen for so much text" in told
    assert "lossless" in told
    assert "bits per byte" in told
    stays, travels = told.split("STAYS")[1].split("TRAVELS")
    for place in ("home/silos/ant/text", "home/silos/ant/state", "home/tokenizers/ant", "ant.key"):
        assert str(folder / place) in stays
    assert "never       text, tokenizer, pieces, token ids, embeddings" in travels
    assert "at the end" not in travels
    assert max(map(len, re.sub(r"\S*/\S*", "", told).splitlines())) <= 90


def test_a_machine_reads_the_same_in_figures(folder: Path) -> None:
    told = json.loads(made("ant", "--data", "data/ant.jsonl", "--json"))
    silo = Silo("ant", load_silo_file(folder / "ant.yaml").alone(), folder / "home", "")
    assert (told["documents"], told["duplicates"]) == (
        silo.corpus.documents,
        silo.corpus.duplicates,
    )
    assert (told["pieces"], told["train_tokens"]) == (300, len(silo.stream.train))
    assert told["unigram_bits_per_byte"] == silo.unigram_bits_per_byte
    assert Path(told["file"]) == folder / "ant.yaml"
    assert Path(told["public_key"]).is_file()


def test_a_text_that_the_model_writes_travels_only_if_asked_for(folder: Path) -> None:
    told = made("ant", "--data", "data/ant.jsonl", "--set", "share_samples=true")
    assert "at the end  a text that the model writes" in told


def test_glimpses_do_no_harm_to_a_terminal(folder: Path) -> None:
    rows(folder, "odd.jsonl", lambda i, text: {"text": f"\x1b[2J\x07{i} 犬{'猫' * 60}\n\t{text}"})
    told = made("odd", "--data", "data/odd.jsonl", "--vocab-size", "330")
    assert "\x1b" not in told and "\x07" not in told
    glimpses = re.findall(r"^  \| (.*)", told, re.MULTILINE)
    assert len(glimpses) == 3
    assert all(re.fullmatch(r"\?\[2J\?\d+ 犬猫{30,42} ?\.\.\.", each) for each in glimpses)


# ---- what is found out -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (lambda i, text: {"id": str(i), "text": text}, "text"),
        (lambda i, text: {"id": i, "body": text, "odd": None}, "body"),
        (lambda i, text: {"id": i, "body": text if i else None}, "body"),
    ],
)
def test_the_column_of_the_text_is_found(
    folder: Path, row: Callable[[int, str], dict[str, Any]], column: str
) -> None:
    rows(folder, "x.jsonl", row)
    made("x", "--data", "data/x.jsonl")
    assert f'column: "{column}"' in (folder / "x.yaml").read_text()


def test_the_column_of_parquet_is_found(folder: Path) -> None:
    texts = (folder / "data/ant.jsonl").read_text(encoding="utf-8").splitlines()
    table = pyarrow.table({"n": [1] * len(texts), "story": [json.loads(t)["text"] for t in texts]})
    parquet.write_table(table, folder / "x.parquet")
    made("x", "--data", "x.parquet")
    assert 'column: "story"' in (folder / "x.yaml").read_text()


def test_plain_text_has_no_column(folder: Path) -> None:
    texts = (folder / "data/ant.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "x.txt").write_text("\n\n".join(json.loads(text)["text"] for text in texts))
    made("x", "--data", "x.txt")
    assert '# column: "text"' in (folder / "x.yaml").read_text()


def test_a_column_that_is_not_clear_is_asked_for(folder: Path) -> None:
    rows(folder, "x.jsonl", lambda i, text: {"id": i, "title": "t", "body": text})
    told = refused("x", "--data", "data/x.jsonl")
    assert told == (
        "which column is the text? of id, title, body: text is in title, body; name it with "
        "--column"
    )
    rows(folder, "y.jsonl", lambda i, text: {"id": i})
    assert "of id: none holds text" in refused("y", "--data", "data/y.jsonl")
    made("x", "--data", "data/x.jsonl", "--column", "body")


def corpus_of(folder: Path, text: str, train_bytes: int) -> Corpus:
    (folder / "train.jsonl").write_text(json.dumps(text, ensure_ascii=False), encoding="utf-8")
    return Corpus(folder, "", 1, train_bytes, 1, 1, 0)


@pytest.mark.parametrize(
    ("train_bytes", "pieces"),
    [(10_000, 300), (70_000, 512), (1 << 20, 2048), (5_900_000, 4096), (1 << 24, 8192),
     (10**9, 32_768), (10**12, 32_768)],
)  # fmt: skip
def test_four_times_the_text_gives_twice_the_pieces(
    tmp_path: Path, train_bytes: int, pieces: int
) -> None:
    assert fitting_pieces(corpus_of(tmp_path, "ab", train_bytes), 10**12) == pieces


def test_a_script_of_many_characters_gets_a_piece_for_each_and_more(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(1000)) * 2
    assert fitting_pieces(corpus_of(tmp_path, text, 6000), 10**6) == 258 + 2 * 1000
    rare = text + "a" * 10_000_000  # of the thousand, few are among 99.95 % of the characters
    assert fitting_pieces(corpus_of(tmp_path, rare, 6000), 10**9) == 300


# ---- a tokenizer that is there -----------------------------------------------------------


def test_a_tokenizer_is_adopted_and_tried(folder: Path) -> None:
    model = sentencepiece_model([" ".join(WORDS["ant"])] * 20, 280)
    (folder / "own.model").write_bytes(model)
    told = made("ant", "--data", "data/ant.jsonl", "--tokenizer", "own.model", "--folder", "f")
    assert "280 pieces; LOSSY: " in told  # it takes any white space for one space
    assert "never text, tokenizer, pieces, token ids, embeddings." in " ".join(told.split())
    assert "its fingerprint goes once" in " ".join(told.split())
    adopt = ["--data", "data/ant.jsonl", "--tokenizer", "own.model", "--folder", "g"]
    told = made("ant", *adopt, "--set", "share_embeddings=true")
    assert "in its variants GLOB and TRIM the embeddings" in " ".join(told.split())
    assert "share_embeddings: true " in (folder / "g/ant.yaml").read_text()
    text = (folder / "f/ant.yaml").read_text()
    assert 'tokenizer: "../own.model"' in text
    assert "# vocab_size: 0 " in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "no such file"), (b"no model", "not readable as a SentencePiece model")],
)
def test_a_tokenizer_that_is_none_is_told_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, expected: str
) -> None:
    if content:
        (folder / "own.model").write_bytes(content)
    monkeypatch.setattr(data_module, "documents", pytest.fail)
    told = refused("ant", "--data", "data/ant.jsonl", "--tokenizer", "own.model")
    assert expected in told


# ---- one clear error, and nothing left ---------------------------------------------------

BAD: dict[str, tuple[list[str], str]] = {
    "no file": (["--data", "nowhere/*.txt"], "no file matches"),
    "empty": (["--data", "empty.txt"], "no text in its data; check --data"),
    "encoding": (["--data", "latin.txt"], "or give --set encoding"),
    "unknown encoding": (["--data", "data", "--set", "encoding=utf-9"], "no such text encoding"),
    "no json": (["--data", "broken.jsonl"], "line 1: not JSON"),
    "one document": (["--data", "one.txt"], "--set sample_by=paragraph or line"),
    "split": (["--data", "one.txt"], "--set validation_fraction=0.05 or --set validation_max"),
    "much vocabulary": (
        ["--data", "data/ant.jsonl", "--vocab-size", "32000"],
        "it has pieces for 3",
    ),
    "little vocabulary": (["--data", "data", "--vocab-size", "7"], "vocab_size=7: must be at le"),
    "column": (["--data", "data/ant.jsonl", "--column", "x"], "columns: text; set --column"),
    "no source": ([], "give the silo's text in one way"),
    "two sources": (["--data", "data", "--hub", "a/b"], "give the silo's text in one way"),
    "two tokenizers": (
        ["--data", "data", "--tokenizer", "x.model", "--vocab-size", "500"],
        "drop --vocab-size=500, or drop --tokenizer",
    ),
    "unquoted": (["--data", "data/ant.jsonl", "data/bee.jsonl"], "quote a pattern"),
    "misplaced": (
        ["--hub", "a/b", "--set", "validation_files=[v.txt]"],
        "v.txt']: only together with files; remove it",
    ),
    "no validation file": (
        ["--data", "data", "--set", "validation_files=[nowhere.txt]"],
        "nowhere.txt']; check --set validation_files",
    ),
    "set": (["--data", "data", "--set", "device"], "expected KEY=VALUE, such as sample_by=line"),
    "set twice": (["--data", "data", "--set", "column=x"], "--set column: give it as --column"),
    "set unknown": (["--data", "data", "--set", "devise=cpu"], "did you mean 'device'?"),
    "quotes": (["--data", "data", "--folder", 'a"b'], "choose another --folder"),
    "no folder": (["--data", "data", "--folder", "empty.txt/x"], "choose another --folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_clear_error_and_leaves_nothing(folder: Path, case: str) -> None:
    (folder / "empty.txt").touch()
    (folder / "one.txt").write_text("one")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "broken.jsonl").write_text("{")
    words, expected = BAD[case]
    before = sorted(folder.rglob("*"))
    told = refused("ant", *words)
    assert expected in told
    assert "--set --" not in told
    after = [path for path in folder.rglob("*") if path not in before]
    whole = [path for path in after if path.name == "corpus.json"]
    assert whole or not after  # text that was read well is kept for the next try
    assert not list(folder.glob("ant.*"))


@pytest.mark.parametrize("name", ["", "Ant", "../ant", "a b", "a" * 65, "-x"])
def test_a_name_that_is_not_allowed(folder: Path, name: str) -> None:
    with pytest.raises(DeptError, match="must be lower-case letters"):
        new_silo(Order(name, folder, data=["data"]), Progress())


@pytest.mark.parametrize("suffix", ["yaml", "key", "pub"])
def test_nothing_is_overwritten(folder: Path, suffix: str) -> None:
    file = folder / f"ant.{suffix}"
    file.write_text("precious")
    told = refused("ant", "--data", "data/ant.jsonl")
    assert told.startswith(f"{file} is there already and is never overwritten; choose another NAME")
    assert [path.name for path in folder.glob("ant.*")] == [file.name]
    assert file.read_text() == "precious"


def test_a_full_disk_is_one_error_and_leaves_no_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(settings: object) -> str:
        assert (folder / "f/ant.key").is_file()
        raise OSError(28, "No space left on device", "ant.yaml")

    monkeypatch.setattr(partner, "as_yaml", full)
    told = refused("ant", "--data", "data/ant.jsonl", "--folder", "f")
    assert told == "ant.yaml: No space left on device"
    assert not (folder / "f").exists()


def test_a_hub_data_set_is_read_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(silo: str, source: Any) -> Any:
        assert (source.hub, source.hub_config, source.hub_split) == ("a/b", "fr", "train")
        texts = (folder / "data/ant.jsonl").read_text(encoding="utf-8").splitlines()
        for i, text in enumerate(texts):
            yield f"a/b, row {i}", {"n": i, "words": json.loads(text)["text"]}

    monkeypatch.setattr(sources, "_hub_rows", stream)
    made("ant", "--hub", "a/b", "--hub-config", "fr")
    text = (folder / "ant.yaml").read_text()
    assert 'hub: "a/b"' in text and 'hub_config: "fr"' in text and 'column: "words"' in text


def test_work_is_shown_on_stderr(folder: Path) -> None:
    done = Done("ant", "--data", "data/ant.jsonl")
    stages = [line for line in done.err.splitlines() if line.endswith("...")]
    assert stages == [
        "starting ...",
        "looking at the data ...",
        "reading the data ...",
        "counting characters ...",
        "training the tokenizer ...",
        "making tokens ...",
    ]
