"""Messages on their way to nodes, and their replies, of which one at a time is in memory.

Flower's own `pull_messages` fetches whatever a reply holds, waits for one that is still being
sent, and raises on bytes that are no message. From a SuperLink replies are therefore fetched
here, object by object and within a limit; one that is not all there yet is left for later.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.superlink.grid.http_grid import HttpGrid
from google.protobuf.message import DecodeError
from httpx import HTTPStatusError, codes

from dept_fl.errors import BadUpdate
from dept_fl.records import printable

_BYTES_OF_AN_OBJECT = 2048  # in the mean at least, but for a thousand small ones
_BYTES_OF_FACTS = 4 << 20  # of all that is not numbers of arrays; in memory they take 40 times more
_SENDING_S = 200.0  # without an object: its sender has stopped, Flower allows 180 s between two
_LOOK_S, _LOOK_AGAIN_S = 0.5, 0.25
_AT_A_TIME = 2  # objects that a SuperNode sends side by side
_CHUNK = b"ArrayChunk "
_LOST = frozenset({3, 4, 5, 8})  # Flower's codes: message gone, node gone, its process died


@dataclass(frozen=True)
class Sent:
    """A message on its way.

    Attributes:
        silo: whom it is for; empty for a question to a node.
        kind: Flower's message type.
        round: of the task; 0 for others.
        largest_reply: bytes.
        due: time.monotonic() at which the silo ends itself.
    """

    node: int
    silo: str
    kind: str
    round: int
    largest_reply: int
    due: float


@dataclass(frozen=True)
class Reply:
    """What came of a message.

    Attributes:
        message: None where nothing will come.
        lost: why nothing will come: the silo may well be asked again.
        bad: why what came cannot be a message.
        fetch_s: seconds of the transfer.
    """

    sent: Sent
    message: Message | None = None
    lost: str = ""
    bad: str = ""
    fetch_s: float = 0.0


class Post:
    """Sends messages and hands out replies as they come."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._under_way: dict[str, Sent] = {}
        self._never_sent: list[Reply] = []
        self._last_look: dict[str, str] = {}  # by message id, why nothing more will come
        self._fetch = _Fetch(grid) if isinstance(grid, HttpGrid) else None

    def send(self, messages: list[Message], sent: Iterable[Sent]) -> None:
        """Send them; the list is emptied, so that only Flower holds what is on its way."""
        ids = list(self._grid.push_messages(messages))
        messages.clear()
        for message_id, each in zip(ids, sent, strict=True):
            if message_id:
                self._under_way[message_id] = each
            else:
                self._never_sent.append(Reply(each, lost="its node is not registered any more"))

    def under_way(self) -> list[Sent]:
        return list(self._under_way.values())

    def give_up(self, node: int, reason: str) -> None:
        """The node is gone: what it has not answered by now is lost."""
        for message_id, sent in self._under_way.items():
            if sent.node == node:
                self._last_look[message_id] = reason

    def replies(self) -> Iterator[Reply]:
        """What has come since the last call. Drop each before taking the next."""
        last, self._last_look = self._last_look, {}
        while self._never_sent:
            yield self._never_sent.pop()
        if self._fetch is None:
            yield from self._from_grid()
        else:
            yield from self._from_superlink(self._fetch)
        for message_id, reason in last.items():
            sent = self._under_way.pop(message_id, None)
            if sent is not None:
                yield Reply(sent, lost=reason)

    def _from_grid(self) -> Iterator[Reply]:
        for message_id in list(self._under_way):
            began = time.monotonic()
            for message in self._grid.pull_messages([message_id]):
                sent = self._under_way.pop(message_id)
                yield _reply(sent, message, time.monotonic() - began)

    def _from_superlink(self, fetch: _Fetch) -> Iterator[Reply]:
        for message_id in fetch.ask(self._under_way):
            yield Reply(self._under_way.pop(message_id), bad="is not a message")
        for message_id in fetch.announced():
            sent = self._under_way.get(message_id)
            if sent is None:  # given up meanwhile
                fetch.drop(message_id)
                continue
            began = time.monotonic()
            try:
                message = fetch.message(message_id, sent.largest_reply)
            except BadUpdate as error:
                reply = Reply(sent, bad=str(error))
            except _BrokenOff as error:
                reply = Reply(sent, lost=str(error))
            else:
                if message is None:
                    continue
                reply = _reply(sent, message, time.monotonic() - began)
                del message
            del self._under_way[message_id]
            yield reply
            del reply


def _reply(sent: Sent, message: Message, fetch_s: float) -> Reply:
    if message.has_error() and message.error.code in _LOST:
        reason = printable(str(message.error.reason), 200)
        return Reply(sent, lost=f"{reason} (Flower's code {message.error.code})")
    return Reply(sent, message, fetch_s=fetch_s)


class _BrokenOff(Exception):
    """The sender of a reply stopped in the middle of it."""


@dataclass
class _Announced:
    """A reply that a silo has begun to send.

    Attributes:
        ids: of its objects in the order in which they are sent; the last is the message itself.
        missing: the one that is waited for; a large one may still be sent after the last.
        there: those that are known to be there.
        since: when the last of them was seen to come.
    """

    message_id: str
    ids: list[str]
    missing: str
    since: float
    next_try: float
    there: set[str] = field(default_factory=set)


