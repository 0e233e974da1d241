"""Files of text that a command line names, with its options of how to read them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dept_fl.config import SiloConfig, source_problems, yaml_value
from dept_fl.errors import DeptError
from dept_fl.sources import documents, labelled_documents

_NAME = "corpus"  # as if it were a silo
_SETTINGS = ("sample_by", "encoding", "max_bytes")


class NamedFiles:
    """Files, folders and patterns as a silo has them; each pass reads them anew.

    Args:
        column: that holds the text.
        settings: words such as sample_by=line.

    Raises:
        DeptError: naming the option and the mend, for what cannot be read too.
    """

    def __init__(self, files: Sequence[str], column: str, settings: Sequence[str] = ()) -> None:
        given = dict(_setting(word) for word in settings)
        self._source = SiloConfig(files=list(files), column=column, **given)
        for problem in source_problems(self._source):
            raise DeptError(f"--set {problem.removeprefix('.')}")

    def documents(self) -> Iterator[str]:
        with _in_options():
            yield from documents(_NAME, self._source)

    def labelled_documents(self, labels: str) -> Iterator[tuple[str, str]]:
        """Each with what its row has in column `labels`."""
        with _in_options():
            yield from labelled_documents(_NAME, self._source, labels)


def _setting(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if key not in _SETTINGS or not equals:
        known = ", ".join(_SETTINGS)
        raise DeptError(f"--set {word!r}: expected KEY=VALUE with a KEY of {known}")
    value = yaml_value(text)
    if not isinstance(value, int if key == "max_bytes" else str):
        kind = "a whole number" if key == "max_bytes" else "text"
        raise DeptError(f"--set {word!r}: must be {kind}")
    return key, value


@contextmanager
def _in_options() -> Iterator[None]:
    """What is wrong with the data, in options of the command."""
    try:
        yield
    except DeptError as error:
        words = re.sub(rf"\bsilos\.{_NAME}\.files\b", "FILES", str(error))
        words = re.sub(rf"set silos\.{_NAME}\.column\b", "set --column", words)
        words = re.sub(rf"set silos\.{_NAME}\.(\w+)", r"give --set \1", words)
        raise DeptError(words.removeprefix(f"silo {_NAME}: ")) from error
