"""A trained model as an ordinary Hugging Face folder, which needs nothing of this project."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from dept_fl.adapt import load_run
from dept_fl.best import best_checkpoint, best_round
from dept_fl.checkpoint import Tensors, round_folder, rounds_on_disk, whole_folder
from dept_fl.config import Recipe
from dept_fl.errors import DeptError
from dept_fl.fast_tokenizer import fast_tokenizer, writes_parts
from dept_fl.final import Final, open_final
from dept_fl.model import Layout, layout
from dept_fl.pretrained import Encoder, Pretrained, joined, of_final, used_tokens
from dept_fl.report import Event, Ledger
from dept_fl.silo import BEST, FINAL
from dept_fl.silo_file import SiloFile
from dept_fl.status import read
from dept_fl.tokenizer import (
    HuggingFaceTokenizer,
    Ids,
    SentencePieceTokenizer,
    Tokenizer,
    Vocabulary,
    load_tokenizer,
)

_SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS = 500, 1 << 20  # of each silo, on which the ids are compared
_EXAMPLES = 3
# Strings at which tokenizers differ.
ODD = (
    *("", " ", "  a   b ", "\t", "a\r\nb", "\n\n\n", "\0", "a\x00b\x7f", "\x85\u2028\u200b\ufeff"),
    *(
        "é",
        "e\u0301",
        "ﬁ",
        "ﬁ\u0301",
        "Å",
        "\u3000",
        "한",
        "한",
        "👩‍👩‍👧",
        "🇫🇷",
        "\U0010ffff",
        "\ufffd",
        "שָׁ",
    ),
    *("▁", "a▁b", " ▁ ▁▁a", "</s>", "a</s>b", "<s>", "<unk>", "<pad>", "<0x41>", "<|endoftext|>"),
    *("def f(x):\n        return x  # 0x41\n", "日本語 text, кот", "x" * 300, " " * 300),
)


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        name: of the model, for its card.
        source: where it was read, and why this one.
        text: documents on which its tokenizer is checked.
        data, metrics: counts of its text, and its evaluation; empty where nobody kept them.
        least: the local id that the training text has least, for rows that nobody trained.
    """

    name: str
    source: str
    recipe: Recipe
    model: Pretrained
    text: Sequence[str]
    data: Mapping[str, int]
    metrics: Mapping[str, float]
    least: int = 0


@dataclass(frozen=True)
class Check:
    """Texts, and how many of them get the same ids and come back the same from either tokenizer.

    Attributes:
        ties: texts that get the same pieces in another order: equally likely for the model, and
            told apart by rounding alone.
        examples: the first few others.
    """

    texts: int
    ties: int
    different: int
    examples: list[str]


@dataclass(frozen=True)
class Exported:
    """What was written, and how well its tokenizer gives the ids of the original."""

    folder: str
    source: str
    model: str
    parameters: int
    vocabulary: int
    sequence_tokens: int
    own_text: Check
    odd_strings: Check
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def lines(self) -> Iterator[str]:
        yield f"folder      {self.folder}"
        yield f"from        {self.source}"
        yield (
            f"model       {self.model}, {self.parameters / 1e6:.2f} M parameters, vocabulary "
            f"{self.vocabulary:,}, sequences of {self.sequence_tokens} tokens"
        )
        for title, check in (("own text", self.own_text), ("odd strings", self.odd_strings)):
            same = check.texts - check.ties - check.different
            yield f"{title:<11} {same:,} of {check.texts:,} get the same ids"
        for warning in self.warnings:
            yield f"warning: {warning}"


# ---- what to export ------------------------------------------------------------------------


def silo_of_run(run_dir: Path, silo: str, home: Path, best: bool = False) -> Subject:
    """A silo's final model, in simulation, or the best of those that it evaluated.

    Raises:
        DeptError: naming what is missing.
    """
    events = read(run_dir)
    plan = next((e for e in reversed(events) if e["event"] == "plan"), None)
    if plan is None:
        raise DeptError(f"{run_dir}: its run has no plan yet; wait until its silos are ready")
    known = sorted(set(plan["silos"]) | {e["silo"] for e in events if e["event"] == "join"})
    if silo not in known:
        raise DeptError(f"--silo {silo}: not in this run; it has {', '.join(known)}")
    if not any(e["event"] == "end" for e in events):
        done = max((e["round"] for e in events if e["event"] == "round"), default=0)
        raise DeptError(
            f"{run_dir}: its run has not ended (round {done} of {plan['rounds']}); wait, or go on "
            "with it with --resume"
        )
    folder = home / "silos" / silo / "state" / plan["experiment"] / FINAL
    if not folder.is_dir():
        raise DeptError(
            f"{folder}: silo {silo} kept no final model there; name the run's --home, or send it "
            "the final body with --resume"
        )
    return _of_silo(folder, f"experiment {plan['experiment']}", best)


