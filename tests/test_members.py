"""Silos of a deployment come, go, restart and hang while the real ClientApp answers in process."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Error, Message
from flwr.proto.node_pb2 import NodeInfo

from dept_fl import members, post, records, strategy
from dept_fl.checkpoint import load_state, round_folder, under_prefix
from dept_fl.config import Recipe, load_recipe, recipe_from_json
from dept_fl.errors import DeptError
from dept_fl.model import initial_embeddings, parameters
from dept_fl.report import Ledger
from dept_fl.rounds import Server
from dept_fl.silo import Silo, with_shared_tokenizer
from dept_fl.silo_file import SiloFile, load_silo_file
from dept_fl.strategy import DeptStrategy
from tests.conftest import write_text
from tests.federation import ALL_VARIANTS, InProcessGrid, same, state_of, trained

Make = Callable[..., Recipe]
Tensors = dict[str, torch.Tensor]
Action = Callable[[Message, Message], Message | None]

PIECES = {"ant": 300, "bee": 320, "cat": 340}
ROUNDS = [1, 2, 3]
OWN_PIECES = "rounds=3 " + " ".join(
    f"silos.{name}.vocab_size={pieces}" for name, pieces in PIECES.items()
)


class Clock:
    """Time that passes only where the server waits, so that an hour takes no time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    perf_counter = staticmethod(time.perf_counter)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (members, post, strategy):
        monkeypatch.setattr(module, "time", made)
    return made


# A recipe and a silo's file are read for each message; here each is parsed once.
_parsed_recipe = functools.cache(recipe_from_json)
_parsed_files: dict[tuple[str, bytes], SiloFile] = {}


def _parsed_file(path: str) -> SiloFile:
    key = (path, Path(path).read_bytes())
    if key not in _parsed_files:
        _parsed_files[key] = load_silo_file(path)
    return _parsed_files[key]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "recipe_from_json", _parsed_recipe)
    monkeypatch.setattr("client_app.app.load_silo_file", _parsed_file)
    monkeypatch.setattr(strategy, "plot", lambda *_: None)


class Village(InProcessGrid):
    """A deployment whose nodes come and go while the server waits."""

    def __init__(self, nodes: int | list[Path], home: Path, tamper: Action | None = None) -> None:
        super().__init__(nodes, home, tamper)
        self._later: list[tuple[float, Callable[[], object]]] = []

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        """Something happens so much later, when the server next looks who is there."""
        self._later.append((strategy.time.monotonic() + seconds, action))

    def get_nodes(self) -> list[NodeInfo]:
        self._pass_time()
        return list(super().get_nodes())

    def get_node_ids(self) -> list[int]:
        self._pass_time()
        return list(super().get_node_ids())

    def _pass_time(self) -> None:
        due = [entry for entry in self._later if entry[0] <= strategy.time.monotonic()]
        self._later = [entry for entry in self._later if entry not in due]
        for _, action in due:
            action()

    def node_of(self, silo: str) -> int:
        """Where its last task went."""
        return self.tasks(silo=silo)[-1].metadata.dst_node_id

    def tasks(self, kind: str = "train", silo: str = "", round_: int = 0) -> list[Message]:
        """The messages of a kind that were sent, to a silo, in a round."""
        return [m for m in self.sent if _fits(m, kind, silo, round_)]


def _fits(message: Message, kind: str, silo: str, round_: int) -> bool:
    record = message.content.config_records["task"]
    return (
        message.metadata.message_type == kind
        and silo in ("", record["silo"])
        and round_ in (0, record.get("round"))
    )


@dataclass
class Script:
    """What becomes of replies: each entry once, at the first message of its kind, silo, round."""

    entries: list[tuple[str, str, int, Action]] = field(default_factory=list)

    def at(self, kind: str, silo: str, round_: int, action: Action) -> Script:
        self.entries.append((kind, silo, round_, action))
        return self

    def __call__(self, message: Message, reply: Message) -> Message | None:
        for entry in self.entries:
            if _fits(message, *entry[:3]):
                self.entries.remove(entry)
                return entry[3](message, reply)
        return reply


def nothing(message: Message, reply: Message) -> None:
    """The reply never comes."""


def flower_error(code: int, reason: str = "Node Unavailable") -> Action:
    def tell(message: Message, reply: Message) -> Message:
        return Message(error=Error(code, reason), metadata=reply.metadata)

    return tell


# ---- silos on disk --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def country(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files and homes of all silos, each with a vocabulary of its own size."""
    folder = tmp_path_factory.mktemp("country")
    for name, pieces in PIECES.items():
        write_silo(folder, name, tiny_file.parent / f"{name}.jsonl", vocab_size=pieces)
    return folder


def write_silo(folder: Path, name: str, text: Path, **settings: Any) -> Path:
    facts = {"name": name, "home": f"{name}-home", "files": [str(text)]}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**facts, "validation_fraction": 0.2, **settings}))
    return file


def files_of(folder: Path, *names: str) -> list[Path]:
    return [folder / f"{name}.yaml" for name in names or PIECES]


@pytest.fixture(scope="session")
def shared(tiny_file: Path, home: Path) -> Path:
    """The tokenizer that all silos share where a variant asks for one."""
    settings = "variant=trim tokenizer=shared"
    return Path(with_shared_tokenizer(load_recipe(tiny_file, settings), home).shared_tokenizer)


