"""The Flower strategy: the steps of `rounds.pretrain` with messages between them."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from dept_fl import records
from dept_fl.best import best_round, keep_checkpoint
from dept_fl.config import Recipe, require_silos
from dept_fl.cost import cost
from dept_fl.errors import BadUpdate, DeptError
from dept_fl.members import GRACE_S, QUERY_LIMIT_S, Members
from dept_fl.post import Post, Reply, Sent
from dept_fl.report import Event, Ledger, Screen, duration, plot
from dept_fl.rounds import Merge, Server, last_checkpoint, shared_tokenizer
from dept_fl.silo import Registration, with_shared_tokenizer
from dept_fl.trackers import Trackers

_RETURN_S = 120.0  # how long the final body waits for a lost silo; with keys, a node needs 60 s
_SHORTEST_TASK_S = 1.0
_LEAST_PATIENCE_S = 30.0
_ASKED_AT_MOST = 5  # times in one round, where a silo gets lost again and again
_SAMPLE_CHARACTERS = 2000  # of a silo's text in the ledger
# To look costs a request for each reply, milliseconds of the SuperLink; in simulation nothing.
_LOOK_S, _LOOK_S_A_SILO, _SIMULATED_LOOK_S = 1.0, 0.1, 0.1


class DeptStrategy(Strategy):
    """Pre-trains by DEPT over the silos that the grid's nodes host.

    Flower's own loop is not used: it holds all replies at once, has no quorum, deadline or
    resume. Here replies are fetched one at a time, checked, put on disk and dropped; the round
    is merged from there in the order of the silos' names, so that neither memory nor the sum
    depends on how many there are or which comes first.
    """

    def __init__(
        self, recipe: Recipe, home: Path, run_dir: Path, resume: bool, simulated: bool
    ) -> None:
        self._recipe = recipe
        self._home = home
        self._run_dir = run_dir
        self._resume = resume
        self._simulated = simulated
        self._ledger = Ledger(run_dir)
        self._screen = Screen()
        self._round_s: list[float] = []
        self._push_s = self._wait_s = self._save_s = 0.0
        self._unsaved = False  # whether a round is done that has no checkpoint
        self._whole_in: dict[str, int] = {}  # by silo, the last round for which it wanted all
        self._sent: dict[str, Event] = {}  # by silo, what of its task goes into the ledger
        self._answered: Reply  # that the reply which is being aggregated came in
        self._rows: list[Event] = []
        self._server: Server
        self._members: Members
        self._post: Post
        self._merge: Merge
        self._trackers: Trackers

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
        experiment, tell = self._server.experiment, self._screen.line
        with Trackers(self._recipe, experiment, self._ledger, tell) as self._trackers:
            try:
                while self._server.round < self._recipe.rounds:
                    self._run_round(grid)
                self._finish(grid)
            finally:
                self._save()
            self._ledger.write("end", round=self._server.round, seconds=time.monotonic() - began)
        return self._server

    def _prepare(self, grid: Grid) -> None:
        if self._simulated:
            require_silos(self._recipe)
        self._recipe = self._with_tokenizer(self._recipe)
        saved = last_checkpoint(self._run_dir, self._recipe) if self._resume else None
        experiment = saved[1]["experiment"] if saved else uuid4().hex[:12]
        self._server = Server(self._recipe, experiment, shared_tokenizer(self._recipe))
        if saved:
            self._server.load(*saved)
            self._ledger.rewind(self._server.round)
            self._ledger.write("resume", round=self._server.round)
        self._post = Post(grid)
        limit_s = self._deadline_s(len(self._recipe.silo_names))
        self._members = Members(grid, self._post, self._server, self, limit_s, self._simulated)
        # However short rounds are: the first answers pay for starting processes everywhere.
        self._wait_for_silos(limit_s if self._simulated else max(limit_s, QUERY_LIMIT_S))
        if not saved:
            self._server.save(self._run_dir)

    def _with_tokenizer(self, recipe: Recipe) -> Recipe:
        if recipe.own_tokenizers:
            return recipe
        if not self._simulated and not recipe.common_tokenizer:
            raise DeptError(
                "tokenizer=shared without shared_tokenizer: only a simulation can train one over "
                "all silos' text; name a file that every silo has"
            )
        if not recipe.common_tokenizer:
            self._screen.line("making the shared tokenizer from all silos' text ...")
        return with_shared_tokenizer(recipe, self._home)

    def _wait_for_silos(self, limit_s: float) -> None:
        """Every simulated silo makes ready; of real ones, as many as the run needs to begin."""
        if self._simulated:
            names = self._recipe.silo_names
            self._screen.line(f"making {len(names)} silos ready (tokenizer, token stream) ...")
        else:
            self._screen.line(f"waiting for silos ({self._recipe.min_silos} or more) ...")
        began, pause = time.monotonic(), self._pause()
        while not self._enough_silos():
            self._members.look()
            for reply in self._post.replies():
                self._members.take(reply)
                pause.reset()
            if self._is_hopeless(began, limit_s):
                raise self._not_ready(limit_s)
            pause.wait()
        self._warn_of_hidden_gpu(self._server.registrations)

    def _is_hopeless(self, began: float, limit_s: float) -> bool:
        """Whether no more silos will come. Simulated ones are all there once their nodes are."""
        now = time.monotonic()
        if not self._simulated:
            return now > began + limit_s
        asked = self._post.under_way()
        answered = bool(asked or self._members.refusals()) or now > began + QUERY_LIMIT_S
        return answered and all(sent.due < now for sent in asked)

    def _enough_silos(self) -> bool:
        present = self._members.present
        if self._simulated:
            return present == self._recipe.silo_names
        return len(present) >= self._recipe.min_silos

    def _not_ready(self, limit_s: float) -> DeptError:
        problems = sorted(self._members.refusals())
        present = self._members.present
        if not self._simulated:
            head = (
                f"within {limit_s:g} s came {len(present)} of "
                f"min_silos={self._recipe.min_silos} silos: {', '.join(present) or 'none'}"
            )
            return DeptError("\n".join([head, *problems]))
        missing = ", ".join(sorted(set(self._recipe.silo_names) - set(present)))
        problems = problems or [f"no answer from {missing}; raise round_timeout_s"]
        return DeptError("\n".join(["not every silo is ready:", *problems]))

    def _run_round(self, grid: Grid) -> None:
        """One round: silos whose update was not accepted are asked again while the quorum lacks."""
        began, self._save_s = time.monotonic(), 0.0
        self._merge, self._rows = self._server.open_round(self._empty_spool()), []
        self._members.during = self._merge.round
        for attempt in range(self._recipe.round_attempts):
            self.aggregate_train(self._merge.round, self._gather_round(grid))
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

    def _empty_spool(self) -> Path:
        folder = self._run_dir / "spool"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def _close_round(self, began: float) -> None:
        merging = time.monotonic()
        clipped = self._server.close_round(self._merge)
        done = time.monotonic()
        seconds = done - began
        self._round_s.append(seconds)
        # Events before the checkpoint: a kill between them costs nothing, since a resume
        # drops what was written behind its checkpoint.
        self._rows.sort(key=lambda row: str(row["silo"]))
        self._write_round(clipped, merge_s=done - merging, seconds=seconds)
        self._keep_if_best(self._server.round - 1)
        shutil.rmtree(self._run_dir / "spool")
        self._unsaved = True
        left = self._recipe.rounds - self._server.round
        rest = duration(left * sum(self._round_s) / len(self._round_s))
        title = f"round {self._server.round} of {self._recipe.rounds}, {duration(seconds)}"
        self._screen.round(self._rows, f"{title}; left: about {rest}" if left else title)
        if self._merge.missing:
            self._screen.line(f"  without {', '.join(self._merge.missing)}")

    def _save(self) -> float:
        """Write the checkpoint of the last round, if it has none; the seconds that it took.

        That is once the silos have the next task, so that they do not wait for the server's disk.
        What a silo keeps reaches a round further back (`Server.task`).
        """
        if not self._unsaved:
            return 0.0
        self._unsaved = False
        began = time.monotonic()
        self._server.save(self._run_dir)
        seconds = time.monotonic() - began
        self._ledger.write("checkpoint", round=self._server.round, save_s=seconds)
        self._trackers.follow()
        return time.monotonic() - began

    def _keep_if_best(self, evaluated: int) -> None:
        """Of the round whose body was evaluated last, in GLOB and TRIM, whose server has a model.

        Called before its checkpoint is dropped; a kill behind this does the round again.
        """
        recipe = self._recipe
        if not (recipe.keep_best and self._server.embeddings and recipe.evaluates(evaluated)):
            return
        if best_round(self._ledger.read(), recipe.first_model) == evaluated:
            keep_checkpoint(self._run_dir, evaluated)

    def _write_round(self, clipped: dict[str, float], merge_s: float, seconds: float) -> None:
        this = self._server.round
        for row in self._rows:
            if self._recipe.evaluates(this - 1):
                evaluated = {k: row[k] for k in _EVALUATED}
                # What arrived, and was evaluated, is the body of the round before.
                self._ledger.write(
                    "silo_eval", round=this - 1, during_round=this, silo=row["silo"], **evaluated
                )
            trained = {k: v for k, v in row.items() if k not in _EVALUATED}
            scale = clipped.get(str(row["silo"]), 1.0)
            self._ledger.write("silo_train", round=this, clipped_to=scale, **trained)
        self._ledger.write(
            "round",
            round=this,
            sampled=self._merge.sampled,
            merged=self._merge.merged,
            push_s=self._push_s,
            wait_s=self._wait_s,
            save_s=self._save_s,  # of the round before
            outer_s=merge_s,
            seconds=seconds,
        )

    def _finish(self, grid: Grid) -> None:
        """Every silo gets the final body, evaluates it and keeps it."""
        this, self._rows = self._server.round, []
        self._members.during = this
        self.aggregate_evaluate(this, self._gather_final(grid))
        self._rows.sort(key=lambda row: str(row["silo"]))
        self._screen.final(self._rows)
        for row in self._rows:
            if row["sample"]:
                self._screen.line(f"{row['silo']} writes: {row['sample']!r}")
        plot(self._ledger.read(), self._run_dir / "curves.png")
        missing = sorted(set(self._server.final_names) - {str(row["silo"]) for row in self._rows})
        self._tell_end(missing)
        if missing and self._simulated:
            raise DeptError(f"the silos {', '.join(missing)} did not take the final body")

    def _tell_end(self, missing: list[str]) -> None:
        self._screen.line()
        if missing:
            self._screen.line(
                f"without the final body: {', '.join(missing)}; once they are back, submit again "
                "with resume=true and this run-dir to send it"
            )
        self._screen.line(f"metrics      {self._ledger.file}")
        self._screen.line(f"plot         {self._run_dir / 'curves.png'}")
        self._screen.line(f"page         dept report {self._run_dir}")
        self._screen.line(f"checkpoints  {self._run_dir / 'checkpoints'}")
        if self._simulated:
            final = self._home / "silos" / "<silo>" / "state" / self._server.experiment / "final"
            self._screen.line(f"models       {final}")
            if not os.environ.get("DEPT_OWN_SUPERLINK"):
                self._screen.line("Flower's local SuperLink goes on running; `make stop` ends it.")

    # ---- Flower's pairs of configure and aggregate ----------------------------------------------

    def summary(self) -> None:
        """Print the resolved plan and write it to metrics.jsonl."""
        recipe, server = self._recipe, self._server
        registrations = [server.registrations[name] for name in self._members.present]
        costs = {r.silo: cost(recipe, server.layout, r.vocabulary) for r in registrations}
        seconds = self._estimate(registrations)
        names = server.silo_names
        sampled = min(recipe.silos_per_round or len(names), len(names))
        words = [
            f"{recipe.name}: {recipe.label}, seed {recipe.seed}, experiment {server.experiment}",
            f"{recipe.rounds} rounds of {recipe.inner.local_steps} local steps of "
            f"{recipe.inner.batch_size} x {recipe.sequence_tokens} tokens; {sampled} of "
            f"{len(names)} silos a round; outer optimiser: {recipe.outer.optimizer}",
            f"body of {server.layout.body_parameters() / 1e6:.2f} M parameters travels; "
            + ("embeddings travel too" if server.embeddings else "embeddings stay at their silo"),
            f"training takes about {duration(seconds)}",
            f"run-dir {self._run_dir}",
            f"home    {self._home}",
        ]
        if server.round:
            words.insert(1, f"resumed behind round {server.round}")
        if fingerprint := recipe.model.start_fingerprint:
            words.append(f"start   {recipe.model.start} ({fingerprint[:12]})")
        self._screen.plan(costs, registrations, words)
        self._ledger.write(
            "plan",
            name=recipe.name,
            recipe=recipe.label,
            experiment=server.experiment,
            rounds=recipe.rounds,
            seed=recipe.seed,
            body_parameters=server.layout.body_parameters(),
            estimate_s=seconds,
            versions=_versions(),
            silos={
                r.silo: {
                    "device": "gpu" if r.on_gpu else "cpu",
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
        """One message for each silo that `config` names, all with the same record of the body."""
        return self._task_messages(arrays, config, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check each reply and keep it for the merge; a bad one costs one line."""
        for reply in replies:
            answered, began = self._answered, time.perf_counter()
            try:
                row = self._accept(reply, answered)
            except BadUpdate as error:
                self._failure(server_round, answered.sent.silo, str(error))
            else:
                row["merge_s"] = time.perf_counter() - began
                self._rows.append(row)
            del reply  # else it would be in memory while the next is fetched
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The final body to each silo that `config` names."""
        return self._task_messages(arrays, config, MessageType.EVALUATE)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Collect the silos' final evaluations."""
        for reply in replies:
            silo = self._answered.sent.silo
            try:
                metrics, text, warning = records.read_finished(records.content_of(reply), silo)
                row = _picked(metrics, _EVALUATED)
            except BadUpdate as error:
                self._failure(server_round, silo, str(error))
                continue
            if warning:
                self._warning(server_round, silo, warning)
            self._ledger.write("silo_eval", round=server_round, silo=silo, final=True, **row)
            if text:
                shown = text[:_SAMPLE_CHARACTERS]
                self._ledger.write("sample", round=server_round, silo=silo, text=shown)
            self._rows.append({"silo": silo, "sample": text, **row})
        return None

    # ---- tasks out, updates in ------------------------------------------------------------------

    def _gather_round(self, grid: Grid) -> Iterator[Message]:
        """The replies to this round's task from all silos that have not answered well yet.

        It ends when all have answered, when those that have not are lost and the quorum is
        met, or when the time is over.
        """
        merge = self._merge

        def enough(_: float) -> bool:
            return self._server.has_quorum(merge)

        return self._gather(grid, MessageType.TRAIN, merge.missing, merge.round, enough)

    def _gather_final(self, grid: Grid) -> Iterator[Message]:
        def enough(idle_s: float) -> bool:
            return idle_s > _RETURN_S

        names = self._server.final_names
        return self._gather(grid, MessageType.EVALUATE, names, self._server.round, enough)

    def _gather(
        self,
        grid: Grid,
        kind: str,
        silos: list[str],
        round_: int,
        enough: Callable[[float], bool],
    ) -> Iterator[Message]:
        """Send silos their task and yield the replies as they come.

        A silo that is lost (its node went, its process died) gets its task again when it is
        back. `enough` says whether the others will do; it gets the seconds for which no silo
        has been at work.
        """
        task = _Task(
            kind, round_, set(silos), self._deadline_s(len(silos)), self._pause(len(silos))
        )
        while task.waiting and time.monotonic() < task.until:
            self._members.look()
            self._ask(grid, task, most=1 if enough(0.0) else _ASKED_AT_MOST)
            self._save_s += (saving_s := self._save())
            task.busy_s += saving_s
            yield from self._take(grid, task)
            if self._is_over(task, enough):
                break
            task.pause.wait()
        self._wait_s = time.monotonic() - task.began - task.busy_s
        for sent in self._post.under_way():
            if task.is_of(sent) and time.monotonic() >= task.until:
                setting = "round_timeout_s" if task.until == task.deadline else "patience"
                waited = f"{round(task.until - task.began, 1):g} s ({setting})"
                self._failure(round_, sent.silo, f"no reply within {waited}")

    def _ask(self, grid: Grid, task: _Task, most: int) -> None:
        """Send the task to those who can take it and have not been asked too often."""
        task.most = most
        able = [s for s in task.waiting if self._members.ready(s) and task.asked[s] < most]
        if able:
            began = time.monotonic()
            self._send(grid, task, sorted(able))
            task.asked.update(able)
            self._push_s = time.monotonic() - began
            task.busy_s += self._push_s

    def _take(self, grid: Grid, task: _Task) -> Iterator[Message]:
        for reply in self._post.replies():
            task.pause.reset()
            began = time.monotonic() - reply.fetch_s
            if self._wants_all(reply, task):
                self._send(grid, task, [reply.sent.silo])
            elif self._is_wanted(reply, task):
                task.waiting.discard(reply.sent.silo)
                message, self._answered = reply.message, replace(reply, message=None)
                del reply  # so that one reply at a time is in memory
                assert message is not None
                yield message
                del message
            task.busy_s += time.monotonic() - began

    def _wants_all(self, reply: Reply, task: _Task) -> bool:
        """Whether a silo answers, once in a round, that a change does not do for it."""
        silo, message = reply.sent.silo, reply.message
        if not task.is_of(reply.sent) or message is None or message.has_error():
            return False
        if self._whole_in.get(silo) == task.round or not records.needs_whole(message.content):
            return False
        self._whole_in[silo] = task.round
        self._warning(task.round, silo, f"{records.reason(message.content)}; it gets all")
        return True

    def _is_over(self, task: _Task, enough: Callable[[float], bool]) -> bool:
        """Whether nobody is waited for any more; who is missing is told once."""
        now = time.monotonic()
        under_way = [
            s for s in self._post.under_way() if s.due > now and s.round in (task.round, 0)
        ]
        at_work = task.waiting & {sent.silo for sent in under_way}  # not on an earlier round
        if enough(0.0) and not self._simulated:
            # Stragglers get as long again as the quorum took, or what `patience` says.
            others_s = max((self._recipe.patience - 1) * (now - task.began), _LEAST_PATIENCE_S)
            task.until = min(task.until, now + others_s)
        if at_work:
            task.idle_since = now
        elif enough(now - task.idle_since):
            return True
        soon = {s for s in task.waiting if self._members.ready(s) and task.asked[s] < task.most}
        for silo in sorted(task.waiting - at_work - soon - task.told):
            task.told.add(silo)
            self._absent(task.round, silo, self._members.absence(silo))
        return not at_work and all(task.asked[silo] >= task.most for silo in task.waiting)

    def _is_wanted(self, reply: Reply, task: _Task) -> bool:
        """Whether the reply is an answer to the present task; deal with it if it is not."""
        if self._members.take(reply):
            return False
        sent, present = reply.sent, task.is_of(reply.sent)
        if reply.lost:
            self._members.lost(sent)
            self._failure(sent.round, sent.silo, reply.lost)
            if present and self._simulated:  # its worker does not come back
                task.waiting.discard(sent.silo)
            return False
        if not present:
            self._late(sent)
            return False
        if reply.bad:
            task.waiting.discard(sent.silo)
            self._failure(task.round, sent.silo, reply.bad)
            return False
        return True

    def _send(self, grid: Grid, task: _Task, silos: list[str]) -> None:
        limit_s = max(task.deadline - time.monotonic(), _SHORTEST_TASK_S)
        header = records.header_record(self._server.experiment, self._recipe, limit_s=limit_s)
        config = ConfigRecord({**header, "silos": silos})
        train = task.kind == MessageType.TRAIN
        configure = self.configure_train if train else self.configure_evaluate
        # Records of the body are made where it is known whether any silo gets it whole.
        messages = configure(task.round, ArrayRecord(), config, grid)
        sent = [
            Sent(
                node=self._members.node_of(silo),
                silo=silo,
                kind=task.kind,
                round=task.round,
                largest_reply=self._largest_reply(silo, task.round),
                due=task.deadline,
            )
            for silo in silos
        ]
        self._post.send(messages, sent)

    def _largest_reply(self, silo: str, round_: int) -> int:
        body = self._server.layout.synchronised(self._recipe, round_)
        arrays = {**body, **self._server.shapes(silo)}
        return records.largest_reply(arrays, self._recipe.wire.up)

    def _task_messages(self, body: ArrayRecord, config: ConfigRecord, kind: str) -> list[Message]:
        header = {key: value for key, value in config.items() if key != "silos"}
        silos: list[str] = config["silos"]  # type: ignore[assignment]
        messages = []
        # What all silos get alike is serialised, and kept, once: the whole, and the change.
        bodies = {False: body} if body else {}
        embeddings: dict[bool, ArrayRecord] = {}
        for silo in silos:
            task = self._server.task(silo)
            if self._whole_in.get(silo) != task.round:
                task = self._server.as_change(task)
            sent, changes = task.change or task, task.change is not None
            if changes not in bodies:
                bodies[changes] = records.to_record(sent.body)
            if changes not in embeddings or self._server.registrations[silo].rows is not None:
                embeddings[changes] = records.to_record(sent.embeddings)
            addressed = ConfigRecord({**header, "silo": silo})
            content = records.task_record(task, addressed, bodies[changes], embeddings[changes])
            down = records.split_bytes(content)
            self._sent[silo] = {
                "bytes_down_body": down[0],
                "bytes_down_embeddings": down[1],
                "down_whole": not changes,
            }
            ttl = float(header["limit_s"]) + GRACE_S  # type: ignore[arg-type]
            group = str(task.round)  # Flower's logs show it
            node = self._members.node_of(silo)
            messages.append(Message(content, node, kind, ttl=ttl, group_id=group))
        return messages

    def _accept(self, message: Message, reply: Reply) -> Event:
        content, silo = records.content_of(message), reply.sent.silo
        body = self._server.layout.synchronised(self._recipe, self._merge.round)
        embeddings = self._server.shapes(silo)
        update = records.read_update(content, body, embeddings, self._recipe.wire.up)
        if update.silo != silo:
            raise BadUpdate(f"answers for silo {update.silo!r}")
        due = self._recipe.evaluates(update.round - 1)
        evaluated = _picked(update.metrics, _EVALUATED) if due else {}
        own = _picked(update.metrics, _TRAINED)
        if own["tokens"] != self._recipe.round_tokens:
            raise BadUpdate(
                f"says it trained on {own['tokens']:g} tokens; a round has "
                f"{self._recipe.round_tokens}"
            )
        self._server.add(self._merge, update)
        if update.warning:
            self._warning(update.round, silo, update.warning)
        up = records.split_bytes(content)
        return {
            "silo": silo,
            **evaluated,
            **own,
            "body_delta_norm": self._merge.body_norm(silo),
            "transfer_s": reply.fetch_s,
            "tokens_per_s": own["tokens"] / max(own["train_s"], 1e-3),
            "bytes_up_body": up[0],
            "bytes_up_embeddings": up[1],
            **self._sent[silo],
        }

    def _pause(self, silos: int | None = None) -> _Pause:
        """Between looks for the replies of so many silos; None: nobody knows of how many."""
        if self._simulated:
            return _Pause(_SIMULATED_LOOK_S)
        return _Pause(_LOOK_S if silos is None else min(_LOOK_S, _LOOK_S_A_SILO * silos))

    def _deadline_s(self, silos: int) -> float:
        """Seconds until replies are due: simulated silos queue for the machine."""
        return self._recipe.round_timeout_s * (max(silos, 1) if self._simulated else 1)

    # ---- news -----------------------------------------------------------------------------------

    def joined(self, registration: Registration, new: bool) -> None:
        """A silo registered: tell, and write it down."""
        r, during = registration, self._members.during
        if not self._simulated:
            late = f"; it takes part from round {during + 1} on"
            if during >= self._recipe.rounds:
                late = "; too late for this run"
            self._screen.line(
                f"silo {r.silo} {'joins' if new else 'is back'}{late if new and during else ''}"
            )
        if new or not during:
            self._screen.line(
                f"  {r.silo}: {r.train_documents:,} documents, {r.duplicates:,} duplicates "
                f"dropped, vocabulary {r.vocabulary:,}, ready in {duration(r.prepare_s)}"
            )
        if r.lossy_documents:
            self._screen.line(
                f"  warning: the tokenizer loses text of {r.silo} ({r.lossy_documents} documents "
                "of its validation split): its bits per byte are lower than they should be"
            )
        self._ledger.write(
            "join", round=during, silo=r.silo, new=new, vocabulary=r.vocabulary,
            train_tokens=r.train_tokens,
        )  # fmt: skip

    def refused(self, who: str, reason: str) -> None:
        """A node or silo cannot take part: tell, and write it down."""
        self._screen.line(f"refused: {reason}")
        silo = who.removeprefix("silo ") if who.startswith("silo ") else ""
        self._ledger.write("failure", round=self._members.during, silo=silo, reason=reason)

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

    def _absent(self, round_: int, silo: str, reason: str) -> None:
        self._screen.line(f"round {round_}: {_of_silo(silo, reason)}")
        self._ledger.write("absent", round=round_, silo=silo, reason=reason)

    def _late(self, sent: Sent) -> None:
        self._screen.line(f"silo {sent.silo}: its {sent.kind} of round {sent.round} came late")
        self._ledger.write("late", round=self._members.during, silo=sent.silo, of_round=sent.round)

    def _warning(self, round_: int, silo: str, reason: str) -> None:
        self._screen.line(f"round {round_}: warning: {_of_silo(silo, reason)}")
        self._ledger.write("warning", round=round_, silo=silo, reason=reason)

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
    "settle_s",
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


