"""The Flower strategy: the steps of `rounds.pretrain` with messages between them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from uuid import uuid4

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from dept_fl import records
from dept_fl.config import Recipe
from dept_fl.cost import cost
from dept_fl.errors import BadUpdate, DeptError
from dept_fl.report import Event, Ledger, Screen, duration, plot
from dept_fl.rounds import Merge, Server, last_checkpoint
from dept_fl.silo import Registration, with_shared_tokenizer

_NODES_TIMEOUT_S = 300.0  # the first query pays for starting every worker
_GRACE_S = 120.0  # a reply that is there at the deadline can still be pulled this long


class DeptStrategy(Strategy):
    """Pre-trains by DEPT over the silos that the grid's nodes host.

    Flower's own loop is not used: it holds all replies at once, has no quorum, deadline or
    resume. Here replies are pulled one at a time in the order of the silos' names, checked,
    added to a running mean and dropped, so that neither memory nor the sum depends on how
    many there are or which comes first.
    """

    def __init__(self, recipe: Recipe, home: Path, run_dir: Path, resume: bool) -> None:
        self._recipe = recipe
        self._home = home
        self._run_dir = run_dir
        self._resume = resume
        self._ledger = Ledger(run_dir)
        self._screen = Screen()
        self._node_of: dict[str, int] = {}
        self._silo_of: dict[str, str] = {}  # by id of the message sent
        self._simulated = False
        self._round_s: list[float] = []
        self._push_s = self._wait_s = self._transfer_s = 0.0
        self._sent_bytes: dict[str, tuple[int, int]] = {}  # by silo: body, embeddings
        self._server: Server
        self._merge: Merge
        self._header: ConfigRecord
        self._rows: list[Event] = []

    # ---- the run ------------------------------------------------------------------------------

    def start(self, grid: Grid) -> Server:  # type: ignore[override]
        """Train to the last round and return the server's state.

        Raises:
            DeptError: silos that cannot take part, or a round below the quorum; the last
                checkpoint is whole, and `resume=true` goes on from it.
        """
        began = time.monotonic()
        self._prepare(grid)
        self.summary()
        while self._server.round < self._recipe.rounds:
            self._run_round(grid)
        self._finish(grid)
        self._ledger.write("end", round=self._server.round, seconds=time.monotonic() - began)
        return self._server

    def _prepare(self, grid: Grid) -> None:
        self._find_hosts(grid)
        if self._simulated:
            if not (self._recipe.own_tokenizers or self._recipe.shared_tokenizer):
                self._screen.line("making the shared tokenizer from all silos' text ...")
            self._recipe = with_shared_tokenizer(self._recipe, self._home)
        elif not self._recipe.own_tokenizers and not self._recipe.shared_tokenizer:
            raise DeptError(
                "tokenizer=shared without shared_tokenizer: only a simulation can train one over "
                "all silos' text; name a file that every silo has"
            )
        saved = last_checkpoint(self._run_dir, self._recipe) if self._resume else None
        experiment = saved[1]["experiment"] if saved else uuid4().hex[:12]
        registrations = self._register(grid, experiment)
        self._server = Server(self._recipe, registrations, experiment)
        self._header = records.header_record(experiment, self._recipe)
        if saved:
            self._server.load(*saved)
            self._ledger.rewind(self._server.round)
            self._ledger.write("resume", round=self._server.round)
        else:
            self._server.save(self._run_dir)

    def _run_round(self, grid: Grid) -> None:
        """One round, tried again as a whole while it is below the quorum."""
        began = time.monotonic()
        for attempt in range(self._recipe.round_attempts):
            self._merge, self._rows = self._server.open_round(), []
            body = records.to_record(self._server.body)
            sent = self.configure_train(self._merge.round, body, self._header, grid)
            self.aggregate_train(self._merge.round, self._exchange(grid, sent, self._merge.round))
            if self._server.has_quorum(self._merge):
                break
            left = self._recipe.round_attempts - attempt - 1
            self._screen.line(f"round {self._merge.round}: below the quorum; attempts left: {left}")
        if self._simulated and not self._server.has_quorum(self._merge):
            self._screen.line(
                "Flower never replaces a simulation worker that died; if one did, start again "
                "with resume=true"
            )
        self._close_round(began)

    def _close_round(self, began: float) -> None:
        merging = time.monotonic()
        self._server.close_round(self._merge)
        saving = time.monotonic()
        seconds = saving - began
        self._round_s.append(seconds)
        # Events before the checkpoint: a kill between them costs nothing, since a resume
        # drops what was written behind its checkpoint.
        self._write_round(outer_s=saving - merging, seconds=seconds)
        self._server.save(self._run_dir)
        self._ledger.write("checkpoint", round=self._server.round, save_s=time.monotonic() - saving)
        left = self._recipe.rounds - self._server.round
        rest = duration(left * sum(self._round_s) / len(self._round_s))
        title = f"round {self._server.round} of {self._recipe.rounds}, {duration(seconds)}"
        self._screen.round(self._rows, f"{title}; left: about {rest}" if left else title)

    def _write_round(self, outer_s: float, seconds: float) -> None:
        this = self._server.round
        for row in self._rows:
            evaluated = {k: row[k] for k in _EVALUATED}
            # What arrived, and was evaluated, is the body of the round before.
            self._ledger.write(
                "silo_eval", round=this - 1, during_round=this, silo=row["silo"], **evaluated
            )
            trained = {k: v for k, v in row.items() if k not in _EVALUATED}
            self._ledger.write("silo_train", round=this, **trained)
        self._ledger.write(
            "round",
            round=this,
            sampled=self._merge.sampled,
            merged=self._merge.merged,
            push_s=self._push_s,
            wait_s=self._wait_s,
            outer_s=outer_s,
            seconds=seconds,
        )

    def _finish(self, grid: Grid) -> None:
        """Every silo gets the final body, evaluates it and keeps it."""
        body = records.to_record(self._server.body)
        this, self._rows = self._server.round, []
        sent = self.configure_evaluate(this, body, self._header, grid)
        self.aggregate_evaluate(this, self._exchange(grid, sent, this))
        self._screen.final(self._rows)
        for row in self._rows:
            if row["sample"]:
                self._screen.line(f"{row['silo']} writes: {row['sample']!r}")
        plot(self._ledger.read(), self._run_dir / "curves.png")
        missing = set(self._recipe.silo_names) - {row["silo"] for row in self._rows}
        self._screen.line()
        if missing:
            self._screen.line(f"without the final body: {', '.join(sorted(missing))}")
        self._screen.line(f"metrics      {self._ledger.file}")
        self._screen.line(f"plot         {self._run_dir / 'curves.png'}")
        self._screen.line(f"checkpoints  {self._run_dir / 'checkpoints'}")
        if self._simulated:
            final = self._home / "silos" / "<silo>" / "state" / self._server.experiment / "final"
            self._screen.line(f"models       {final}")
            if not os.environ.get("DEPT_OWN_SUPERLINK"):
                self._screen.line("Flower's local SuperLink goes on running; `make stop` ends it.")
        if missing:
            raise DeptError(f"the silos {', '.join(sorted(missing))} did not take the final body")

    # ---- Flower's pairs of configure and aggregate ----------------------------------------------

    def summary(self) -> None:
        """Print the resolved plan and write it to metrics.jsonl."""
        recipe, server = self._recipe, self._server
        registrations = list(server.registrations.values())
        costs = {r.silo: cost(recipe, server.layout, r) for r in registrations}
        seconds = self._estimate(registrations)
        sampled = recipe.silos_per_round or len(recipe.silo_names)
        words = [
            f"{recipe.name}: {recipe.label}, seed {recipe.seed}, experiment {server.experiment}",
            f"{recipe.rounds} rounds of {recipe.inner.local_steps} local steps of "
            f"{recipe.inner.batch_size} x {recipe.sequence_tokens} tokens; {sampled} of "
            f"{len(recipe.silo_names)} silos a round; outer optimiser: {recipe.outer.optimizer}",
            f"body of {server.layout.body_parameters() / 1e6:.2f} M parameters travels; "
            + ("embeddings travel too" if server.embeddings else "embeddings stay at their silo"),
            f"training takes about {duration(seconds)}",
            f"run-dir {self._run_dir}",
            f"home    {self._home}",
        ]
        if server.round:
            words.insert(1, f"resumed behind round {server.round}")
        self._screen.plan(costs, registrations, words)
        self._ledger.write(
            "plan",
            recipe=recipe.label,
            experiment=server.experiment,
            rounds=recipe.rounds,
            seed=recipe.seed,
            body_parameters=server.layout.body_parameters(),
            estimate_s=seconds,
            silos={
                r.silo: {
                    "vocabulary": r.vocabulary,
                    "train_tokens": r.train_tokens,
                    "train_bytes": r.train_bytes,
                    "validation_bytes": r.validation_bytes,
                    **vars(costs[r.silo]),
                }
                for r in registrations
            },
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message for each sampled silo, all with the same record of the body."""
        return self._task_messages(self._merge.sampled, arrays, config, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check each reply and add it to the round's mean; a bad one costs one line."""
        for reply in replies:
            silo = self._silo_of.pop(reply.metadata.reply_to_message_id)
            began = time.perf_counter()
            try:
                row = self._accept(reply, silo)
            except BadUpdate as error:
                self._failure(server_round, silo, str(error))
            else:
                row["merge_s"] = time.perf_counter() - began
                self._rows.append(row)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The final body to every silo, sampled or not."""
        return self._task_messages(self._recipe.silo_names, arrays, config, MessageType.EVALUATE)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Collect the silos' final evaluations."""
        for reply in replies:
            silo = self._silo_of.pop(reply.metadata.reply_to_message_id)
            try:
                metrics, text = records.read_finished(_content(reply), silo)
                row = _picked(metrics, _EVALUATED)
            except BadUpdate as error:
                self._failure(server_round, silo, str(error))
                continue
            self._ledger.write("silo_eval", round=server_round, silo=silo, final=True, **row)
            self._rows.append({"silo": silo, "sample": text, **row})
        return None

    # ---- messages ---------------------------------------------------------------------------

    def _task_messages(
        self, silos: list[str], body: ArrayRecord, header: ConfigRecord, kind: str
    ) -> list[Message]:
        messages = []
        embeddings: ArrayRecord | None = None
        for silo in silos:
            task = self._server.task(silo)
            if embeddings is None or self._server.registrations[silo].rows is not None:
                embeddings = records.to_record(task.embeddings)  # else all silos get the same
            addressed = ConfigRecord({**header, "silo": silo})
            content = records.task_record(task, addressed, body, embeddings)
            self._sent_bytes[silo] = records.split_bytes(content)
            messages.append(self._message(silo, content, kind))
        return messages

    def _message(self, silo: str, content: RecordDict, kind: str) -> Message:
        ttl = self._deadline_s(len(self._recipe.silo_names)) + _GRACE_S
        return Message(content, self._node_of[silo], kind, ttl=ttl)

    def _accept(self, reply: Message, silo: str) -> Event:
        content = _content(reply)
        shapes = self._server.sent_embedding_shapes(silo)
        update = records.read_update(content, self._server.layout.body, shapes)
        if update.silo != silo:
            raise BadUpdate(f"answers for silo {update.silo!r}")
        evaluated = _picked(update.metrics, _EVALUATED)
        own = _picked(update.metrics, _TRAINED)
        self._server.add(self._merge, update)
        up, down = records.split_bytes(content), self._sent_bytes[silo]
        return {
            "silo": silo,
            **evaluated,
            **own,
            "transfer_s": self._transfer_s,
            "tokens_per_s": own["tokens"] / max(own["train_s"], 1e-3),
            "bytes_up_body": up[0],
            "bytes_up_embeddings": up[1],
            "bytes_down_body": down[0],
            "bytes_down_embeddings": down[1],
        }

    def _deadline_s(self, silos: int) -> float:
        """Seconds until replies are due: simulated silos queue for the machine."""
        return self._recipe.round_timeout_s * (silos if self._simulated else 1)

    def _exchange(self, grid: Grid, messages: list[Message], round_: int) -> Iterator[Message]:
        """Push messages; pull the replies one at a time, in the order of the messages.

        What has not come when the time is over is named as missing. The messages are emptied
        once they are sent, so that only Flower holds what is on its way.
        """
        silos = [str(m.content.config_records[records.TASK]["silo"]) for m in messages]
        began = time.monotonic()
        ids = list(grid.push_messages(messages))
        messages.clear()
        self._push_s, self._wait_s = time.monotonic() - began, 0.0
        due_s = self._deadline_s(len(silos))
        deadline = time.monotonic() + due_s
        for message_id, silo in zip(ids, silos, strict=True):
            waiting = time.monotonic()
            reply, self._transfer_s = _wait_for(grid, message_id, deadline)
            self._wait_s += time.monotonic() - waiting - self._transfer_s
            if reply is None:
                self._failure(round_, silo, f"no reply within {due_s:g} s (round_timeout_s)")
            else:
                self._silo_of[message_id] = silo
                yield reply

    def _find_hosts(self, grid: Grid) -> None:
        """Ask every node which silos it hosts."""
        nodes = _wait_for_nodes(grid)
        header = records.header_record("0" * 12, self._recipe)
        sent = [
            Message(
                RecordDict({records.TASK: header}), node, MessageType.QUERY, ttl=_NODES_TIMEOUT_S
            )
            for node in nodes
        ]
        ids = list(grid.push_messages(sent))
        deadline = time.monotonic() + _NODES_TIMEOUT_S
        for message_id, node in zip(ids, nodes, strict=True):
            reply, _ = _wait_for(grid, message_id, deadline)
            try:
                if reply is None:
                    raise BadUpdate("does not answer")
                content = _content(reply)
                records.raise_failure(content)
                silos, simulated = records.read_hosts(content)
            except BadUpdate as error:
                self._screen.line(f"node {node}: {error}")
                continue
            self._simulated |= simulated
            self._node_of.update(dict.fromkeys(silos, node))

    def _register(self, grid: Grid, experiment: str) -> dict[str, Registration]:
        """Every silo makes ready; this trains tokenizers at first use, so say what happens."""
        names = [name for name in self._recipe.silo_names if name in self._node_of]
        self._screen.line(f"making {len(names)} silos ready (tokenizer, token stream) ...")
        messages = []
        for name in names:
            header = records.header_record(experiment, self._recipe, name)
            content = RecordDict({records.TASK: header})
            messages.append(self._message(name, content, records.QUERY_REGISTER))
        found: dict[str, Registration] = {}
        problems = []
        for reply in self._exchange(grid, messages, 0):
            silo = self._silo_of.pop(reply.metadata.reply_to_message_id)
            try:
                content = _content(reply)
                records.raise_failure(content)
                found[silo] = records.read_registration(content, silo)
            except BadUpdate as error:
                problems.append(_of_silo(silo, str(error)))
                continue
            r = found[silo]
            self._screen.line(
                f"  {silo}: {r.train_documents:,} documents, {r.duplicates:,} duplicates dropped, "
                f"vocabulary {r.vocabulary:,}, ready in {duration(r.prepare_s)}"
            )
            if r.lossy_documents:
                self._screen.line(
                    f"  warning: the tokenizer loses text of {silo} ({r.lossy_documents} documents "
                    "of its validation split): its bits per byte are lower than they should be"
                )
        unheard = [silo for silo in names if silo not in found]
        if unheard and not problems:
            problems.append(f"no answer from {', '.join(unheard)}; raise round_timeout_s")
        if problems:
            raise DeptError("\n".join(["not every silo is ready:", *problems]))
        self._warn_of_hidden_gpu(found)
        return found

    def _warn_of_hidden_gpu(self, found: dict[str, Registration]) -> None:
        if self._simulated and torch.cuda.is_available() and not any(
            r.on_gpu for r in found.values()
        ):  # fmt: skip
            self._screen.line(
                "warning: this machine has a GPU that the simulated silos do not see; run with "
                "--federation-config 'client-resources-num-gpus=1.0' (`dept run` does)"
            )

    def _estimate(self, registrations: list[Registration]) -> float:
        """Seconds of training, from one step of each silo."""
        share = (self._recipe.silos_per_round or len(registrations)) / len(registrations)
        steps = self._recipe.total_steps - self._server.round * self._recipe.inner.local_steps
        one_step = [r.step_s for r in registrations]
        if not self._simulated:
            return max(one_step) * steps
        # Flower gives each simulated client two cores, and `dept run` a GPU where there is one.
        on_gpu = any(r.on_gpu for r in registrations)
        side_by_side = 1 if on_gpu else max(1, min((os.cpu_count() or 1) // 2, len(registrations)))
        return share * sum(one_step) * steps / side_by_side

    def _failure(self, round_: int, silo: str, reason: str) -> None:
        self._screen.line(f"round {round_}: rejected: {_of_silo(silo, reason)}")
        self._ledger.write("failure", round=round_, silo=silo, reason=reason)


_EVALUATED = (
    "bits_per_byte",
    "perplexity",
    "unigram_bits_per_byte",
    "unigram_perplexity",
    "validation_loss",
    "validation_tokens",
    "activation_norm",
)
_TRAINED = (
    "loss",
    "last_loss",
    "tokens",
    "gradient_norm",
    "body_norm",
    "embedding_norm",
    "body_delta_norm",
    "embedding_delta_norm",
    "load_s",
    "evaluate_s",
    "train_s",
    "save_s",
    "encode_s",
)


def _picked(metrics: dict[str, float], keys: tuple[str, ...]) -> Event:
    """The metrics by these names and no others: a silo must not choose names in our ledger."""
    try:
        return {key: metrics[key] for key in keys}
    except KeyError as error:
        raise BadUpdate(f"has no metric {error}") from error


def _of_silo(silo: str, reason: str) -> str:
    return reason if reason.startswith(f"silo {silo}: ") else f"silo {silo}: {reason}"


def _content(reply: Message) -> RecordDict:
    if reply.has_error():
        reason = records.printable(str(reply.error.reason))
        raise BadUpdate(f"error {reply.error.code}: {reason}")
    return reply.content


def _wait_for(grid: Grid, message_id: str, deadline: float) -> tuple[Message | None, float]:
    """The reply to a message and the seconds it took to fetch once it was there.

    None when the deadline has passed without one.
    """
    pause_s = 0.02
    while True:
        began = time.monotonic()
        for reply in grid.pull_messages([message_id]):
            return reply, time.monotonic() - began
        if time.monotonic() >= deadline:
            return None, 0.0
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)


def _wait_for_nodes(grid: Grid) -> list[int]:
    deadline = time.monotonic() + _NODES_TIMEOUT_S
    while not (nodes := sorted(grid.get_node_ids())):
        if time.monotonic() >= deadline:
            raise DeptError(f"no node came online within {_NODES_TIMEOUT_S:.0f} s")
        time.sleep(0.5)
    return nodes