@pytest.fixture
def country_sharing(tiny_file: Path, tmp_path: Path, shared: Path, home: Path) -> Path:
    """The same where each silo has its own copy of the federation's tokenizer."""
    (tmp_path / "mine.model").write_bytes(shared.read_bytes())
    for name in PIECES:
        text = tiny_file.parent / f"{name}.jsonl"
        where = {"tokenizer": "mine.model", "home": str(home / "sharing" / name)}
        write_silo(tmp_path, name, text, share_embeddings=True, **where)
    return tmp_path


def silos_of(server: Server, folder: Path) -> dict[str, Silo]:
    found = {}
    for name in server.silo_names:
        file = load_silo_file(folder / f"{name}.yaml")
        found[name] = Silo(name, file.over(server.recipe), file.home, server.experiment)
    return found


@pytest.fixture(scope="module")
def unbroken(tiny_file: Path, home: Path) -> Tensors:
    """What an undisturbed run of the three silos gives, by the plain algorithm."""
    return state_of(*trained(load_recipe(tiny_file, OWN_PIECES), home))


@pytest.fixture
def run(recipe: Make, tmp_path: Path) -> Callable[..., Server]:
    """run(grid, overrides): a run without silos in its recipe, in the folder `run`."""

    def start(grid: InProcessGrid, overrides: str = "", resume: bool = False) -> Server:
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        made = recipe(f"silos={{}} min_silos=3 rounds=3 {overrides}")
        return DeptStrategy(made, tmp_path / "server", run_dir, resume, simulated=False).start(grid)

    return start


@pytest.fixture
def events(tmp_path: Path) -> Callable[[str], list[dict[str, Any]]]:
    def of(kind: str) -> list[dict[str, Any]]:
        return [e for e in Ledger(tmp_path / "run").read() if e["event"] == kind]

    return of


Run = Callable[..., Server]
Events = Callable[[str], list[dict[str, Any]]]


def merged(server: Server) -> dict[str, list[int]]:
    return {name: member.merged for name, member in sorted(server.members.items())}


# ---- nothing happens ------------------------------------------------------------------------


def test_a_deployment_gives_the_tensors_of_the_plain_algorithm(
    run: Run, recipe: Make, country: Path, home: Path, tmp_path: Path
):
    """Silos of different vocabularies, two of three a round."""
    settings = "silos_per_round=2 outer.optimizer=nesterov"
    grid = Village(files_of(country), home)
    server = run(grid, settings)
    assert {n: r.vocabulary for n, r in server.registrations.items()} == PIECES
    expected = state_of(*trained(recipe(f"{settings} {OWN_PIECES}"), home))
    assert same(state_of(server, silos_of(server, country)), expected)
    kinds = [m.metadata.message_type for m in grid.sent]
    assert kinds == ["query"] * 3 + ["query.register"] * 3 + ["train"] * 6 + ["evaluate"] * 3


@pytest.mark.parametrize("variant", ["glob", "trim", "spec"])
def test_so_it_does_with_a_tokenizer_that_each_silo_has_a_copy_of(
    run: Run, recipe: Make, country_sharing: Path, shared: Path, home: Path, variant: str
):
    settings = f"{ALL_VARIANTS[variant]} shared_tokenizer={shared} rounds=3"
    server = run(Village(files_of(country_sharing), home), settings)
    expected = state_of(*trained(recipe(settings), home))
    assert same(state_of(server, silos_of(server, country_sharing)), expected)


def test_a_deployment_cannot_train_the_tokenizer_that_silos_share(run: Run, home: Path):
    with pytest.raises(DeptError, match=r"only a simulation can train one.*name a file"):
        run(Village([], home), "variant=glob tokenizer=shared")


def test_no_text_is_sent_unless_the_silos_file_says_so(
    run: Run, country: Path, tiny_file: Path, tmp_path: Path, home: Path
):
    """The server's recipe cannot make a silo send what its model writes."""
    text = tiny_file.parent / "ant.jsonl"
    open_ = {"vocab_size": 300, "home": str(country / "ant-home"), "share_samples": True}
    files = [write_silo(tmp_path, "ant", text, **open_), *files_of(country, "bee", "cat")]
    grid = Village(files, home)
    run(grid, "rounds=1 share_samples=true")
    finals = [m.content for m in grid.received if m.metadata.message_type == "evaluate"]
    texts = {
        c.config_records["task"]["silo"]: c.config_records["task"].get("sample") for c in finals
    }
    assert texts.keys() == PIECES.keys()
    assert [name for name, sample in texts.items() if sample] == ["ant"]


@pytest.mark.parametrize("kind", ["query", "query.register"])
@pytest.mark.parametrize("simulated", [False, True])
def test_a_node_that_takes_its_time_is_asked_once(
    run: Run, recipe: Make, country: Path, home: Path, tmp_path: Path, kind: str, simulated: bool
):
    held = Held()
    script = Script().at(kind, "", 0, held)
    grid = Village(2 if simulated else files_of(country), home, script)
    grid.after(100, lambda: grid.deliver(*held.only()))
    if simulated:
        made = recipe("rounds=1")
        DeptStrategy(made, home, tmp_path, resume=False, simulated=True).start(grid)
    else:
        run(grid, "rounds=1")
    assert len(grid.tasks("query")) == (2 if simulated else 3)
    assert len(grid.tasks("query.register")) == 3


# ---- silos that join ------------------------------------------------------------------------


class Visitor(Script):
    """cat's node comes while bee is at work on round 2, whose reply waits for cat to register."""

    def __init__(self, cat: Path) -> None:
        super().__init__()
        self._cat, self._held = cat, []
        self.at("train", "bee", 2, self._arrive).at("query.register", "cat", 0, self._register)

    def watch(self, grid: Village) -> Village:
        self._grid = grid
        return grid

    def _arrive(self, message: Message, reply: Message) -> None:
        self._held.append((reply, message))
        self._grid.join(self._cat)

    def _register(self, message: Message, reply: Message) -> Message:
        self._grid.deliver(*self._held.pop())
        return reply