def _versions() -> dict[str, str]:
    """Of what decides a run's bits at the server."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("flwr", "torch", "transformers")
    }


def _of_silo(silo: str, reason: str) -> str:
    return reason if reason.startswith(f"silo {silo}: ") else f"silo {silo}: {reason}"


class _Pause:
    """Waits between looks: short while replies come, `longest_s` at most."""

    _SHORTEST_S = 0.02

    def __init__(self, longest_s: float) -> None:
        self._seconds, self._longest_s = self._SHORTEST_S, longest_s

    def reset(self) -> None:
        self._seconds = self._SHORTEST_S

    def wait(self) -> None:
        time.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, self._longest_s)


@dataclass
class _Task:
    """A task on its way to several silos.

    Attributes:
        waiting: who has not answered.
        deadline: when the silos end themselves; `until`: when the server stops waiting.
        asked: how often each silo was; `most` how often it may be.
        told: whose absence was told.
        idle_since: since when no silo has been at work.
        busy_s: seconds in which the server was not waiting.
    """

    kind: str
    round: int
    waiting: set[str]
    limit_s: float
    pause: _Pause
    asked: Counter[str] = field(default_factory=Counter)
    most: int = 1
    told: set[str] = field(default_factory=set)
    busy_s: float = 0.0

    def __post_init__(self) -> None:
        self.began = self.idle_since = time.monotonic()
        self.deadline = self.until = self.began + self.limit_s

    def is_of(self, sent: Sent) -> bool:
        """Whether a message is this task, for a silo that has not answered."""
        return (sent.kind, sent.round) == (self.kind, self.round) and sent.silo in self.waiting
