"""The paper's configurations and the cost figures that it prints (Tables 1, 2 and 9), as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from dept_fl.config import CONF_DIR, ModelConfig, read_yaml
from dept_fl.cost import Parameters, parameters, sent_a_step
from dept_fl.errors import ConfigError
from dept_fl.model import Layout, layout

LOCAL_STEPS = 500
SEQUENCE_TOKENS = 2048
LEARNED, ALIBI = "GPT-2", "MPT"  # positions: the text says ALiBi, the sums count learned ones

_BANDWIDTH_BITS_A_S = 10e9
_UNITS = {"": 1.0, "M": 1e6, "B": 1e9, "x": 1.0, "%": 0.01}
_PRINTED = re.compile(r"([0-9,]+(?:\.([0-9]+))?) ?([MBx%]?)")


@dataclass(frozen=True)
class Setting:
    """A corpus with a size of model.

    Attributes:
        presets: by reading of the positions, names of files in conf/models.
        vocabulary: V. used: mean V_k. own: of each silo's tokenizer in SPEC-OPT. 0 where the
            paper has none.
    """

    name: str
    presets: Mapping[str, str]
    width: int
    vocabulary: int
    used: int
    own: int

    def size(self, method: str) -> int:
        """Mean vocabulary of a silo; 0 where the paper prints no figure."""
        sizes = {"std": self.vocabulary, "glob": self.vocabulary, "spec-opt": self.own}
        return sizes.get(method, self.used)


def _presets(size: str) -> dict[str, str]:
    return {LEARNED: f"gpt2-{size}", ALIBI: f"mpt-{size}"}


MC4_12 = Setting("mC4, 12 blocks, d 768", _presets("125m"), 768, 250_112, 216_135, 50_257)
MC4_24 = Setting("mC4, 24 blocks, d 2048", _presets("1b"), 2048, 250_112, 0, 50_257)
PILE_12 = Setting("Pile, 12 blocks, d 768", _presets("125m"), 768, 50_257, 45_554, 0)
PILE_24 = Setting("Pile, 24 blocks, d 1024", _presets("350m"), 1024, 50_257, 45_554, 0)
SETTINGS = (MC4_12, MC4_24, PILE_12, PILE_24)


class Reading:
    """The paper's settings with one family of models, counted on empty models of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.layouts: dict[str, Layout] = {}
        for setting in SETTINGS:
            model = setting.presets[name]
            if model not in self.layouts:
                self.layouts[model] = layout(preset(model), SEQUENCE_TOKENS)

    def parameters(self, setting: Setting, method: str) -> Parameters:
        """Of the model of a silo with the mean vocabulary."""
        found = self.layouts[setting.presets[self.name]]
        return parameters(found, setting.size(method))

    def sent_a_step(self, setting: Setting, method: str) -> float:
        return sent_a_step(method, self.parameters(setting, method), LOCAL_STEPS)


Ours = Callable[[Reading], float]


def preset(name: str) -> ModelConfig:
    """A model of conf/models.

    Raises:
        ConfigError: there is no such file.
    """
    problems: list[str] = []
    config = dict(read_yaml(CONF_DIR / "models" / f"{name}.yaml", problems))
    if problems:
        raise ConfigError(problems)
    return ModelConfig(config=config)


# ---- Table 1: formulas -------------------------------------------------------------------------


@dataclass(frozen=True)
class Formula:
    """A row of Table 1.

    Attributes:
        memory_text, sent_text: as the paper writes them, memory and communication by step.
        memory, sent: the same to be computed, in parameters.
    """

    method: str
    memory_text: str
    sent_text: str
    own_vocabulary: bool
    memory: Callable[[Terms], float]
    sent: Callable[[Terms], float]


@dataclass(frozen=True)
class Terms:
    """The letters of Table 1. Without learned positions L d is nothing, and so L is 0."""

    m: int
    v: int
    v_k: int
    length: int
    d: int
    n_local: int


FORMULAS = (
    Formula("std", "M", "M", False, lambda t: t.m, lambda t: t.m),
    Formula("glob", "M", "M / N_local", False, lambda t: t.m, lambda t: t.m / t.n_local),
    Formula(
        "trim",
        "M - (V - V_k) d",
        "[M - (V - V_k) d] / N_local",
        False,
        lambda t: t.m - (t.v - t.v_k) * t.d,
        lambda t: (t.m - (t.v - t.v_k) * t.d) / t.n_local,
    ),
    Formula(
        "spec",
        "M - (V - V_k) d",
        "[M - (V + L) d] / N_local",
        True,
        lambda t: t.m - (t.v - t.v_k) * t.d,
        lambda t: (t.m - (t.v + t.length) * t.d) / t.n_local,
    ),
)