@pytest.mark.parametrize("variant", ["spec-opt", "trim"])
def test_a_silo_that_joins_during_round_2_takes_part_from_round_3_on(
    run: Run, country: Path, country_sharing: Path, shared: Path, home: Path, events: Events,
    capsys: pytest.CaptureFixture[str], variant: str,
):  # fmt: skip
    trim = variant == "trim"
    folder = country_sharing if trim else country
    visitor = Visitor(folder / "cat.yaml")
    grid = visitor.watch(Village(files_of(folder, "ant", "bee"), home, visitor))
    settings = f"{ALL_VARIANTS[variant]} min_silos=2"
    server = run(grid, f"{settings} shared_tokenizer={shared}" if trim else settings)
    assert merged(server) == {"ant": ROUNDS, "bee": ROUNDS, "cat": [3]}
    assert [(e["silo"], e["round"], e["new"]) for e in events("join")] == [
        ("ant", 0, True), ("bee", 0, True), ("cat", 2, True)
    ]  # fmt: skip
    assert "silo cat joins; it takes part from round 3 on" in capsys.readouterr().out
    assert [e["sampled"] for e in events("round")] == [["ant", "bee"]] * 2 + [list(PIECES)]
    assert {e["silo"] for e in events("silo_eval") if e.get("final")} == PIECES.keys()
    ids = server.registrations["cat"].rows
    assert (ids is not None) == trim
    if trim:
        stream = silos_of(server, folder)["cat"].stream
        assert ids.tolist() == stream.vocabulary.ids.tolist()
        sent = grid.tasks(silo="cat", round_=3)[0].content.array_records["embeddings"]
        assert records.from_record(sent, server.shapes("cat")).keys() == server.layout.tokens.keys()


def test_fresh_embeddings_first_learn_beside_a_body_that_stays_as_it_is(
    run: Run, country: Path, home: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, list[Any]] = {name: [] for name in PIECES}
    settle = Silo._settle_in

    def watched(self: Silo, model: Any, task: Any, state: Any) -> Any:
        before = {name: p.clone() for name, p in parameters(model).items()}
        settled = settle(self, model, task, state)
        after = {name: p.clone() for name, p in parameters(model).items()}
        assert all(p.requires_grad for p in model.parameters())
        seen[self.name].append((task.round, before, after, settled.position - state.position))
        return settled

    monkeypatch.setattr(Silo, "_settle_in", watched)
    visitor = Visitor(country / "cat.yaml")
    grid = visitor.watch(Village(files_of(country, "ant", "bee"), home, visitor))
    settings = "min_silos=2 rounds=4 inner.newcomer_steps=3 inner.weight_decay=0.1"
    server = run(grid, settings)
    cat = silos_of(server, country)["cat"]
    body = server.layout.body
    for name, rounds in seen.items():
        for round_, before, after, sequences in rounds:
            newcomer = (name, round_) == ("cat", 3)
            assert sequences == (3 * 4 if newcomer else 0)
            assert all(torch.equal(before[n], after[n]) for n in body)
            assert same(before, after) != newcomer
    _, before, after, _ = seen["cat"][0]
    fresh = initial_embeddings(cat.recipe.model, 340, 16, server.layout, cat.recipe.seed, "cat")
    assert all(torch.equal(before[n], tensor) for n, tensor in fresh.items())
    positions = {t: load_state(round_folder(cat._states, t))[1]["position"] for t in (3, 4)}
    assert positions == {3: 3 * 4 + 2 * 4, 4: 3 * 4 + 4 * 4}


@pytest.mark.parametrize("variant", ["glob", "trim"])
def test_a_newcomer_with_another_tokenizer_is_refused_by_name(
    run: Run, country_sharing: Path, shared: Path, tiny_file: Path, home: Path, events: Events,
    capsys: pytest.CaptureFixture[str], variant: str,
):  # fmt: skip
    made = with_shared_tokenizer(load_recipe(tiny_file, "tokenizer=shared vocab_size=310"), home)
    text = tiny_file.parent / "cat.jsonl"
    other = made.shared_tokenizer
    write_silo(country_sharing, "cat", text, tokenizer=other, share_embeddings=True)
    visitor = Visitor(country_sharing / "cat.yaml")
    grid = visitor.watch(Village(files_of(country_sharing, "ant", "bee"), home, visitor))
    server = run(grid, f"{ALL_VARIANTS[variant]} shared_tokenizer={shared} min_silos=2")
    assert merged(server) == {"ant": ROUNDS, "bee": ROUNDS}
    (failure,) = events("failure")
    assert failure["silo"] == "cat"
    assert "is not the federation's" in failure["reason"]
    assert "give it the same file" in failure["reason"]
    assert capsys.readouterr().out.count("refused: silo cat: its tokenizer (") == 1
    assert grid.tasks(silo="cat") == []


def test_a_silo_whose_file_names_no_tokenizer_is_refused_where_all_share_one(
    run: Run, country_sharing: Path, country: Path, shared: Path, home: Path, events: Events
):
    files = [*files_of(country_sharing, "ant", "bee"), country / "cat.yaml"]
    server = run(
        Village(files, home),
        f"{ALL_VARIANTS['trim']} shared_tokenizer={shared} min_silos=2 rounds=1",
    )
    assert merged(server) == {"ant": [1], "bee": [1]}
    assert "tokenizer: missing; the federation shares one" in events("failure")[0]["reason"]


