"""Which silos a run has, on which node each one is, and which can be sent a task now."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from dept_fl import records
from dept_fl.errors import BadUpdate
from dept_fl.post import Post, Reply, Sent
from dept_fl.rounds import Server
from dept_fl.silo import Registration

QUERY_LIMIT_S = 300.0  # in a simulation the first query pays for starting every worker
_WENT, _RESTARTED = "its node went offline", "its node was started again"
_LOOK_S = 1.0
_ASK_AGAIN_S = 30.0  # a node whose silo could not be used; its owner may have mended it
GRACE_S = 120.0  # a reply that is there at the deadline can still be fetched this long


class Tells(Protocol):
    """Where news of members goes."""

    def joined(self, registration: Registration, new: bool) -> None: ...

    def refused(self, who: str, reason: str) -> None: ...


@dataclass
class _Node:
    """A node that is online; `name` is what the operator registered its key under, if any."""

    id: int
    name: str = ""
    activated: str = ""
    silos: list[str] | None = None
    next_ask: float = 0.0
    refused: dict[str, str] = field(default_factory=dict)  # by silo, what was last said of it


class Members:
    """Finds silos and registers them, while a run goes on.

    Args:
        limit_s: seconds a silo has to register.
        simulated: whether nodes are Flower's virtual ones, which host several silos each and
            neither come nor go.
    """

    def __init__(
        self, grid: Grid, post: Post, server: Server, tells: Tells, limit_s: float, simulated: bool
    ) -> None:
        self._grid, self._post, self._server, self._tells = grid, post, server, tells
        self._limit_s, self._simulated = limit_s, simulated
        self._nodes: dict[int, _Node] = {}
        self._node_of: dict[str, int] = {}  # of the silos that are registered
        self._next_look = 0.0
        self.during = 0  # the round in the making: who joins now takes part behind it

    # ---- who is there --------------------------------------------------------------------

    @property
    def present(self) -> list[str]:
        """The silos that are registered and online."""
        return sorted(self._node_of)

    def node_of(self, silo: str) -> int:
        return self._node_of[silo]

    def ready(self, silo: str) -> bool:
        """Whether the silo can be sent something now: a real node does one thing at a time."""
        return silo in self._node_of and not self.owing(silo)

    def owing(self, silo: str) -> list[Sent]:
        """What is on its way to the silo's node; a simulated one can do more than one thing."""
        if self._simulated:
            now = time.monotonic()
            return [s for s in self._post.under_way() if s.silo == silo and s.due > now]
        node = self._node_of.get(silo)
        return [s for s in self._post.under_way() if s.silo == silo or s.node == node]

    def absence(self, silo: str) -> str:
        """Why a silo cannot be sent anything."""
        for node in self._nodes.values():
            if silo in node.refused:
                return node.refused[silo]
        if any(silo in (node.silos or []) for node in self._nodes.values()):
            if silo not in self._node_of:
                return "registers again"
        elif silo not in self._node_of:
            return "is not online"
        owed = ", ".join(f"{sent.kind} of round {sent.round}" for sent in self.owing(silo))
        return f"still owes its reply to {owed}" if owed else "got lost; the round can do without"

    def refusals(self) -> list[str]:
        """What is wrong with nodes and silos that cannot take part."""
        return [reason for node in self._nodes.values() for reason in node.refused.values()]

    # ---- looking and asking --------------------------------------------------------------

    def look(self) -> None:
        """See which nodes came and went; ask new ones for their silos, and those to register."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_S
        online = {node.id: node for node in self._online()}
        for known in list(self._nodes.values()):
            now = online.get(known.id)
            if now is None:
                self._gone(known, _WENT)
            elif now.activated != known.activated:
                self._gone(known, _RESTARTED)
        for node in online.values():
            self._nodes.setdefault(node.id, node)
        self._ask()

    def _online(self) -> Iterable[_Node]:
        if self._simulated:
            return [_Node(node) for node in self._grid.get_node_ids()]
        return [
            _Node(info.node_id, info.name, info.last_activated_at)
            for info in self._grid.get_nodes()
        ]

    def _gone(self, node: _Node, reason: str) -> None:
        del self._nodes[node.id]
        for silo in [silo for silo, at in self._node_of.items() if at == node.id]:
            del self._node_of[silo]
        self._post.give_up(node.id, reason)
        for other in self._nodes.values():
            other.next_ask = 0.0  # its silo may be free for another now

    def lost(self, sent: Sent) -> None:
        """A task got lost on its way: a real silo registers anew, and may have changed."""
        if not self._simulated and self._node_of.get(sent.silo) == sent.node:
            del self._node_of[sent.silo]

    def _ask(self) -> None:
        messages: list[Message] = []
        sent: list[Sent] = []
        busy = {each.node for each in self._post.under_way()}
        for node in self._nodes.values():
            if node.next_ask > time.monotonic():
                continue
            if node.id in busy and not (self._simulated and node.silos):
                continue
            for silo in [""] if node.silos is None else self._to_register(node):
                messages.append(self._question(node, silo))
                sent.append(self._sent(node, silo, messages[-1]))
        if messages:
            self._post.send(messages, sent)

    def _to_register(self, node: _Node) -> list[str]:
        asked = {each.silo for each in self._post.under_way()}
        return [s for s in node.silos or [] if s not in self._node_of and s not in asked]

    def _question(self, node: _Node, silo: str) -> Message:
        kind = records.QUERY_REGISTER if silo else MessageType.QUERY
        limit_s = self._limit_s if silo else QUERY_LIMIT_S
        server = self._server
        header = records.header_record(server.experiment, server.recipe, silo, limit_s)
        return Message(RecordDict({records.TASK: header}), node.id, kind, ttl=limit_s + GRACE_S)

    def _sent(self, node: _Node, silo: str, message: Message) -> Sent:
        shared = self._server.shared
        largest = records.largest_reply({}, "fp32", rows=shared.size if shared and silo else 0)
        due = time.monotonic() + message.metadata.ttl - GRACE_S
        return Sent(node.id, silo, message.metadata.message_type, 0, largest, due)

    # ---- answers ---------------------------------------------------------------------------

    def take(self, reply: Reply) -> bool:
        """Take the reply if it answers a question of ours."""
        if reply.sent.kind not in (MessageType.QUERY, records.QUERY_REGISTER):
            return False
        node, silo = self._nodes.get(reply.sent.node), reply.sent.silo
        if node is None or reply.lost in (_WENT, _RESTARTED):
            return True
        try:
            if reply.message is None:
                raise BadUpdate(reply.lost or reply.bad)
            content = records.content_of(reply.message)
            if silo:
                self._register(node, records.read_registration(content, silo))
            else:
                node.silos = self._claimed(node, records.read_hosts(content))
                self._next_look = 0.0
        except BadUpdate as error:
            self._refuse(node, silo, str(error))
        else:
            node.refused.pop(silo, None)
        return True

    def _refuse(self, node: _Node, silo: str, reason: str) -> None:
        who = f"silo {silo}" if silo else f"node {node.name or node.id}"
        line = reason if reason.startswith(f"{who}: ") else f"{who}: {reason}"
        if node.refused.get(silo) != line:
            self._tells.refused(who, line)
        node.refused[silo] = line
        node.silos = None if not self._simulated else node.silos  # ask anew from the start
        node.next_ask = time.monotonic() + _ASK_AGAIN_S

    def _register(self, node: _Node, registration: Registration) -> None:
        if not self._simulated:
            self._check_identity(node, registration.silo)
        new = self._server.register(registration, self.during, bool(node.name))
        self._node_of[registration.silo] = node.id
        self._tells.joined(registration, new)

    def _claimed(self, node: _Node, silos: list[str]) -> list[str]:
        """The silos of a node, if it may host them."""
        if self._simulated:
            names = set(self._server.recipe.silo_names)
            return [silo for silo in silos if silo in names]
        if len(silos) != 1:
            raise BadUpdate(f"hosts {len(silos)} silos; a node of a deployment hosts one")
        silo = silos[0]
        self._check_identity(node, silo)
        for other in self._nodes.values():
            if other is not node and silo in (other.silos or []):
                if other.name or not node.name:
                    raise BadUpdate(f"claims silo {silo}, which node {other.id} hosts already")
                self._evict(other, silo)
        self._server.check_invited(silo)
        return silos

    def _check_identity(self, node: _Node, silo: str) -> None:
        """Nobody takes over the silo of a key that was registered under the silo's name.

        A key alone proves nothing: without SuperNode authentication Flower makes one up at
        every start.
        """
        if node.name and node.name != silo:
            raise BadUpdate(f"claims silo {silo}, but its key is registered as {node.name}")
        named = any(member.named for member in self._server.members.values())
        if not node.name and (named or any(each.name for each in self._nodes.values())):
            raise BadUpdate(
                f"claims silo {silo}, but keys are registered under names here: register this one "
                f"with --name {silo}"
            )

    def _evict(self, node: _Node, silo: str) -> None:
        """The silo's rightful node has come."""
        self._node_of.pop(silo, None)
        self._post.give_up(node.id, _RESTARTED)
        self._refuse(node, "", f"claimed silo {silo}, whose own key has come")
