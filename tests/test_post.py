"""Replies fetched from a SuperLink, object by object: honest, slow, broken off and hostile ones."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.app.message import array as flower_array
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from dept_fl import post
from dept_fl.post import Post, Reply, Sent

LARGEST = 1_000_000


class Clock:
    """Time that passes when the test says so."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    made = Clock()
    monkeypatch.setattr(post, "time", made)
    return made


@dataclass
class SuperLink:
    """What the Runtime API of a SuperLink does with replies.

    Attributes:
        objects: by id their bytes, None while they are announced but not yet there.
        replies: what is answered to the question for a message's reply, once.
        asked: the messages whose reply was asked for; `pulled` the objects that were given out.
        confirmed: the replies that may be forgotten.
        later: the bytes of the last reply's objects, for those that are not yet there.
        arrives_when_asked_for: objects that are there at the second question for them.
    """

    objects: dict[str, bytes | None] = field(default_factory=dict)
    replies: dict[str, PullAppMessagesResponse | Exception] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    pulled: list[str] = field(default_factory=list)
    confirmed: list[str] = field(default_factory=list)
    later: dict[str, bytes] = field(default_factory=dict)
    arrives_when_asked_for: set[str] = field(default_factory=set)

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802
        (message_id,) = request.message_ids
        self.asked.append(message_id)
        reply = self.replies.pop(message_id, PullAppMessagesResponse())
        if isinstance(reply, Exception):
            raise reply
        return reply

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        if request.object_id not in self.objects:
            return PullObjectResponse(object_found=False, object_available=False)
        content = self.objects[request.object_id]
        if request.object_id in self.arrives_when_asked_for:
            self.objects[request.object_id] = self.later[request.object_id]
        if content is not None:
            self.pulled.append(request.object_id)
        return PullObjectResponse(
            object_found=True, object_available=content is not None, object_content=content or b""
        )

    def ConfirmMessageReceived(  # noqa: N802
        self, request: ConfirmMessageReceivedRequest
    ) -> ConfirmMessageReceivedResponse:
        self.confirmed.append(request.message_object_id)
        return ConfirmMessageReceivedResponse()

    # ---- what a SuperNode sends ----------------------------------------------------------

    def answer(self, reply: Message, there: bool = True) -> list[str]:
        """A reply arrives as Flower sends it; returns the ids of its objects in that order."""
        found = get_all_nested_objects(reply)
        contents = {each: found[each].deflate() for each in found}
        self.objects |= contents if there else dict.fromkeys(contents)
        self.later = contents
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.announce(reply.metadata.reply_to_message_id, reply, get_object_tree(reply))
        return list(contents)

    def announce(self, message_id: str, like: Message, tree: ObjectTree) -> None:
        proto = message_to_proto(remove_content_from_message(like))
        self.replies[message_id] = PullAppMessagesResponse(
            messages_list=[proto], message_object_trees=[tree]
        )

    def answer_with(self, task: Message, *contents: bytes, tree: ObjectTree | None = None) -> None:
        """A reply of any bytes; the last are the message's."""
        ids = [sha256(content).hexdigest() for content in contents]
        self.objects |= dict(zip(ids, contents, strict=True))
        like = Message(RecordDict(), reply_to=task)
        like.metadata.__dict__["_message_id"] = ids[-1]
        if tree is None:
            children = [ObjectTree(object_id=each) for each in ids[:-1]]
            tree = ObjectTree(object_id=ids[-1], children=children)
        self.announce(task.metadata.message_id, like, tree)


class Line(HttpGrid):
    """Flower's grid, connected to that SuperLink."""

    def __init__(self, link: SuperLink) -> None:
        self.link = link
        self.node = Node(node_id=1)
        self.refuses: set[int] = set()

    @property
    def _runtime_client(self) -> Any:
        return self.link

    @property
    def run(self) -> Any:
        return type("Run", (), {"run_id": 1})

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for i, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"task-{message.metadata.dst_node_id}"
            ids.append("" if i in self.refuses else message.metadata.message_id)
        return ids


@pytest.fixture
def link() -> SuperLink:
    return SuperLink()


@pytest.fixture
def mail(link: SuperLink) -> Post:
    return Post(Line(link))


def task_for(node: int) -> Message:
    message = Message(RecordDict({"task": ConfigRecord({"a": 1})}), node, MessageType.TRAIN)
    message.metadata.__dict__["_message_id"] = f"task-{node}"
    return message


