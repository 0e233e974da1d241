"""The algorithm without Flower: by hand, against a plain reference, stopped and resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dept_fl.checkpoint import rounds_on_disk
from dept_fl.config import Recipe, load_recipe
from dept_fl.errors import BadUpdate, ConfigError, DeptError
from dept_fl.rounds import Server, last_checkpoint, pretrain
from dept_fl.silo import Registration, Silo, Task, Update
from tests.federation import ALL_VARIANTS, same, start, state_of, trained

Make = Callable[..., Recipe]
every_variant = pytest.mark.parametrize("settings", ALL_VARIANTS.values(), ids=ALL_VARIANTS.keys())


class AddsConstants:
    """A silo whose training adds one number to the body and another to its embeddings."""

    def __init__(self, body: float, embeddings: float) -> None:
        self._body, self._embeddings = body, embeddings

    def train(self, task: Task) -> Update:
        body = {n: torch.full_like(t, self._body) for n, t in task.body.items()}
        own = {n: torch.full_like(t, self._embeddings) for n, t in task.embeddings.items()}
        return Update(task.silo, task.round, body, own, {})


def holds(silo: str, rows: list[int], tokens: int = 6) -> Registration:
    return Registration(
        silo=silo,
        vocabulary=len(rows),
        tokenizer_size=tokens,
        fingerprint="f",
        train_tokens=1,
        train_bytes=1,
        validation_bytes=1,
        train_documents=1,
        duplicates=0,
        lossy_documents=0,
        unigram_bits_per_byte=1.0,
        step_s=0.0,
        prepare_s=0.0,
        on_gpu=False,
        rows=torch.tensor(rows),
    )


TRIM_ROWS = {"ant": [0, 1, 3], "bee": [1, 2, 3], "cat": [3, 4]}


def trim_server(recipe: Make, overrides: str = "") -> Server:
    settings = recipe(f"variant=trim tokenizer=shared shared_tokenizer=x {overrides}")
    return Server(settings, {name: holds(name, rows) for name, rows in TRIM_ROWS.items()}, "e" * 12)


def test_trim_round_by_hand_with_all_silos(recipe: Make):
    server = trim_server(recipe, "rounds=1")
    body = {n: t.clone() for n, t in server.body.items()}
    phi = server.embeddings["model.embed_tokens.weight"].clone()
    ant, bee, cat = AddsConstants(0.3, 0.01), AddsConstants(0.6, 0.04), AddsConstants(0, -0.02)
    pretrain(server, {"ant": ant, "bee": bee, "cat": cat})
    for name, tensor in server.body.items():
        torch.testing.assert_close(tensor, body[name] + 0.3)
    # rows 0: ant; 1: (ant + bee)/2; 2: bee; 3: all three; 4: cat; 5: nobody
    moved = torch.tensor([0.01, 0.025, 0.04, 0.01, -0.02, 0.0]).unsqueeze(1)
    torch.testing.assert_close(server.embeddings["model.embed_tokens.weight"], phi + moved)
    assert torch.equal(server.embeddings["model.embed_tokens.weight"][5], phi[5])


def test_trim_round_by_hand_with_some_silos_sampled(recipe: Make):
    server = trim_server(recipe, "rounds=1 silos_per_round=2")
    sampled = server.sample(1)
    phi = server.embeddings["model.embed_tokens.weight"].clone()
    deltas = {"ant": 0.01, "bee": 0.04, "cat": -0.02}
    pretrain(server, {name: AddsConstants(0, delta) for name, delta in deltas.items()})
    expected = [
        [deltas[name] for name in sampled if row in TRIM_ROWS[name]] or [0.0] for row in range(6)
    ]
    moved = torch.tensor([sum(held) / len(held) for held in expected]).unsqueeze(1)
    assert len(sampled) == 2
    torch.testing.assert_close(server.embeddings["model.embed_tokens.weight"], phi + moved)


def test_trim_sends_a_silo_its_own_rows_only(recipe: Make):
    server = trim_server(recipe)
    phi = server.embeddings["model.embed_tokens.weight"]
    assert torch.equal(server.task("bee").embeddings["model.embed_tokens.weight"], phi[[1, 2, 3]])


def test_averaging_equals_the_mean_of_the_silos_models(recipe: Make, home: Path):
    server, silos = start(recipe("variant=glob tokenizer=shared rounds=1"), home)
    before = {n: t.clone() for n, t in {**server.body, **server.embeddings}.items()}
    updates = [silo.train(server.task(name)) for name, silo in silos.items()]
    pretrain(server, silos)
    for name, tensor in {**server.body, **server.embeddings}.items():
        models = [before[name] + {**u.body, **u.embeddings}[name] for u in updates]
        torch.testing.assert_close(tensor, torch.stack(models).mean(0), atol=1e-6, rtol=1e-6)


def test_one_silo_alone_with_averaging_is_ordinary_training(recipe: Make, home: Path):
    """Rounds must leave no seam: 4 rounds of 2 steps are 1 round of 8."""
    many, silos = trained(recipe("only=[ant]"), home)
    once, single = trained(recipe("only=[ant] rounds=1 inner.local_steps=8"), home)
    for name, tensor in many.body.items():
        torch.testing.assert_close(tensor, once.body[name], atol=1e-5, rtol=1e-4)
    embeddings = silos["ant"]._state(4).embeddings
    for name, tensor in single["ant"]._state(1).embeddings.items():
        torch.testing.assert_close(embeddings[name], tensor, atol=1e-5, rtol=1e-4)


@every_variant
def test_the_same_seed_gives_the_same_run_bit_for_bit(recipe: Make, home: Path, settings: str):
    torch.manual_seed(1)
    first = state_of(*trained(recipe(settings), home))
    torch.manual_seed(99)  # nobody may draw from the global generator
    assert same(first, state_of(*trained(recipe(settings), home)))


def test_another_seed_gives_another_run(recipe: Make, home: Path):
    one, two = (state_of(*trained(recipe(f"seed={seed}"), home)) for seed in (1, 2))
    assert not same(one, two)


@every_variant
@pytest.mark.parametrize("outer", ["average", "nesterov", "adam"])
def test_killed_at_round_2_of_4_and_resumed_equals_unbroken(
    recipe: Make, home: Path, tmp_path: Path, settings: str, outer: str
):
    made = recipe(f"{settings} outer.optimizer={outer} silos_per_round=2")
    unbroken = state_of(*trained(made, home))
    server, silos = start(made, home)
    for _ in range(2):
        train_one_round(server, silos)
        server.save(tmp_path)
    silos["ant"].train(server.task("ant"))  # killed in the middle of round 3
    tensors, meta = last_checkpoint(tmp_path, server.recipe)
    resumed, again = start(made, home, meta["experiment"])
    resumed.load(tensors, meta)
    assert resumed.round == 2
    pretrain(resumed, again)
    assert same(unbroken, state_of(resumed, again))


def train_one_round(server: Server, silos: dict) -> None:
    merge = server.open_round()
    for name in merge.sampled:
        server.add(merge, silos[name].train(server.task(name)))
    server.close_round(merge)


def test_an_update_that_was_not_merged_leaves_no_trace(recipe: Make, home: Path):
    """A silo trains, its reply is lost, the round is tried again: as if nothing had been."""
    unbroken = state_of(*trained(recipe(), home))
    server, silos = start(recipe(), home)
    for _ in range(4):
        for silo in silos.values():
            silo.train(server.task(silo.name))
        train_one_round(server, silos)
    assert same(unbroken, state_of(server, silos))


def test_a_seldom_sampled_silo_keeps_the_state_it_will_need(recipe: Make, home: Path):
    server, silos = start(recipe("silos_per_round=1 rounds=12"), home)
    pretrain(server, silos)
    for name, silo in silos.items():
        newest = max(server.history[name], default=0)
        assert server.history[name] == [] or newest in rounds_on_disk(silo._states)
        assert len(rounds_on_disk(silo._states)) <= 3


def test_sampling_depends_on_seed_round_and_names_alone(recipe: Make):
    server = trim_server(recipe, "silos_per_round=2 rounds=40")
    draws = [server.sample(t) for t in range(1, 41)]
    again = trim_server(recipe, "silos_per_round=2 rounds=40")
    assert draws == [again.sample(t) for t in range(1, 41)]
    assert {name for draw in draws for name in draw} == {"ant", "bee", "cat"}
    other = trim_server(recipe, "silos_per_round=2 rounds=40 seed=4")
    assert draws != [other.sample(t) for t in range(1, 41)]


def update(server: Server, **changes: object) -> Update:
    task = server.task("ant")
    good = AddsConstants(0.1, 0.01).train(task)
    return replace(good, **changes)  # type: ignore[arg-type]


def poisoned(tensors: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    bad = {name: tensor.clone() for name, tensor in tensors.items()}
    next(iter(bad.values())).view(-1)[0] = value
    return bad


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (lambda u: {"round": 7}, "round 7, expected 1"),
        (lambda u: {"silo": "dog"}, "silo 'dog', which was not sampled"),
        (lambda u: {"body": poisoned(u.body, float("nan"))}, "NaN or infinity"),
        (lambda u: {"body": poisoned(u.body, float("inf"))}, "NaN or infinity"),
        (lambda u: {"embeddings": poisoned(u.embeddings, float("-inf"))}, "NaN or infinity"),
        (lambda u: {"body": poisoned(u.body, 1e6)}, "norm"),
        (lambda u: {"embeddings": {}}, "missing"),
        (lambda u: {"body": dict(list(u.body.items())[1:])}, "missing"),
        (lambda u: {"body": {n: t.double() for n, t in u.body.items()}}, "float64"),
        (lambda u: {"body": {n: t[..., :1] for n, t in u.body.items()}}, "expected"),
        (lambda u: {"embeddings": {n: t[:-1] for n, t in u.embeddings.items()}}, "expected"),
    ],
)
def test_a_bad_update_is_rejected_as_a_whole(recipe: Make, changes: Callable, reason: str):
    server = trim_server(recipe, "rounds=1")
    merge = server.open_round()
    with pytest.raises(BadUpdate, match=reason):
        server.add(merge, update(server, **changes(update(server))))
    assert merge.merged == []
    for delta in (*merge.body.mean().values(), *merge.embeddings.mean().values()):
        assert not delta.any()


def test_a_second_update_of_a_silo_in_one_round_is_rejected(recipe: Make):
    server = trim_server(recipe)
    merge = server.open_round()
    server.add(merge, update(server))
    with pytest.raises(BadUpdate, match="second"):
        server.add(merge, update(server))


def test_a_round_below_the_quorum_names_who_is_missing(recipe: Make):
    server = trim_server(recipe, "quorum=0.5")
    merge = server.open_round()
    server.add(merge, update(server))
    with pytest.raises(DeptError, match=r"only 1 of 3 .* bee, cat.* quorum=0.5"):
        server.close_round(merge)
    assert server.round == 0


def test_different_shared_tokenizers_are_refused_by_name(recipe: Make):
    settings = recipe("variant=glob tokenizer=shared shared_tokenizer=x")
    registrations = {name: holds(name, rows) for name, rows in TRIM_ROWS.items()}
    registrations["cat"] = replace(registrations["cat"], fingerprint="other")
    with pytest.raises(DeptError, match=r"different tokenizers .*other: cat"):
        Server(settings, registrations, "e" * 12)


@pytest.mark.parametrize("rows", [[3, 1], [1, 1], [-1, 2], [4, 6]])
def test_token_ids_that_cannot_be_are_refused(recipe: Make, rows: list[int]):
    settings = recipe("variant=trim tokenizer=shared shared_tokenizer=x")
    registrations = {name: holds(name, rows) for name, rows in TRIM_ROWS.items()}
    registrations["cat"] = holds("cat", rows)
    with pytest.raises(DeptError, match="silo cat: its token ids"):
        Server(settings, registrations, "e" * 12)


def test_resuming_with_other_settings_names_them(recipe: Make, home: Path, tmp_path: Path):
    server, _ = start(recipe(), home)
    server.save(tmp_path)
    with pytest.raises(ConfigError, match=r"inner.learning_rate: 0.01 -> 0.02"):
        last_checkpoint(tmp_path, recipe("inner.learning_rate=0.02"))


def test_a_silo_without_the_state_it_should_start_from_says_so(recipe: Make, home: Path):
    server, silos = start(recipe(), home)
    train_one_round(server, silos)
    server.experiment = "f" * 12
    lost = type(silos["ant"])("ant", server.recipe, home, "f" * 12)
    with pytest.raises(DeptError, match="round-00001"):
        lost.train(server.task("ant"))


def test_settings_that_change_nothing_may_change_on_resume(
    recipe: Make, home: Path, tmp_path: Path
):
    server, _ = start(recipe(), home)
    server.save(tmp_path)
    _, meta = last_checkpoint(tmp_path, recipe("quorum=0.5 round_timeout_s=9 sample_tokens=3"))
    assert meta["round"] == 0


def test_a_damaged_checkpoint_gives_way_to_the_one_before(recipe: Make, home: Path, tmp_path: Path):
    server, silos = start(recipe(), home)
    server.save(tmp_path)
    train_one_round(server, silos)
    server.save(tmp_path)
    damage(tmp_path / "checkpoints" / "round-00001" / "tensors.safetensors")
    with pytest.warns(UserWarning, match=r"round-00001.*damaged.*round before"):
        _, meta = last_checkpoint(tmp_path, recipe())
    assert meta["round"] == 0
    damage(tmp_path / "checkpoints" / "round-00000" / "tensors.safetensors")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(DeptError, match=r"(?s)no checkpoint .*round-00001.*round-00000"),
    ):
        last_checkpoint(tmp_path, recipe())


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@every_variant
def test_text_that_changed_between_rounds_is_noticed(
    tiny_file: Path, tmp_path: Path, settings: str
):
    for file in tiny_file.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    made = load_recipe(tmp_path / "tiny.yaml", settings)
    server, silos = start(made, tmp_path / "home")
    train_one_round(server, silos)
    lines = (tmp_path / "ant.jsonl").read_text().splitlines()
    (tmp_path / "ant.jsonl").write_text("\n".join(lines[:-1]))
    changed = Silo("ant", server.recipe, tmp_path / "home", server.experiment)
    with pytest.raises(DeptError, match=r"silo ant: its state of round 1 has (text|tokenizer)="):
        changed.train(server.task("ant"))


def test_a_quorum_is_not_missed_by_a_rounding_error(recipe: Make):
    server = trim_server(recipe, "quorum=0.28")
    merge = server.open_round()
    merge.sampled = [str(i) for i in range(25)]
    merge.merged = [str(i) for i in range(7)]
    assert server.has_quorum(merge)
    merge.merged.pop()
    assert not server.has_quorum(merge)
