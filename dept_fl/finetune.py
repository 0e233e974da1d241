"""Fine-tuning on a downstream task: one small head over the last token's final hidden state."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from dept_fl.checkpoint import write_whole
from dept_fl.config import DEVICES, PRECISIONS
from dept_fl.errors import DeptError
from dept_fl.model import seed_of
from dept_fl.pretrained import CONTROLS, Encoder, Pretrained, load_pretrained, with_control
from dept_fl.progress import Progress
from dept_fl.report import duration, table
from dept_fl.tasks import Item, Task, TaskData, find_task, load_data
from dept_fl.tokenizer import Ids
from dept_fl.train import autocast, pick_device

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_LEAST_TOKENS = 8  # what is left of shorter sequences says nothing


@dataclass(frozen=True)
class Settings:
    """How to fine-tune: the usual choices of the field.

    Attributes:
        learning_rate: the highest, of AdamW; it rises over the first steps and falls to 0.
        warmup_fraction: share of the steps over which it rises.
        batch_size: examples in one step; micro_batch_size: in one pass, 0 = batch_size.
        max_tokens: longest sequence, longer ones are cut; 0 takes the model's own.
        train_examples: take a random part of so many of them, the same for every seed; 0: all.
        control: `none`, or start with a `random` body, or from `scratch`.
    """

    learning_rate: float = 2e-5
    epochs: int = 3
    batch_size: int = 32
    micro_batch_size: int = 0
    max_tokens: int = 0
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    dropout: float = 0.1
    clip_norm: float = 1.0
    train_examples: int = 0
    control: str = "none"
    device: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("control", self.control, CONTROLS),
            ("device", self.device, DEVICES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in allowed:
                raise DeptError(f"--{key} {value}: must be one of {', '.join(allowed)}")
        if not 0.0 < self.learning_rate <= 1.0:
            raise DeptError(f"--learning-rate {self.learning_rate}: must be above 0, at most 1")

    @property
    def per_pass(self) -> int:
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True)
class Run:
    """One seed's figures.

    Attributes:
        figures: the task's measure by validation split, in -1 to 1 (Pearson) or 0 to 1.
        losses: mean training loss of each epoch.
    """

    seed: int
    figures: dict[str, float]
    losses: list[float]
    seconds: float


@dataclass(frozen=True)
class Result:
    """A model on a task.

    Attributes:
        floor: what a constant answer reaches by validation split: the most frequent one; 0 for
            Pearson's r.
        examples: rows by split.
        max_tokens: longest sequence that was used.
    """

    model: str
    task: Task
    settings: Settings
    max_tokens: int
    examples: dict[str, int]
    floor: dict[str, float]
    runs: list[Run]

    def mean(self, split: str) -> float:
        return statistics.fmean(run.figures[split] for run in self.runs)

    def spread(self, split: str) -> float | None:
        """Standard deviation over the seeds; None of a single one."""
        figures = [run.figures[split] for run in self.runs]
        return statistics.stdev(figures) if len(figures) > 1 else None

    def to_json(self) -> str:
        facts = {
            "model": self.model,
            "task": self.task.name,
            "measure": self.task.measure,
            "mean": {split: self.mean(split) for split in self.floor},
            "standard_deviation": {split: self.spread(split) for split in self.floor},
            "floor": self.floor,
            "runs": [asdict(run) for run in self.runs],
            "examples": self.examples,
            "settings": {**asdict(self.settings), "max_tokens": self.max_tokens},
            "torch": torch.__version__,
        }
        return json.dumps(facts, indent=1)


# ---- an example as sequences -----------------------------------------------------------------


def fit(first: Ids, second: Ids, room: int, first_gives_way: bool) -> tuple[Ids, Ids]:
    """Cut two texts so that they hold `room` tokens in all.

    Args:
        first_gives_way: the first is cut at its end, to nothing if need be, and the second keeps
            its last tokens: a question with its answer outlives the passage. Otherwise the longer
            one is cut at its end until both are equally long.
    """
    if first_gives_way:
        second = second[max(0, len(second) - room) :]
        return first[: room - len(second)], second
    half = room // 2
    if len(second) <= half:
        return first[: room - len(second)], second
    if len(first) <= half:
        return first, second[: room - len(first)]
    return first[: room - half], second[:half]


class Sequences:
    """Examples as token sequences: end, text, line end, candidate, end; the last is read out.

    The same form as in pre-training, where a document stands between two end ids.
    """

    def __init__(self, encoder: Encoder, task: Task, max_tokens: int) -> None:
        self._encoder, self._task, self._max_tokens = encoder, task, max_tokens

    def of(self, items: Sequence[Item]) -> list[Ids]:
        """len(items) * choices sequences of at most max_tokens ids."""
        firsts = self._encoder([item.text for item in items])
        seconds = iter(self._encoder([text for item in items for text in item.candidates]))
        return [
            self._sequence(first, next(seconds))
            for first, item in zip(firsts, items, strict=True)
            for _ in item.candidates
        ]

    def _sequence(self, first: Ids, second: Ids) -> Ids:
        end, between = self._encoder.end, self._encoder.line_end if second else []
        room = self._max_tokens - 2 - len(between)
        first, second = fit(first, second, room, self._task.first_gives_way)
        return [end, *first, *between, *second, end]


def padded(sequences: Sequence[Ids], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, longest] ids, filled up behind their ends, and [n] the place of each one's last token."""
    last = torch.tensor([len(sequence) - 1 for sequence in sequences])
    ids = torch.full((len(sequences), int(last.max()) + 1), fill)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return ids, last