def test_a_refused_silo_joins_once_its_owner_has_mended_its_file(
    run: Run, country: Path, tiny_file: Path, tmp_path: Path, home: Path, clock: Clock
):
    broken = tmp_path / "cat.yaml"
    broken.write_text("name: cat\nvocab_size: many\n")
    grid = Village([*files_of(country, "ant", "bee"), broken], home)

    def mend() -> None:
        text = tiny_file.parent / "cat.jsonl"
        write_silo(tmp_path, "cat", text, vocab_size=340, home=str(country / "cat-home"))

    grid.after(5, mend)
    began = clock.now
    server = run(grid, "rounds=1")
    assert merged(server) == {"ant": [1], "bee": [1], "cat": [1]}
    assert 30 <= clock.now - began < 40
    assert len(grid.tasks("query")) == 4


# ---- who is who -----------------------------------------------------------------------------


def test_of_two_nodes_that_claim_one_silo_the_first_has_it(
    run: Run, country: Path, home: Path, events: Events
):
    grid = Village(files_of(country, "ant", "bee", "ant"), home)
    server = run(grid, "min_silos=2 rounds=2")
    assert merged(server) == {"ant": [1, 2], "bee": [1, 2]}
    assert {m.metadata.dst_node_id for m in grid.tasks(silo="ant")} == {1000}
    assert [m.metadata.dst_node_id for m in grid.tasks("query.register", "ant")] == [1000]
    (failure,) = events("failure")
    assert failure["reason"] == ("node 1002: claims silo ant, which node 1000 hosts already")


def test_the_second_takes_over_when_the_first_is_gone(
    run: Run, country: Path, home: Path, unbroken: Tensors
):
    script = Script()
    grid = Village(files_of(country, "ant", "bee", "cat", "ant"), home, script)

    def leave(message: Message, reply: Message) -> None:
        del grid.nodes[1000]

    script.at("train", "ant", 2, leave)
    server = run(grid)
    hosts = [m.metadata.dst_node_id for m in grid.tasks(silo="ant")]
    assert hosts == [1000, 1000, 1003, 1003]
    assert same(state_of(server, silos_of(server, country)), unbroken)


@pytest.mark.parametrize(
    ("file", "name", "reason"),
    [
        ("cat", "dog", "node dog: claims silo cat, but its key is registered as dog"),
        ("ant", "cat", "node cat: claims silo ant, but its key is registered as cat"),
        ("cat", "", "node 1002: claims silo cat, but keys are registered under names here: "
         "register this one with --name cat"),
    ],
)  # fmt: skip
def test_a_node_may_only_host_the_silo_that_its_key_is_registered_for(
    run: Run, country: Path, home: Path, events: Events, file: str, name: str, reason: str
):
    grid = village_of_named(country, home)
    grid.join(country / f"{file}.yaml", name)
    assert merged(run(grid, "min_silos=2 rounds=1")) == {"ant": [1], "bee": [1]}
    assert [e["reason"] for e in events("failure")] == [reason]


def village_of_named(country: Path, home: Path, script: Action | None = None) -> Village:
    """ant's and bee's nodes, whose keys are registered under their names."""
    grid = Village([], home, script)
    for name in ("ant", "bee"):
        grid.join(country / f"{name}.yaml", name)
    return grid


def test_nobody_without_its_key_takes_over_a_silo_whose_key_is_registered(
    run: Run, country: Path, home: Path, events: Events
):
    """Not during the run, and not in one that is resumed."""
    script = Script()
    grid = village_of_named(country, home, script)

    def take_its_place(message: Message, reply: Message) -> None:
        del grid.nodes[message.metadata.dst_node_id]
        grid.join(country / "ant.yaml")

    script.at("train", "ant", 2, take_its_place)
    with pytest.raises(DeptError, match="round 2: only 1 of 2"):
        run(grid, "min_silos=2 round_attempts=1")
    wanted = "claims silo ant, but keys are registered under names here"
    assert wanted in str(events("failure"))
    unnamed = Village(files_of(country, "ant"), home)
    unnamed.join(country / "bee.yaml", "bee")
    with pytest.raises(DeptError, match=f"came 1 of min_silos=2 silos: bee\nnode 1000: {wanted}"):
        run(unnamed, "min_silos=2", resume=True)
    server = run(village_of_named(country, home), "min_silos=2", resume=True)
    assert merged(server) == {"ant": ROUNDS, "bee": ROUNDS}


def test_a_silos_own_key_takes_it_from_who_had_it_before(
    run: Run, country: Path, home: Path, events: Events
):
    script = Script()
    grid = Village(files_of(country, "ant"), home, script)

    def come(message: Message, reply: Message) -> None:
        grid.join(country / "ant.yaml", "ant")

    script.at("train", "ant", 2, come)
    server = run(grid, "min_silos=1")
    assert merged(server) == {"ant": ROUNDS}
    assert [m.metadata.dst_node_id for m in grid.tasks(silo="ant")] == [1000, 1000, 1001, 1001]
    assert server.members["ant"].named
    reasons = [e["reason"] for e in events("failure")]
    assert "node 1000: claimed silo ant, whose own key has come" in reasons


@pytest.mark.parametrize(
    ("claimed", "reason"),
    [
        (["cat", "dog"], "hosts 2 silos; a node of a deployment hosts one"),
        ([], "hosts 0 silos"),
        (["../cat"], "does not name its silos"),
        (["CAT"], "does not name its silos"),
        (["bee"], "claims silo bee, which node 1001 hosts already"),
    ],
)
def test_a_node_of_a_deployment_hosts_one_silo(
    run: Run, country: Path, home: Path, events: Events, claimed: list[str], reason: str
):
    def claim(message: Message, reply: Message) -> Message:
        if (message.metadata.message_type, message.metadata.dst_node_id) == ("query", 1002):
            return Message(records.hosts_record(claimed), reply_to=message)
        return reply

    grid = Village(files_of(country), home, claim)
    assert merged(run(grid, "min_silos=2 rounds=1")) == {"ant": [1], "bee": [1]}
    (failure,) = events("failure")
    assert failure["reason"].startswith(f"node 1002: {reason}")


def test_a_node_without_a_silos_file_is_told_how_to_start(
    run: Run, country: Path, home: Path, events: Events
):
    grid = Village(files_of(country), home)
    grid.nodes[1002][0].clear()
    run(grid, "min_silos=2 rounds=1")
    assert "node 1002: this node has no silo: start its SuperNode with" in str(events("failure"))


def test_a_silo_that_the_run_leaves_out_is_not_even_made_ready(
    run: Run, country: Path, home: Path, events: Events
):
    grid = Village(files_of(country), home)
    assert merged(run(grid, "only=[ant,bee] min_silos=2 rounds=1")) == {"ant": [1], "bee": [1]}
    (failure,) = events("failure")
    assert "silo cat is not one of the run's (only=['ant', 'bee'])" in failure["reason"]
    assert grid.tasks("query.register", "cat") == []


# ---- silos that get lost --------------------------------------------------------------------


def test_a_round_with_its_quorum_does_not_wait_for_a_node_that_went(
    run: Run, country: Path, home: Path, events: Events, clock: Clock
):
    script = Script()
    grid = Village(files_of(country), home, script)

    def leave(message: Message, reply: Message) -> None:
        del grid.nodes[message.metadata.dst_node_id]

    script.at("train", "bee", 2, leave)
    began = clock.now
    server = run(grid, "quorum=0.6")
    assert merged(server) == {"ant": ROUNDS, "bee": [1], "cat": ROUNDS}
    assert [(e["round"], e["silo"], e["reason"]) for e in events("failure")] == [
        (2, "bee", "its node went offline")
    ]
    assert clock.now - began < 10 + strategy._RETURN_S  # which the final body waits
    assert [(e["round"], e["silo"]) for e in events("absent")] == [(3, "bee")]  # for the final


@pytest.mark.parametrize("how", ["node", "restart", "code 5", "code 8", "code 3", "code 4"])
def test_a_silo_that_is_back_in_time_is_asked_again_and_leaves_no_trace(
    run: Run, country: Path, home: Path, events: Events, unbroken: Tensors, how: str
):
    script = Script()
    grid = Village(files_of(country), home, script)

    def leave(message: Message, reply: Message) -> Message | None:
        node = message.metadata.dst_node_id
        if how.startswith("code"):
            return flower_error(int(how[-1]))(message, reply)
        if how == "restart":
            grid.restart(node)
        else:
            del grid.nodes[node]
            grid.after(50, lambda: grid.join(country / "bee.yaml"))
        return None

    script.at("train", "bee", 2, leave)
    server = run(grid)
    assert merged(server) == dict.fromkeys(PIECES, ROUNDS)
    assert same(state_of(server, silos_of(server, country)), unbroken)
    (failure,) = events("failure")
    assert (failure["round"], failure["silo"]) == (2, "bee")
    assert [e["new"] for e in events("join") if e["silo"] == "bee"] == [True, False]
    assert len(grid.tasks(silo="bee", round_=2)) == 2
    limits = [m.content.config_records["task"]["limit_s"] for m in grid.tasks(silo="bee", round_=2)]
    assert limits[0] == 3600
    assert 3500 < limits[1] < (3550 if how == "node" else 3601)


def test_without_its_quorum_a_round_waits_for_the_lost_until_its_time_is_over(
    run: Run, country: Path, home: Path, events: Events, clock: Clock
):
    script = Script()
    grid = Village(files_of(country), home, script)

    def leave(message: Message, reply: Message) -> None:
        del grid.nodes[message.metadata.dst_node_id]

    script.at("train", "bee", 2, leave)
    began = clock.now
    with pytest.raises(DeptError, match=r"round 2: only 2 of 3 .*missing: bee\), below quorum=0.9"):
        run(grid, "quorum=0.9 round_timeout_s=50")
    assert 100 <= clock.now - began < 110
    assert [(e["silo"], e["reason"]) for e in events("absent")] == [("bee", "is not online")] * 2
    assert not (grid.tasks("evaluate"))


def test_a_silo_that_gets_lost_again_and_again_is_not_asked_for_ever(
    run: Run, country: Path, home: Path, clock: Clock
):
    def crash(message: Message, reply: Message) -> Message:
        fits = _fits(message, "train", "bee", 2)
        return flower_error(8)(message, reply) if fits else reply

    grid = Village(files_of(country), home, crash)
    began = clock.now
    with pytest.raises(DeptError, match="round 2: only 2 of 3"):
        run(grid)
    assert len(grid.tasks(silo="bee", round_=2)) == 2 * strategy._ASKED_AT_MOST
    assert clock.now - began < 60


