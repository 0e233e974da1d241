"""`dept tokenizer`: train one, look at it, compare several."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dept_fl.cli.common import (
    AsJson,
    Column,
    ReadSettings,
    expanded,
    expanded_name,
    folder_for,
    require_utf8,
)
from dept_fl.config import LEAST_PIECES
from dept_fl.errors import DeptError
from dept_fl.progress import Progress
from dept_fl.report import harmless, table

if TYPE_CHECKING:
    from dept_fl.workbench import Card, Comparison

app = typer.Typer(
    no_args_is_help=True,
    help="""Train, look at and compare tokenizers.

    Example: dept tokenizer show fr-tokenizer
    """,
)

_SHOWN = 8  # specials and odd strings


@app.command("train")
def tokenizer_train(
    files: Annotated[
        list[str], typer.Argument(help="files, folders or quoted patterns, as for a silo")
    ],
    out: Annotated[Path, typer.Option(help="new folder for it")],
    vocab_size: Annotated[int, typer.Option(help="pieces, 256 bytes among them", min=LEAST_PIECES)],
    sample_bytes: Annotated[
        int, typer.Option(help="how much text is looked at, spread over all of it", min=1000)
    ] = 4_000_000,
    column: Column = "text",
    settings: ReadSettings = None,
    as_json: AsJson = False,
) -> None:
    """Train a lossless tokenizer, as silos train theirs (SentencePiece unigram, byte fall-back).

    Example: dept tokenizer train 'texts/*.jsonl' --out fr --vocab-size 16000
    """
    folder_for(out)
    progress = Progress()
    with progress.stage("starting"):  # PyTorch takes seconds
        from dept_fl.named_files import NamedFiles
        from dept_fl.workbench import train

    named = NamedFiles(files, column, settings or [])
    _tell(train(named, vocab_size, sample_bytes, expanded(out), progress), [], as_json)


@app.command("show")
def tokenizer_show(
    name: Annotated[
        str, typer.Argument(help="SentencePiece .model, Hugging Face folder or name, a folder made")
    ],
    text: Annotated[str, typer.Option(help="show the pieces of this")] = "",
    as_json: AsJson = False,
) -> None:
    """Say what a tokenizer is: kind, pieces, whether it loses text, how it writes one.

    Example: dept tokenizer show fr-tokenizer --text 'Il était une fois'
    """
    require_utf8(text, "--text")
    with Progress().stage("loading the tokenizer"):
        from dept_fl.tokenizer import load_tokenizer
        from dept_fl.workbench import card, pieces_of

        tokenizer = load_tokenizer(expanded_name(name))
        found = card(name, tokenizer)
        pieces = list(pieces_of(tokenizer, text))
    _tell(found, pieces, as_json)


@app.command("compare")
def tokenizer_compare(
    names: Annotated[list[str], typer.Argument(help="two or more, as for `dept tokenizer show`")],
    data: Annotated[
        list[str], typer.Option(help="files, folder or quoted pattern of text; repeatable")
    ],
    column: Column = "text",
    settings: ReadSettings = None,
    as_json: AsJson = False,
) -> None:
    """Compare tokenizers on the same text: bytes per token, what is lost, pieces in common.

    Example: dept tokenizer compare fr shared.model --data 'texts/*.jsonl'
    """
    if len(names) < 2:
        raise DeptError("name two tokenizers or more; `dept tokenizer show` looks at one")
    names = [expanded_name(name) for name in names]
    progress = Progress()
    with progress.stage("starting"):
        from dept_fl.named_files import NamedFiles
        from dept_fl.workbench import compare

    found = compare(names, NamedFiles(data, column, settings or []), progress)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), ensure_ascii=False))
    else:
        _show_comparison(found)


def _tell(found: Card, pieces: list[tuple[int, str]], as_json: bool) -> None:
    if as_json:
        facts: dict[str, Any] = {**asdict(found), "lossless": found.lossless}
        typer.echo(json.dumps({**facts, "text": [list(each) for each in pieces]}))
        return
    rows = {
        "tokenizer": found.name,
        "kind": found.kind,
        "pieces": f"{found.pieces:,}",
        "document end": found.end,
        "specials": _some(found.specials),
        "any text": "yes, by byte pieces" if found.writes_bytes else "no: it has no byte pieces",
        "lossless": "yes" if found.lossless else f"NO: {_some([ascii(t) for t in found.lost])}",
        "fingerprint": found.fingerprint,
    }
    lines = [f"{name:<13} {words}" for name, words in rows.items()]
    if pieces:
        lines += ["", f"{len(pieces):,} tokens", *(f"{i:>8,}  {piece}" for i, piece in pieces)]
    typer.echo(harmless("\n".join(lines)))


def _some(words: list[str]) -> str:
    more = f" and {len(words) - _SHOWN:,} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more if words else "none"


def _show_comparison(found: Comparison) -> None:
    numbers = [str(i) for i in range(1, len(found.names) + 1)]
    rows = [
        [
            f"{number}  {name}",
            f"{pieces:,}",
            f"{each.tokens:,}",
            f"{each.bytes_per_token:.3f}",
            f"{each.unknown / each.tokens:.2%}",
            f"{each.byte_tokens / each.tokens:.2%}",
            f"{each.lossy_documents:,}",
            *(f"{count:,}" for count in common),
        ]
        for number, name, pieces, each, common in zip(
            numbers, found.names, found.pieces, found.written, found.common, strict=True
        )
    ]
    head = ["tokenizer", "pieces", "tokens", "bytes/token", "unknown", "bytes", "lossy"]
    text = found.written[0]
    console = Console(width=100 + 9 * len(rows), highlight=False, markup=False, emoji=False)
    console.print(f"{text.documents:,} documents, {text.text_bytes:,} bytes")
    console.print(table([*head, *(f"as {number}" for number in numbers)], rows))
    typer.echo(
        "bytes: tokens of pieces that write single bytes; lossy: documents that do not come back\n"
        "whole; as N: how many pieces write the same as one of tokenizer N"
    )
