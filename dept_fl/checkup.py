"""Whether a silo can join a federation: one check after the other, each with its mend."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import psutil
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

from dept_fl.checkpoint import load_meta
from dept_fl.config import Recipe, load_recipe
from dept_fl.data import lossy_documents
from dept_fl.errors import ConfigError, DeptError
from dept_fl.node_key import check_key
from dept_fl.progress import Progress
from dept_fl.report import duration, size
from dept_fl.silo import Silo
from dept_fl.silo_file import SiloFile, load_silo_file
from dept_fl.story import dropped
from dept_fl.superlink import Answer, ask_health
from dept_fl.trial import Trial, try_step

State = Literal["ok", "warning", "FAILED", "skipped"]

_RECIPE = "conf/partners.yaml"
_FP32_BYTES = 4
_KEPT_STATES = 3  # of rounds that the server may go back to, and of the one being written
_BODY_COPIES = 3  # beside the model's own: as it came, its delta, the message with that
_BUSY = 1.5  # programs that want a core, for each core
_AHEAD_S, _BEHIND_S = 2.0, 60.0  # clocks that differ by so much are worth a warning


@dataclass(frozen=True)
class Subject:
    """What is to be checked.

    Attributes:
        file: of the silo.
        recipe: a file of the federation's settings; empty: one that comes along.
        superlink: HOST:PORT; empty: not asked.
        ca_file: the federation's own authority.
    """

    file: Path
    recipe: str = ""
    superlink: str = ""
    ca_file: Path | None = None


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        words: with the mend, where it is not ok.
        facts: the figures in the words.
    """

    state: State
    words: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class Checkup:
    """The checks of a silo; each one that needs another is skipped where that one failed."""

    def __init__(self, subject: Subject, progress: Progress) -> None:
        self._subject = subject
        self._progress = progress
        self._in_its_words: Callable[[str], str] = str  # those of the file, once it is read

    def run(self) -> Iterator[tuple[str, Finding]]:
        """Each check's name and finding, as soon as it is made."""
        states: dict[str, State] = {}
        for name, needed in _NEEDED.items():
            if needed and states[needed] in ("FAILED", "skipped"):
                finding = Finding("skipped", f"needs the check of {needed}")
            else:
                finding = self._find(getattr(self, f"_{name}"))
            states[name] = finding.state
            yield name, finding

    def _find(self, check: Callable[[], Finding]) -> Finding:
        try:
            return check()
        except ConfigError as error:
            return Finding("FAILED", "; ".join(error.problems))
        except (DeptError, OSError) as error:
            return Finding("FAILED", self._in_its_words(str(error)))

    # ---- what is checked -----------------------------------------------------------------

    @cached_property
    def _silo_file(self) -> SiloFile:
        return load_silo_file(self._subject.file)

    @cached_property
    def _own_recipe(self) -> Recipe:
        return self._silo_file.over(load_recipe(self._subject.recipe or _RECIPE))

    @cached_property
    def _silo(self) -> Silo:
        file = self._silo_file
        return Silo(file.name, self._own_recipe, file.home, "", self._progress.watch)

    @cached_property
    def _trial(self) -> Trial:
        title = "training for a step, in a process of its own"
        file = self._silo_file.path
        return self._progress.during(title, lambda: try_step(file, self._own_recipe))

    @cached_property
    def _answer(self) -> Answer:
        subject = self._subject
        return self._progress.during(
            f"asking {subject.superlink}", lambda: ask_health(subject.superlink, subject.ca_file)
        )

    # ---- the silo ------------------------------------------------------------------------

    def _file(self) -> Finding:
        file = self._silo_file
        self._in_its_words = file.in_its_words
        facts = {"silo": file.name, "home": str(file.home)}
        return Finding("ok", f"describes silo {file.name}; home {file.home}", facts)

    def _recipe(self) -> Finding:
        recipe, inner = self._own_recipe, self._own_recipe.inner
        words = (
            f"{self._subject.recipe or _RECIPE}: {recipe.label}, {recipe.rounds} rounds of "
            f"{inner.local_steps} steps of {inner.batch_size} x {recipe.sequence_tokens} tokens"
        )
        if not self._subject.recipe:
            words += "; give the federation's own with --recipe"
        return Finding("ok", words, {"variant": recipe.label})

    def _data(self) -> Finding:
        before = _last_corpus(self._silo.folder)
        corpus = self._progress.during("reading the data", lambda: self._silo.corpus)
        words = f"{corpus.documents:,} documents, {dropped(corpus)}, {size(corpus.text_bytes)}"
        facts = {
            "documents": corpus.documents,
            "duplicates": corpus.duplicates,
            "near_duplicates": corpus.near_duplicates,
            "left_out": corpus.left_out,
            "sources": corpus.sources,
            "bytes": corpus.text_bytes,
            "changed": before is not None and before.digest != corpus.digest,
        }
        run, digest = _last_run(self._silo.folder)
        if run and digest != corpus.digest:
            words += (
                f"; not the text that run {run} began with, which will refuse the silo: put that "
                "text back, or take part in a new run only"
            )
            return Finding("warning", words, facts)
        return Finding("ok", f"{words}; {_since(before, corpus.digest)}", facts)

    def _tokenizer(self) -> Finding:
        silo = self._silo
        tokenizer = self._progress.during("loading the tokenizer", lambda: silo.tokenizer)
        lossy, documents = lossy_documents(silo.corpus, tokenizer), silo.corpus.validation_documents
        facts = {
            "pieces": tokenizer.size,
            "lossy_documents": lossy,
            "validation_documents": documents,
        }
        words = (
            f"{tokenizer.size:,} pieces; {documents - lossy:,} of {documents:,} validation "
            "documents come back whole"
        )
        if not lossy:
            return Finding("ok", words, facts)
        mend = "its bits per byte will be too low; a tokenizer with byte fall-back loses nothing"
        return Finding("warning", f"{words}; {mend}", facts)

    def _tokens(self) -> Finding:
        silo, recipe = self._silo, self._own_recipe
        stream = self._progress.during("making tokens", lambda: silo.stream)
        silo.check_start()
        passes = recipe.rounds * recipe.round_tokens / len(stream.train)
        facts = {
            "train_tokens": len(stream.train),
            "bytes_per_token": stream.bytes_per_token,
            "unigram_bits_per_byte": silo.unigram_bits_per_byte,
            "passes": passes,
        }
        words = (
            f"{len(stream.train):,} to train on, {stream.bytes_per_token:.2f} bytes each, unigram "
            f"{silo.unigram_bits_per_byte:.3f} bits per byte; a run reads them {passes:,.1f} times"
        )
        return Finding("ok", words, facts)

    # ---- the machine ---------------------------------------------------------------------

    def _step(self) -> Finding:
        inner, trial = self._own_recipe.inner, self._trial
        tokens_per_s = inner.batch_size * self._own_recipe.sequence_tokens / trial.step_s
        device = "the GPU" if trial.gpu_bytes else "the CPU"
        if (processes := self._own_recipe.processes) > 1:
            device = f"{processes} GPUs" if trial.gpu_bytes else f"the CPU in {processes} processes"
        words = f"{trial.step_s:.2f} s on {device}, {tokens_per_s:,.0f} tokens/s"
        load, cores = psutil.getloadavg()[0], psutil.cpu_count() or 1
        if load > _BUSY * cores:
            words += f"; others use this machine now (load {load:.1f} on {cores} cores)"
        facts = {"step_s": trial.step_s, "on_gpu": bool(trial.gpu_bytes)}
        return Finding("ok", words, {**facts, "tokens_per_s": tokens_per_s})

    def _memory(self) -> Finding:
        trial, machine = self._trial, psutil.virtual_memory()
        body_bytes = _FP32_BYTES * self._silo.layout.body_parameters()
        needed, there, free = trial.gpu_peak_bytes, trial.gpu_bytes, trial.gpu_bytes
        what = "the GPU's"
        if not trial.gpu_bytes:
            needed, what = trial.peak_bytes + _BODY_COPIES * body_bytes, "this machine's"
            there, free = machine.total, machine.available
        facts = {"needed_bytes": needed, "machine_bytes": there, "available_bytes": free}
        words = f"{size(needed)} of {what} {size(there)}"
        if needed <= free:
            return Finding("ok", words, facts)
        mend = "end other programs, or set a lower micro_batch_size in the silo's file"
        state: State = "FAILED" if needed > there else "warning"
        return Finding(state, f"{words}, of which {size(free)} are free now; {mend}", facts)

    def _round(self) -> Finding:
        recipe, inner = self._own_recipe, self._own_recipe.inner
        round_s = inner.local_steps * self._trial.step_s
        first_s = round_s + inner.newcomer_steps * self._trial.step_s
        facts = {
            "round_s": round_s,
            "first_round_s": first_s,
            "round_timeout_s": recipe.round_timeout_s,
        }
        words = f"{duration(round_s)} of training"
        if inner.newcomer_steps:
            words += f", {duration(first_s)} in a latecomer's first"
        words += f"; the server waits {duration(recipe.round_timeout_s)}"
        if first_s <= recipe.round_timeout_s / 2:
            return Finding("ok", words, facts)
        mend = "take a faster machine, or ask for fewer inner.local_steps or more round_timeout_s"
        if first_s <= recipe.round_timeout_s:
            return Finding("warning", f"{words}, which is little more; {mend}", facts)
        return Finding("FAILED", f"{words}, which is less; {mend}", facts)

    def _disk(self) -> Finding:
        home, silo, recipe = self._silo_file.home, self._silo, self._own_recipe
        body, wire = silo.layout.body_parameters(), recipe.wire
        held = body + silo.layout.embedding_parameters(silo.stream.vocabulary.size)
        travels = held if recipe.variant != "spec" else body
        kept = held - travels  # its embeddings
        if recipe.inner.state == "keep":
            kept += 2 * held
        if wire.up != "fp32" and wire.error_feedback:
            kept += travels // 2  # in bf16
        arrived = 2 * travels if wire.sends_changes else 0  # in this round and in the one before
        kept += body - body // wire.fragments  # of its own
        # To several processes and back go the model and its moments.
        passed = 2 * 3 * held if recipe.processes > 1 else 0
        models = (1 + recipe.keep_best) * held  # the final one, and the best
        needed = _FP32_BYTES * (_KEPT_STATES * kept + arrived + models + passed)
        free = shutil.disk_usage(home).free
        words = f"{size(needed)} for the silo's states, {size(free)} free in {home}"
        facts = {"state_bytes": needed, "free_bytes": free}
        if needed <= free:
            return Finding("ok", words, facts)
        return Finding("FAILED", f"{words}; make room, or set another home in the file", facts)

    # ---- the federation ------------------------------------------------------------------

    def _key(self) -> Finding:
        key_file = self._subject.file.with_suffix(".key")
        if not key_file.is_file():
            return Finding("skipped", f"no {key_file} beside the file")
        check_key(key_file)
        return Finding("ok", f"{key_file} is for you alone, and its public half fits")

    def _superlink(self) -> Finding:
        subject = self._subject
        if not subject.superlink:
            return Finding("skipped", "give --superlink HOST:PORT and --root-certificates ca.crt")
        answer = self._answer
        via = f" through the proxy {answer.proxy}" if answer.proxy else ""
        whose = subject.ca_file or "an authority that this machine knows"
        words = f"{subject.superlink} answers{via}, with a certificate from {whose}"
        return Finding("ok", words, {"proxy": answer.proxy, "answer_s": answer.seconds})

    def _clock(self) -> Finding:
        ahead_s = self._answer.ahead_s
        if ahead_s is None:
            return Finding("skipped", "the server does not tell its time")
        return clock_finding(ahead_s)