def off_formula(formula: Formula, readings: Sequence[Reading]) -> tuple[float, float]:
    """The most that our counts of memory and of communication differ from it, in parameters."""
    memory, sent = [], []
    for reading, setting in product(readings, SETTINGS):
        if not setting.size(formula.method):
            continue
        whole = reading.parameters(setting, "std")
        terms = Terms(
            m=whole.total,
            v=setting.vocabulary,
            v_k=setting.size(formula.method),
            length=whole.positions // setting.width,
            d=setting.width,
            n_local=LOCAL_STEPS,
        )
        held = reading.parameters(setting, formula.method).total
        memory.append(abs(held - formula.memory(terms)))
        sent.append(abs(reading.sent_a_step(setting, formula.method) - formula.sent(terms)))
    return max(memory), max(sent)


# ---- Tables 2 and 9, and the headlines -------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One that the paper prints.

    Attributes:
        group: the setting's name, or `headlines`.
        printed: as the paper has it: a count in millions (M) or billions (B), a factor (x), a
            share (%).
        ours: from a reading; None where the figure cannot be derived.
        reason: why ours differs, or why there is none; empty where ours gives the print.
    """

    group: str
    name: str
    printed: str
    ours: Ours | None
    reason: str = ""

    @property
    def value(self) -> float:
        number, _, unit = self._parts()
        return float(number.replace(",", "")) * _UNITS[unit]

    def written(self, value: float) -> str:
        """A value in the unit of the print, with one digit more."""
        _, decimals, unit = self._parts()
        space = " " if unit == "%" else ""
        return f"{value / _UNITS[unit]:,.{decimals + 1}f}{space}{unit}"

    def agrees(self, value: float) -> str:
        """How a value gives the print: `rounded`, `cut off` behind its last digit, or not: ""."""
        number, decimals, unit = self._parts()
        scaled, printed = value / _UNITS[unit], float(number.replace(",", ""))
        if f"{scaled:.{decimals}f}" == f"{printed:.{decimals}f}":
            return "rounded"
        return "cut off" if 0 <= scaled - printed < 10**-decimals else ""

    def _parts(self) -> tuple[str, int, str]:
        match = _PRINTED.fullmatch(self.printed)
        if match is None:
            raise ValueError(self.printed)
        return match[1], len(match[2] or ""), match[3]


@dataclass(frozen=True)
class Comparison:
    """A figure beside ours.

    Attributes:
        ours: by reading; empty where the figure cannot be derived.
        why: how ours gives the print, or why it does not.
    """

    figure: Figure
    ours: dict[str, float]
    why: str

    def difference(self, reading: str) -> float:
        """Ours over the print, less 1."""
        return self.ours[reading] / self.figure.value - 1


def compare(readings: Sequence[Reading]) -> list[Comparison]:
    """Every figure, with what the readings give; the first decides whether it is the print."""
    return [_comparison(figure, readings) for figure in figures(readings[0])]


def _comparison(figure: Figure, readings: Sequence[Reading]) -> Comparison:
    if figure.ours is None:
        return Comparison(figure, {}, figure.reason)
    ours = {reading.name: figure.ours(reading) for reading in readings}
    how = {"rounded": "as printed", "cut off": "as printed: cut off, not rounded", "": ""}
    first = ours[readings[0].name]
    return Comparison(figure, ours, how[figure.agrees(first)] or figure.reason)


_BODY_298 = "a body of 298.6M (350M less 51.4M); 24 blocks of this width have 302.3M"
_WHY_MODEL = {
    "1.71B": "adds 1.2B and 0.51B, rounded before; the body has 1.209B, positions 0.004B",
    "350M": f"with {_BODY_298}, positions 2.1M; 350M may be but the name of the size",
    "345.2M": f"with {_BODY_298}, positions 2.1M",
}

# Setting, methods, embedding, model, and of each method what it sends by step.
_TABLE: tuple[tuple[Setting, tuple[str, ...], str, str, tuple[str, ...]], ...] = (
    (MC4_12, ("std", "glob"), "192M", "278M", ("278M", "0.56M")),
    (MC4_12, ("trim", "spec"), "166M", "252M", ("0.5M", "0.17M")),
    (MC4_12, ("spec-opt",), "38.6M", "125M", ("0.17M",)),
    (MC4_24, ("std",), "512.2M", "1.71B", ("1.71B",)),
    (MC4_24, ("spec-opt",), "102.9M", "1.3B", ("2.4M",)),
    (PILE_12, ("std", "glob"), "38.6M", "125M", ("125M", "0.25M")),
    (PILE_12, ("trim", "spec"), "35M", "121M", ("0.24M", "0.17M")),
    (PILE_24, ("std", "glob"), "51.4M", "350M", ("350M", "0.7M")),
    (PILE_24, ("trim", "spec"), "46.6M", "345.2M", ("0.69M", "0.6M")),
)


def figures(learned: Reading) -> Iterator[Figure]:
    """All of them. learned: a reading for the reasons that have figures of their own."""
    for setting, methods, embedding, model, sent in _TABLE:
        names = ", ".join(methods).upper()
        held = partial(Reading.parameters, setting=setting, method=methods[0])
        why = _WHY_MODEL.get(model, "")
        yield Figure(setting.name, f"{names}: embedding", embedding, _tokens(held))
        yield Figure(setting.name, f"{names}: model", model, _total(held), why)
        for method, printed in zip(methods, sent, strict=True):
            ours = partial(Reading.sent_a_step, setting=setting, method=method)
            name = f"{method.upper()}: sent a step"
            yield Figure(setting.name, name, printed, ours, why and "as the model above")
    yield from (Figure("headlines", *facts) for facts in _headlines(learned))


def _tokens(held: Callable[[Reading], Parameters]) -> Ours:
    return lambda reading: held(reading).tokens


def _total(held: Callable[[Reading], Parameters]) -> Ours:
    return lambda reading: held(reading).total


def _headlines(learned: Reading) -> Iterator[tuple[str, str, Ours | None, str]]:
    def less(setting: Setting, method: str) -> Ours:
        return lambda r: r.sent_a_step(setting, "std") / r.sent_a_step(setting, method)

    def but_tokens(setting: Setting) -> Ours:
        return lambda r: r.parameters(setting, "std").total - r.parameters(setting, "std").tokens

    std = partial(Reading.parameters, setting=MC4_24, method="std")
    own = partial(Reading.parameters, setting=MC4_24, method="spec-opt")
    yield "GLOB sends less", "500x", less(MC4_12, "glob"), ""
    yield "TRIM sends less, up to", "560x", less(MC4_12, "trim"), _WHY_560
    yield "SPEC-OPT sends less, 1B", "714x", less(MC4_24, "spec-opt"), ""
    yield "the same in earlier abstracts", "675x", None, _why_675(learned)
    yield "fewer embedding parameters", "80 %", lambda r: 1 - own(r).tokens / std(r).tokens, ""
    yield "the same, counted", "409M", lambda r: std(r).tokens - own(r).tokens, ""
    yield "fewer parameters in all", "24 %", lambda r: 1 - own(r).total / std(r).total, ""
    yield "body, 12 blocks, d 768", "86.4M", but_tokens(MC4_12), _WHY_86
    yield "body, 24 blocks, d 1024", "298M", but_tokens(PILE_24), "350M less 51.4M; see 350M"
    yield "body, 24 blocks, d 2048", "1.2B", but_tokens(MC4_24), ""
    yield "faster at 10 Gbit/s, 1B", "33 %", None, _why_33(learned)
    yield "V, mC4", "250,112", None, f"{_TAKEN}: rows of mT5's table"
    yield "mean V_k, mC4", "216,135", None, f"{_TAKEN}: depends on the text"
    yield "V, Pile; V_k of SPEC-OPT", "50,257", None, _TAKEN
    yield "mean V_k, Pile", "45,554", None, f"{_TAKEN}: depends on the text"


_TAKEN = "taken as given"
_WHY_560 = "278M / 0.5M, both rounded before, are 556x, to two digits 560x"
_WHY_86 = "125M less 38.6M, both rounded; ours is with positions, 85.1M without"


def _why_675(learned: Reading) -> str:
    body = learned.parameters(MC4_24, "spec-opt").body
    needed = 675 / LOCAL_STEPS * body
    return f"not derivable: this body would need an STD model of {needed / 1e9:.2f}B"


def _why_33(learned: Reading) -> str:
    sending_s = learned.sent_a_step(MC4_24, "std") * 32 / _BANDWIDTH_BITS_A_S
    computing_s = sending_s * (1 - 0.33) / 0.33
    return (
        "not derivable: what a step computes for is not given; sending fp32 one way takes "
        f"{sending_s:.1f} s, 33 % of a step that computes for {computing_s:.1f} s"
    )
