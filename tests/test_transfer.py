"""Embeddings of other vocabularies: rows by hand, then real silos' in a real model."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch

from dept_fl.checkpoint import load_state, save_state
from dept_fl.config import ModelConfig, Recipe, SiloConfig, load_recipe
from dept_fl.errors import DeptError
from dept_fl.evaluate import evaluate
from dept_fl.final import common_body, read_final
from dept_fl.model import build, initial_embeddings, join, layout
from dept_fl.silo import Silo
from dept_fl.stitch import StitchedModel, refine
from dept_fl.tokenizer import (
    SentencePieceTokenizer,
    Vocabulary,
    byte_level_alphabet,
    train_sentencepiece,
)
from dept_fl.transfer import AVERAGES, METHODS, Source, Target, Transferred, token_counts, transfer
from tests.conftest import WORDS, write_text
from tests.federation import same, trained
from tests.pieces import BYTES, Pieces

Make = Callable[..., Recipe]
WIDTH = 16
PHI = "model.embed_tokens.weight"
UNTIED = ModelConfig(
    config={
        "model_type": "phi",
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
)
LEARNED_POSITIONS = ModelConfig(
    config={"model_type": "gpt2", "n_embd": WIDTH, "n_layer": 1, "n_head": 2}
)


def rows(*values: float) -> torch.Tensor:
    """[n, WIDTH]: a row for each number, all of its dimensions the same."""
    return torch.tensor(values).unsqueeze(1).repeat(1, WIDTH)


def source(
    name: str, tokenizer: Pieces, values: torch.Tensor, counts: list[int] | None = None
) -> Source:
    seen = np.asarray(counts or [1] * tokenizer.size)
    return Source(name, tokenizer, tokenizer.whole, {PHI: values}, seen)


def target(tokenizer: Pieces, text: list[int] | None = None) -> Target:
    tokens = None if text is None else np.asarray(text, dtype=np.uint16)
    return Target("new", tokenizer, tokenizer.whole, tokens)


def as_they_are(sources: list[Source], to: Target, recipe: Recipe, **options: str) -> list[float]:
    """A number for each token, of a copy between spaces that are taken for one."""
    found = transfer("copy", sources, to, recipe, alignment="identity", **options)
    return found.embeddings[PHI][:, 0].tolist()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- tokens that sources have ------------------------------------------------------------------


def two_silos() -> tuple[Source, Source]:
    """Ends, "a" and "b" in both; "a" is 3/4 of bee's text and 1/4 of ant's."""
    ant = source("ant", Pieces("▁a", "▁b", "▁c"), rows(1.0, 2.0, 4.0, 8.0), [2, 2, 2, 2])
    bee = source("bee", Pieces("▁b", "▁a", "▁d"), rows(5.0, 16.0, 6.0, 32.0), [0, 10, 60, 10])
    return ant, bee


def test_a_token_in_two_silos_is_averaged_by_its_share_of_their_texts(recipe: Make):
    to = target(Pieces("▁d", "▁a", "▁b", "▁c"))
    values = as_they_are(list(two_silos()), to, recipe(), average="share")
    # end: only ant's text has it; a: shares 2/8 and 60/80 of 2 and 6; b: 2/8 and 1/8 of 4 and 16
    assert values == pytest.approx([1.0, 32.0, 5.0, 8.0, 8.0])


def test_the_reference_is_the_silo_that_writes_most_of_the_text(recipe: Make):
    pieces = Pieces("▁d", "▁a", "▁b", "▁c")
    ant, bee = two_silos()
    mostly_d = target(pieces, [0, 1, 1, 1, 2, 3, 4])
    assert as_they_are([ant, bee], mostly_d, recipe()) == [5.0, 32.0, 6.0, 16.0, 8.0]
    mostly_c = target(pieces, [0, 4, 4, 4, 2, 3, 1])
    assert as_they_are([ant, bee], mostly_c, recipe()) == [1.0, 32.0, 2.0, 4.0, 8.0]
    assert as_they_are([ant, bee], mostly_c, recipe(), reference="bee")[2:4] == [6.0, 16.0]
    found = transfer("copy", [ant, bee], mostly_c, recipe()).report
    assert (found.reference, found.shared) == ("ant", {"ant": 4, "bee": 4})


def test_what_the_reference_lacks_is_the_others_average(recipe: Make):
    ant, bee = two_silos()
    cat = source("cat", Pieces("▁e"), rows(0.0, 9.0))
    to = target(Pieces("▁a", "▁b", "▁e"), [3, 3, 3, 1, 2])
    values = as_they_are([ant, bee, cat], to, recipe())
    assert values == pytest.approx([0.0, 5.0, 8.0, 9.0])


@pytest.mark.parametrize("average", AVERAGES)
def test_tokens_that_no_text_has_are_averaged_alike(recipe: Make, average: str):
    ant = source("ant", Pieces("▁a", "▁z"), rows(1.0, 2.0, 4.0), [1, 1, 0])
    bee = source("bee", Pieces("▁a", "▁z"), rows(1.0, 2.0, 8.0), [1, 1, 0])
    values = as_they_are([ant, bee], target(Pieces("▁z", "▁a")), recipe(), average=average)
    assert values[1] == {"share": 6.0, "reference": 4.0}[average]


def test_the_order_in_which_sources_are_named_does_not_matter(recipe: Make):
    ant, bee = two_silos()
    to = target(Pieces("▁d", "▁a", "▁b", "▁c", "▁x"))
    one, two = (transfer("mix", order, to, recipe()) for order in ([ant, bee], [bee, ant]))
    assert same(one.embeddings, two.embeddings)


def test_a_byte_level_piece_gets_the_row_of_a_sentencepiece_one(recipe: Make):
    ant = source("ant", Pieces("▁the", "é"), rows(1.0, 2.0, 3.0))
    to = target(Pieces(*byte_level_alphabet(), "Ã©", "Ġthe", end="<|end|>"))
    values = as_they_are([ant], to, recipe())
    assert (values[0], *values[-2:]) == (1.0, 3.0, 2.0)


def test_a_part_of_a_shared_vocabulary_is_read_through_its_ids(recipe: Make):
    pieces = Pieces("▁a", "▁b", "▁c", "▁d")
    part = Vocabulary(np.asarray([0, 2, 4]), pieces.size)
    ant = Source("ant", pieces, part, {PHI: rows(1.0, 2.0, 3.0)}, np.ones(3, dtype=np.int64))
    to = Target("new", pieces, Vocabulary(np.asarray([2, 4]), pieces.size))
    assert as_they_are([ant], to, recipe()) == [2.0, 3.0]


def test_byte_pieces_are_shared_whatever_the_languages(recipe: Make):
    sources = []
    for name in ("ant", "cat"):
        text = [" ".join(a + b for a in WORDS[name] for b in WORDS[name])]
        tokenizer = SentencePieceTokenizer(train_sentencepiece(name, text, 300))
        held = Vocabulary.whole(tokenizer)
        counts = token_counts(np.asarray(tokenizer.encode(text)[0]), held)
        embeddings = {PHI: normal(300, WIDTH, seed=len(sources))}
        sources.append(Source(name, tokenizer, held, embeddings, counts))
    ant, cat = sources
    found = transfer("copy", [cat], Target("new", ant.tokenizer, ant.vocabulary), recipe())
    places = [ant.tokenizer.pieces().index(piece) for piece in BYTES]
    theirs = [cat.tokenizer.pieces().index(piece) for piece in BYTES]
    assert torch.equal(found.embeddings[PHI][places], cat.embeddings[PHI][theirs])
    assert 256 < found.report.rows["copied"] < 290


def test_counts_of_a_text_are_in_local_ids_and_in_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dept_fl.transfer._CHUNK_TOKENS", 3)
    text = np.asarray([5, 2, 2, 0, 2, 5, 9], dtype=np.uint16)
    assert token_counts(text, Vocabulary(np.asarray([2, 3, 5]), full=10)).tolist() == [3, 0, 2]


# ---- spaces ------------------------------------------------------------------------------------


def rotated_silos() -> tuple[Source, Source, torch.Tensor]:
    """ant has tokens 0..79 and bee 20..99 of one space, bee's turned; and that space."""
    space = normal(100, WIDTH)
    turn = torch.linalg.qr(normal(WIDTH, WIDTH, seed=1)).Q
    names = [f"▁t{i}" for i in range(100)]
    end = torch.zeros(1, WIDTH)
    ant = source("ant", Pieces(*names[:80]), torch.cat([end, space[:80]]))
    bee = source("bee", Pieces(*names[20:]), torch.cat([end, space[20:] @ turn]))
    return ant, bee, space


