"""The Flower strategy against the plain algorithm, and what it does when replies go wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord

from dept_fl import records
from dept_fl.checkpoint import rounds_on_disk
from dept_fl.config import Recipe
from dept_fl.errors import DeptError
from dept_fl.report import Ledger
from dept_fl.rounds import Server, pretrain
from dept_fl.silo import Silo
from tests.conftest import write_text
from tests.federation import (
    ALL_VARIANTS,
    Tamper,
    run,
    same,
    silos_of,
    start,
    state_of,
    trained,
)

Make = Callable[..., Recipe]
every_variant = pytest.mark.parametrize("settings", ALL_VARIANTS.values(), ids=ALL_VARIANTS.keys())


@every_variant
def test_flower_gives_the_tensors_of_the_plain_algorithm(
    recipe: Make, home: Path, tmp_path: Path, settings: str
):
    made = recipe(f"{settings} silos_per_round=2 outer.optimizer=nesterov")
    server, _ = run(made, home, tmp_path)
    assert same(state_of(server, silos_of(server, home)), state_of(*trained(made, home)))


@every_variant
@pytest.mark.parametrize("model", ["llama", "gpt2", "untied"])
def test_what_crosses_the_border_of_a_silo(
    recipe: Make, home: Path, tmp_path: Path, settings: str, model: str
):
    """SPEC: no array with a vocabulary dimension, no token string, no tokenizer byte, ever."""
    change = {
        "llama": "",
        "untied": "model.config.tie_word_embeddings=false",
        "gpt2": "model.config={model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2}",
    }[model]
    made = recipe(f"{settings} rounds=2 '{change}'" if change else f"{settings} rounds=2")
    server, grid = run(made, home, tmp_path)
    messages = [m.content for m in (*grid.sent, *grid.received)]
    body = {
        (name, array.numpy().shape) for name, array in records.to_record(server.body).items()
    }  # a name for these parameters and shapes, and their bytes to the last
    foreign = {
        (kind, name, array.numpy().shape)
        for content in messages
        for kind, record in content.array_records.items()
        for name, array in record.items()
        if (name, array.numpy().shape) not in body
    }
    if made.variant == "spec":
        assert foreign == set()
        assert_no_vocabulary(server, home, messages)
    else:
        assert "rows" in {name for _, name, _ in foreign} or made.variant == "glob"
        assert "embeddings" in {kind for kind, _, _ in foreign}
    kinds = {m.metadata.message_type for m in grid.sent}
    assert kinds == {"query", "query.register", "train", "evaluate"}


def assert_no_vocabulary(server: Server, home: Path, messages: list) -> None:
    for silo in silos_of(server, home).values():
        sizes = {silo.stream.vocabulary.size, silo.tokenizer.size}
        pieces = {p for p in silo.tokenizer.pieces() if len(p) > 6 and not p.startswith("<")}
        assert pieces
        for content in messages:
            for record in content.array_records.values():
                for array in record.values():
                    assert not sizes & set(array.numpy().shape)
            for record in (*content.config_records.values(), *content.metric_records.values()):
                text = {k: v for k, v in record.items() if k not in ("sample", "recipe")}
                assert not any(piece in str(text) for piece in pieces)
                assert not any(
                    isinstance(v, bytes | list) and k != "silos" for k, v in text.items()
                )


def test_samples_are_not_sent_where_they_are_not_shared(recipe: Make, home: Path, tmp_path: Path):
    _, grid = run(recipe("rounds=1 share_samples=false"), home, tmp_path)
    finals = [m.content for m in grid.received if m.metadata.message_type == "evaluate"]
    assert len(finals) == 3
    assert all("sample" not in content.config_records["task"] for content in finals)
    assert "sample" not in {event["event"] for event in Ledger(tmp_path).read()}


def test_one_message_a_round_for_each_sampled_silo(recipe: Make, home: Path, tmp_path: Path):
    _, grid = run(recipe("silos_per_round=2"), home, tmp_path)
    kinds = [m.metadata.message_type for m in grid.sent]
    assert kinds == ["query"] * 2 + ["query.register"] * 3 + ["train"] * 8 + ["evaluate"] * 3


def test_bytes_follow_the_variant(recipe: Make, home: Path, tmp_path: Path):
    """TRIM's bytes follow each silo's vocabulary, SPEC's have no embedding in them."""
    seen = {}
    for name, settings in ALL_VARIANTS.items():
        folder = tmp_path / name
        server, _ = run(recipe(f"{settings} rounds=1"), home, folder)
        rows = {e["silo"]: e for e in Ledger(folder).read() if e["event"] == "silo_train"}
        plan = next(e for e in Ledger(folder).read() if e["event"] == "plan")["silos"]
        for silo, row in rows.items():
            up = row["bytes_up_body"] + row["bytes_up_embeddings"]
            assert up == plan[silo]["up_bytes"]
            assert row["bytes_down_body"] == row["bytes_up_body"]
            assert row["bytes_down_embeddings"] == row["bytes_up_embeddings"]
        seen[name] = (server, rows)
    assert all(row["bytes_up_embeddings"] == 0 for row in seen["spec"][1].values())
    assert all(row["bytes_up_embeddings"] == 0 for row in seen["spec-opt"][1].values())
    server, rows = seen["trim"]
    for silo, row in rows.items():
        vocabulary = server.registrations[silo].vocabulary
        assert vocabulary < server.registrations[silo].tokenizer_size
        assert row["bytes_up_embeddings"] == vocabulary * 16 * 4 + 128
    assert all(r["bytes_up_embeddings"] == 320 * 16 * 4 + 128 for r in seen["glob"][1].values())


