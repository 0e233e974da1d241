"""The paper's cost figures come out of counted models, or differ for a reason that is checked."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from typer.testing import CliRunner

from dept_fl.cli import app
from dept_fl.cost_tables import WIDTH
from dept_fl.paper import (
    ALIBI,
    FORMULAS,
    LEARNED,
    LOCAL_STEPS,
    MC4_12,
    MC4_24,
    PILE_12,
    PILE_24,
    Comparison,
    Figure,
    Reading,
    compare,
    off_formula,
)

PRINTED = {
    MC4_12.name: "192M 278M 278M 0.56M 166M 252M 0.5M 0.17M 38.6M 125M 0.17M",
    MC4_24.name: "512.2M 1.71B 1.71B 102.9M 1.3B 2.4M",
    PILE_12.name: "38.6M 125M 125M 0.25M 35M 121M 0.24M 0.17M",
    PILE_24.name: "51.4M 350M 350M 0.7M 46.6M 345.2M 0.69M 0.6M",
    "headlines": "500x 560x 714x 675x 80% 409M 24% 86.4M 298M 1.2B 33% 250,112 216,135 50,257 "
    "45,554",
}
DIFFERENT = Counter("1.71B 1.71B 350M 350M 345.2M 0.69M 560x 86.4M 298M".split())
NOT_DERIVED = Counter("675x 33% 250,112 216,135 50,257 45,554".split())


@pytest.fixture(scope="module")
def learned() -> Reading:
    return Reading(LEARNED)


@pytest.fixture(scope="module")
def alibi() -> Reading:
    return Reading(ALIBI)


@pytest.fixture(scope="module")
def comparisons(learned: Reading, alibi: Reading) -> list[Comparison]:
    return compare([learned, alibi])


def prints(comparisons: list[Comparison]) -> Counter[str]:
    return Counter(c.figure.printed.replace(" ", "") for c in comparisons)


def test_no_figure_of_the_paper_is_left_out(comparisons: list[Comparison]):
    for group, expected in PRINTED.items():
        of_group = [c for c in comparisons if c.figure.group == group]
        assert prints(of_group) == Counter(expected.split())
    assert len(comparisons) == sum(len(each.split()) for each in PRINTED.values())


def test_all_come_out_as_printed_but_those_that_differ_for_a_reason(comparisons: list[Comparison]):
    counted = [c for c in comparisons if c.ours]
    different = [c for c in counted if not c.figure.agrees(c.ours[LEARNED])]
    assert prints(different) == DIFFERENT
    assert prints([c for c in comparisons if not c.ours]) == NOT_DERIVED
    assert all(c.why for c in comparisons)
    assert all(abs(c.difference(LEARNED)) < 0.023 for c in counted)
    assert all(abs(c.difference(ALIBI)) < 0.018 for c in counted)


@pytest.mark.parametrize(
    ("printed", "learned_positions", "no_positions"),
    [
        ("500x", "500.0x", "500.0x"),
        ("560x", "551.6x", "552.0x"),
        ("714x", "713.6x", "712.0x"),
        ("80 %", "79.9 %", "79.9 %"),
        ("24 %", "23.7 %", "23.8 %"),
        ("409M", "409.3M", "409.3M"),
        ("350M", "355.9M", "353.5M"),
        ("1.71B", "1.725B", "1.720B"),
    ],
)
def test_the_headlines(
    comparisons: list[Comparison], printed: str, learned_positions: str, no_positions: str
):
    found = next(c for c in comparisons if c.figure.printed == printed)
    ours = [found.figure.written(found.ours[name]) for name in (LEARNED, ALIBI)]
    assert ours == [learned_positions, no_positions]


def test_what_the_reasons_say_by_hand(learned: Reading):
    """GPT-2's body has 12 d^2 + 13 d parameters a block, and 2 d in its final norm."""
    small, wide, large = (
        learned.parameters(setting, "std") for setting in (MC4_12, PILE_24, MC4_24)
    )
    assert small.body == 12 * (12 * 768**2 + 13 * 768) + 2 * 768 == 85_056_000  # 85.1M
    assert wide.body == 24 * (12 * 1024**2 + 13 * 1024) + 2 * 1024 == 302_311_424  # 302.3M
    assert wide.positions == 2048 * 1024 == 2_097_152  # 2.1M
    assert large.body == 24 * (12 * 2048**2 + 13 * 2048) + 2 * 2048 == 1_208_602_624  # 1.209B
    assert large.positions == 2048 * 2048 == 4_194_304  # 0.004B
    assert large.tokens == 250_112 * 2048 == 512_229_376  # 0.51B
    assert round(1.2 + 0.51, 2) == 1.71
    assert round(278 / 0.5) == 556
    assert round(125 - 38.6, 1) == 86.4
    assert round(350 - 51.4, 1) == 298.6