class _Fetch:
    """Replies from a SuperLink, object by object."""

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        self._waiting: dict[str, _Announced] = {}

    @property
    def _client(self) -> Any:
        return self._grid._runtime_client  # Flower has no public way to look before it fetches

    def ask(self, message_ids: Iterable[str]) -> Iterator[str]:
        """Look which of these have a reply; yield those whose reply Flower cannot read.

        One by one: a hostile reply fails the whole call, and Flower forgets all that were in it.
        """
        for message_id in [each for each in message_ids if each not in self._waiting]:
            request = PullAppMessagesRequest(message_ids=[message_id])
            try:
                found = self._client.PullMessages(request)
            except HTTPStatusError as error:
                if error.response.status_code != codes.INTERNAL_SERVER_ERROR:
                    raise  # the run itself is gone
                yield message_id
            except DecodeError:
                yield message_id
            else:
                self._announce(found)

    def _announce(self, found: PullAppMessagesResponse) -> None:
        now = time.monotonic()
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            ids = list(dict.fromkeys(each.object_id for each in iterate_object_tree(tree)))
            entry = _Announced(message.metadata.message_id, ids, ids[-1], now, now)
            self._waiting[message.metadata.reply_to_message_id] = entry

    def announced(self) -> list[str]:
        """Messages with a reply that is worth a try now."""
        now = time.monotonic()
        return [each for each, entry in self._waiting.items() if entry.next_try <= now]

    def drop(self, message_id: str) -> None:
        entry = self._waiting.pop(message_id)
        request = ConfirmMessageReceivedRequest(
            node=self._grid.node, run_id=self._grid.run.run_id, message_object_id=entry.message_id
        )
        with suppress(HTTPStatusError):  # it only tells Flower to forget
            self._client.ConfirmMessageReceived(request)

    def message(self, message_id: str, largest: int) -> Message | None:
        """The reply to a message, or None while its sender is still at it.

        Raises:
            BadUpdate: it is too large, or no message. _BrokenOff: the rest will not come.
        """
        entry = self._waiting[message_id]
        try:
            if len(entry.ids) > 1000 + largest // _BYTES_OF_AN_OBJECT:
                raise BadUpdate(f"is in {len(entry.ids):,} parts, far more than was asked for")
            if not self._is_there(entry):
                return None
            found = _inflated(entry.message_id, self._contents(entry, largest), largest)
        except ObjectPullError:
            return None
        except (BadUpdate, _BrokenOff):
            self.drop(message_id)
            raise
        except (HTTPStatusError, DecodeError) as error:
            self.drop(message_id)
            raise BadUpdate(f"is not a message: {type(error).__name__}") from error
        self.drop(message_id)
        found.metadata.__dict__["_message_id"] = entry.message_id
        return found

    def _is_there(self, entry: _Announced) -> bool:
        """Whether what was missing has come; a slow sender is not waited for, only looked after."""
        began = time.monotonic()
        if self._has(entry.missing):
            entry.since = began
            return True
        absent = 0
        for each in entry.ids:
            if absent == _AT_A_TIME or time.monotonic() - began >= _LOOK_S:
                break
            if each in entry.there:
                continue
            if self._has(each):
                entry.there.add(each)
                entry.since = time.monotonic()
            else:
                absent += 1
        if time.monotonic() - entry.since > _SENDING_S:
            raise _BrokenOff("it stopped in the middle of its reply")
        entry.next_try = time.monotonic() + _LOOK_AGAIN_S
        return False

    def _has(self, object_id: str) -> bool:
        try:
            self._pull(object_id)
        except ObjectUnavailableError:
            return False
        return True

    def _pull(self, object_id: str) -> bytes:
        node, run_id = self._grid.node, self._grid.run.run_id
        try:
            return make_pull_object_fn_protobuf(self._client.PullObject, node, run_id)(object_id)
        except ObjectPullError as error:  # Flower has forgotten it
            raise _BrokenOff("it stopped in the middle of its reply") from error

    def _contents(self, entry: _Announced, largest: int) -> dict[str, bytes]:
        """All objects by id; ObjectPullError if one is still missing."""
        taken, lock = 0, threading.Lock()  # Flower pulls in two threads

        def pull_within_limit(object_id: str) -> bytes:
            nonlocal taken
            try:
                content = self._pull(object_id)
            except ObjectUnavailableError:
                entry.missing = object_id
                raise
            with lock:
                taken += len(content)
            if taken > largest:
                raise _too_large(largest)
            return content

        return pull_objects(entry.ids, pull_within_limit, max_tries_per_object=1)


def _inflated(object_id: str, contents: dict[str, bytes], largest: int) -> Message:
    try:
        facts = sum(len(each) for each in contents.values() if not each.startswith(_CHUNK))
        if facts > _BYTES_OF_FACTS + largest // 100:
            raise BadUpdate(f"has {facts / 1e6:.1f} MB that are no numbers of arrays")
        # An array lists its chunks by number, and may list one any number of times.
        if sum(_chunk_bytes(content, contents) for content in contents.values()) > largest:
            raise _too_large(largest)
        found = inflate_object_from_contents(object_id, contents)
    except BadUpdate:
        raise
    except Exception as error:  # hostile bytes; Flower's parsers raise what they like
        raise BadUpdate(f"is not a message: {type(error).__name__}") from error
    if not isinstance(found, Message):
        raise BadUpdate("is not a message")
    return found


def _chunk_bytes(content: bytes, contents: dict[str, bytes]) -> int:
    """Bytes of an array once its chunks are put together; 0 for any other object."""
    kind, children, _ = get_object_head_values_from_object_content(content)
    if kind != "Array":
        return 0
    listed = json.loads(content[content.index(b"\0") + 1 :])["arraychunk_ids"]
    return sum(len(contents[children[each]]) for each in listed)


def _too_large(largest: int) -> BadUpdate:
    return BadUpdate(f"is larger than the {largest / 1e6:.1f} MB that was asked for at most")