def test_evaluation_can_be_seldom(recipe: Make, home: Path, tmp_path: Path):
    """Behind rounds 0 and 3 and at the end; what is trained stays the same."""
    often, _ = run(recipe(""), home, tmp_path / "often")
    seldom, _ = run(recipe("evaluate_every=3"), home, tmp_path / "seldom")
    assert same(often.body, seldom.body)
    evaluated = [e for e in Ledger(tmp_path / "seldom").read() if e["event"] == "silo_eval"]
    assert [e["round"] for e in evaluated if e["silo"] == "ant"] == [0, 3, 4]
    usual = [e for e in Ledger(tmp_path / "often").read() if e["event"] == "silo_eval"]
    assert {e["bits_per_byte"] for e in evaluated} < {e["bits_per_byte"] for e in usual}


@pytest.mark.parametrize("silos", [1, 12, 40])
def test_any_number_of_silos_on_two_nodes(tmp_path: Path, recipe: Make, silos: int):
    names = [f"s{i}" for i in range(silos)]
    sources = " ".join(f"silos.{name}.files=[{tmp_path}/{name}.jsonl]" for name in names)
    for i, name in enumerate(names):
        write_text(tmp_path, name, words=[chr(97 + (i + j) % 26) * 3 + "x" for j in range(26)])
    settings = f"{sources} only=[{','.join(names)}] rounds=1 vocab_size=300"
    server, grid = run(recipe(settings), tmp_path / "home", tmp_path / "run")
    assert {n: m.merged for n, m in server.members.items()} == {name: [1] for name in names}
    hosts = {m.content.config_records["task"]["silo"]: m.metadata.dst_node_id
             for m in grid.sent if m.metadata.message_type == "train"}  # fmt: skip
    assert hosts == {name: 1000 + i % 2 for i, name in enumerate(sorted(names))}


def test_two_runs_side_by_side_do_not_mix(recipe: Make, home: Path, tmp_path: Path):
    """Variants and seeds interleaved, round by round, in one home."""
    pairs = [recipe("variant=spec seed=5"), recipe("variant=trim tokenizer=shared seed=6")]
    alone = [state_of(*trained(made, home)) for made in pairs]
    running = [start(made, home) for made in pairs]
    for target in range(1, 5):
        for server, silos in running:
            merge = server.open_round(tmp_path)
            for name in merge.sampled:
                server.add(merge, silos[name].train(server.task(name)))
            server.close_round(merge)
            assert server.round == target
    for (server, silos), expected in zip(running, alone, strict=True):
        assert same(state_of(server, silos), expected)


# ---- stopped and resumed ------------------------------------------------------------------------


class Killed(BaseException):
    """Ends the ServerApp the hard way, between two statements."""


@every_variant
def test_killed_and_resumed_equals_unbroken(
    recipe: Make, home: Path, tmp_path: Path, settings: str
):
    made = recipe(settings)
    unbroken = state_of(*trained(made, home))
    with pytest.raises(Killed):
        run(made, home, tmp_path, tamper=kill_in_round(3))
    server, _ = run(made, home, tmp_path, resume=True)
    assert same(state_of(server, silos_of(server, home)), unbroken)
    events = Ledger(tmp_path).read()
    trained_rounds = sorted((e["round"], e["silo"]) for e in events if e["event"] == "silo_train")
    assert trained_rounds == [(t, s) for t in range(1, 5) for s in ("ant", "bee", "cat")]
    evaluated = sorted((e["round"], e["silo"]) for e in events if e["event"] == "silo_eval")
    assert evaluated == [(t, s) for t in range(5) for s in ("ant", "bee", "cat")]