# In their order, each with the one that it needs.
_NEEDED = {
    "file": "",
    "recipe": "file",
    "data": "recipe",
    "tokenizer": "data",
    "tokens": "tokenizer",
    "step": "tokens",
    "memory": "step",
    "round": "step",
    "disk": "tokens",
    "key": "",
    "superlink": "",
    "clock": "superlink",
}


def clock_finding(ahead_s: float) -> Finding:
    """Whether Flower takes what a clock so far ahead of the server's, or behind it, signs."""
    facts = {"clock_ahead_s": ahead_s}
    if not ahead_s:
        return Finding("ok", "agrees with the server's", facts)
    allowed_s, notable_s = SYSTEM_TIME_TOLERANCE, _AHEAD_S
    way = "ahead of"
    if ahead_s < 0:
        allowed_s, notable_s, way = TIMESTAMP_TOLERANCE, _BEHIND_S, "behind"
    words = f"{duration(abs(ahead_s))} {way} the server's"
    if abs(ahead_s) <= notable_s:
        return Finding("ok", words, facts)
    state: State = "warning" if abs(ahead_s) <= allowed_s else "FAILED"
    mend = f"Flower refuses SuperNodes that are over {allowed_s} s {way} it; set the clock (NTP)"
    return Finding(state, f"{words}; {mend}", facts)