@pytest.mark.parametrize("average", AVERAGES)
def test_a_rotated_silo_is_turned_into_the_references_space(recipe: Make, average: str):
    ant, bee, space = rotated_silos()
    pieces = Pieces(*[f"▁t{i}" for i in range(100)])
    to = target(pieces, [*range(1, 101), *range(1, 20)])  # ant's tokens more often
    found = transfer("copy", [ant, bee], to, recipe(), average=average)
    torch.testing.assert_close(found.embeddings[PHI][1:], space, atol=1e-4, rtol=0.0)
    (how,) = found.report.alignments
    assert (how.source, how.tensor, how.kind, how.pairs) == ("bee", PHI, "procrustes", 61)
    assert how.residuals["procrustes"] < 1e-5
    assert how.residuals["identity"] == pytest.approx(math.sqrt(2), abs=0.2)


def test_a_space_that_is_common_already_is_left_alone(recipe: Make):
    ant, bee, _ = rotated_silos()
    noisy = ant.embeddings[PHI] + 0.1 * normal(81, WIDTH, seed=4)
    near = replace(bee, embeddings={PHI: noisy}, tokenizer=ant.tokenizer)
    to = target(Pieces(*[f"▁t{i}" for i in range(100)]))
    (how,) = transfer("copy", [ant, near], to, recipe()).report.alignments
    assert how.kind == "identity"