@pytest.mark.parametrize(
    "settings",
    [*ALL_VARIANTS.values(), "wire.fragments=2", "wire.up=int4 wire.down=int8 wire.fragments=2"],
)
def test_killed_before_the_checkpoint_of_a_merged_round_equals_unbroken(
    recipe: Make, home: Path, tmp_path: Path, settings: str, monkeypatch: pytest.MonkeyPatch
):
    """The silos are at round 3 by then; the server goes on behind round 1."""
    made = recipe(settings)
    unbroken = state_of(*trained(made, home))
    save = Server.save

    def killed(server: Server, run_dir: Path) -> None:
        if server.round == 2:
            raise Killed
        save(server, run_dir)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Server, "save", killed)
        run(made, home, tmp_path)
    assert rounds_on_disk(tmp_path / "checkpoints")[-1] == 1
    silos = [Silo(n, made, home, experiment_of(tmp_path)) for n in ("ant", "bee", "cat")]
    assert all(rounds_on_disk(silo._states)[-1] == 3 for silo in silos)
    server, _ = run(made, home, tmp_path, resume=True)
    assert same(state_of(server, silos_of(server, home)), unbroken)


def experiment_of(run_dir: Path) -> str:
    return str(next(e for e in Ledger(run_dir).read() if e["event"] == "plan")["experiment"])


def kill_in_round(round_: int) -> Tamper:
    def tamper(message: Message, reply: Message) -> Message | None:
        record = message.content.config_records["task"]
        if record.get("round") == round_ and record["silo"] == "cat":
            raise Killed
        return reply

    return tamper


def test_a_finished_run_resumed_only_evaluates_again(recipe: Make, home: Path, tmp_path: Path):
    first, _ = run(recipe(), home, tmp_path)
    again, grid = run(recipe(), home, tmp_path, resume=True)
    assert same(first.body, again.body)
    assert "train" not in {m.metadata.message_type for m in grid.sent}
    finals = [e for e in Ledger(tmp_path).read() if e.get("final")]
    assert len(finals) == 3


# ---- bad replies ----------------------------------------------------------------------------


def spoil(silo: str, change: Callable[[Message], Message | None], rounds: set[int]) -> Tamper:
    """Change the train replies of one silo in some rounds, each once."""
    left = set(rounds)

    def tamper(message: Message, reply: Message) -> Message | None:
        record = message.content.config_records["task"]
        if message.metadata.message_type != "train" or record["silo"] != silo:
            return reply
        if record["round"] not in left:
            return reply
        left.discard(record["round"])
        return change(reply)

    return tamper


def with_first_array(reply: Message, value: np.ndarray) -> Message:
    record = reply.content.array_records["body"]
    name = next(iter(record))
    reply.content["body"] = ArrayRecord({**record, name: Array(value)})
    return reply


def not_a_number(reply: Message) -> Message:
    array = next(iter(reply.content.array_records["body"].values())).numpy().copy()
    array[:4].view(np.float32)[0] = np.nan
    return with_first_array(reply, array)


def of_another_round(reply: Message) -> Message:
    reply.content["task"] = ConfigRecord({"silo": "bee", "round": 1})
    return reply


def for_another_silo(reply: Message) -> Message:
    reply.content["task"] = ConfigRecord({"silo": "ant", "round": 2})
    return reply


def without_metrics(reply: Message) -> Message:
    del reply.content["metrics"]
    return reply


def without_tokens(reply: Message) -> Message:
    kept = {k: v for k, v in reply.content.metric_records["metrics"].items() if k != "tokens"}
    reply.content["metrics"] = MetricRecord(kept)
    return reply


def error(reply: Message) -> Message:
    return Message(error=Error(8, "ClientApp stopped responding."), metadata=reply.metadata)


BAD_REPLIES = {
    "nan": (not_a_number, "NaN or infinity"),
    "shape": (lambda r: with_first_array(r, np.zeros((1, 1), np.uint8)), "expected"),
    "dtype": (lambda r: with_first_array(r, np.zeros((320, 16))), "expected uint8"),
    "stale": (of_another_round, "is of round 1"),
    "silo": (for_another_silo, "answers for silo 'ant'"),
    "metrics": (without_metrics, "no metrics"),
    "tokens": (without_tokens, "no metric 'tokens'"),
    "error": (error, "ClientApp stopped responding"),
    "silence": (lambda r: None, "no reply within"),
}


