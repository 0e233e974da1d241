"""Helpers of the tests: a federation without Flower, and Flower's Grid inside one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import app as client_app
from dept_fl.config import Recipe
from dept_fl.rounds import Server, pretrain, shared_tokenizer
from dept_fl.silo import Silo, Update, with_shared_tokenizer
from dept_fl.strategy import DeptStrategy

Tamper = Callable[[Message, Message], Message | None]

ALL_VARIANTS = {
    "glob": "variant=glob tokenizer=shared",
    "trim": "variant=trim tokenizer=shared",
    "spec": "variant=spec tokenizer=shared",
    "spec-opt": "variant=spec tokenizer=own",
}


def start(recipe: Recipe, home: Path, experiment: str = "") -> tuple[Server, dict[str, Silo]]:
    """Server and silos of a run that has not begun."""
    experiment = experiment or uuid4().hex[:12]
    recipe = with_shared_tokenizer(recipe, home)
    silos = {name: Silo(name, recipe, home, experiment) for name in recipe.silo_names}
    server = Server(recipe, experiment, shared_tokenizer(recipe))
    for silo in silos.values():
        server.register(silo.register())
    return server, silos


def trained(recipe: Recipe, home: Path) -> tuple[Server, dict[str, Silo]]:
    """The whole run by the plain algorithm."""
    server, silos = start(recipe, home)
    pretrain(server, silos)
    return server, silos


def train_round(server: Server, silos: Mapping[str, Silo]) -> dict[str, Update]:
    """One round of the plain algorithm with those of the sampled silos that are given."""
    updates = {}
    with TemporaryDirectory() as folder:
        merge = server.open_round(Path(folder))
        for name in merge.sampled:
            if name in silos:
                updates[name] = silos[name].train(server.task(name))
                server.add(merge, updates[name])
        server.close_round(merge)
    return updates


def run(
    recipe: Recipe,
    home: Path,
    run_dir: Path,
    nodes: int = 2,
    tamper: Tamper | None = None,
    resume: bool = False,
) -> tuple[Server, InProcessGrid]:
    """The whole run through Flower's messages."""
    run_dir.mkdir(exist_ok=True)
    grid = InProcessGrid(nodes, home, tamper)
    return DeptStrategy(recipe, home, run_dir, resume, simulated=True).start(grid), grid


def silos_of(server: Server, home: Path) -> dict[str, Silo]:
    """The silos of a run, to look at what they keep."""
    names = server.recipe.silo_names
    return {name: Silo(name, server.recipe, home, server.experiment) for name in names}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal names and, bit for bit, equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def state_of(server: Server, silos: dict[str, Silo]) -> dict[str, torch.Tensor]:
    """Everything that training made: the server's tensors and each silo's newest state."""
    found = {**server.body, **server.embeddings}
    for name, silo in silos.items():
        task = server.task(name)
        state = silo._state(task.start_round)
        for part in ("embeddings", "moments", "lost"):
            found |= {f"{name}/{part}/{n}": t for n, t in getattr(state, part).items()}
    return found


class InProcessGrid(Grid):
    """Flower's Grid over nodes in this process, which call the real ClientApp.

    Args:
        nodes: how many virtual nodes, or for a deployment the silo files of real ones.
        tamper: gets each reply before the server does; it may change, replace or drop it.

    Attributes:
        nodes: by id what each node is configured with and, in a deployment, Flower's facts of it;
            tests may add and remove nodes while a run goes on.
    """

    def __init__(
        self,
        nodes: int | list[Path],
        home: Path,
        tamper: Tamper | None = None,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._home, self._tamper = home, tamper
        self.nodes: dict[int, tuple[dict[str, Any], NodeInfo]] = {}
        if isinstance(nodes, int):
            for i in range(nodes):
                partition = {"partition-id": i, "num-partitions": nodes}
                self.nodes[1000 + i] = (partition, NodeInfo(node_id=1000 + i))
        else:
            for file in nodes:
                self.join(file)
        self._replies: dict[str, Message] = {}
        self.sent: list[Message] = []
        self.received: list[Message] = []

    def join(self, file: Path, name: str = "") -> int:
        """A SuperNode comes online with a silo's file; returns its id."""
        node = 1000 + len(self.nodes)
        while node in self.nodes:
            node += 1
        info = NodeInfo(node_id=node, name=name, last_activated_at=str(uuid4()))
        self.nodes[node] = ({"silo": str(file)}, info)
        return node

    def restart(self, node: int) -> None:
        """A SuperNode was started again."""
        self.nodes[node][1].last_activated_at = str(uuid4())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{len(self.sent)}"
            self.sent.append(message)
            ids.append(message.metadata.message_id)
            reply: Message | None = self._answer(message)
            if self._tamper is not None:
                reply = self._tamper(message, reply)
            if reply is not None:
                self.deliver(reply, message)
        return ids

    def deliver(self, reply: Message, message: Message) -> None:
        """The reply to a message reaches the server; also one that `tamper` held back."""
        self.received.append(reply)
        self._replies[message.metadata.message_id] = reply

    def _answer(self, message: Message) -> Message:
        if message.metadata.dst_node_id not in self.nodes:  # it went since the server looked
            return Message(Error(5, "Node Unavailable"), reply_to=message)
        node, _ = self.nodes[message.metadata.dst_node_id]
        context = Context(
            run_id=1,
            node_id=message.metadata.dst_node_id,
            node_config=node,
            state=RecordDict(),
            run_config={"home": str(self._home)},
        )
        try:
            return client_app(message, context)
        except Exception as error:  # what Flower's own client process makes of an exception
            return Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [info for _, info in self.nodes.values()]

    def send_and_receive(self, messages: Iterable[Message], **_: Any) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError
