"""The one kind of error that is the user's to mend; its text names the value and the mend."""

from __future__ import annotations


class DeptError(Exception):
    """Bad input: config, data, tokenizer, message or checkpoint."""


class ConfigError(DeptError):
    """One or more problems in a recipe, all of them listed.

    Attributes:
        problems: one line for each, with the value and the way to mend it.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(["bad configuration:", *(f"  - {p}" for p in problems)]))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        return type(self), (self.problems,)  # as it is, from one process to another


class Failed(DeptError):
    """What was asked for is right, and yet it did not come about: a server or a disk failed."""


class DamagedState(DeptError):
    """Saved state that is missing, cut short or changed; what was saved before may be whole."""


class NeedsWhole(DeptError):
    """A silo does not have what a change of the body would be added to; the server sends all."""


class BadUpdate(DeptError):
    """A silo's reply that must not be merged."""