def test_an_alignment_that_is_asked_for_is_taken(recipe: Make):
    ant, bee, _ = rotated_silos()
    to = target(ant.tokenizer)
    for kind in ("identity", "procrustes"):
        (how,) = transfer("copy", [ant, bee], to, recipe(), alignment=kind).report.alignments
        assert (how.kind, how.residuals) == (kind, {})


def test_tokens_that_a_silos_text_never_had_do_not_align_it(recipe: Make):
    ant, bee, _ = rotated_silos()
    values = bee.embeddings[PHI].clone()
    values[51:] = normal(30, WIDTH, seed=3)  # as at the silo's beginning
    untrained = replace(bee, embeddings={PHI: values}, counts=1 * (np.arange(81) < 51))
    pieces = Pieces(*[f"▁t{i}" for i in range(100)])
    found = transfer("copy", [ant, untrained], target(pieces), recipe())
    assert found.report.alignments[0].pairs == 51
    assert found.report.alignments[0].residuals["procrustes"] < 1e-4


# ---- more tensors than one ---------------------------------------------------------------------


def test_an_untied_head_and_its_bias_are_carried_over_too(recipe: Make):
    made = replace(recipe(), model=UNTIED)
    found = layout(UNTIED, made.sequence_tokens)
    names = [f"▁t{i}" for i in range(60)]
    ant = source("ant", Pieces(*names), torch.empty(0))
    own = {name: normal(61, *shape, seed=i) for i, (name, shape) in enumerate(found.tokens.items())}
    assert [tensor.dim() for tensor in own.values()] == [2, 2, 1]
    ant = replace(ant, embeddings=own)
    turns = [torch.linalg.qr(normal(WIDTH, WIDTH, seed=s)).Q for s in (7, 8)]
    turned = dict(zip(own, [own[n] @ q for n, q in zip(own, turns, strict=False)], strict=False))
    bias = list(own)[2]
    bee = replace(ant, name="bee", embeddings={**turned, bias: own[bias] + 1.0})
    back = transfer("copy", [ant, bee], target(Pieces(*names)), made, average="share")
    for name in turned:
        torch.testing.assert_close(back.embeddings[name], own[name], atol=1e-4, rtol=0.0)
    torch.testing.assert_close(back.embeddings[bias], own[bias] + 0.5)
    kinds = {how.tensor: how.kind for how in back.report.alignments}
    assert list(kinds.values()) == ["procrustes", "procrustes", "identity"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_all_tensors_of_the_model_in_their_shapes(recipe: Make, method: str):
    for model in (UNTIED, LEARNED_POSITIONS, recipe().model):
        made = replace(recipe(), model=model)
        found = layout(model, made.sequence_tokens)
        sources = [
            Source(
                name,
                pieces,
                pieces.whole,
                {n: normal(*s) for n, s in found.embeddings(pieces.size).items()},
                np.ones(pieces.size, dtype=np.int64),
            )
            for name, pieces in (("ant", Pieces("▁ab", "▁b")), ("bee", Pieces("▁ab", "▁c")))
        ]
        to = target(Pieces("▁ab", "▁abc", "▁zz"), [0, 1, 2, 1, 0])
        own = {name: normal(4, *shape, seed=9) for name, shape in found.tokens.items()}
        got = transfer(method, sources, replace(to, embeddings=own), made)
        assert {n: tuple(t.shape) for n, t in got.embeddings.items()} == found.embeddings(4)
        assert all(t.isfinite().all() and t.dtype == torch.float32 for t in got.embeddings.values())
        assert sum(got.report.rows.values()) == 4
        assert sum(got.report.shares.values()) == pytest.approx(1.0)
        model_of_it = build(model, 4, made.sequence_tokens, seed=0)
        join(model_of_it, found.split(dict(model_of_it.named_parameters()))[0], got.embeddings)
        json.dumps(asdict(got.report))


def positions_of(value: float, pieces: Pieces, recipe: Recipe) -> Source:
    embeddings = {
        "transformer.wte.weight": normal(pieces.size, WIDTH),
        "transformer.wpe.weight": torch.full((recipe.sequence_tokens, WIDTH), value),
    }
    name = {2.0: "ant", 4.0: "bee"}[value]
    counts = np.ones(pieces.size, dtype=np.int64)
    return Source(name, pieces, pieces.whole, embeddings, counts)


@pytest.mark.parametrize(("average", "expected"), [("reference", 2.0), ("share", 3.0)])
def test_positions_are_the_references_or_the_mean(recipe: Make, average: str, expected: float):
    made = replace(recipe(), model=LEARNED_POSITIONS)
    pieces = Pieces("▁a", "▁b")
    sources = [positions_of(value, pieces, made) for value in (4.0, 2.0)]
    found = transfer(
        "copy", sources, target(pieces), made, alignment="identity", average=average
    ).embeddings["transformer.wpe.weight"]
    assert torch.equal(found, torch.full_like(found, expected))


# ---- tokens that no source has -----------------------------------------------------------------


def test_others_are_drawn_with_the_mean_and_spread_of_the_copied_rows(recipe: Make):
    names = [f"▁t{i}" for i in range(400)]
    scale, shift = torch.linspace(0.1, 2.0, WIDTH), torch.linspace(-3.0, 3.0, WIDTH)
    ant = source("ant", Pieces(*names[:200]), normal(201, WIDTH) * scale + shift)
    to = target(Pieces(*names))
    found = transfer("copy", [ant], to, recipe())
    assert found.report.rows == {"copied": 201, "drawn": 200}
    copied, drawn = found.embeddings[PHI].split([201, 200])
    torch.testing.assert_close(drawn.mean(0), copied.mean(0), atol=0.5, rtol=0.0)
    torch.testing.assert_close(drawn.std(0), copied.std(0), atol=0.0, rtol=0.3)
    assert len(drawn.unique(dim=0)) == 200


def test_where_all_copied_rows_are_one_the_drawn_ones_are_too(recipe: Make):
    ant = source("ant", Pieces("▁a"), rows(3.0, 3.0))
    assert as_they_are([ant], target(Pieces("▁a", "▁x", "▁y")), recipe()) == [3.0] * 4


def test_a_mix_by_hand(recipe: Make):
    """Without text, spelling alone: "abcd" is like "abce" and like nothing else."""
    ant = source("ant", Pieces("abce", "xy", "wz"), rows(1.0, 2.0, 4.0, 8.0))
    found = transfer("mix", [ant], target(Pieces("abcd", "xy", "wz", "abce", "qq")), recipe())
    assert found.report.rows == {"copied": 4, "mixed": 1, "drawn": 1}
    # With a lead of 1 over all others it would take all; its cosine is less, and the rest goes
    # to the two that are not like it at all, each alike.
    weight = found.embeddings[PHI][1, 0]
    assert 2.0 < weight < 8.0


def test_a_token_is_most_like_the_one_in_whose_contexts_it_stands(recipe: Make):
    pieces = Pieces("ab", "cd", "xy", "wz", "kl")
    known = torch.eye(5, WIDTH)  # so that a row shows the weights it is mixed with
    ant = source("ant", Pieces("ab", "cd", "xy", "wz"), known)
    draw = random.Random(1)
    lines = ([1, 3, 2, 0], [1, 5, 2, 0], [4, 4, 4, 0])  # "kl" stands where "xy" does
    text = [token for line in draw.choices(lines, k=200) for token in line]
    found = transfer("mix", [ant], target(pieces, text), recipe())
    assert found.report.rows == {"copied": 5, "mixed": 1}
    assert found.report.shares["mixed"] == pytest.approx(text.count(5) / 800)
    weights = found.embeddings[PHI][5, :5]
    assert weights.sum() == pytest.approx(1.0)
    assert weights.argmax() == 3
    assert weights[3] > 2 * weights[4] > 0.0


def test_matched_keeps_the_spread_and_no_row(recipe: Make):
    names = [f"▁t{i}" for i in range(400)]
    ant = source("ant", Pieces(*names), 2.0 * normal(401, WIDTH) + 5.0)
    found = transfer("matched", [ant], target(Pieces(*names)), recipe())
    values, given = found.embeddings[PHI], ant.embeddings[PHI]
    torch.testing.assert_close(values.mean(0), given.mean(0), atol=0.5, rtol=0.0)
    torch.testing.assert_close(values.std(0), given.std(0), atol=0.0, rtol=0.3)
    assert torch.cosine_similarity(values - 5.0, given - 5.0).abs().mean() < 0.3
    assert found.report.rows == {"drawn": 401}


def test_random_is_what_a_new_silo_of_that_name_begins_with(recipe: Make):
    made = recipe()
    found = transfer("random", [], target(Pieces("▁a", "▁b")), made)
    layout_ = layout(made.model, made.sequence_tokens)
    fresh = initial_embeddings(made.model, 3, made.sequence_tokens, layout_, made.seed, "new")
    assert same(found.embeddings, fresh)


@pytest.mark.parametrize("method", ["copy", "mix", "matched", "random"])
def test_the_seed_alone_decides_what_is_drawn(recipe: Make, method: str):
    ant = source("ant", Pieces("▁a", "▁b"), normal(3, WIDTH))
    to = target(Pieces("▁a", "xyz", "uvw"))
    torch.manual_seed(5)
    one = transfer(method, [ant], to, recipe("seed=1")).embeddings
    torch.manual_seed(6)
    assert same(one, transfer(method, [ant], to, recipe("seed=1")).embeddings)
    assert not same(one, transfer(method, [ant], to, recipe("seed=2")).embeddings)


def test_sources_are_left_as_they_are(recipe: Make):
    ant, bee, _ = rotated_silos()
    before = [{PHI: s.embeddings[PHI].clone()} for s in (ant, bee)]
    transfer("mix", [ant, bee], target(Pieces("▁t1", "▁t99", "▁t500")), recipe())
    assert same(before[0], ant.embeddings)
    assert same(before[1], bee.embeddings)


# ---- embeddings of another body ----------------------------------------------------------------


def test_a_stitch_brings_foreign_embeddings_of_another_width_over(recipe: Make):
    names = [f"▁t{i}" for i in range(120)]
    own, weight = normal(121, 10), normal(10, WIDTH, seed=1)
    ant = source("ant", Pieces(*names[:60]), (own @ weight)[:61])
    to = replace(target(Pieces(*names)), embeddings={PHI: own})
    found = transfer("stitch", [ant], to, recipe())
    torch.testing.assert_close(found.maps[PHI], weight, atol=1e-3, rtol=0.0)
    torch.testing.assert_close(found.embeddings[PHI], own @ weight, atol=1e-2, rtol=0.0)
    (how,) = found.report.alignments
    assert (how.source, how.kind, how.pairs) == ("new", "ridge 0", 61)
    assert found.report.rows == {"mapped": 121}


def test_a_stitch_is_fitted_to_tokens_that_both_texts_have(recipe: Make):
    names = [f"▁t{i}" for i in range(40)]
    own = normal(41, 6)
    ant = source("ant", Pieces(*names), normal(41, WIDTH), [1] * 31 + [0] * 10)
    to = replace(target(Pieces(*names), list(range(11, 41))), embeddings={PHI: own})
    (how,) = transfer("stitch", [ant], to, recipe()).report.alignments
    assert how.pairs == 20  # 11 to 30


# ---- what cannot be done -----------------------------------------------------------------------


def refused(method: str, sources: list[Source], to: Target, recipe: Recipe, **options: str) -> str:
    with pytest.raises(DeptError) as raised:
        transfer(method, sources, to, recipe, **options)
    return str(raised.value)


def test_mistakes_name_the_value_and_the_mend(recipe: Make):
    ant = source("ant", Pieces("▁a"), normal(2, WIDTH))
    to = target(Pieces("▁a"), [0, 1])
    made = recipe()
    assert "method='focus': must be one of copy, mix" in refused("focus", [ant], to, made)
    wrong = refused("copy", [ant], to, made, alignment="none")
    assert "alignment='none': must be one of measure, identity" in wrong
    wrong = refused("copy", [ant], to, made, average="mean")
    assert "average='mean': must be one of reference, share" in wrong
    wrong = refused("copy", [ant], to, made, reference="bee")
    assert "reference='bee': no such source; sources: ant" in wrong
    assert "sources=[]: name at least one" in refused("copy", [], to, made)
    assert "sources=['ant', 'ant']: " in refused("copy", [ant, ant], to, made)
    narrow = source("bee", Pieces("▁a"), normal(2, 4))
    assert "source bee: its embeddings are {'model.embed" in refused("mix", [narrow], to, made)
    assert f"needs its own {PHI} of 2 rows, it has none" in refused("stitch", [ant], to, made)
    short = replace(to, embeddings={PHI: normal(3, 4)})
    assert "of 2 rows, it has (3, 4)" in refused("stitch", [ant], short, made)
    unseen = replace(ant, counts=np.zeros(2, dtype=np.int64))
    own = replace(to, embeddings={PHI: normal(2, 4)})
    assert "nothing to fit a map to; use method=mix" in refused("stitch", [unseen], own, made)


def test_without_a_token_in_common_there_is_nothing_to_copy(recipe: Make):
    ant = Source("ant", Pieces("▁a"), Vocabulary(np.asarray([1]), 2), {PHI: rows(1.0)}, np.ones(1))
    to = Target("new", Pieces("▁b"), Vocabulary(np.asarray([1]), 2))
    assert "target new: no token in common with ant; method=random" in refused(
        "copy", [ant], to, recipe()
    )


# ---- real silos --------------------------------------------------------------------------------

LONGER = "rounds=8 inner.local_steps=10 inner.batch_size=8 only=[ant,bee]"


def new_silo(recipe: Recipe, home: Path, name: str, documents: int = 60) -> Silo:
    """A silo of ant's language that took no part, with text and a tokenizer of its own."""
    folder = home / "newcomers"
    folder.mkdir(exist_ok=True)
    write_text(folder, name, documents, [a + b for a in WORDS["ant"] for b in WORDS["ant"]])
    newcomer = SiloConfig(files=[str(folder / f"{name}.jsonl")], vocab_size=310)
    return Silo(name, replace(recipe, silos={name: newcomer}, only=[]), home, uuid4().hex[:12])


def bits(body: dict[str, torch.Tensor], found: Transferred, silo: Silo) -> float:
    recipe, stream = silo.recipe, silo.stream
    model = build(recipe.model, stream.vocabulary.size, recipe.sequence_tokens, seed=0)
    join(model, body, found.embeddings)
    return evaluate(model, stream, recipe.sequence_tokens, recipe.inner).bits_per_byte


@pytest.fixture(scope="module")
def finals(tiny_file: Path, home: Path) -> list[Path]:
    """The final folders of ant and bee, trained together for a while."""
    server, silos = trained(load_recipe(tiny_file, LONGER), home)
    for name, silo in silos.items():
        silo.finish(server.task(name))
    return [silo.final_folder for silo in silos.values()]


def test_a_final_folder_is_read_back_with_its_silo(finals: list[Path], home: Path):
    ant = read_final(finals[0])
    assert ant.silo.name == "ant"
    assert ant.silo.final_folder == finals[0]
    assert ant.silo.recipe.rounds == 8
    found = Source.of(ant)
    assert found.embeddings[PHI].shape == (320, WIDTH)
    assert found.counts.sum() == len(ant.silo.stream.train)


def test_a_copy_of_a_final_folder_needs_the_home_named(
    finals: list[Path], home: Path, tmp_path: Path
):
    copy = tmp_path / "final"
    shutil.copytree(finals[0], copy)
    with pytest.raises(DeptError, match=r"in no home; name <home>/silos/.* itself"):
        read_final(copy)
    assert same(read_final(copy, home).body, read_final(finals[0]).body)


def test_a_silo_whose_tokenizer_is_another_now_is_refused(finals: list[Path], tmp_path: Path):
    tensors, meta = load_state(finals[0])
    moved = tmp_path / "silos" / "ant" / "state" / "e" / "final"
    shutil.copytree(finals[0], moved)
    save_state(moved, tensors, {**meta, "tokenizer": "0123"})
    with pytest.raises(DeptError, match=r"silo ant has tokenizer='.*' now, it was '0123' in the"):
        read_final(moved)


def test_silos_of_different_runs_have_no_common_body(finals: list[Path]):
    ant, bee = map(read_final, finals)
    assert same(common_body([ant, bee]), ant.body)
    other = replace(bee, body={n: t + 1.0 for n, t in bee.body.items()})
    with pytest.raises(DeptError, match=r"silos ant and bee have different bodies"):
        common_body([ant, other])


@pytest.mark.parametrize("average", AVERAGES)
def test_a_new_silo_begins_far_below_random(finals: list[Path], home: Path, average: str):
    read = list(map(read_final, finals))
    silo = new_silo(read[0].silo.recipe, home, "newcomer")
    body, sources, to = common_body(read), list(map(Source.of, read)), Target.of(silo)
    begun = {
        method: bits(body, transfer(method, sources, to, silo.recipe, average=average), silo)
        for method in ("copy", "mix", "matched", "random")
    }
    assert max(begun["copy"], begun["mix"]) < 0.75 * min(begun["matched"], begun["random"])


@pytest.fixture
def stranger(finals: list[Path], home: Path) -> tuple[Silo, list[Source], Target, dict]:
    """A silo with embeddings beside a body of its own; the sources, and their common body."""
    read = list(map(read_final, finals))
    silo = new_silo(read[0].silo.recipe, home, "stranger")
    _, alone = trained(replace(silo.recipe, rounds=4, seed=77), home)
    own = alone["stranger"]._state(4).embeddings
    return silo, list(map(Source.of, read)), Target.of(silo, own), common_body(read)


def test_a_stitch_begins_below_random(stranger: tuple):
    silo, sources, to, body = stranger
    closed = transfer("stitch", sources, to, silo.recipe)
    fresh = transfer("random", sources, to, silo.recipe)
    assert bits(body, closed, silo) < 0.75 * bits(body, fresh, silo)


def test_a_stitch_is_refined_on_text_with_all_but_the_map_frozen(stranger: tuple):
    silo, sources, to, body = stranger
    own, frozen = to.embeddings[PHI].clone(), {n: t.clone() for n, t in body.items()}
    closed = transfer("stitch", sources, to, silo.recipe)
    halved = {PHI: closed.maps[PHI] / 2.0}
    start = replace(closed, maps=halved, embeddings={PHI: own @ halved[PHI]})
    found = refine(start, to.embeddings, body, silo.stream, silo.recipe, 30, learning_rate=0.02)
    torch.testing.assert_close(found.embeddings[PHI], own @ found.maps[PHI])
    assert bits(body, found, silo) < 0.95 * bits(body, start, silo)
    assert torch.equal(to.embeddings[PHI], own)
    assert same(body, frozen)
    torch.manual_seed(1)
    again = refine(start, to.embeddings, body, silo.stream, silo.recipe, 30, learning_rate=0.02)
    assert same(found.embeddings, again.embeddings)


def test_only_a_stitch_can_be_refined(stranger: tuple):
    silo, sources, to, body = stranger
    given = (to.embeddings, body, silo.stream, silo.recipe)
    with pytest.raises(DeptError, match="method='copy' made no maps; refine what stitch made"):
        refine(transfer("copy", sources, to, silo.recipe), *given, steps=1)
    with pytest.raises(DeptError, match="steps=0: must be at least 1"):
        refine(transfer("stitch", sources, to, silo.recipe), *given, steps=0)


@pytest.mark.parametrize("model", [UNTIED, LEARNED_POSITIONS], ids=["untied", "tied"])
def test_a_stitched_model_is_the_model_with_the_stitched_embeddings(model: ModelConfig):
    found = layout(model, 8)
    plain, base = build(model, 20, 8, seed=1).eval(), build(model, 20, 8, seed=1)
    own = {name: normal(20, 5 if shape else 1, seed=2) for name, shape in found.tokens.items()}
    maps = {n: normal(5 if s else 1, *(s or (1,)), seed=3) for n, s in found.tokens.items()}
    made = StitchedModel(base, own, maps, found).eval()
    ids = torch.arange(8).unsqueeze(0)
    logits = made(input_ids=ids).logits
    body, embeddings = found.split(dict(plain.named_parameters()))
    tokens = {n: (own[n] @ w).view(-1, *found.tokens[n]) for n, w in maps.items()}
    join(plain, body, {**embeddings, **tokens})
    torch.testing.assert_close(logits, plain(input_ids=ids).logits)
    logits.sum().backward()
    with_gradient = {n for n, p in made.named_parameters() if p.grad is not None}
    assert with_gradient == {f"maps.{i}" for i in range(len(maps))}
