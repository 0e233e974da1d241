"""The exported pipeline gives SentencePiece's own ids, on whatever text."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dept_fl.errors import DeptError
from dept_fl.export import ODD
from dept_fl.fast_tokenizer import fast_tokenizer, writes_parts
from dept_fl.pretrained import Encoder
from dept_fl.tokenizer import (
    SentencePieceTokenizer,
    Vocabulary,
    byte_ids,
    sentencepiece_proto,
    train_sentencepiece,
)
from tests.conftest import sentencepiece_model
from tests.test_tokenizer import AWKWARD, words
from tokenizers import Tokenizer as Backend

# Any Unicode text but surrogates, with what tokenizers trip over far more often than by chance.
PARTS = st.one_of(
    st.text(max_size=6),
    st.text(alphabet="abe \n\t▁<>/s0x41кот\u0301é\r\0", max_size=12),
    st.sampled_from((*AWKWARD, *ODD)),
)
TEXTS = st.lists(st.lists(PARTS, max_size=5).map("".join), min_size=8, max_size=12)
MANY = settings(
    max_examples=250,  # lists of 8 and more: 2,000 strings
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
AS_IS = {"normalization_rule_name": "identity"}


MODELS = {
    "own": lambda: train_sentencepiece("ant", words(), 290),
    "unigram": lambda: foreign(),
    "unigram, no prefix": lambda: foreign(add_dummy_prefix=False),
    "unigram, spaces kept": lambda: foreign(remove_extra_whitespaces=False),
    "unigram, symbols": lambda: foreign(user_defined_symbols=["le", "<|x|>"]),
    "bpe": lambda: foreign(model_type="bpe"),
    "bpe, no prefix": lambda: foreign(model_type="bpe", add_dummy_prefix=False),
    "bpe, spaces kept": lambda: foreign(model_type="bpe", remove_extra_whitespaces=False),
}


def foreign(vocab_size: int = 290, **options: object) -> bytes:
    """As others train theirs, but for the scores, which are round as ours."""
    proto = sentencepiece_proto(
        sentencepiece_model(words(), vocab_size=vocab_size, **{**AS_IS, **options})
    )
    for piece in proto.pieces:
        piece.score = round(piece.score * 64) / 64
    return proto.SerializeToString()


@pytest.fixture(scope="module", params=sorted(MODELS))
def pair(request: pytest.FixtureRequest) -> tuple[SentencePieceTokenizer, Backend]:
    model = MODELS[request.param]()
    ours = SentencePieceTokenizer(model)
    return ours, fast_tokenizer(model, Vocabulary.whole(ours))


def ids(fast: Backend, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in fast.encode_batch(texts, add_special_tokens=False)]


@MANY
@given(texts=TEXTS)
def test_any_text_gets_the_same_ids_and_comes_back_the_same(
    pair: tuple[SentencePieceTokenizer, Backend], texts: list[str]
):
    ours, fast = pair
    expected = ours.encode(texts)
    assert ids(fast, texts) == expected
    for own in expected:
        assert fast.decode(own, skip_special_tokens=False) == ours.decode(own)


def test_our_own_comes_back_whole():
    model = train_sentencepiece("ant", words(), 290)
    fast = fast_tokenizer(model, Vocabulary.whole(SentencePieceTokenizer(model)))
    for text in (*AWKWARD, *ODD):
        assert fast.decode(fast.encode(text).ids) == text


def test_a_long_text_gets_the_ids_of_its_words():
    """Sums of the scores stay exact, so that nothing depends on how much text lies before."""
    model = train_sentencepiece("ant", words(), 290)
    ours = SentencePieceTokenizer(model)
    fast = fast_tokenizer(model, Vocabulary.whole(ours))
    draw = random.Random(2)
    text = " ".join(draw.choices([*" ".join(words()).split(), "", "    "], k=20_000))
    assert fast.encode(text).ids == ours.encode([text])[0]
    assert all(
        64 * piece.score == int(64 * piece.score) for piece in sentencepiece_proto(model).pieces
    )


@pytest.fixture(scope="module")
def part() -> tuple[SentencePieceTokenizer, Vocabulary, Backend]:
    """A tokenizer with the ids that "the leaf", "is" and "green" are written with."""
    model = train_sentencepiece("ant", words(), 290)
    ours = SentencePieceTokenizer(model)
    used = {i for each in ours.encode(["the leaf is green leaf the is"]) for i in each}
    kept = used | ours.specials() | set(byte_ids(ours, "ant"))
    vocabulary = Vocabulary(Vocabulary.whole(ours).ids[sorted(kept)], ours.size)
    assert vocabulary.size < ours.size
    return ours, vocabulary, fast_tokenizer(model, vocabulary)


@MANY
@given(texts=TEXTS)
def test_a_part_of_the_ids_writes_any_text(
    part: tuple[SentencePieceTokenizer, Vocabulary, Backend], texts: list[str]
):
    _, vocabulary, fast = part
    for text, found in zip(texts, ids(fast, texts), strict=True):
        assert fast.decode(found) == text
        assert max(found, default=0) < vocabulary.size


@MANY
@given(text=st.lists(st.sampled_from(["the", " leaf", " is", " green", " "]), max_size=20))
def test_a_part_of_the_ids_gives_the_silos_own_where_it_has_the_pieces(
    part: tuple[SentencePieceTokenizer, Vocabulary, Backend], text: list[str]
):
    ours, vocabulary, fast = part
    whole = "".join(text)
    if set(ours.encode([whole])[0]) <= set(vocabulary.ids.tolist()):
        assert fast.encode(whole).ids == Encoder(ours, vocabulary)([whole])[0]


def test_only_unigram_models_with_bytes_write_parts():
    def can(model: bytes) -> bool:
        return writes_parts(SentencePieceTokenizer(model))

    assert can(foreign())
    assert not can(foreign(model_type="bpe"))
    assert not can(foreign(byte_fallback=False, vocab_size=40))


@pytest.mark.parametrize("options", [{"model_type": "char"}, {"treat_whitespace_as_suffix": True}])
def test_a_kind_without_a_counterpart_is_refused(options: dict[str, object]):
    model = foreign(**{"hard_vocab_limit": False, **options})
    whole = Vocabulary.whole(SentencePieceTokenizer(model))
    with pytest.raises(DeptError, match="a SentencePiece model of a kind that no Hugging Face"):
        fast_tokenizer(model, whole)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("strips", [True, False])
def test_without_bytes_the_ids_are_the_same_too(kind: str, strips: bool):
    model = foreign(
        byte_fallback=False, vocab_size=40, model_type=kind, remove_extra_whitespaces=strips
    )
    ours = SentencePieceTokenizer(model)
    fast = fast_tokenizer(model, Vocabulary.whole(ours))
    texts = [*AWKWARD, *ODD]
    assert ids(fast, texts) == ours.encode(texts)