# ---- the model with its head ------------------------------------------------------------------


class Classifier(nn.Module):
    """A causal LM's body and embeddings, and a linear layer where its output layer was."""

    def __init__(self, model: PreTrainedModel, outputs: int, dropout: float) -> None:
        super().__init__()
        self.body = model.base_model
        if self.body is model:
            raise DeptError(f"{type(model).__name__}: has no body apart from its output layer")
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self._width(), outputs)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def _width(self) -> int:
        return int(self.body(input_ids=torch.zeros(1, 1, dtype=torch.long))[0].shape[-1])

    def forward(self, ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """[n, outputs] from [n, t] ids and [n] places of the last tokens.

        Needs no mask: what is filled up lies behind the last token, where it does not look.
        """
        hidden = self.body(input_ids=ids).last_hidden_state
        read = hidden[torch.arange(len(ids), device=ids.device), last]
        scores: torch.Tensor = self.head(self.dropout(read))
        return scores


@dataclass(frozen=True)
class Scale:
    """Labels of a regression in standard units of the training split, which Pearson's r ignores."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, labels: Floats) -> Scale:
        return cls(float(labels.mean()), float(labels.std()) or 1.0)


def loss_of(scores: torch.Tensor, labels: Floats, task: Task, scale: Scale) -> torch.Tensor:
    """Mean loss of examples. scores: [n * choices, outputs]."""
    if not task.labels:
        targets = torch.from_numpy((labels - scale.mean) / scale.deviation).to(scores)
        return functional.mse_loss(scores[:, 0], targets)
    classes = torch.from_numpy(labels).long().to(scores.device)
    return functional.cross_entropy(scores.view(len(labels), -1), classes)


def answers(scores: torch.Tensor, task: Task) -> Floats:
    """[n] the class or candidate with the highest score; in a regression the score itself."""
    if not task.labels:
        return scores[:, 0].double().cpu().numpy()
    rows = len(scores) // task.choices
    return scores.view(rows, -1).argmax(dim=1).double().cpu().numpy()


# ---- measures ------------------------------------------------------------------------------


def accuracy(predicted: Floats, labels: Floats) -> float:
    return float((predicted == labels).mean())


def pearson(predicted: Floats, labels: Floats) -> float:
    """Pearson's r; 0 where either side is constant, for which it is not defined."""
    a, b = predicted - predicted.mean(), labels - labels.mean()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else 0.0


def measure(task: Task, predicted: Floats, labels: Floats) -> float:
    return accuracy(predicted, labels) if task.labels else pearson(predicted, labels)


def constant_answer(task: Task, labels: Floats) -> float:
    """What the most frequent label alone reaches."""
    if not task.labels:
        return 0.0
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))