@pytest.mark.parametrize("code", [0, 1, 2, 6, 7, 99])
def test_a_silo_whose_app_fails_is_asked_again_in_the_next_attempt_alone(
    run: Run, country: Path, home: Path, unbroken: Tensors, events: Events, code: int
):
    script = Script().at("train", "bee", 2, flower_error(code, "broken\x1b[2J"))
    grid = Village(files_of(country), home, script)
    server = run(grid)
    assert same(state_of(server, silos_of(server, country)), unbroken)
    (failure,) = events("failure")
    assert failure["reason"] == f"error {code}: broken?[2J"
    assert len(grid.tasks("query.register")) == 3  # its node is as it was


def test_a_lost_silos_reason_cannot_forge_lines_of_the_terminal(
    run: Run, country: Path, home: Path, capsys: pytest.CaptureFixture[str]
):
    forged = flower_error(5, "gone\nround 9: rejected: silo ant\x1b[2J")
    run(Village(files_of(country), home, Script().at("train", "bee", 1, forged)), "rounds=1")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert not any(line.startswith("round 9") for line in printed.splitlines())


@pytest.mark.parametrize("change", ["vocab_size", "text", "name"])
def test_a_silo_that_comes_back_as_another_is_refused_by_name(
    run: Run,
    tiny_file: Path,
    country: Path,
    tmp_path: Path,
    home: Path,
    events: Events,
    change: str,
):
    (tmp_path / "bee.jsonl").write_bytes((tiny_file.parent / "bee.jsonl").read_bytes())
    write_silo(tmp_path, "bee", tmp_path / "bee.jsonl", vocab_size=320)
    script = Script()
    files = [country / "ant.yaml", tmp_path / "bee.yaml", country / "cat.yaml"]
    grid = Village(files, home, script)

    def come_back_changed(message: Message, reply: Message) -> None:
        if change == "text":
            write_text(tmp_path, "bee", documents=70)
        old, new = ("320", "330") if change == "vocab_size" else ("name: bee", "name: bumblebee")
        if change != "text":
            files[1].write_text(files[1].read_text().replace(old, new))
        grid.restart(message.metadata.dst_node_id)

    script.at("train", "bee", 2, come_back_changed)
    with pytest.raises(DeptError, match=r"round 2: only 2 of 3 .*missing: bee"):
        run(grid, "round_timeout_s=60")
    reasons = " ".join(e["reason"] for e in events("failure") + events("absent"))
    assert {
        "vocab_size": "silo bee: comes back with vocabulary=330 (it joined with 320)",
        "text": "silo bee: its state of round 1 has t",  # its text, or the tokenizer made of it
        "name": "is not online",
    }[change] in reasons
    assert [e["silo"] for e in events("join") if e["new"]][3:] == (
        ["bumblebee"] if change == "name" else []
    )


# ---- silos that are late --------------------------------------------------------------------


@dataclass
class Held:
    """Replies that are kept back, to be delivered later."""

    replies: dict[str, tuple[Message, Message]] = field(default_factory=dict)

    def __call__(self, message: Message, reply: Message) -> None:
        silo = message.content.config_records["task"]["silo"]
        self.replies[str(silo)] = (reply, message)

    def only(self) -> tuple[Message, Message]:
        (held,) = self.replies.values()
        return held

    def deliver(self, grid: Village, silo: str) -> Callable[[], None]:
        return lambda: grid.deliver(*self.replies[silo])


@pytest.mark.parametrize(
    ("patience", "took_s", "waits_s"),
    [(2.0, 100, 100), (4.0, 100, 300), (1.0, 100, 30), (2.0, 5, 30), (1e6, 100, 3500)],
)
def test_a_round_with_its_quorum_has_some_patience_with_the_others(
    run: Run, country: Path, home: Path, events: Events, clock: Clock,
    patience: float, took_s: float, waits_s: float,
):  # fmt: skip
    held = Held()
    script = Script().at("train", "ant", 1, held).at("train", "bee", 1, held)
    grid = Village(files_of(country), home, script)

    def begin(message: Message, reply: Message) -> Message:
        grid.after(took_s, held.deliver(grid, "ant"))
        return reply

    script.at("train", "cat", 1, begin)
    server = run(grid, f"quorum=0.6 rounds=1 patience={patience}")
    assert merged(server) == {"ant": [1], "bee": [], "cat": [1]}
    (failure,) = events("failure")
    setting = "round_timeout_s" if waits_s == 3500 else "patience"
    waited, unit = failure["reason"].removeprefix("no reply within ").split(" ", 1)
    # A look up to a second late, three times of which are waited at most.
    assert took_s + waits_s <= float(waited) <= took_s + waits_s + 4
    assert unit == f"s ({setting})"


def test_a_straggler_that_comes_within_the_patience_is_merged(
    run: Run, country: Path, home: Path, unbroken: Tensors
):
    held = Held()
    script = Script().at("train", "bee", 2, held)
    grid = Village(files_of(country), home, script)

    def begin(message: Message, reply: Message) -> Message:
        grid.after(25, held.deliver(grid, "bee"))
        return reply

    script.at("train", "cat", 2, begin)
    server = run(grid, "quorum=0.6")
    assert same(state_of(server, silos_of(server, country)), unbroken)


def test_a_late_reply_of_an_old_round_is_not_merged_and_its_silo_takes_part_again(
    run: Run, country: Path, home: Path, events: Events
):
    held = Held()
    script = Script().at("train", "bee", 2, held)
    grid = Village(files_of(country), home, script)

    def late(message: Message, reply: Message) -> Message:
        held.deliver(grid, "bee")()
        return reply

    script.at("train", "cat", 3, late)
    server = run(grid, "quorum=0.6 rounds=4")
    assert merged(server)["bee"] == [1, 4]
    assert [(e["silo"], e["round"], e["of_round"]) for e in events("late")] == [("bee", 3, 2)]
    task = grid.tasks(silo="bee", round_=4)[0].content.config_records["task"]
    assert (task["start_round"], task["keep_from"]) == (1, 1)