def sent_to(node: int, largest: int = LARGEST) -> Sent:
    return Sent(node, f"silo-{node}", "train", 1, largest, due=2000.0)


def send(mail: Post, *nodes: int, largest: int = LARGEST) -> list[Message]:
    """A task to each node; they come back as the nodes see them."""
    mail.send([task_for(n) for n in nodes], [sent_to(n, largest) for n in nodes])
    return [task_for(node) for node in nodes]


def reply_to(task: Message, numbers: int = 1000, **facts: Any) -> Message:
    arrays = {
        "w": Array(np.arange(numbers, dtype=np.float32)),
        "b": Array(np.zeros(3, np.float32)),
        "again": Array(np.zeros(3, np.float32)),  # the same object twice
    }
    content = {"body": ArrayRecord(arrays), "task": ConfigRecord({"silo": "ant", **facts})}
    return Message(RecordDict(content), reply_to=task)


def only(replies: Iterator[Reply]) -> Reply:
    (reply,) = replies
    return reply


# ---- honest replies -----------------------------------------------------------------------------


def test_a_reply_comes_as_it_was_sent(mail: Post, link: SuperLink):
    (task,) = send(mail, 7)
    assert list(mail.replies()) == []
    ids = link.answer(reply_to(task, round=3))
    reply = only(mail.replies())
    assert reply.sent == sent_to(7)
    assert (reply.lost, reply.bad) == ("", "")
    assert reply.message is not None
    assert reply.message.content == reply_to(task, round=3).content
    assert reply.message.metadata.message_id == ids[-1]
    assert link.confirmed == [ids[-1]]
    assert mail.under_way() == []
    assert list(mail.replies()) == []


