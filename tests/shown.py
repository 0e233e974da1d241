"""Helper of the tests: the commands that a page shows."""

from __future__ import annotations

import re
from collections.abc import Iterator


def bash_blocks(markdown: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)


def shell_commands(markdown: str) -> Iterator[str]:
    """The commands of its bash blocks, without comments and what is fed in; one line each."""
    for block in bash_blocks(markdown):
        block = re.sub(r" <<'(\w+)'.*?^\1$", "", block, flags=re.MULTILINE | re.DOTALL)
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            for part in re.sub(r"(^|\s)#.*", "", line).split(" && "):
                if part.strip():
                    yield part.strip()