@pytest.mark.parametrize("kind", BAD_REPLIES)
def test_a_bad_reply_costs_one_line_and_the_round_is_tried_again(
    recipe: Make, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
):
    change, reason = BAD_REPLIES[kind]
    made = recipe("round_timeout_s=0.1")
    server, _ = run(made, home, tmp_path, tamper=spoil("bee", change, {2}))
    assert server.members["bee"].merged == [1, 2, 3, 4]
    assert same(state_of(server, silos_of(server, home)), state_of(*trained(made, home)))
    failures = [e for e in Ledger(tmp_path).read() if e["event"] == "failure"]
    assert [(e["round"], e["silo"]) for e in failures] == [(2, "bee")]
    assert reason in failures[0]["reason"]
    assert capsys.readouterr().out.count("rejected: silo bee") == 1


def test_with_a_smaller_quorum_the_round_goes_on_without_the_bad_reply(
    recipe: Make, home: Path, tmp_path: Path
):
    made = recipe("quorum=0.6")
    server, _ = run(made, home, tmp_path, tamper=spoil("bee", not_a_number, {2}))
    merged = {name: member.merged for name, member in server.members.items()}
    assert merged == {"ant": [1, 2, 3, 4], "bee": [1, 3, 4], "cat": [1, 2, 3, 4]}


def test_a_round_that_stays_below_the_quorum_stops_with_its_checkpoint_whole(
    recipe: Make, home: Path, tmp_path: Path
):
    unbroken = state_of(*trained(recipe(), home))

    def always(message: Message, reply: Message) -> Message | None:
        record = message.content.config_records["task"]
        bad = record.get("round") == 3 and record["silo"] == "bee"
        return error(reply) if bad else reply

    with pytest.raises(DeptError, match=r"round 3: only 2 of 3 .*missing: bee"):
        run(recipe(), home, tmp_path, tamper=always)
    server, _ = run(recipe(), home, tmp_path, resume=True)
    assert same(state_of(server, silos_of(server, home)), unbroken)


def test_silos_that_cannot_make_ready_are_all_named(recipe: Make, home: Path, tmp_path: Path):
    made = recipe("silos.dog.files=[/nowhere/*.txt] silos.eel.packages=[no-such-package]")
    with pytest.raises(DeptError, match=r"(?s)silo dog: no file matches.*silo eel: package"):
        run(made, home, tmp_path)