def silo_at_home(file: SiloFile, experiment: str, best: bool = False) -> Subject:
    """A partner's final or best model; of several runs' the newest, unless one is named.

    Raises:
        DeptError: naming what is missing.
    """
    states = file.home / "silos" / file.name / "state"
    finals = sorted(states.glob(f"*/{FINAL}/state.json"), key=lambda each: each.stat().st_mtime)
    found = {each.parents[1].name: each.parent for each in finals}
    if not found:
        raise DeptError(f"{states}: silo {file.name} has no final model; no run of its has ended")
    if not experiment:
        experiment = list(found)[-1]
        choice = f"experiment {experiment}" + f", the newest of {len(found)}" * (len(found) > 1)
        return _of_silo(found[experiment], choice, best)
    if experiment not in found:
        raise DeptError(f"--experiment {experiment}: no final model; there is {', '.join(found)}")
    return _of_silo(found[experiment], f"experiment {experiment}", best)


def _of_silo(folder: Path, choice: str, best: bool) -> Subject:
    final = open_final(folder)
    if best:
        _check_kept(folder, final.meta)
        if folder.with_name(BEST).is_dir():  # else the final model is the best
            folder = folder.with_name(BEST)
            final = open_final(folder)
    model, silo, meta = of_final(final), final.silo, final.meta
    choice += f", round {meta['round']}"
    return Subject(
        name=f"silo {silo.name}",
        source=f"{folder} ({choice})",
        recipe=silo.recipe,
        model=model,
        text=_sample(silo.folder, meta["text"]),
        data=meta.get("data", {}),
        metrics=meta.get("metrics", {}),
        least=_least(final, model),
    )


def _check_kept(where: Path, meta: Mapping[str, Any]) -> None:
    if not meta["recipe"].get("keep_best", False):
        raise DeptError(
            f"{where}: its run kept no best model (keep_best=false, or an older version); only "
            "--round last can be exported"
        )


def _least(final: Final, model: Pretrained) -> int:
    if model.vocabulary.size == model.tokenizer.size:
        return 0
    file = used_tokens(final, model.tokenizer) / "counts.npy"
    return int(np.load(file, allow_pickle=False)[model.vocabulary.ids].argmin())


def global_model(run_dir: Path, home: Path, best: bool = False) -> Subject:
    """The server's model where embeddings travel, or that of a job of `dept adapt` or `compare`.

    Args:
        best: that of the round whose body predicted best, instead of the last.

    Raises:
        DeptError: naming what is missing.
    """
    run, events = load_run(run_dir), Ledger(run_dir).read()
    recipe, rounds = run.recipe, rounds_on_disk(run_dir / "checkpoints")
    if not run.embeddings:
        raise DeptError(
            f"{run_dir}: no global model, since embeddings never left their silos (variant="
            f"{recipe.variant}); export a silo's with --silo"
        )
    if rounds[-1] < recipe.rounds:
        raise DeptError(
            f"{run_dir}: its run has not ended (round {rounds[-1]} of {recipe.rounds}); wait, or "
            "go on with it with --resume"
        )
    source, evaluated = round_folder(run_dir / "checkpoints", rounds[-1]), events
    if best and (kept := best_checkpoint(run_dir, events, recipe.first_model)):
        run, source = load_run(run_dir, kept), kept
        chosen = best_round(events, recipe.first_model)
        evaluated = [event for event in events if event.get("round") == chosen]
    tokenizer = load_tokenizer(recipe.shared_tokenizer)
    try:
        whole = Vocabulary.whole(tokenizer)
        model = joined(recipe, run.body, run.embeddings, tokenizer, whole)
    except ValueError as error:
        raise DeptError(
            f"{run_dir}: its embeddings are not those of {recipe.shared_tokenizer}: {error}; put "
            "the old tokenizer back"
        ) from error
    names = recipe.silo_names
    texts = [text for name in names for text in _sample(home / "silos" / name)]
    return Subject(
        name="global model",
        source=str(source),
        recipe=recipe,
        model=model,
        text=texts,
        data=_all_data(events),
        metrics=_all_metrics(evaluated),
    )


def _all_data(events: Sequence[Event]) -> dict[str, int]:
    """Sums over the silos of a run's plan."""
    plans = [event for event in events if event["event"] == "plan"]
    silos = plans[-1]["silos"].values() if plans else []
    keys = ("train_bytes", "train_tokens", "validation_bytes")
    return {key: sum(silo[key] for silo in silos) for key in keys} if silos else {}


