"""A tiny model learns a task of each form; figures, truncation and read-out by hand."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dept_fl.cli import app
from dept_fl.config import ModelConfig, Recipe
from dept_fl.errors import DeptError
from dept_fl.finetune import (
    Classifier,
    FineTuning,
    Result,
    Run,
    Scale,
    Sequences,
    Settings,
    accuracy,
    answers,
    constant_answer,
    fit,
    keep,
    longest,
    loss_of,
    padded,
    pearson,
    rate,
)
from dept_fl.model import build, parameters
from dept_fl.pretrained import Encoder, Pretrained
from dept_fl.progress import Progress
from dept_fl.tasks import TASKS, Item, TaskData
from dept_fl.tokenizer import SentencePieceTokenizer, Vocabulary, train_sentencepiece
from tests.test_pretrained import finished

WORDS = (
    "the a film book play was is by and old new long short good bad surely perhaps never".split()
)
DEGREES = "zero one two three four five".split()
LLAMA: dict[str, Any] = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
LEARN = Settings(learning_rate=3e-3, epochs=5, batch_size=16, dropout=0.0)


def row_of(task: str, draw: random.Random) -> dict[str, Any]:
    """An example whose label one word tells."""
    text = " ".join(draw.choices(WORDS[:12], k=6))
    if task == "sst2":
        label = draw.randrange(2)
        return {"sentence": f"{text} {('bad', 'good')[label]}", "label": label}
    if task == "mnli":
        label = draw.randrange(3)
        word = ("surely", "perhaps", "never")[label]
        return {"premise": text, "hypothesis": f"{word} {text}", "label": label}
    if task == "stsb":
        label = draw.randrange(6)
        return {"sentence1": text, "sentence2": DEGREES[label], "label": float(label)}
    right = draw.randrange(4)
    options = [f"{draw.choice(WORDS[:12])} {'good' if i == right else 'bad'}" for i in range(4)]
    return {"article": text, "question": text, "options": options, "answer": "ABCD"[right]}


def toy(task: str, train: int = 240, validation: int = 60) -> TaskData:
    draw = random.Random(task)
    rows = datasets.Dataset.from_list([row_of(task, draw) for _ in range(train)])
    return TaskData(
        rows,
        {
            name: datasets.Dataset.from_list([row_of(task, draw) for _ in range(validation)])
            for name in TASKS[task].validation
        },
    )


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    draw = random.Random(1)
    texts = [" ".join(draw.choices([*WORDS, *DEGREES], k=20)) for _ in range(100)]
    return SentencePieceTokenizer(train_sentencepiece("toy", texts, 320))


def pretrained_as(tokenizer: SentencePieceTokenizer, config: dict[str, Any]) -> Pretrained:
    model = build(ModelConfig(config=config), tokenizer.size, 64, seed=1)
    return Pretrained(model, tokenizer, Vocabulary.whole(tokenizer), 64)


@pytest.fixture(scope="module")
def pretrained(tokenizer: SentencePieceTokenizer) -> Pretrained:
    return pretrained_as(tokenizer, LLAMA)


def tuned(
    pretrained: Pretrained, task: str, settings: Settings, data: TaskData, seed: int = 1
) -> Run:
    return FineTuning(pretrained, TASKS[task], data, settings, seed, Progress()).run()


# ---- it learns -------------------------------------------------------------------------------


@pytest.mark.parametrize("task", list(TASKS))
def test_a_task_of_each_form_is_learnt(pretrained: Pretrained, task: str):
    data = toy(task)
    before = tuned(pretrained, task, replace(LEARN, epochs=0), data)
    after = tuned(pretrained, task, LEARN, data)
    assert set(after.figures) == set(TASKS[task].validation)
    assert min(after.figures.values()) > 0.9
    assert max(before.figures.values()) < 0.7
    assert before.losses == []
    assert len(after.losses) == LEARN.epochs
    assert after.losses[-1] < 0.5 * after.losses[0]


def test_a_seed_decides_everything(pretrained: Pretrained):
    data, settings = toy("sst2", train=48), replace(LEARN, epochs=1, dropout=0.1)
    first, again, other = (tuned(pretrained, "sst2", settings, data, s) for s in (1, 1, 2))
    assert first.losses == again.losses
    assert first.losses != other.losses


def test_the_pretrained_model_is_left_as_it_was(pretrained: Pretrained):
    before = {name: tensor.clone() for name, tensor in parameters(pretrained.model).items()}
    tuned(pretrained, "sst2", replace(LEARN, epochs=1), toy("sst2", train=32))
    after = parameters(pretrained.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_passes_of_a_few_examples_give_the_steps_of_the_whole_batch(pretrained: Pretrained):
    """20 examples in batches of 16 and 4, in passes of 3: none of them divides another."""
    data, settings = toy("race", train=20), replace(LEARN, epochs=2)
    whole = tuned(pretrained, "race", settings, data)
    parts = tuned(pretrained, "race", replace(settings, micro_batch_size=3), data)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-3)
    assert parts.figures == whole.figures


def test_a_control_starts_elsewhere(pretrained: Pretrained):
    data = toy("sst2", train=32)
    starts = [
        tuned(pretrained, "sst2", replace(LEARN, epochs=1, control=control), data).losses
        for control in ("none", "random", "scratch")
    ]
    assert len({losses[0] for losses in starts}) == 3


def test_a_loss_that_is_not_finite_names_the_learning_rate(pretrained: Pretrained):
    broken = replace(pretrained, model=build(ModelConfig(config=LLAMA), 320, 64, seed=1))
    with torch.no_grad():
        broken.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(DeptError, match=r"loss became nan; lower --learning-rate 0\.003"):
        tuned(broken, "sst2", LEARN, toy("sst2", train=16))


# ---- sequences ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "room", "expected"),
    [
        ([1, 2, 3], [7, 8], 5, ([1, 2, 3], [7, 8])),
        ([1, 2, 3, 4], [7, 8], 4, ([1, 2], [7, 8])),  # the passage gives way, from its end
        ([1, 2, 3], [7, 8, 9], 3, ([], [7, 8, 9])),
        ([1, 2, 3], [6, 7, 8, 9], 3, ([], [7, 8, 9])),  # the answer at the end stays
    ],
)
def test_a_passage_is_cut_before_its_question(
    first: list[int], second: list[int], room: int, expected: tuple[list[int], list[int]]
):
    assert fit(first, second, room, first_gives_way=True) == expected


@pytest.mark.parametrize(
    ("first", "second", "room", "expected"),
    [
        ([1, 2, 3], [7, 8], 5, ([1, 2, 3], [7, 8])),
        ([1, 2, 3, 4], [7], 3, ([1, 2], [7])),
        ([1], [6, 7, 8, 9], 3, ([1], [6, 7])),
        ([1, 2, 3, 4], [6, 7, 8, 9], 5, ([1, 2, 3], [6, 7])),
        ([1, 2, 3, 4], [6, 7, 8], 6, ([1, 2, 3], [6, 7, 8])),
        ([1, 2, 3], [], 2, ([1, 2], [])),
    ],
)
def test_of_a_pair_the_longer_is_cut(
    first: list[int], second: list[int], room: int, expected: tuple[list[int], list[int]]
):
    assert fit(first, second, room, first_gives_way=False) == expected


def test_sequences_by_hand(pretrained: Pretrained):
    encoder = Encoder(pretrained.tokenizer, pretrained.vocabulary)
    end, line = encoder.end, encoder.line_end
    text, one, two = encoder(["the old film", "was good", "is bad"])
    pair = Sequences(encoder, TASKS["race"], 64).of([Item("the old film", ["was good", "is bad"])])
    assert pair == [[end, *text, *line, *one, end], [end, *text, *line, *two, end]]
    single = Sequences(encoder, TASKS["sst2"], 64).of([Item("the old film", [""])])
    assert single == [[end, *text, end]]
    room = 2 + len(line) + len(one) + 1
    (cut,) = Sequences(encoder, TASKS["race"], room).of([Item("the old film", ["was good"])])
    assert cut == [end, text[0], *line, *one, end]


def test_shorter_sequences_are_filled_up_behind_their_ends():
    ids, last = padded([[1, 2, 3], [4]], fill=9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert last.tolist() == [2, 0]


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
        {"model_type": "mpt", "d_model": 32, "n_layers": 2, "n_heads": 2},
        {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 64,
         "num_attention_heads": 2, "word_embed_proj_dim": 16},
    ],
    ids=lambda config: config["model_type"],
)  # fmt: skip
def test_what_is_filled_up_is_never_seen(tokenizer: SentencePieceTokenizer, config: dict[str, Any]):
    """Alone or beside a longer one, a sequence has the same scores, read at its last token."""
    model = Classifier(pretrained_as(tokenizer, config).model, outputs=3, dropout=0.1).eval()
    short, long = [5, 6, 7], [5, 8, 9, 10, 11, 12]
    with torch.no_grad():
        together = model(*padded([short, long], fill=1))
        alone = [model(*padded([each], fill=1))[0] for each in (short, long)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


# ---- loss and measures ------------------------------------------------------------------------


def test_the_loss_over_candidates_by_hand():
    scores = torch.log(torch.tensor([1.0, 2.0, 4.0, 1.0])).unsqueeze(1)  # shares of 8
    loss = loss_of(scores, np.array([2.0]), TASKS["race"], Scale())
    assert float(loss) == pytest.approx(math.log(8 / 4))


def test_the_loss_over_classes_by_hand():
    scores = torch.log(torch.tensor([[1.0, 3.0], [1.0, 1.0]]))
    loss = loss_of(scores, np.array([1.0, 0.0]), TASKS["sst2"], Scale())
    assert float(loss) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_scores_are_learnt_in_standard_units_by_hand():
    scale = Scale.of(np.array([1.0, 3.0]))
    assert (scale.mean, scale.deviation) == (2.0, 1.0)
    loss = loss_of(torch.tensor([[0.5], [0.0]]), np.array([3.0, 2.0]), TASKS["stsb"], scale)
    assert float(loss) == pytest.approx((0.25 + 0.0) / 2)
    assert Scale.of(np.array([4.0, 4.0])).deviation == 1.0


def test_answers_by_hand():
    assert answers(torch.tensor([[0.1], [0.9], [0.2], [0.3]] * 2), TASKS["race"]).tolist() == [1, 1]
    assert answers(torch.tensor([[0.1, 0.9], [2.0, 1.0]]), TASKS["sst2"]).tolist() == [1, 0]
    assert answers(torch.tensor([[0.25], [4.0]]), TASKS["stsb"]).tolist() == [0.25, 4.0]


def test_pearsons_r_by_hand():
    # Deviations (-1, 0, 1) and (-2, 1, 1): 3 over the root of 2 * 6.
    r = pearson(np.array([1.0, 2.0, 3.0]), np.array([0.0, 3.0, 3.0]))
    assert r == pytest.approx(3 / math.sqrt(12))
    assert pearson(np.array([1.0, 2.0]), np.array([5.0, 3.0])) == pytest.approx(-1.0)
    assert pearson(np.array([2.0, 2.0]), np.array([0.0, 3.0])) == 0.0


def test_accuracy_and_the_constant_answer_by_hand():
    labels = np.array([0.0, 1.0, 1.0, 2.0])
    assert accuracy(np.array([0.0, 1.0, 2.0, 2.0]), labels) == 0.75
    assert constant_answer(TASKS["mnli"], labels) == 0.5
    assert constant_answer(TASKS["stsb"], labels) == 0.0


def test_the_rate_rises_then_falls_to_nothing():
    assert [rate(step, 10, 0.2) for step in range(10)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    )
    assert rate(0, 1, 0.0) == 1.0


def test_mean_and_spread_by_hand(tmp_path: Path):
    runs = [Run(seed, {"validation": figure}, [], 1.0) for seed, figure in ((1, 0.5), (2, 0.7))]
    task = TASKS["sst2"]
    settings = Settings(control="random")
    result = Result("m", task, settings, 64, {"train": 9}, {"validation": 0.5}, runs)
    assert result.mean("validation") == pytest.approx(0.6)
    assert result.spread("validation") == pytest.approx(math.sqrt(0.02))
    assert replace(result, runs=runs[:1]).spread("validation") is None
    file = keep(result, tmp_path / "new")
    assert file.name == "sst2-random.json"
    kept = json.loads(file.read_text())
    assert kept["mean"]["validation"] == pytest.approx(0.6)
    assert kept["settings"]["max_tokens"] == 64
    assert [run["figures"]["validation"] for run in kept["runs"]] == [0.5, 0.7]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"control": "frozen"}, "--control frozen: must be one of none, random, scratch"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0: must be above 0"),
        ({"learning_rate": float("nan")}, "--learning-rate nan: must be above 0"),
        ({"device": "tpu"}, "--device tpu: must be one of auto, cpu, cuda"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], reason: str):
    with pytest.raises(DeptError, match=reason):
        Settings(**wrong)


def test_no_more_tokens_than_the_model_takes(pretrained: Pretrained):
    assert longest(pretrained, Settings()) == 64
    assert longest(pretrained, Settings(max_tokens=32)) == 32
    for wrong in (65, 3):
        with pytest.raises(DeptError, match=f"--max-tokens {wrong}: must be from 8 to 64"):
            longest(pretrained, Settings(max_tokens=wrong))


# ---- the command ------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of MNLI's form."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    draw = random.Random(1)
    folder = tmp_path / "mnli"
    folder.mkdir()
    for split, count in (("train", 24), ("validation_matched", 6), ("validation_mismatched", 8)):
        rows = (json.dumps(row_of("mnli", draw)) + "\n" for _ in range(count))
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return str(folder)


def test_the_command_on_a_silos_model(
    recipe: Callable[..., Recipe], home: Path, data: str, tmp_path: Path
):
    final = finished(recipe("rounds=1"), home).final_folder
    out = tmp_path / "results"
    words = ["finetune", str(final), "--task", "mnli", "--data", data, "--seeds", "2"]
    words += ["--epochs", "1", "--train-examples", "16", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "mnli: accuracy over 2 seeds, 16 training examples, 1 epoch," in done.stdout
    assert "mismatched" in done.stdout
    kept = json.loads((out / "mnli.json").read_text())
    assert kept["examples"] == {"train": 16, "matched": 6, "mismatched": 8}
    assert [run["seed"] for run in kept["runs"]] == [1, 2]
    assert all(0 <= figure <= 1 for figure in kept["mean"].values())
    asked = CliRunner().invoke(app, [*words[:-2], "--json", "--control", "random"])
    assert json.loads(asked.stdout)["settings"]["control"] == "random"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--task", "sst2"], "no model; give a silo's folder"),
        (["--task", "cola"], "--task cola: must be one of"),
        (["--task", "sst2", "--control", "x"], "--control x: must be one of"),
    ],
)
def test_a_mistake_is_one_clear_error(tmp_path: Path, words: list[str], reason: str):
    done = CliRunner().invoke(app, ["finetune", str(tmp_path), *words])
    assert done.exit_code == 2
    assert reason in done.stderr.splitlines()[-1]