def test_the_ledger_has_what_it_promises(recipe: Make, home: Path, tmp_path: Path):
    run(recipe("variant=trim tokenizer=shared"), home, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kinds = {line["event"] for line in lines}
    trained = {"join", "plan", "silo_train", "silo_eval", "round", "checkpoint", "end"}
    assert trained | {"sample"} == kinds
    train = next(line for line in lines if line["event"] == "silo_train")
    promised = "round silo loss tokens bytes_up_body bytes_up_embeddings bytes_down_body "
    promised += "bytes_down_embeddings train_s encode_s merge_s load_s save_s tokens_per_s "
    promised += "body_norm embedding_norm body_delta_norm embedding_delta_norm gradient_norm"
    assert set(promised.split()) <= train.keys()
    evaluation = next(line for line in lines if line["event"] == "silo_eval")
    wanted = {"round", "silo", "bits_per_byte", "unigram_bits_per_byte", "perplexity"}
    assert wanted | {"activation_norm"} <= evaluation.keys()
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_silo_keeps_the_final_body_beside_its_embeddings(
    recipe: Make, home: Path, tmp_path: Path
):
    from dept_fl.checkpoint import load_state, under_prefix

    server, _ = run(recipe(), home, tmp_path)
    for silo in silos_of(server, home).values():
        tensors, meta = load_state(silo.final_folder)
        assert same(under_prefix("body", tensors), server.body)
        newest = silo._state(4).embeddings
        assert same(under_prefix("embeddings", tensors), newest)
        assert meta["round"] == 4
        assert (silo.final_folder / "sample.txt").read_text()


def test_losses_fall(recipe: Make, home: Path, tmp_path: Path):
    torch.manual_seed(0)
    run(recipe("rounds=20 inner.local_steps=4"), home, tmp_path)
    evals = [e for e in Ledger(tmp_path).read() if e["event"] == "silo_eval"]
    for silo in ("ant", "bee", "cat"):
        curve = [e["bits_per_byte"] for e in evals if e["silo"] == silo]
        assert len(curve) == 21
        assert curve[-1] < 0.8 * curve[0]
        assert curve[-1] < evals[0]["unigram_bits_per_byte"] or curve[-1] < curve[10]


def test_pretrain_goes_on_where_the_strategy_stopped(recipe: Make, home: Path, tmp_path: Path):
    """Server state is the whole state: Flower for two rounds, the plain loop for the rest."""
    made = recipe("quorum=1.0")
    with pytest.raises(Killed):
        run(made, home, tmp_path, tamper=kill_in_round(3))
    from dept_fl.rounds import last_checkpoint

    tensors, meta = last_checkpoint(tmp_path, made)
    server, silos = start(made, home, meta["experiment"])
    server.load(tensors, meta)
    pretrain(server, silos)
    assert same(state_of(server, silos), state_of(*trained(made, home)))


def test_metrics_under_foreign_names_change_nothing(recipe: Make, home: Path, tmp_path: Path):
    def name_them(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train":
            record = reply.content.metric_records["metrics"]
            reply.content["metrics"] = MetricRecord(
                {**record, "round": 99, "event": 1.0, "silo": 2.0, "train_s": 0.0}
            )
        return reply

    server, _ = run(recipe("rounds=1"), home, tmp_path, tamper=name_them)
    rows = [e for e in Ledger(tmp_path).read() if e["event"] == "silo_train"]
    assert [(e["round"], e["silo"]) for e in rows] == [(1, "ant"), (1, "bee"), (1, "cat")]
    assert server.round == 1


def test_the_reason_of_a_stop_stays_in_the_ledger(recipe: Make, home: Path, tmp_path: Path):
    with pytest.raises(DeptError):
        run(recipe("round_attempts=1"), home, tmp_path, tamper=spoil("bee", error, {3}))
    run(recipe("round_attempts=1"), home, tmp_path, resume=True)
    failures = [e for e in Ledger(tmp_path).read() if e["event"] == "failure"]
    assert [(e["round"], e["silo"]) for e in failures] == [(3, "bee")]


@pytest.mark.parametrize("kind", ["gpt2", "mpt"])
def test_a_sample_may_be_longer_than_what_the_model_can_see(
    recipe: Make, home: Path, tmp_path: Path, kind: str
):
    sizes = {
        "gpt2": "n_embd: 16, n_layer: 1, n_head: 2",
        "mpt": "d_model: 16, n_layers: 1, n_heads: 2",
    }
    model = f"'model.config={{model_type: {kind}, {sizes[kind]}}}'"
    server, _ = run(recipe(f"{model} rounds=1 sample_tokens=40"), home, tmp_path)
    assert all(
        (silo.final_folder / "sample.txt").is_file() for silo in silos_of(server, home).values()
    )


def test_silos_that_do_not_answer_the_registration_are_named(
    recipe: Make, home: Path, tmp_path: Path
):
    def mute(message: Message, reply: Message) -> Message | None:
        record = message.content.config_records["task"]
        silent = message.metadata.message_type == "query.register" and record["silo"] == "bee"
        return None if silent else reply

    with pytest.raises(DeptError, match="no answer from bee; raise round_timeout_s"):
        run(recipe("round_timeout_s=0.1"), home, tmp_path, tamper=mute)


def byte_level_tokenizer(folder: Path) -> None:
    """A byte-level BPE as Hugging Face saves it, trained on other text than the silos'."""
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<e>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(
        ["the cat and the leaf on the roof " * 20, "кот на крыше " * 20], trainer
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<e>").save_pretrained(folder)


@pytest.mark.parametrize("variant", ["glob", "trim", "spec"])
def test_a_shared_hugging_face_tokenizer_serves_all_variants(
    recipe: Make, home: Path, tmp_path: Path, variant: str
):
    byte_level_tokenizer(tmp_path / "tokenizer")
    words = f"variant={variant} tokenizer=shared shared_tokenizer={tmp_path}/tokenizer rounds=2"
    server, _ = run(recipe(words), home, tmp_path / "run")
    sizes = {name: r.vocabulary for name, r in server.registrations.items()}
    assert (len(set(sizes.values())) == 1) == (variant == "glob")
    assert all(r.lossy_documents == 0 for r in server.registrations.values())


def test_a_tokenizer_that_loses_text_is_said_to(
    recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<e>": 0, "[UNK]": 1, "leaf": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<e>", unk_token="[UNK]"
    ).save_pretrained(folder)
    words_of = f"variant=glob tokenizer=shared shared_tokenizer={folder} rounds=1 only=[ant]"
    server, _ = run(recipe(words_of), tmp_path / "home", tmp_path / "run")
    assert server.registrations["ant"].lossy_documents > 0
    assert "warning: the tokenizer loses text of ant" in capsys.readouterr().out
