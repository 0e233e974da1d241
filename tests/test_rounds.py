"""The algorithm without Flower: by hand, against a plain reference, stopped and resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from dept_fl.checkpoint import rounds_on_disk
from dept_fl.config import Recipe, load_recipe
from dept_fl.errors import BadUpdate, ConfigError, DeptError
from dept_fl.rounds import Server, SharedTokenizer, last_checkpoint, pretrain
from dept_fl.silo import Registration, Silo, Task, Update
from tests.federation import ALL_VARIANTS, same, start, state_of, train_round, trained

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
    return with_members(settings, {name: holds(name, rows) for name, rows in TRIM_ROWS.items()})


def with_members(settings: Recipe, registrations: dict[str, Registration]) -> Server:
    server = Server(settings, "e" * 12, SharedTokenizer(6, "f"))
    for registration in registrations.values():
        server.register(registration)
    return server


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
        train_round(server, silos)
        server.save(tmp_path)
    silos["ant"].train(server.task("ant"))  # killed in the middle of round 3
    tensors, meta = last_checkpoint(tmp_path, server.recipe)
    resumed, again = start(made, home, meta["experiment"])
    resumed.load(tensors, meta)
    assert resumed.round == 2
    pretrain(resumed, again)
    assert same(unbroken, state_of(resumed, again))


def test_an_update_that_was_not_merged_leaves_no_trace(recipe: Make, home: Path):
    """A silo trains, its reply is lost, the round is tried again: as if nothing had been."""
    unbroken = state_of(*trained(recipe(), home))
    server, silos = start(recipe(), home)
    for _ in range(4):
        for silo in silos.values():
            silo.train(server.task(silo.name))
        train_round(server, silos)
    assert same(unbroken, state_of(server, silos))


def test_a_seldom_sampled_silo_keeps_the_state_it_will_need(recipe: Make, home: Path):
    server, silos = start(recipe("silos_per_round=1 rounds=12"), home)
    pretrain(server, silos)
    for name, silo in silos.items():
        newest = max(server.members[name].merged, default=0)
        assert server.members[name].merged == [] or newest in rounds_on_disk(silo._states)
        assert len(rounds_on_disk(silo._states)) <= 3


def test_sampling_depends_on_seed_round_and_names_alone(recipe: Make):
    server = trim_server(recipe, "silos_per_round=2 rounds=40")
    draws = [server.sample(t) for t in range(1, 41)]
    again = trim_server(recipe, "silos_per_round=2 rounds=40")
    assert draws == [again.sample(t) for t in range(1, 41)]
    assert {name for draw in draws for name in draw} == {"ant", "bee", "cat"}
    other = trim_server(recipe, "silos_per_round=2 rounds=40 seed=4")
    assert draws != [other.sample(t) for t in range(1, 41)]


def test_a_silo_is_sampled_in_the_rounds_behind_the_one_in_which_it_joined(recipe: Make):
    server = trim_server(recipe)
    server.register(holds("dog", [1, 5]), during=2)
    assert server.register(holds("ant", TRIM_ROWS["ant"]), during=2) is False
    assert server.sample(2) == ["ant", "bee", "cat"]
    assert server.sample(3) == ["ant", "bee", "cat", "dog"]


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
def test_a_bad_update_is_rejected_as_a_whole(
    recipe: Make, changes: Callable, reason: str, tmp_path: Path
):
    server = trim_server(recipe, "rounds=1")
    merge = server.open_round(tmp_path)
    with pytest.raises(BadUpdate, match=reason):
        server.add(merge, update(server, **changes(update(server))))
    assert merge.merged == []
    assert list(tmp_path.iterdir()) == []


def test_a_second_update_of_a_silo_in_one_round_is_rejected(recipe: Make, tmp_path: Path):
    server = trim_server(recipe)
    merge = server.open_round(tmp_path)
    server.add(merge, update(server))
    with pytest.raises(BadUpdate, match="second"):
        server.add(merge, update(server))


def test_a_round_below_the_quorum_names_who_is_missing(recipe: Make, tmp_path: Path):
    server = trim_server(recipe, "quorum=0.5")
    merge = server.open_round(tmp_path)
    server.add(merge, update(server))
    with pytest.raises(DeptError, match=r"only 1 of 3 .* bee, cat.* quorum=0.5"):
        server.close_round(merge)
    assert server.round == 0


def test_a_different_shared_tokenizer_is_refused(recipe: Make):
    settings = recipe("variant=trim tokenizer=shared shared_tokenizer=x")
    registrations = {name: holds(name, rows) for name, rows in TRIM_ROWS.items()}
    registrations["cat"] = replace(registrations["cat"], fingerprint="other")
    with pytest.raises(BadUpdate, match=r"its tokenizer \(other\) is not the federation's \(f\)"):
        with_members(settings, registrations)


@pytest.mark.parametrize("rows", [[3, 1], [1, 1], [-1, 2], [4, 6]])
def test_token_ids_that_cannot_be_are_refused(recipe: Make, rows: list[int]):
    settings = recipe("variant=trim tokenizer=shared shared_tokenizer=x")
    registrations = {name: holds(name, rows) for name, rows in TRIM_ROWS.items()}
    registrations["cat"] = holds("cat", rows)
    with pytest.raises(BadUpdate, match="its token ids"):
        with_members(settings, registrations)


def test_resuming_with_other_settings_names_them(recipe: Make, home: Path, tmp_path: Path):
    server, _ = start(recipe(), home)
    server.save(tmp_path)
    with pytest.raises(ConfigError, match=r"inner.learning_rate: 0.01 -> 0.02"):
        last_checkpoint(tmp_path, recipe("inner.learning_rate=0.02"))


def test_a_silo_without_the_state_it_should_start_from_says_so(recipe: Make, home: Path):
    server, silos = start(recipe(), home)
    train_round(server, silos)
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
    train_round(server, silos)
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
    train_round(server, silos)
    lines = (tmp_path / "ant.jsonl").read_text().splitlines()
    (tmp_path / "ant.jsonl").write_text("\n".join(lines[:-1]))
    changed = Silo("ant", server.recipe, tmp_path / "home", server.experiment)
    with pytest.raises(DeptError, match=r"silo ant: its state of round 1 has (text|tokenizer)="):
        changed.train(server.task("ant"))


# ---- clipping and other merges ------------------------------------------------------------------


def spec_server(recipe: Make, overrides: str = "") -> Server:
    """Three silos with vocabularies of their own; only the body travels."""
    server = Server(recipe(overrides), "e" * 12, None)
    for name in ("ant", "bee", "cat"):
        server.register(replace(holds(name, [0, 1]), fingerprint="", rows=None))
    return server


def one_round(server: Server, body: dict[str, float], embeddings: float = 0.0) -> dict[str, float]:
    """A round in which each silo adds its number to the body; returns who was scaled down."""
    with TemporaryDirectory() as folder:
        merge = server.open_round(Path(folder))
        for name, value in body.items():
            server.add(merge, AddsConstants(value, embeddings).train(server.task(name)))
        return server.close_round(merge)


def moved_by(server: Server, before: dict[str, torch.Tensor]) -> float:
    """The one number that was added to the whole body."""
    moves = [(tensor - before[name]).flatten() for name, tensor in server.body.items()]
    move = torch.cat(moves)
    torch.testing.assert_close(move, move[:1].expand_as(move), atol=1e-6, rtol=1e-3)
    return float(move.mean())


def copied(server: Server) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in server.body.items()}


@pytest.mark.parametrize(
    ("settings", "moved"),
    [
        ("", 0.002),  # 1, 1 and 4 thousandths, being 4 times the median norm
        ("outer.clip_delta=0", 1.002 / 3),
        ("outer.clip_delta=1", 0.001),
        ("outer.merge=median", 0.001),
        ("outer.merge=trimmed-mean outer.trim_fraction=0.4", 0.001),
        ("outer.merge=trimmed-mean outer.trim_fraction=0.3", 0.002),
    ],
)
def test_a_delta_a_thousand_times_too_large_in_round_1_is_scaled_down(
    recipe: Make, settings: str, moved: float
):
    server = spec_server(recipe, settings)
    before = copied(server)
    clipped = one_round(server, {"ant": 0.001, "bee": 1.0, "cat": 0.001})
    assert moved_by(server, before) == pytest.approx(moved, rel=1e-3)
    limit = server.recipe.outer.clip_delta
    assert clipped == ({"bee": pytest.approx(limit / 1000)} if limit else {})


def test_the_limit_of_later_rounds_is_the_median_of_the_clipped_norms_before(recipe: Make):
    server = spec_server(recipe, "outer.clip_delta=2 rounds=9 inner.local_steps=1")
    unit = server.layout.body_parameters() ** 0.5  # the norm of a delta of ones
    one_round(server, {"ant": 0.001, "bee": 0.002, "cat": 0.009})  # cat is clipped to 4
    kept = [norm / unit for norm in server._norms.rounds["body"][0]]
    assert kept == pytest.approx([0.001, 0.002, 0.004], rel=1e-3)
    before = copied(server)
    # The median is 2, so that the limit is 4: ant's 8 becomes 4.
    clipped = one_round(server, {"ant": 0.008, "bee": 0.003, "cat": -0.001})
    assert clipped == {"ant": pytest.approx(0.5, rel=1e-3)}
    assert moved_by(server, before) == pytest.approx((4 + 3 - 1) / 3000, rel=1e-3)
    # 1 2 4, 4 3 1: the median is 2.5, the limit 5
    assert one_round(server, {"ant": 0.0049, "bee": 0.0051, "cat": 0.001}) == {
        "bee": pytest.approx(5 / 5.1, rel=1e-3)
    }


def test_a_delta_a_thousand_times_too_large_in_round_3_is_refused(recipe: Make, tmp_path: Path):
    server = spec_server(recipe)
    for _ in range(2):
        one_round(server, dict.fromkeys(("ant", "bee", "cat"), 0.001))
    merge = server.open_round(tmp_path)
    for name, value in (("ant", 0.1001), ("bee", 1.0)):
        with pytest.raises(BadUpdate, match=r"body: its norm .* is over largest_delta=100 times"):
            server.add(merge, AddsConstants(value, 0).train(server.task(name)))
    server.add(merge, AddsConstants(0.0999, 0).train(server.task("cat")))
    assert merge.merged == ["cat"]
    assert [file.name for file in tmp_path.iterdir() if file.name.endswith("body")] == ["cat.body"]


def test_with_a_larger_largest_delta_it_is_scaled_down_in_round_3_too(recipe: Make):
    server = spec_server(recipe, "largest_delta=1e4")
    for _ in range(2):
        one_round(server, dict.fromkeys(("ant", "bee", "cat"), 0.001))
    before = copied(server)
    assert one_round(server, {"ant": 0.001, "bee": 0.001, "cat": 1.0}).keys() == {"cat"}
    assert moved_by(server, before) == pytest.approx(0.002, rel=1e-3)


def test_embeddings_that_travel_are_scaled_down_apart_from_the_body(recipe: Make, tmp_path: Path):
    server = trim_server(recipe, "rounds=1 outer.clip_delta=1")
    phi = server.embeddings["model.embed_tokens.weight"].clone()
    before = copied(server)
    merge = server.open_round(tmp_path)
    # Norms of the embeddings: 0.03 sqrt(48), 0.01 sqrt(48), 0.01 sqrt(32); the median is bee's.
    for name, value in (("ant", 0.03), ("bee", 0.01), ("cat", 0.01)):
        server.add(merge, AddsConstants(0.005, value).train(server.task(name)))
    assert server.close_round(merge) == {}
    assert moved_by(server, before) == pytest.approx(0.005, rel=1e-3)
    moved = torch.full((6, 1), 0.01)
    moved[5] = 0
    torch.testing.assert_close(
        server.embeddings["model.embed_tokens.weight"], (phi + moved), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("how", ["median", "trimmed-mean"])
def test_trim_round_by_hand_with_other_merges(recipe: Make, how: str):
    server = trim_server(recipe, f"rounds=1 outer.merge={how} outer.trim_fraction=0.4")
    phi = server.embeddings["model.embed_tokens.weight"].clone()
    before = copied(server)
    deltas = {"ant": (0.003, 0.01), "bee": (0.006, 0.04), "cat": (-0.009, -0.02)}
    pretrain(server, {name: AddsConstants(*both) for name, both in deltas.items()})
    assert moved_by(server, before) == pytest.approx(0.003, rel=1e-3)
    # rows 0: ant; 1: (ant + bee)/2; 2: bee; 3: the middle of three; 4: cat; 5: nobody
    moved = torch.tensor([0.01, 0.025, 0.04, 0.01, -0.02, 0.0]).unsqueeze(1)
    torch.testing.assert_close(server.embeddings["model.embed_tokens.weight"], phi + moved)
    assert torch.equal(server.embeddings["model.embed_tokens.weight"][5], phi[5])


@pytest.mark.parametrize("merge", ["mean", "median", "trimmed-mean"])
@pytest.mark.parametrize("outer", ["average", "nesterov"])
def test_stopped_and_resumed_equals_unbroken_while_deltas_are_scaled_down(
    recipe: Make, tmp_path: Path, merge: str, outer: str
):
    settings = f"outer.merge={merge} outer.optimizer={outer} outer.clip_delta=1.5 rounds=6"

    def numbers(round_: int) -> dict[str, float]:
        return {"ant": 0.001 * round_, "bee": -0.002, "cat": 0.03 / round_}

    unbroken, stopped = trim_server(recipe, settings), trim_server(recipe, settings)
    scaled = [one_round(unbroken, numbers(t), 0.001 * t) for t in range(1, 7)]
    assert sum(map(len, scaled)) >= 6
    for t in range(1, 4):
        one_round(stopped, numbers(t), 0.001 * t)
    stopped.save(tmp_path)
    resumed = trim_server(recipe, settings)
    resumed.load(*last_checkpoint(tmp_path, resumed.recipe))
    for t in range(4, 7):
        assert one_round(resumed, numbers(t), 0.001 * t) == scaled[t - 1]
    for part in ("body", "embeddings"):
        assert same(getattr(resumed, part), getattr(unbroken, part))
    assert resumed._norms.rounds == unbroken._norms.rounds


def test_a_quorum_is_not_missed_by_a_rounding_error(recipe: Make, tmp_path: Path):
    server = trim_server(recipe, "quorum=0.28")
    merge = server.open_round(tmp_path)
    merge.sampled = [str(i) for i in range(25)]
    merge.norms = {str(i): {} for i in range(7)}
    assert server.has_quorum(merge)
    merge.norms.popitem()
    assert not server.has_quorum(merge)
