"""The arms of a comparison by hand: what each trains on, how much of it, at which rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from dept_fl.arms import ARMS, chosen_arms
from dept_fl.central import probabilities
from dept_fl.config import InnerConfig, Recipe
from dept_fl.errors import ConfigError
from dept_fl.train import Schedule

Make = Callable[..., Recipe]
NAMES = {
    "std-0", "std-0-small", "std-0.3", "std-0.3-small", "std-1", "std-1-small", "act", "act-small",
    "alone", "mixed", "glob", "trim", "spec", "spec-opt",
}  # fmt: skip


def test_all_arms_are_there():
    assert set(ARMS) == NAMES
    assert [arm.name for arm in chosen_arms("all")] == list(ARMS)
    assert [arm.name for arm in chosen_arms("trim, glob,trim")] == ["trim", "glob"]


@pytest.mark.parametrize("names", ["std-2", "glob,trimm", "", ","])
def test_an_unknown_arm_is_named(names: str):
    with pytest.raises(ConfigError, match=r"no such arm; arms: all, std-0, .*spec-opt"):
        chosen_arms(names)


def test_sampling_probabilities_by_hand():
    tokens = {"a": 100, "b": 400}
    assert probabilities(tokens, 0) == {"a": 0.5, "b": 0.5}
    assert probabilities(tokens, 1) == {"a": 0.2, "b": 0.8}
    # 400^0.5 is twice 100^0.5
    assert probabilities(tokens, 0.5) == {"a": pytest.approx(1 / 3), "b": pytest.approx(2 / 3)}
    # 4^0.3 = 1.5157
    assert probabilities(tokens, 0.3)["b"] == pytest.approx(1.5157 / 2.5157, abs=1e-4)


@pytest.mark.parametrize(("name", "tau"), [("std-0", 0.0), ("std-0.3", 0.3), ("std-1", 1.0)])
def test_the_exponent_of_an_arm_is_in_its_name(name: str, tau: float):
    assert ARMS[name].tau == ARMS[f"{name}-small"].tau == tau


def test_both_readings_of_equal_tokens_by_hand(recipe: Make):
    # three silos, four rounds of two steps of four sequences of 16 tokens
    base = recipe()
    whole, small = (ARMS[name].recipe(base) for name in ("std-1", "std-1-small"))
    for made in (whole, small):
        assert (made.rounds, made.inner.local_steps, made.total_steps) == (4, 2, 8)
    assert whole.rounds * whole.round_tokens == 3 * 4 * 2 * 4 * 16
    assert small.rounds * small.round_tokens == 4 * 2 * 4 * 16
    assert whole.inner.sequences_per_pass == small.inner.sequences_per_pass == 4


def test_what_the_federations_arms_are(recipe: Make):
    made = {n: ARMS[n].recipe(recipe("outer.optimizer=nesterov")) for n in NAMES}
    settings = {n: (r.variant, r.tokenizer) for n, r in made.items()}
    assert settings["spec-opt"] == settings["alone"] == ("spec", "own")
    assert settings["spec"] == ("spec", "shared")
    assert settings["trim"] == ("trim", "shared")
    assert {settings[n] for n in NAMES - {"spec-opt", "alone", "spec", "trim"}} == {
        ("glob", "shared")
    }
    # the control has the outer optimiser of what it controls; the mean of one silo needs none
    assert made["mixed"].outer == made["glob"].outer == made["spec-opt"].outer
    assert made["alone"].outer.optimizer == "average"


def test_what_serves_averaging_does_not_burden_arms_that_average_nothing(recipe: Make):
    base = recipe("inner.rewarm_steps=1 inner.state=reset outer.clip_delta=2.0")
    made = {name: ARMS[name].recipe(base) for name in NAMES}
    assert made["alone"].inner.rewarm_steps == made["std-1"].inner.rewarm_steps == 0
    assert made["glob"].inner.rewarm_steps == made["mixed"].inner.rewarm_steps == 1
    assert (made["alone"].inner.state, made["alone"].outer.clip_delta) == ("keep", 0.0)
    assert (made["spec-opt"].inner.state, made["spec-opt"].outer.clip_delta) == ("reset", 2.0)


def test_an_arm_takes_its_own_settings_from_the_recipe(recipe: Make):
    lines = ["std-* inner.learning_rate=0.5", "std-1 inner.learning_rate=0.25 rounds=3", "x y=1"]
    base = with_lines(recipe(), lines)
    rates = {name: arm.recipe(base).inner.learning_rate for name, arm in ARMS.items()}
    assert rates["std-0"] == rates["std-0.3-small"] == rates["std-1-small"] == 0.5
    assert rates["std-1"] == 0.25
    assert rates["act"] == rates["spec-opt"] == base.inner.learning_rate
    assert ARMS["std-1"].recipe(base).rounds == 3
    with pytest.raises(ConfigError, match=r"inner\.rate: no such setting"):
        ARMS["glob"].recipe(with_lines(recipe(), ["glob inner.rate=1"]))


def test_no_arm_has_an_open_model_of_its_own(recipe: Make):
    base = with_lines(recipe(), ["glob model.start=org/model"])
    with pytest.raises(ConfigError, match=r"model\.start='org/model': .* read with its recipe"):
        ARMS["glob"].recipe(base)


def with_lines(recipe: Recipe, lines: list[str]) -> Recipe:
    return replace(recipe, arms=lines)


# ---- active forgetting ------------------------------------------------------------------------


def test_the_rates_of_active_forgetting_by_hand():
    inner = InnerConfig(
        local_steps=20, learning_rate=1.0, warmup_steps=4, final_learning_rate_fraction=0.0
    )
    schedule = Schedule(first=20, total=44, forget_every=20)
    # the body is on the one cosine: steps 4..44, half way at 24
    assert schedule.body_rate(inner, 24) == pytest.approx(0.5)
    # the embeddings begin again at 20, warm up over a tenth of 20, and are half way at 31
    assert schedule.embedding_rate(inner, 20) == 0.5
    assert schedule.embedding_rate(inner, 21) == 1.0
    assert schedule.embedding_rate(inner, 31) == pytest.approx(0.5)
    assert schedule.embedding_rate(inner, 39) == pytest.approx(0.0076, abs=1e-4)


def test_without_forgetting_embeddings_follow_the_bodys_schedule_at_their_own_rate():
    inner = InnerConfig(learning_rate=1.0, embedding_learning_rate=3.0, warmup_steps=2)
    schedule = Schedule(first=0, total=10)
    for step in range(10):
        ratio = schedule.embedding_rate(inner, step) / schedule.body_rate(inner, step)
        assert ratio == pytest.approx(3.0)


def test_a_round_behind_the_first_comes_up_to_its_rate():
    inner = InnerConfig(learning_rate=1.0, warmup_steps=0, rewarm_steps=3)
    flat = Schedule(first=0, total=10**9)
    later = Schedule(first=8, total=10**9)
    assert flat.body_rate(inner, 0) == pytest.approx(1.0)
    rates = [later.body_rate(inner, step) for step in range(8, 13)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