def test_a_silo_that_never_answers_gets_nothing_more_and_is_waited_for_once(
    run: Run, country: Path, home: Path, clock: Clock, events: Events
):
    grid = Village(files_of(country), home, Script().at("train", "bee", 2, nothing))
    began = clock.now
    server = run(grid, "quorum=0.6 rounds=4")
    assert merged(server) == {"ant": [1, 2, 3, 4], "bee": [1], "cat": [1, 2, 3, 4]}
    node = grid.node_of("bee")
    assert [m.metadata.message_type for m in grid.sent if m.metadata.dst_node_id == node] == [
        "query", "query.register", "train", "train"
    ]  # fmt: skip
    assert 30 <= clock.now - began < 30 + strategy._RETURN_S + 10
    reasons = [(e["round"], e["reason"]) for e in events("absent")]
    assert set(reasons) == {(4, "still owes its reply to train of round 2")}
    failures = [(e["round"], e["silo"], e["reason"]) for e in events("failure")]
    assert failures == [(2, "bee", "no reply within 30 s (patience)")]


def test_once_flower_gives_its_task_up_such_a_silo_is_back(
    run: Run, country: Path, home: Path, events: Events, clock: Clock
):
    """The SuperLink says so when the message's time to live is over."""
    held = Held()
    script = Script().at("train", "bee", 2, held)

    def in_a_while(message: Message, reply: Message) -> Message | None:
        clock.now += 2
        return script(message, reply)

    grid = Village(files_of(country), home, in_a_while)

    def expire(message: Message, reply: Message) -> Message:
        reply_of_bee, task_of_bee = held.replies["bee"]
        grid.deliver(flower_error(3, "Message Unavailable")(message, reply_of_bee), task_of_bee)
        return reply

    script.at("train", "cat", 3, expire)
    server = run(grid, "quorum=0.6 rounds=5")
    assert merged(server)["bee"][-1] == 5
    late, lost = (e["reason"] for e in events("failure"))
    assert late.endswith("s (patience)")
    assert lost == "Message Unavailable (Flower's code 3)"


def test_a_reply_of_an_attempt_that_was_given_up_still_counts_in_its_round(
    run: Run, country: Path, home: Path, unbroken: Tensors
):
    held = Held()
    grid = Village(files_of(country), home, Script().at("train", "bee", 2, held))
    grid.after(3700, lambda: held.deliver(grid, "bee")())
    server = run(grid)
    assert same(state_of(server, silos_of(server, country)), unbroken)
    assert len(grid.tasks(silo="bee", round_=2)) == 1


def test_a_reply_that_was_there_before_its_node_went_counts(
    run: Run, country: Path, home: Path, unbroken: Tensors, events: Events
):
    held = Held()
    script = Script().at("train", "bee", 3, held)
    grid = Village(files_of(country), home, script)

    def go() -> None:
        held.deliver(grid, "bee")()
        del grid.nodes[grid.node_of("bee")]
        grid.after(20, lambda: grid.join(country / "bee.yaml"))

    def begin(message: Message, reply: Message) -> Message:
        grid.after(20, go)
        return reply

    script.at("train", "cat", 3, begin)
    server = run(grid)
    assert same(state_of(server, silos_of(server, country)), unbroken)
    assert events("failure") == []
    assert len(grid.tasks(silo="bee", round_=3)) == 1


# ---- the run begins, stops, goes on and ends ------------------------------------------------


def test_the_first_round_waits_for_min_silos(run: Run, country: Path, home: Path, events: Events):
    grid = Village(files_of(country, "ant"), home)
    grid.after(10, lambda: grid.join(country / "bee.yaml"))
    grid.after(200, lambda: grid.join(country / "cat.yaml"))
    server = run(grid)
    assert merged(server) == dict.fromkeys(PIECES, ROUNDS)
    assert [e["round"] for e in events("join")] == [0, 0, 0]


def test_too_few_silos_are_named_with_what_is_wrong_with_the_others(
    run: Run, country: Path, home: Path, tmp_path: Path, clock: Clock
):
    (tmp_path / "dog.yaml").write_text("name: dog\nvocab_size: 300\nfiles: [/nowhere/*.txt]\n")
    grid = Village([*files_of(country, "ant"), tmp_path / "dog.yaml"], home)
    began = clock.now
    with pytest.raises(DeptError) as caught:
        run(grid, "round_timeout_s=700")
    lines = str(caught.value).splitlines()
    assert lines[0] == "within 700 s came 1 of min_silos=3 silos: ant"
    assert len(lines) == 2
    assert lines[1].startswith("silo dog: no file matches ['/nowhere/*.txt']")
    assert 700 <= clock.now - began < 705


class Killed(BaseException):
    """Ends the ServerApp the hard way."""


def kill(message: Message, reply: Message) -> None:
    raise Killed


def test_a_run_that_was_killed_goes_on_with_the_silos_that_are_there(
    run: Run, country: Path, home: Path, events: Events
):
    with pytest.raises(Killed):
        run(Village(files_of(country), home, Script().at("train", "cat", 3, kill)))
    grid = Village(files_of(country, "ant", "bee"), home)
    server = run(grid, "min_silos=2 quorum=0.6", resume=True)
    assert merged(server) == {"ant": ROUNDS, "bee": ROUNDS, "cat": [1, 2]}
    assert [e["merged"] for e in events("round")] == [list(PIECES)] * 2 + [["ant", "bee"]]