def test_the_reasons_with_figures_of_their_own(comparisons: list[Comparison]):
    why = {c.figure.printed: c.why for c in comparisons}
    assert "1.63B" in why["675x"]  # 675 / 500 of the body's 1.2086B
    sending_s = 1.725026304e9 * 32 / 10e9
    assert f"{sending_s:.1f} s, 33 % of a step that computes for 11.2 s" in why["33 %"]
    assert sending_s / (sending_s + 11.2) == pytest.approx(0.33, abs=0.001)


def test_our_counts_are_the_formulas_of_table_1(learned: Reading, alibi: Reading):
    for formula in FORMULAS:
        memory, sent = off_formula(formula, [learned, alibi])
        assert memory == 0
        assert sent < 1e-6
    assert LOCAL_STEPS == 500


def test_a_wrong_count_is_off_its_formula(learned: Reading):
    """One more token in a silo is d more parameters, and one more row in 500 steps."""
    trim = FORMULAS[2]
    wrong = type(trim)(
        trim.method,
        trim.memory_text,
        trim.sent_text,
        trim.own_vocabulary,
        memory=lambda t: trim.memory(t) + t.d,
        sent=lambda t: trim.sent(t) + t.d / t.n_local,
    )
    assert off_formula(wrong, [learned]) == (1024, pytest.approx(1024 / 500))


@pytest.mark.parametrize(
    ("printed", "value", "how"),
    [
        ("0.5M", 505_000, "rounded"),
        ("0.5M", 549_000, "rounded"),
        ("0.5M", 551_000, "cut off"),
        ("0.5M", 601_000, ""),
        ("0.5M", 449_000, ""),
        ("24 %", 0.237, "rounded"),
        ("24 %", 0.234, ""),
        ("1.71B", 1.7149e9, "rounded"),
        ("1.71B", 1.7201e9, ""),
        ("45,554", 45_554, "rounded"),
        ("45,554", 45_553, ""),
    ],
)
def test_what_gives_the_print(printed: str, value: float, how: str):
    figure = Figure("", "", printed, None)
    assert figure.agrees(value) == how


def test_a_value_is_written_as_the_print_with_a_digit_more():
    written = [
        Figure("", "", printed, None).written(value)
        for printed, value in (("0.56M", 557_000), ("714x", 713.63), ("24 %", 0.2373))
    ]
    assert written == ["0.557M", "713.6x", "23.7 %"]


def test_the_command_prints_every_figure_in_100_columns():
    done = CliRunner().invoke(app, ["cost", "--paper"])
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= WIDTH == 100
    for printed in {c for group in PRINTED.values() for c in group.replace("%", " %").split()}:
        assert any(printed in line for line in lines)
    assert "48 figures: 33 come out as printed with GPT-2 (25 with MPT), 9 differ" in done.stdout


def test_the_command_gives_the_same_as_json(comparisons: list[Comparison]):
    done = CliRunner().invoke(app, ["cost", "--paper", "--json"])
    facts = json.loads(done.stdout)
    assert [each["ours"] for each in facts] == [c.ours for c in comparisons]
    trim = next(each for each in facts if each["printed"] == "560x")
    assert trim["difference"][LEARNED] == pytest.approx(551.65 / 560 - 1, abs=1e-4)