def _all_metrics(events: Sequence[Event]) -> dict[str, float]:
    """Means over the silos' last evaluations."""
    last = {event["silo"]: event for event in events if event["event"] == "silo_eval"}
    keys = ("bits_per_byte", "unigram_bits_per_byte")
    return {key: sum(e[key] for e in last.values()) / len(last) for key in keys} if last else {}


def _sample(silo: Path, digest: str = "") -> list[str]:
    """Validation documents that lie in a silo's folder, of the text with this digest."""
    for facts in sorted(silo.glob("text/*/corpus.json")):
        if not digest or json.loads(facts.read_text(encoding="utf-8"))["digest"] == digest:
            lines = (facts.parent / "validation.jsonl").open(encoding="utf-8")
            with lines:
                return list(_up_to(map(json.loads, islice(lines, _SAMPLE_DOCUMENTS))))
    return []


def _up_to(texts: Iterable[str]) -> Iterator[str]:
    left = _SAMPLE_CHARACTERS
    for text in texts:
        yield text
        left -= len(text)
        if left <= 0:
            return


# ---- the folder ----------------------------------------------------------------------------


def export(subject: Subject, out: Path) -> Exported:
    """Write the model with its tokenizer and card to a new folder, whole or not at all.

    A silo of TRIM or SPEC has embeddings of V_k, a part of the shared tokenizer's ids. With a
    unigram model of byte fall-back the exported tokenizer writes local ids, and the model is the
    silo's own; else it is the shared one, and the rows that the silo never trained are those of
    its rarest id.

    Raises:
        DeptError: the folder is not empty, or no Hugging Face tokenizer gives the ids that the
            model was trained with.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DeptError(f"--out {out}: not an empty folder; name a new one")
    pretrained = subject.model
    tokenizer, vocabulary = pretrained.tokenizer, pretrained.vocabulary
    local = vocabulary.size == tokenizer.size or writes_parts(tokenizer)
    warnings = []
    encode = Encoder(tokenizer, vocabulary) if local else tokenizer.encode
    if not local:
        pretrained = _widened(subject)
        warnings.append(
            f"{tokenizer.size - vocabulary.size:,} of {tokenizer.size:,} ids were never trained by "
            "this silo; they have the row of its rarest id, and generation leaves them out"
        )
    with whole_folder(out) as draft:
        _write_tokenizer(pretrained, draft)
        _write_model(pretrained, vocabulary, draft)
        written = load_tokenizer(draft)
        decode = _decoder(tokenizer, vocabulary if local else Vocabulary.whole(tokenizer))
        own = _compared(subject.text, encode, decode, written)
        odd = _compared(ODD, encode, decode, written)
        if own.different and pretrained.vocabulary.size == tokenizer.size:
            raise DeptError(
                f"{own.different:,} of {own.texts:,} documents of its own text would get other "
                f"ids, as at {own.examples[0]}: no Hugging Face tokenizer writes the rules of its "
                "SentencePiece model; retrain with one that normalises nothing"
            )
        warnings += _told(own, odd, len(subject.text))
        made = Exported(
            folder=str(out),
            source=subject.source,
            model=f"{subject.recipe.label}, {subject.name}",
            parameters=sum(p.numel() for p in pretrained.model.parameters()),
            vocabulary=pretrained.vocabulary.size,
            sequence_tokens=pretrained.sequence_tokens,
            own_text=own,
            odd_strings=odd,
            warnings=warnings,
        )
        (draft / "README.md").write_text(_card(subject, made), encoding="utf-8")
    return made


def _told(own: Check, odd: Check, texts: int) -> Iterator[str]:
    if not texts:
        yield "its text is not there any more; the tokenizer was checked on odd strings alone"
    if own.ties + odd.ties:
        yield (
            f"{own.ties + odd.ties:,} texts get the same pieces in another order, equally likely "
            "for the tokenizer: an older or foreign SentencePiece model, whose scores are not round"
        )
    if own.different:  # else refused
        yield (
            f"{own.different:,} of {own.texts:,} documents of its own text hold pieces that it has "
            "not, and are written with other pieces than the silo's"
        )
    if odd.different:
        yield f"{odd.different} odd strings get other ids: {', '.join(odd.examples)}"


def _widened(subject: Subject) -> Pretrained:
    """With embeddings of all of the tokenizer's ids."""
    pretrained, recipe = subject.model, subject.recipe
    parts: Layout = layout(recipe.model, recipe.sequence_tokens)
    body, embeddings = parts.split(dict(pretrained.model.named_parameters()))
    rows = torch.full((pretrained.tokenizer.size,), subject.least)
    rows[pretrained.vocabulary.ids] = torch.arange(pretrained.vocabulary.size)
    wide: Tensors = {
        name: tensor.detach()[rows] if name in parts.tokens else tensor
        for name, tensor in embeddings.items()
    }
    whole = Vocabulary.whole(pretrained.tokenizer)
    return joined(recipe, body, wide, pretrained.tokenizer, whole)