# ---- training --------------------------------------------------------------------------------


class FineTuning:
    """One seed's training and evaluation.

    The seed decides the head, the order of the examples, dropout and a control's fresh weights.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        task: Task,
        data: TaskData,
        settings: Settings,
        seed: int,
        progress: Progress,
    ) -> None:
        self._task, self._data, self._settings, self._seed = task, data, settings, seed
        self._progress = progress
        self._device = pick_device(settings.device)
        encoder = Encoder(pretrained.tokenizer, pretrained.vocabulary)
        self._end = encoder.end
        self._sequences = Sequences(encoder, task, longest(pretrained, settings))
        self._labels = _labels(task, data.train)
        self._scale = Scale() if task.labels else Scale.of(self._labels)
        self._pretrained = pretrained

    def run(self) -> Run:
        began = time.perf_counter()
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed_of(self._seed, "finetune", self._task.name))
            start = with_control(self._pretrained, self._settings.control, self._seed)
            model = Classifier(start, self._task.outputs, self._settings.dropout)
            model.to(self._device)
            losses = self._train(model)
        figures = {name: self._evaluate(model, name) for name in self._data.validation}
        return Run(self._seed, figures, losses, time.perf_counter() - began)

    @property
    def _precision(self) -> AbstractContextManager[None]:
        return autocast(self._settings.precision, self._device)

    def _train(self, model: Classifier) -> list[float]:
        settings, count = self._settings, len(self._labels)
        optimizer = _adamw(model, settings)
        steps = math.ceil(count / settings.batch_size) * settings.epochs
        step, losses = 0, []
        model.train()
        with self._progress.stage(f"{self._task.name}, seed {self._seed}: training"):
            for epoch in range(settings.epochs):
                total = 0.0
                for rows in _batches(count, settings.batch_size, self._seed, epoch):
                    for group in optimizer.param_groups:
                        group["lr"] = settings.learning_rate * rate(
                            step, steps, settings.warmup_fraction
                        )
                    total += self._step(model, optimizer, rows) * len(rows)
                    step += 1
                    self._progress.at(step, steps)
                losses.append(total / count)
        return losses

    def _step(self, model: Classifier, optimizer: torch.optim.Optimizer, rows: Ints) -> float:
        total = 0.0
        for part in _parts(rows, self._settings.per_pass):
            with self._precision:
                scores = self._scores(model, self._data.train, part)
            loss = loss_of(scores.float(), self._labels[part], self._task, self._scale)
            (loss * (len(part) / len(rows))).backward()
            total += float(loss.detach()) * len(part) / len(rows)
        if not math.isfinite(total):
            raise DeptError(
                f"the training loss became {total}; lower --learning-rate "
                f"{self._settings.learning_rate}"
            )
        nn.utils.clip_grad_norm_(model.parameters(), self._settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    @torch.no_grad()
    def _evaluate(self, model: Classifier, name: str) -> float:
        split = self._data.validation[name]
        labels = _labels(self._task, split)
        model.eval()
        parts = list(_parts(np.arange(len(labels)), self._settings.per_pass))
        found = []
        with (
            self._progress.stage(f"{self._task.name}, seed {self._seed}: {name}"),
            self._precision,
        ):
            for done, part in enumerate(parts, start=1):
                found.append(answers(self._scores(model, split, part).float(), self._task))
                self._progress.at(done, len(parts))
        return measure(self._task, np.concatenate(found), labels)

    def _scores(self, model: Classifier, split: Any, rows: Ints) -> torch.Tensor:
        """[len(rows) * choices, outputs]"""
        ids, last = padded(self._sequences.of(_items(self._task, split, rows)), self._end)
        scores: torch.Tensor = model(ids.to(self._device), last.to(self._device))
        return scores


def _items(task: Task, split: Any, rows: Ints) -> list[Item]:
    columns = split[rows.tolist()]
    return [task.read({name: columns[name][i] for name in columns}) for i in range(len(rows))]


def _labels(task: Task, split: Any) -> Floats:
    """[n] classes, right candidates or scores."""
    values = split[task.label]
    found = [task.labels.index(value) for value in values] if task.labels else list(values)
    return np.array(found, dtype=np.float64)


def _batches(count: int, size: int, seed: int, epoch: int) -> Iterator[Ints]:
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    yield from _parts(generator.permutation(count), size)


def _parts(rows: Ints, size: int) -> Iterator[Ints]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def rate(step: int, steps: int, warmup_fraction: float) -> float:
    """The learning rate's share of its highest: linear warm-up, then linear to 0."""
    warmup = math.ceil(steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(steps - warmup, 1)


def _adamw(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # norms and biases do not decay
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def longest(pretrained: Pretrained, settings: Settings) -> int:
    """Tokens of the longest sequence.

    Raises:
        DeptError: more are asked for than the model takes, or too few to say anything.
    """
    asked = settings.max_tokens or pretrained.sequence_tokens
    if not _LEAST_TOKENS <= asked <= pretrained.sequence_tokens:
        raise DeptError(
            f"--max-tokens {asked}: must be from {_LEAST_TOKENS} to {pretrained.sequence_tokens}, "
            "the length of the sequences that the model was trained on"
        )
    return asked


# ---- the command ------------------------------------------------------------------------------


def finetune(
    folder: Path, task_name: str, data: str, settings: Settings, seeds: int, progress: Progress
) -> Result:
    """Fine-tune a pre-trained model on a task, once a seed, and evaluate it.

    Args:
        folder: a silo's final folder, or a Hugging Face folder.
        data: see `tasks.load_data`.
        seeds: how many: 1, 2, ...

    Raises:
        DeptError: naming what is wrong and the mend.
    """
    task = find_task(task_name)
    pick_device(settings.device)
    pretrained = progress.during("loading the model", lambda: load_pretrained(folder))
    max_tokens = longest(pretrained, settings)
    found = progress.during(f"{task.name}: loading data", lambda: load_data(task, data))
    found = _part_of(found, settings.train_examples)
    runs = [
        FineTuning(pretrained, task, found, settings, seed, progress).run()
        for seed in range(1, seeds + 1)
    ]
    splits = found.validation.items()
    return Result(
        model=str(folder),
        task=task,
        settings=settings,
        max_tokens=max_tokens,
        examples={"train": len(found.train), **{name: len(split) for name, split in splits}},
        floor={name: constant_answer(task, _labels(task, split)) for name, split in splits},
        runs=runs,
    )


def _part_of(data: TaskData, train_examples: int) -> TaskData:
    if not train_examples or train_examples >= len(data.train):
        return data
    drawn = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(len(data.train))
    return TaskData(data.train.select(sorted(drawn[:train_examples].tolist())), data.validation)


def keep(result: Result, out: Path) -> Path:
    """Write the result to `out`, under a name that tells task and control."""
    control = "" if result.settings.control == "none" else f"-{result.settings.control}"
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{result.task.name}{control}.json"
    write_whole(file, result.to_json() + "\n")
    return file


def rendered(result: Result) -> Any:
    """A table: a row a validation split."""
    rows = []
    for split in result.floor:
        spread = result.spread(split)
        rows.append(
            [
                split,
                f"{result.mean(split):.3f}",
                "" if spread is None else f"{spread:.3f}",
                f"{result.floor[split]:.3f}",
                f"{result.examples[split]:,}",
            ]
        )
    settings, count = result.settings, len(result.runs)
    start = {"none": "", "random": ", random body", "scratch": ", from scratch"}[settings.control]
    seconds = statistics.fmean(run.seconds for run in result.runs)
    title = (
        f"{result.task.name}{start}: {result.task.measure} over {count} "
        f"{'seeds' if count > 1 else 'seed'}, {result.examples['train']:,} training examples, "
        f"{settings.epochs} {'epoch' if settings.epochs == 1 else 'epochs'}, "
        f"{duration(seconds)} a seed"
    )
    head = ("validation split", "mean", "standard deviation", "constant answer", "examples")
    return table(head, rows, title)