# ---- what is remembered ------------------------------------------------------------------


@dataclass(frozen=True)
class _Before:
    """A silo's text as it was read before."""

    digest: str
    documents: int
    day: str


def _last_corpus(folder: Path) -> _Before | None:
    files = sorted(folder.glob("text/*/corpus.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        return None
    facts = json.loads(files[-1].read_text(encoding="utf-8"))
    return _Before(
        digest=facts["digest"],
        documents=facts["train_documents"] + facts["validation_documents"],
        day=f"{datetime.fromtimestamp(files[-1].stat().st_mtime):%Y-%m-%d %H:%M}",
    )


def _since(before: _Before | None, digest: str) -> str:
    if before is None:
        return "read for the first time"
    if before.digest == digest:
        return f"as on {before.day}"
    return f"changed since {before.day}, when it had {before.documents:,} documents"


def _last_run(folder: Path) -> tuple[str, str]:
    """The run in which the silo trained last, and the digest of its text; empty where none."""
    files = folder.glob("state/*/round-*/state.json")
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    if newest is None:
        return "", ""
    try:
        return newest.parents[1].name, str(load_meta(newest.parent)["text"])
    except (DeptError, OSError, ValueError, KeyError):  # the next round will tell
        return "", ""


# ---- what the partner reads --------------------------------------------------------------


def line(name: str, finding: Finding, columns: int) -> str:
    """A finding for a terminal; what does not fit goes on below its words."""
    head = f"{finding.state:<8} {name:<10} "
    wrapped = textwrap.wrap(
        finding.words, columns - len(head), break_long_words=False, break_on_hyphens=False
    )
    return head + f"\n{' ' * len(head)}".join(wrapped)


def as_json_text(findings: Mapping[str, Finding]) -> str:
    """All findings as one JSON object: `ok`, and by each check's name its state, words, facts."""
    ok = all(finding.state != "FAILED" for finding in findings.values())
    checks = {
        name: {"state": finding.state, "words": finding.words, **finding.facts}
        for name, finding in findings.items()
    }
    return json.dumps({"ok": ok, "checks": checks}, ensure_ascii=False, allow_nan=False)