def test_an_array_in_many_chunks_is_put_together(
    mail: Post, link: SuperLink, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(flower_array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 100)
    (task,) = send(mail, 7)
    assert len(link.answer(reply_to(task))) > 40
    message = only(mail.replies()).message
    assert message is not None
    found = message.content.array_records["body"]["w"].numpy()
    assert found.tolist() == list(range(1000))


def test_replies_are_fetched_one_at_a_time(mail: Post, link: SuperLink):
    tasks = send(mail, 7, 8, 9)
    first = [link.answer(reply_to(task, node=i))[-1] for i, task in enumerate(tasks)]
    replies = mail.replies()
    for i, reply in enumerate(replies):
        assert reply.message is not None
        assert reply.message.content.config_records["task"]["node"] == i
        assert link.confirmed == first[: i + 1]
        assert [sent.node for sent in mail.under_way()] == [7, 8, 9][i + 1 :]


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_flowers_errors_of_what_got_lost_say_so(mail: Post, link: SuperLink, code: int):
    (task,) = send(mail, 7)
    link.answer(Message(Error(code, "gone\x1b[2J"), reply_to=task))
    reply = only(mail.replies())
    assert reply.message is None
    assert reply.lost == f"gone?[2J (Flower's code {code})"


@pytest.mark.parametrize("code", [0, 1, 2, 6, 7, 9, 2**31])
def test_other_errors_are_replies(mail: Post, link: SuperLink, code: int):
    (task,) = send(mail, 7)
    link.answer(Message(Error(code, "broken"), reply_to=task))
    message = only(mail.replies()).message
    assert message is not None
    assert (message.error.code, message.error.reason) == (code, "broken")


def test_a_message_that_could_not_be_sent_is_lost(mail: Post, link: SuperLink):
    mail._grid.refuses = {1}  # type: ignore[attr-defined]
    send(mail, 7, 8, 9)
    reply = only(mail.replies())
    assert (reply.sent.node, reply.lost) == (8, "its node is not registered any more")
    assert [sent.node for sent in mail.under_way()] == [7, 9]


# ---- slow ones and those that stop in the middle --------------------------------------------


def test_what_is_still_on_its_way_is_not_fetched_in_part(mail: Post, link: SuperLink, clock: Clock):
    (task,) = send(mail, 7)
    ids = link.answer(reply_to(task), there=False)
    for each in ids[:-1]:
        assert list(mail.replies()) == []
        link.objects[each] = link.later[each]
        clock.now += 50  # an honest sender may be slow, if only it goes on
    assert len(link.pulled) <= len(ids)
    assert link.confirmed == []
    link.objects[ids[-1]] = link.later[ids[-1]]
    assert only(mail.replies()).message is not None
    assert link.asked == ["task-7"]  # Flower forgets a message whose reply it announced


def test_a_reply_that_becomes_whole_while_it_is_looked_at_comes_with_the_next_look(
    mail: Post, link: SuperLink, clock: Clock
):
    (task,) = send(mail, 7)
    last = link.answer(reply_to(task))[-1]
    link.objects[last], link.arrives_when_asked_for = None, {last}
    assert list(mail.replies()) == []
    clock.now += 10
    assert only(mail.replies()).message is not None


def test_the_others_do_not_wait_for_a_slow_one(mail: Post, link: SuperLink):
    slow, quick = send(mail, 7, 8)
    link.answer(reply_to(slow), there=False)
    link.answer(reply_to(quick))
    assert only(mail.replies()).sent.node == 8
    assert list(mail.replies()) == []
    assert [sent.node for sent in mail.under_way()] == [7]


def test_a_sender_that_stopped_in_the_middle_is_lost(mail: Post, link: SuperLink, clock: Clock):
    (task,) = send(mail, 7)
    ids = link.answer(reply_to(task), there=False)
    link.objects[ids[0]] = link.later[ids[0]]
    assert list(mail.replies()) == []
    clock.now += 190
    assert list(mail.replies()) == []
    clock.now += 20
    assert only(mail.replies()).lost == "it stopped in the middle of its reply"
    assert mail.under_way() == []
    assert link.confirmed == [ids[-1]]


@pytest.mark.parametrize("gone", [0, 2, -1])
def test_what_flower_has_forgotten_is_lost(mail: Post, link: SuperLink, clock: Clock, gone: int):
    (task,) = send(mail, 7)
    ids = link.answer(reply_to(task))
    del link.objects[ids[gone]]
    assert only(mail.replies()).lost == "it stopped in the middle of its reply"


def test_a_part_that_comes_after_the_message_itself_is_waited_for(
    mail: Post, link: SuperLink, clock: Clock
):
    """A SuperNode sends two objects at a time, of which a large one may take minutes."""
    (task,) = send(mail, 7)
    ids = link.answer(reply_to(task))
    link.objects[ids[0]] = link.objects[ids[1]] = None
    for each in (ids[1], ids[0]):
        for _ in range(5):
            assert list(mail.replies()) == []
            clock.now += 30
        link.objects[each] = link.later[each]
    assert only(mail.replies()).message is not None
    assert len(link.pulled) < 8 * len(ids)  # the others are not fetched anew at each look


def test_a_part_that_never_comes_after_the_message_itself_is_lost(
    mail: Post, link: SuperLink, clock: Clock
):
    (task,) = send(mail, 7)
    ids = link.answer(reply_to(task))
    link.objects[ids[0]] = None
    for _ in range(2):
        assert list(mail.replies()) == []
        clock.now += 10
    clock.now += 200
    assert only(mail.replies()).lost == "it stopped in the middle of its reply"


# ---- nodes that go ------------------------------------------------------------------------------


def test_what_a_node_that_went_has_not_answered_is_lost(mail: Post, link: SuperLink):
    here, _ = send(mail, 7, 8)
    mail.give_up(8, "went")
    reply = only(mail.replies())
    assert (reply.sent.node, reply.lost) == (8, "went")
    link.answer(reply_to(here))
    assert only(mail.replies()).message is not None


def test_what_it_had_answered_before_counts(mail: Post, link: SuperLink):
    (task,) = send(mail, 7)
    link.answer(reply_to(task))
    mail.give_up(7, "went")
    assert only(mail.replies()).message is not None
    assert list(mail.replies()) == []


def test_a_reply_that_it_had_only_begun_is_forgotten(mail: Post, link: SuperLink, clock: Clock):
    (task,) = send(mail, 7)
    ids = link.answer(reply_to(task), there=False)
    assert list(mail.replies()) == []
    mail.give_up(7, "went")
    assert only(mail.replies()).lost == "went"
    clock.now += 10
    assert list(mail.replies()) == []
    assert link.confirmed == [ids[-1]]


# ---- hostile ones -------------------------------------------------------------------------------


@pytest.fixture
def peak() -> Iterator[Any]:
    """peak(): the most bytes that Python has held since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def test_a_reply_that_is_larger_than_asked_for_is_not_fetched_to_its_end(
    mail: Post, link: SuperLink, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(flower_array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 10_000)
    (task,) = send(mail, 7)
    ids = link.answer(reply_to(task, numbers=2_000_000))
    assert only(mail.replies()).bad == "is larger than the 1.0 MB that was asked for at most"
    assert len(link.pulled) < 120 < len(ids)
    assert link.confirmed == [ids[-1]]


def test_one_byte_too_many_is_too_many(mail: Post, link: SuperLink):
    (task,) = send(mail, 7)
    ids = link.answer(reply_to(task))
    size = sum(len(link.objects[each] or b"") for each in ids)
    assert only(mail.replies()).message is not None
    for largest, good in ((size, True), (size - 1, False)):
        (task,) = send(mail, 7, largest=largest)
        link.answer(reply_to(task))
        assert (only(mail.replies()).bad == "") == good


def test_a_reply_in_too_many_parts_is_not_even_begun(mail: Post, link: SuperLink):
    (task,) = send(mail, 7)
    children = [ObjectTree(object_id=f"{i:064x}") for i in range(1600)]
    link.answer_with(task, b"x", tree=ObjectTree(object_id="f" * 64, children=children))
    assert only(mail.replies()).bad == "is in 1,601 parts, far more than was asked for"
    assert link.pulled == []


def flower_object(kind: str, children: list[str], body: bytes) -> bytes:
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body


def object_id(content: bytes) -> str:
    return sha256(content).hexdigest()


def array_object(chunks: list[bytes], listed: Any) -> bytes:
    facts = {"dtype": "float32", "shape": [1], "stype": "numpy.ndarray", "arraychunk_ids": listed}
    return flower_object("Array", [object_id(c) for c in chunks], json.dumps(facts).encode())


def message_around(task: Message, array: bytes) -> list[bytes]:
    """The objects of a reply whose body is this array, the message last."""
    references = json.dumps({"w": object_id(array)}).encode()
    record = flower_object("ArrayRecord", [object_id(array)], references)
    references = json.dumps({"body": object_id(record)}).encode()
    content = flower_object("RecordDict", [object_id(record)], references)
    _, metadata = Message(RecordDict(), reply_to=task).deflate().split(b"\0", 1)
    return [array, record, content, flower_object("Message", [object_id(content)], metadata)]


def test_an_array_that_lists_one_chunk_a_million_times_is_refused_before_it_is_built(
    mail: Post, link: SuperLink, peak: Any
):
    chunk = flower_object("ArrayChunk", [], b"x" * 100_000)
    (task,) = send(mail, 7, largest=20_000_000)
    link.answer_with(task, chunk, *message_around(task, array_object([chunk], [0] * 1_000_000)))
    assert only(mail.replies()).bad == "is larger than the 20.0 MB that was asked for at most"
    assert peak() < 60_000_000  # the array would be of 100 GB


def test_the_same_array_with_an_honest_list_is_a_message(mail: Post, link: SuperLink):
    chunk = flower_object("ArrayChunk", [], b"x" * 100)
    (task,) = send(mail, 7)
    link.answer_with(task, chunk, *message_around(task, array_object([chunk], [0, 0])))
    message = only(mail.replies()).message
    assert message is not None
    assert message.content.array_records["body"]["w"].data == b"x" * 200


@pytest.mark.parametrize(
    "listed", [[1], [-2], [0.5], ["0"], None, {}, [[0]], "00", [0] * 2 + [10**30], [True, None]]
)
def test_an_array_that_lists_chunks_that_are_not_there_is_refused(
    mail: Post, link: SuperLink, listed: Any
):
    chunk = flower_object("ArrayChunk", [], b"x" * 100)
    (task,) = send(mail, 7)
    link.answer_with(task, chunk, *message_around(task, array_object([chunk], listed)))
    assert only(mail.replies()).bad.startswith("is not a message: ")


def test_facts_that_would_swell_in_memory_are_not_even_read(
    mail: Post, link: SuperLink, monkeypatch: pytest.MonkeyPatch
):
    """A list of small whole numbers takes a byte each on the wire and 36 in Python."""
    monkeypatch.setattr(post, "inflate_object_from_contents", None)
    (task,) = send(mail, 7, largest=100_000_000)
    link.answer(reply_to(task, many="x" * 6_000_000))
    assert only(mail.replies()).bad == "has 6.0 MB that are no numbers of arrays"


def garbage() -> dict[str, Callable[[Message], list[bytes]]]:
    chunk = flower_object("ArrayChunk", [], b"x")
    array = array_object([chunk], [0])
    broken, deep = (flower_object("Array", [], body) for body in (b"{", b"[" * 100_000))
    chain = [flower_object("RecordDict", [], b"{}")]
    for _ in range(900):
        reference = json.dumps({"a": object_id(chain[-1])}).encode()
        chain.append(flower_object("RecordDict", [object_id(chain[-1])], reference))
    loop = flower_object("Message", ["a" * 64], b"")
    found = {
        "empty": [b""],
        "no head": [b"x"],
        "no type": [b"\0"],
        "unknown type": [flower_object("Pickle", [], b"x")],
        "no text": [b"\xff\xfe 0 1\0x"],
        "length": [b"Message  x\0x"],
        "a chunk": [chunk],
        "an array": [chunk, array],
        "a content": [flower_object("RecordDict", [], b"{}")],
        "a message of an array": [
            chunk, array, flower_object("Message", [object_id(array)], b"")
        ],
        "an empty message": [flower_object("Message", [], b"")],
        "no protobuf": [chain[0], flower_object("Message", [object_id(chain[0])], b"\xff" * 9)],
        "a child that is not there": [flower_object("Message", ["b" * 64], b"")],
        "a chain": [*chain, flower_object("Message", [object_id(chain[-1])], b"")],
        "its own child": [loop.replace(b"a" * 64, object_id(loop).encode())],
        "a child again and again": [
            chain[0], flower_object("Message", [object_id(chain[0])] * 10_000, b"")
        ],
    }  # fmt: skip
    return {name: lambda _, contents=contents: contents for name, contents in found.items()} | {
        "a record": lambda task: [chunk, *message_around(task, array)[:2]],
        "no JSON": lambda task: message_around(task, broken),
        "deep JSON": lambda task: message_around(task, deep),
    }


GARBAGE = garbage()


@pytest.mark.parametrize("contents", GARBAGE.values(), ids=GARBAGE.keys())
def test_what_is_no_message_is_refused(
    mail: Post, link: SuperLink, contents: Callable[[Message], list[bytes]]
):
    (task,) = send(mail, 7)
    link.answer_with(task, *contents(task))
    reply = only(mail.replies())
    assert reply.bad.startswith("is not a message")
    assert reply.message is None
    assert len(link.confirmed) == 1
    assert mail.under_way() == []


def test_a_deeply_nested_tree_is_no_trouble(mail: Post, link: SuperLink):
    (task,) = send(mail, 7)
    tree = ObjectTree(object_id="e" * 64)
    for i in range(90):
        tree = ObjectTree(object_id=f"{i:064x}", children=[tree])
    link.answer_with(task, b"x", tree=tree)
    assert only(mail.replies()).lost == "it stopped in the middle of its reply"


@pytest.mark.parametrize("error", ["decode", "500"])
def test_a_reply_that_flower_itself_cannot_read_spoils_no_other(
    mail: Post, link: SuperLink, error: str
):
    bad, good = send(mail, 7, 8)
    link.replies[bad.metadata.message_id] = (
        DecodeError("broken") if error == "decode" else http_error(500)
    )
    link.answer(reply_to(good))
    refused, taken = mail.replies()
    assert (refused.sent.node, refused.bad) == (7, "is not a message")
    assert taken.sent.node == 8
    assert taken.message is not None


def http_error(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://superlink")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(status))


def test_a_superlink_that_has_ended_the_run_is_not_blamed_on_a_silo(mail: Post, link: SuperLink):
    (task,) = send(mail, 7)
    link.replies[task.metadata.message_id] = http_error(401)
    with pytest.raises(httpx.HTTPStatusError):
        list(mail.replies())


@settings(max_examples=150, deadline=None)
@given(noise=st.binary(min_size=1, max_size=80), which=st.integers(0, 9), at=st.integers(0, 400))
def test_no_bytes_within_a_reply_crash_the_fetch(noise: bytes, which: int, at: int):
    """A genuine reply with noise written over one of its objects: refused, or still a message."""
    link = SuperLink()
    mail = Post(Line(link))
    (task,) = send(mail, 7)
    ids = link.answer(reply_to(task, numbers=20))
    each = ids[which % len(ids)]
    content = bytearray(link.objects[each] or b"")
    at %= len(content)
    content[at : at + len(noise)] = noise
    link.objects[each] = bytes(content)
    reply = only(mail.replies())
    assert (reply.message is None) == bool(reply.bad or reply.lost)
    assert link.confirmed == [ids[-1]]


def test_time_is_measured_by_the_fetch(
    mail: Post, link: SuperLink, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(post, "time", time)
    (task,) = send(mail, 7)
    link.answer(reply_to(task))
    assert 0 < only(mail.replies()).fetch_s < 60