@pytest.mark.parametrize("back", ["with all", "without cat, who then comes"])
def test_a_run_that_was_killed_and_resumed_equals_an_unbroken_one(
    run: Run, country: Path, home: Path, unbroken: Tensors, back: str
):
    with pytest.raises(Killed):
        run(Village(files_of(country), home, Script().at("train", "cat", 3, kill)))
    grid = Village(files_of(country), home)
    if back != "with all":
        del grid.nodes[1002]
        grid.after(100, lambda: grid.join(country / "cat.yaml"))
    server = run(grid, "min_silos=2", resume=True)
    assert same(state_of(server, silos_of(server, country)), unbroken)


def test_a_partner_that_left_for_good_is_left_out_on_resume(
    run: Run, country: Path, home: Path, events: Events
):
    script = Script()
    grid = Village(files_of(country), home, script)

    def leave(message: Message, reply: Message) -> None:
        del grid.nodes[message.metadata.dst_node_id]

    script.at("train", "bee", 3, leave)
    with pytest.raises(DeptError, match="round 3: only 2 of 3"):
        run(grid, "round_timeout_s=5 round_attempts=1")
    again = Village(files_of(country), home)
    server = run(again, "min_silos=2 without=[bee]", resume=True)
    assert merged(server) == {"ant": ROUNDS, "bee": [1, 2], "cat": ROUNDS}
    assert again.tasks(silo="bee") == again.tasks("evaluate", "bee") == []
    assert "silo bee takes no part (without=['bee'])" in str(events("failure"))
    assert [e["sampled"] for e in events("round")][2:] == [["ant", "cat"]]


def final_body(server: Server, country: Path, silo: str) -> Tensors:
    tensors, _ = load_state(silos_of(server, country)[silo].final_folder)
    return under_prefix("body", tensors)


def test_the_final_body_goes_to_those_who_are_there_and_later_to_the_others(
    run: Run, country: Path, home: Path, clock: Clock, capsys: pytest.CaptureFixture[str],
    events: Events,
):  # fmt: skip
    script = Script()
    grid = Village(files_of(country), home, script)

    def leave(message: Message, reply: Message) -> Message:
        del grid.nodes[message.metadata.dst_node_id]
        return reply

    script.at("train", "cat", 3, leave)
    began = clock.now
    server = run(grid)
    assert merged(server) == dict.fromkeys(PIECES, ROUNDS)
    assert strategy._RETURN_S < clock.now - began < strategy._RETURN_S + 20
    assert "without the final body: cat; once they are back, submit again" in (
        capsys.readouterr().out
    )
    for silo in ("ant", "bee"):
        assert same(final_body(server, country, silo), server.body)
    assert not silos_of(server, country)["cat"].final_folder.exists()
    again = Village(files_of(country), home)
    server = run(again, resume=True)
    assert again.tasks() == []
    assert same(final_body(server, country, "cat"), server.body)
    assert {e["silo"] for e in events("silo_eval") if e.get("final")} == PIECES.keys()


def test_the_final_body_waits_for_a_silo_that_is_back_soon(run: Run, country: Path, home: Path):
    script = Script()
    grid = Village(files_of(country), home, script)

    def leave(message: Message, reply: Message) -> Message:
        del grid.nodes[message.metadata.dst_node_id]
        grid.after(100, lambda: grid.join(country / "cat.yaml"))
        return reply

    script.at("train", "cat", 3, leave)
    server = run(grid)
    assert same(final_body(server, country, "cat"), server.body)


@pytest.mark.parametrize("variant", ["spec-opt", "trim"])
def test_a_silo_that_was_never_merged_gets_the_final_body_only_with_embeddings(
    run: Run, country: Path, country_sharing: Path, shared: Path, home: Path,
    capsys: pytest.CaptureFixture[str], variant: str,
):  # fmt: skip
    """Embeddings of its own would still be those that it began with."""
    trim = variant == "trim"
    folder = country_sharing if trim else country
    visitor = Visitor(folder / "cat.yaml")
    grid = visitor.watch(Village(files_of(folder, "ant", "bee"), home, visitor))
    settings = f"{ALL_VARIANTS[variant]} min_silos=2 rounds=2"
    server = run(grid, f"{settings} shared_tokenizer={shared}" if trim else settings)
    assert merged(server)["cat"] == []
    finals = {m.content.config_records["task"]["silo"] for m in grid.tasks("evaluate")}
    assert finals == ({"ant", "bee", "cat"} if trim else {"ant", "bee"})
    out = capsys.readouterr().out
    assert "silo cat joins; too late for this run" in out
    assert "without the final body" not in out


@pytest.mark.parametrize(
    ("silos", "simulated", "longest_s"),
    [(1, False, 0.1), (4, False, 0.4), (100, False, 1.0), (None, False, 1.0), (100, True, 0.1)],
)
def test_a_look_for_the_replies_of_many_silos_comes_less_often(
    recipe: Callable[..., Recipe], tmp_path: Path, silos: int | None, simulated: bool,
    longest_s: float, clock: Clock,
):  # fmt: skip
    made = DeptStrategy(recipe(""), tmp_path, tmp_path, resume=False, simulated=simulated)
    pause = made._pause(silos)
    slept = []
    for _ in range(8):
        before = clock.now
        pause.wait()
        slept.append(clock.now - before)
    assert slept[0] == pytest.approx(0.02)
    assert slept[-1] == pytest.approx(longest_s)
