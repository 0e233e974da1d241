"""What a partner is told of a new silo: what it is, what stays, what travels, what comes next."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Mapping
from functools import partial

from rich.cells import cell_len, set_cell_size

from dept_fl.data import Corpus
from dept_fl.node_key import public_file
from dept_fl.partner import NewSilo
from dept_fl.report import size
from dept_fl.silo import Silo

_GLIMPSES = 3
_FEW_DOCUMENTS = 10


def story(made: NewSilo, columns: int) -> str:
    """What was made, what stays, what travels and what comes next, for a terminal."""
    tables = {
        f"silo {made.order.name}": _figures(made),
        "STAYS on this machine": _stays(made),
        "TRAVELS to the federation's server": _travels(made),
    }
    first, *others = [_table(title, rows, columns) for title, rows in tables.items()]
    shown = (f"  | {line}" for line in glimpses(made.silo.corpus, columns - 4))
    text = "\n".join(["its text, here and there:", *shown])
    return "\n\n".join([first, text, *others, _next(made)])


def as_json_text(made: NewSilo) -> str:
    """The same in figures, as one JSON object; no text."""
    silo, order = made.silo, made.order
    facts = {
        "silo": order.name,
        "file": str(order.file),
        "public_key": str(public_file(order.key_file)),
        "home": str(made.home),
        "documents": silo.corpus.documents,
        "duplicates": silo.corpus.duplicates,
        "train_bytes": silo.corpus.train_bytes,
        "validation_documents": silo.corpus.validation_documents,
        "validation_bytes": silo.corpus.validation_bytes,
        "train_tokens": len(silo.stream.train),
        "pieces": silo.stream.vocabulary.size,
        "lossy_documents": silo.stream.lossy_documents,
        "unigram_bits_per_byte": silo.unigram_bits_per_byte,
    }
    return json.dumps(facts, ensure_ascii=False, allow_nan=False)


def _figures(made: NewSilo) -> dict[str, str]:
    corpus, stream = made.silo.corpus, made.silo.stream
    pieces = f"{stream.vocabulary.size:,} pieces"
    if made.pieces_chosen:
        pieces += ", chosen for so much text (--vocab-size sets another number)"
    return {
        "documents": f"{corpus.documents:,}; {dropped(corpus)}",
        "text": f"{size(corpus.train_bytes)} to train on",
        **({"sources": _shares(corpus)} if corpus.sources else {}),
        "validation": _validation(corpus),
        "tokenizer": f"{pieces}; {_fidelity(made.silo)}",
        "tokens": f"{len(stream.train):,} to train on, {stream.bytes_per_token:.2f} bytes each",
        "unigram": f"{made.silo.unigram_bits_per_byte:.3f} bits per byte, from token "
        "frequencies alone",
    }


def _shares(corpus: Corpus) -> str:
    shares = {n: own["bytes"] * own["passes"] for n, own in corpus.sources.items()}
    return ", ".join(
        f"{name} {share / corpus.train_bytes:.0%}, read {corpus.sources[name]['passes']:.2f} times"
        for name, share in shares.items()
    )


def dropped(corpus: Corpus) -> str:
    """What was not taken of its data, in words."""
    words = [f"{corpus.duplicates:,} duplicates dropped"]
    if corpus.near_duplicates:
        words[0] += f", {corpus.near_duplicates:,} of them nearly the same as another"
    words += [f"{count:,} left out by {name}" for name, count in sorted(corpus.left_out.items())]
    if corpus.unvalidated:
        words.append(f"no document kept for validation of {', '.join(corpus.unvalidated)}")
    return ", ".join(words)


def _validation(corpus: Corpus) -> str:
    words = f"{corpus.validation_documents:,} other documents, {size(corpus.validation_bytes)}"
    if corpus.validation_documents >= _FEW_DOCUMENTS:
        return words
    return f"{words}: too little to trust figures; --set validation_fraction=0.2 keeps more"


def _fidelity(silo: Silo) -> str:
    lossy, documents = silo.stream.lossy_documents, silo.corpus.validation_documents
    if not lossy:
        return "lossless"
    return (
        f"LOSSY: {lossy:,} of {documents:,} validation documents do not come back whole, so that "
        "bits per byte will be too low"
    )


def glimpses(corpus: Corpus, columns: int) -> list[str]:
    """Some of its documents from here and there, each harmless and in a line."""
    return [_one_line(text, columns) for text in corpus.glimpses(_GLIMPSES)]


def _one_line(text: str, columns: int) -> str:
    """The beginning of a text, harmless for a terminal, in one line that fits into it."""
    line = " ".join(text[: 4 * columns].split())
    clean = "".join(c if c.isprintable() else "?" for c in line)
    return clean if cell_len(clean) <= columns else f"{set_cell_size(clean, columns - 3)}..."


def _stays(made: NewSilo) -> dict[str, str]:
    silo = made.silo
    return {
        "text": f"{silo.folder / 'text'} (a cleaned copy)",
        "tokens": str(silo.folder / "tokens"),
        "tokenizer": silo.config.tokenizer or str(made.home / "tokenizers" / silo.name),
        "embeddings": f"{silo.folder / 'state'} (with all other state of training)",
        "private key": str(made.order.key_file),
        "settings": str(made.order.file),
    }


def _travels(made: NewSilo) -> dict[str, str]:
    never = "text, tokenizer, pieces, token ids, embeddings"
    if made.silo.config.tokenizer:
        never += ". In a federation that shares this tokenizer its fingerprint goes once"
    if made.settings.get("share_embeddings"):
        never = (
            "text, tokenizer, pieces. As share_embeddings allows, in a federation that shares this "
            "tokenizer: its fingerprint goes once, in its variants GLOB and TRIM the embeddings "
            "each round, in TRIM the ids that the text uses once"
        )
    return {
        "once": "the silo's name; how many documents, duplicates, bytes, tokens, pieces; "
        "documents that lose text; unigram bits per byte; speed; whether on a GPU",
        "each round": "the change of the model's body, losses, norms, timings. The operator "
        "can read that change, and it may tell something of the text",
        "on errors": "their words, which may name a file or a column",
        **(
            {"at the end": "a text that the model writes"} if made.silo.recipe.share_samples else {}
        ),
        "never": never,
        "comes in": "the recipe, the model's body, and the code of the app, which runs as you: "
        "who operates the federation is to be trusted with what your account can read",
    }


def _next(made: NewSilo) -> str:
    order = made.order
    public, key = public_file(order.key_file), shlex.quote(str(order.key_file))
    file, silo = shlex.quote(str(order.file)), shlex.quote(f'silo="{order.file}"')
    superlink = "--superlink HOST:PORT --root-certificates ca.crt"
    return f"""\
NEXT, with the address HOST:PORT and the file ca.crt that the operator gives you
  1. dept silo check {file} \\
       {superlink}
  2. send the operator your public key: {public}
  3. flower-supernode {superlink} \\
       --auth-supernode-private-key {key} \\
       --node-config {silo}
     or, which does the same and starts it again whenever it ends: dept silo start {file} \\
       {superlink}"""


def _table(title: str, rows: Mapping[str, str], columns: int) -> str:
    """Names to the left; long lines go on below, but paths are never cut."""
    wrap = partial(textwrap.fill, width=columns, break_long_words=False, break_on_hyphens=False)
    lines = [
        wrap(text, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14)
        for name, text in rows.items()
    ]
    return "\n".join([title, *lines])