def _write_tokenizer(pretrained: Pretrained, folder: Path) -> None:
    tokenizer = pretrained.tokenizer
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.save(folder)
        return
    assert isinstance(tokenizer, SentencePieceTokenizer)
    backend = fast_tokenizer(tokenizer.model, pretrained.vocabulary)
    end = backend.id_to_token(int(pretrained.vocabulary.local_ids()[tokenizer.end_id]))
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        bos_token=end,  # which stands before the first document too
        split_special_tokens=True,  # text that looks like one is text
        clean_up_tokenization_spaces=False,
        model_max_length=pretrained.sequence_tokens,
    ).save_pretrained(folder)


def _write_model(pretrained: Pretrained, trained: Vocabulary, folder: Path) -> None:
    model = pretrained.model
    model.config.use_cache = True
    end = model.config.eos_token_id
    left_out = np.setdiff1d(np.arange(trained.full), trained.ids).tolist()
    widened = pretrained.vocabulary.size > trained.size
    model.generation_config = GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        max_length=pretrained.sequence_tokens,
        suppress_tokens=left_out if widened else None,
    )
    model.save_pretrained(folder)


def _decoder(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Any:
    return lambda ids: tokenizer.decode([int(vocabulary.ids[i]) for i in ids])


def _compared(texts: Sequence[str], encode: Any, decode: Any, written: Tokenizer) -> Check:
    """The original's ids beside those of the exported tokenizer, and what comes back of them."""
    ties, different = 0, []
    if not texts:
        return Check(0, 0, 0, [])  # transformers would stumble over it
    for text, old, new in zip(texts, encode(texts), written.encode(texts), strict=True):
        if sorted(old) != sorted(new) or decode(new) != written.decode(new):
            different.append(_where(text, old, new, decode))
        elif old != new:
            ties += 1
    return Check(len(texts), ties, len(different), different[:_EXAMPLES])


def _where(text: str, old: Ids, new: Ids, decode: Any) -> str:
    """What of the text lies about the first id that differs."""
    if len(text) <= 40:
        return repr(text)
    pairs = enumerate(zip(old, new, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(old), len(new)))
    return repr(decode(old[max(0, first - 3) : first + 6]))


# ---- the card ------------------------------------------------------------------------------

_NOT_TOLD = {"silos", "only", "without", "shared_tokenizer", "name"}  # paths and names of others


def _card(subject: Subject, made: Exported) -> str:
    recipe = {k: v for k, v in json.loads(subject.recipe.to_json()).items() if k not in _NOT_TOLD}
    if Path(recipe["model"]["start"]).is_absolute():  # a path of its owner's
        recipe["model"]["start"] = Path(recipe["model"]["start"]).name
    rows = {
        **{name.replace("_", " "): f"{count:,}" for name, count in subject.data.items()},
        **{
            title: f"{subject.metrics[key]:.4f}"
            for title, key in (
                ("bits per byte of validation text", "bits_per_byte"),
                ("of token frequencies alone (unigram)", "unigram_bits_per_byte"),
            )
            if key in subject.metrics
        },
    }
    table = [f"| {title} | {value} |" for title, value in rows.items()]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "license: other  # to be filled in by the owner of the text",
            "license_name: to-be-filled-in",
            "language: []  # to be filled in",
            "---",
            "",
            f"# {made.model}",
            "",
            "A causal language model pre-trained by a federation with decoupled embeddings (DEPT,",
            "https://arxiv.org/abs/2410.05021) with dept-fl.",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
            "```",
            "",
            f"It was trained on sequences of {made.sequence_tokens} tokens. Every document stood",
            "behind an end token (`eos`): put one before a prompt that begins a document.",
            "",
            "## Licence and text",
            "",
            "To be filled in by the owner: licence of the model, where the text is from, whom it",
            "may harm, what it must not be used for.",
            "",
            *(["| text and evaluation | |", "|---|---|", *table] if table else ["Nothing kept."]),
            "",
            *(f"- {warning}" for warning in made.warnings),
            "",
            "## Run",
            "",
            "```json",
            json.dumps(recipe, indent=1, ensure_ascii=False),
            "```",
            "",
        ]
    )
