"""Deltas merged, worked out by hand. A quiet wrong average is the worst bug there can be."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dept_fl import merge
from dept_fl.checkpoint import Tensors
from dept_fl.codec import Encoded, encode
from dept_fl.config import OuterConfig
from dept_fl.merge import Delta, Norms, Shapes, Spool, holders
from dept_fl.records import from_record, to_record

MERGES = ("mean", "median", "trimmed-mean")
every_merge = pytest.mark.parametrize("how", MERGES)


def outer(how: str, trim_fraction: float = 0.2) -> OuterConfig:
    return OuterConfig(merge=how, trim_fraction=trim_fraction)


def merged(
    deltas: Sequence[Delta], shapes: Shapes, row_tensors: Collection[str], outer: OuterConfig
) -> Tensors:
    """All that is merged, each in memory of its own."""
    rows = next((shapes[name][0] for name in row_tensors), 0)
    found = merge.merged(deltas, shapes, row_tensors, merge.holders(deltas, rows), outer)
    return {name: tensor.clone() for name, tensor in found}


def merged_numbers(how: str, values: Sequence[float], trim_fraction: float = 0.2) -> float:
    """One number of each silo, merged."""
    deltas = [Delta({"w": torch.tensor([value])}) for value in values]
    return merged(deltas, {"w": (1,)}, (), outer(how, trim_fraction))["w"].item()


def rows(*values: float) -> torch.Tensor:
    """[n, 1]: an embedding of one dimension, so that a row is a number."""
    return torch.tensor(values).unsqueeze(1)


def test_trim_row_mean_is_over_the_silos_that_hold_the_row():
    # Six tokens. A holds 0 1 3, B holds 1 2 3, C holds 3 4; nobody holds 5.
    deltas = [
        Delta({"phi": rows(1.0, 2.0, 3.0)}, torch.tensor([0, 1, 3])),
        Delta({"phi": rows(4.0, 6.0, 9.0)}, torch.tensor([1, 2, 3])),
        Delta({"phi": rows(-3.0, 8.0)}, torch.tensor([3, 4])),
    ]
    assert holders(deltas, 6).tolist() == [1, 2, 1, 3, 1, 0]
    # row 0: 1/1; row 1: (2+4)/2; row 2: 6/1; row 3: (3+9-3)/3; row 4: 8/1; row 5: nobody
    found = merged(deltas, {"phi": (6, 1)}, {"phi"}, outer("mean"))
    assert found["phi"].flatten().tolist() == [1.0, 3.0, 6.0, 3.0, 8.0, 0.0]


def test_trim_positions_and_body_are_averaged_over_all_silos_of_the_round():
    deltas = [
        Delta({"phi": rows(2.0), "psi": torch.tensor([1.0, 2.0])}, torch.tensor([0])),
        Delta({"phi": rows(4.0), "psi": torch.tensor([3.0, 6.0])}, torch.tensor([2])),
    ]
    found = merged(deltas, {"phi": (3, 1), "psi": (2,)}, {"phi"}, outer("mean"))
    assert found["phi"].flatten().tolist() == [2.0, 0.0, 4.0]
    assert found["psi"].tolist() == [2.0, 4.0]


def test_glob_row_mean_is_over_all_silos_whether_they_use_the_row_or_not():
    deltas = [Delta({"phi": d}) for d in (rows(3.0, 0.0), rows(0.0, 6.0), rows(0.0, 0.0))]
    assert holders(deltas, 2).tolist() == [3, 3]
    found = merged(deltas, {"phi": (2, 1)}, {"phi"}, outer("mean"))
    assert found["phi"].flatten().tolist() == [1.0, 2.0]


def test_untied_heads_share_the_holders_of_their_rows():
    deltas = [
        Delta(
            {"phi": rows(1.0, 1.0), "head": rows(2.0, 2.0), "bias": torch.tensor([3.0, 3.0])},
            torch.tensor([0, 1]),
        ),
        Delta(
            {"phi": rows(3.0), "head": rows(6.0), "bias": torch.tensor([9.0])}, torch.tensor([1])
        ),
    ]
    shapes = {"phi": (3, 1), "head": (3, 1), "bias": (3,)}
    found = merged(deltas, shapes, shapes.keys(), outer("mean"))
    assert found["phi"].flatten().tolist() == [1.0, 2.0, 0.0]
    assert found["head"].flatten().tolist() == [2.0, 4.0, 0.0]
    assert found["bias"].tolist() == [3.0, 6.0, 0.0]
    assert holders(deltas, 3).tolist() == [1, 2, 0]


def test_merged_tensors_share_one_piece_of_memory():
    shapes = {"a": (2,), "b": (3,)}
    delta = Delta({name: torch.ones(shape) for name, shape in shapes.items()})
    places = {
        t.data_ptr() for _, t in merge.merged([delta], shapes, (), torch.zeros(0), outer("mean"))
    }
    assert len(places) == 1


# ---- median and trimmed mean ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "mean", "median", "trimmed"),
    [
        ([3.0], 3.0, 3.0, 3.0),
        ([1.0, 4.0], 2.5, 2.5, 2.5),
        ([900.0, 1.0, 2.0], 301.0, 2.0, 301.0),  # a fifth of three is nobody
        ([900.0, 1.0, 2.0, 5.0], 227.0, 3.5, 227.0),
        ([900.0, 1.0, 2.0, -600.0, 6.0], 61.8, 2.0, 3.0),  # without 900 and -600
        ([8.0, 8.0, 8.0, 8.0, 8.0, 0.0], 40 / 6, 8.0, 8.0),  # without one 8 and the 0
        ([1e6, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, -1e6], 4.4, 5.5, 5.5),  # without two each
    ],
)
def test_what_many_silos_numbers_become(
    values: list[float], mean: float, median: float, trimmed: float
):
    assert merged_numbers("mean", values) == pytest.approx(mean)
    assert merged_numbers("median", values) == pytest.approx(median)
    assert merged_numbers("trimmed-mean", values) == pytest.approx(trimmed)


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [(0.0, [0, 1, 2, 3, 40]), (0.19, [0, 1, 2, 3, 40]), (0.2, [1, 2, 3]), (0.4, [2]), (0.49, [2])],
)
def test_the_trimmed_mean_drops_a_share_at_either_end(fraction: float, kept: list[int]):
    found = merged_numbers("trimmed-mean", [40, 0, 3, 1, 2], fraction)
    assert found == pytest.approx(sum(kept) / len(kept))


def test_the_share_that_is_dropped_is_exact_for_any_number_of_silos():
    for silos in (*range(1, 12), 25, 50, 100, 150):
        for percent in range(50):
            cut = min(math.floor(Fraction(percent, 100) * silos), (silos - 1) // 2)
            assert merge._dropped(torch.tensor([float(silos)]), percent / 100).tolist() == [cut]


@pytest.mark.parametrize("silos", [1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 64, 65])
def test_numbers_are_sorted_over_any_number_of_silos(silos: int):
    # A network that sorts every row of zeros and ones sorts everything (Knuth, 5.3.4).
    bits = torch.arange(1 << silos) if silos < 14 else torch.randint(1 << 62, (4096,))
    ones = [(bits >> silo % 62 & 1).float() for silo in range(silos)]
    mixed = [torch.cat([each, torch.randn(512)]) for each in ones]
    expected = torch.stack(mixed).sort(dim=0).values
    assert torch.equal(torch.stack(merge._sorted(mixed)), expected)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [1.0, 3.0, 6.0, 22.0, 8.0, 0.0]),
        ("median", [1.0, 3.0, 6.0, 3.0, 8.0, 0.0]),
        ("trimmed-mean", [1.0, 3.0, 6.0, 4.0, 8.0, 0.0]),
    ],
)
def test_trim_rows_are_merged_over_the_silos_that_hold_them(how: str, expected: list[float]):
    # Six tokens; nobody holds 5. Row 3 has 3, 8, -3, 101, 1: trimmed it is (1 + 3 + 8) / 3.
    deltas = [
        Delta({"phi": rows(1.0, 2.0, 3.0)}, torch.tensor([0, 1, 3])),
        Delta({"phi": rows(4.0, 6.0, 8.0)}, torch.tensor([1, 2, 3])),
        Delta({"phi": rows(-3.0, 8.0)}, torch.tensor([3, 4])),
        Delta({"phi": rows(101.0)}, torch.tensor([3])),
        Delta({"phi": rows(1.0)}, torch.tensor([3])),
    ]
    found = merged(deltas, {"phi": (6, 1)}, {"phi"}, outer(how))
    assert found["phi"].flatten().tolist() == expected


@every_merge
def test_tensors_of_every_shape_are_merged_number_by_number(how: str):
    shapes = {"matrix": (2, 2), "bias": (3,), "scalar": (), "deep": (1, 2, 1, 2)}
    deltas = [
        Delta({name: torch.full(shape, value) for name, shape in shapes.items()})
        for value in (1.0, 2.0, 6.0)
    ]
    found = merged(deltas, shapes, (), outer(how))
    value = 2.0 if how == "median" else 3.0
    assert {name: tensor.shape for name, tensor in found.items()} == shapes
    assert all(torch.equal(found[name], torch.full(shapes[name], value)) for name in shapes)


@every_merge
def test_positions_are_merged_over_all_silos_and_biases_of_tokens_by_row(how: str):
    shapes = {"phi": (3, 2), "psi": (2, 1), "bias": (3,)}
    deltas = [
        Delta(
            {"phi": torch.full((2, 2), v), "psi": rows(v, 2 * v), "bias": torch.tensor([v, -v])},
            torch.tensor(held),
        )
        for v, held in ((1.0, [0, 1]), (3.0, [1, 2]))
    ]
    found = merged(deltas, shapes, {"phi", "bias"}, outer(how))
    assert found["phi"].tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert found["bias"].tolist() == [1.0, 1.0, -3.0]  # row 1: (-1 + 3) / 2
    assert found["psi"].flatten().tolist() == [2.0, 4.0]


@every_merge
def test_a_delta_is_scaled_before_it_is_merged(how: str):
    deltas = [
        Delta({"w": torch.tensor([2.0, -2.0])}),
        Delta({"w": torch.tensor([4.0, -4.0])}),
        Delta({"w": torch.tensor([1000.0, -1000.0])}, scale=0.006),  # 6, -6
    ]
    found = merged(deltas, {"w": (2,)}, (), outer(how))
    torch.testing.assert_close(found["w"], torch.tensor([4.0, -4.0]))


@every_merge
def test_scaled_rows_of_trim_are_merged_over_their_holders(how: str):
    deltas = [
        Delta({"phi": rows(10.0, 10.0)}, torch.tensor([0, 2]), scale=0.5),
        Delta({"phi": rows(1.0)}, torch.tensor([2])),
    ]
    found = merged(deltas, {"phi": (4, 1)}, {"phi"}, outer(how))
    assert found["phi"].flatten().tolist() == [5.0, 0.0, 3.0, 0.0]


@every_merge
def test_the_order_of_silos_changes_no_more_than_rounding(how: str):
    generator = torch.Generator().manual_seed(1)
    deltas = [Delta({"w": torch.randn(50, generator=generator)}) for _ in range(7)]
    one = merged(deltas, {"w": (50,)}, (), outer(how))
    other = merged(deltas[::-1], {"w": (50,)}, (), outer(how))
    torch.testing.assert_close(one["w"], other["w"], atol=1e-6, rtol=0)
    again = merged(deltas, {"w": (50,)}, (), outer(how))
    assert torch.equal(one["w"], again["w"])


def plain(
    deltas: Sequence[Delta], shape: tuple[int, ...], by_row: bool, how: str, fraction: float
) -> torch.Tensor:
    """The merge of one tensor as one would write it on paper: number by number, in fp64."""
    found = torch.zeros(shape, dtype=torch.float64)
    columns = found.view(shape[0] if shape else 1, -1)
    for row in range(columns.shape[0]):
        for column in range(columns.shape[1]):
            held = [held_number(delta, row, column, by_row) for delta in deltas]
            values = sorted(number for each in held for number in each)
            if how != "mean" and values:
                share = Fraction(1, 2) if how == "median" else Fraction(str(fraction))
                cut = min(math.floor(share * len(values)), (len(values) - 1) // 2)
                values = values[cut : len(values) - cut]
            columns[row, column] = sum(values) / max(len(values), 1)
    return found


def held_number(delta: Delta, row: int, column: int, by_row: bool) -> list[float]:
    """The silo's number, if it holds the row."""
    tensor = delta.tensors["w"]
    tensor = tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)
    if by_row and delta.rows is not None:
        if row not in delta.rows.tolist():
            return []
        row = delta.rows.tolist().index(row)
    return [float(tensor[row, column]) * delta.scale]


@st.composite
def federations(draw: st.DrawFn) -> tuple[list[Delta], tuple[int, ...], bool]:
    shape = draw(st.sampled_from([(), (1,), (5,), (4, 3), (7, 1), (3, 2, 2)]))
    by_row = draw(st.booleans()) and len(shape) > 0
    numbers = st.floats(-100, 100, width=32)
    deltas = []
    for _ in range(draw(st.integers(1, 6))):
        held, rows_ = shape, None
        if by_row and draw(st.booleans()):
            ids = draw(st.sets(st.integers(0, shape[0] - 1), min_size=1))
            rows_ = torch.tensor(sorted(ids))
            held = (len(ids), *shape[1:])
        count = math.prod(held)
        values = draw(st.lists(numbers, min_size=count, max_size=count))
        scale = draw(st.sampled_from([1.0, 1.0, 0.5, 0.125]))
        deltas.append(Delta({"w": torch.tensor(values).reshape(held)}, rows_, scale))
    return deltas, shape, by_row


@every_merge
@settings(max_examples=60, deadline=None)
@given(
    federation=federations(),
    fraction=st.sampled_from([0.0, 0.2, 0.25, 0.34, 0.49]),
    chunk=st.integers(1, 40),
)
def test_every_merge_equals_the_plain_one_whatever_the_chunks(
    how: str, federation: tuple, fraction: float, chunk: int
):
    deltas, shape, by_row = federation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "_CHUNK_NUMBERS", chunk)
        tokens = {"w"} if by_row else set()
        found = merged(deltas, {"w": shape}, tokens, outer(how, fraction))
    expected = plain(deltas, shape, by_row, how, fraction)
    torch.testing.assert_close(found["w"].double(), expected, atol=1e-4, rtol=1e-5)


@every_merge
def test_chunks_leave_no_seam_in_a_large_merge(how: str, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(2)

    def silo(tokens: int) -> Delta:
        ids = torch.randperm(101, generator=generator)[:tokens].sort().values
        tensors = {
            "phi": torch.randn(tokens, 5, generator=generator),
            "bias": torch.randn(tokens, generator=generator),
            "w": torch.randn(33, 3, generator=generator),
        }
        return Delta(tensors, ids)

    deltas = [silo(tokens) for tokens in (20, 60, 101, 3)]
    shapes = {"phi": (101, 5), "bias": (101,), "w": (33, 3)}
    whole = merged(deltas, shapes, {"phi", "bias"}, outer(how))
    for chunk in (1, 4 * 5, 4 * 5 * 7 + 1, 4 * 101):
        monkeypatch.setattr(merge, "_CHUNK_NUMBERS", chunk)
        pieces = merged(deltas, shapes, {"phi", "bias"}, outer(how))
        assert all(torch.equal(pieces[name], whole[name]) for name in shapes)


# ---- the spool ------------------------------------------------------------------------------


def round_trip(folder: Path, tensors: Tensors) -> Tensors:
    spool = Spool(folder)
    spool.put("ant", "body", tensors)
    return spool.get("ant", "body", {n: tuple(t.shape) for n, t in tensors.items()})


def test_what_is_put_into_the_spool_comes_out_bit_for_bit(tmp_path: Path):
    tensors = {
        "matrix": torch.randn(3, 5),
        "bias": torch.randn(7),
        "scalar": torch.tensor(1.5),
        "deep": torch.randn(1, 2, 1, 3),
        "odd": torch.tensor([-0.0, 1e-45, 3e38]),
        "turned": torch.randn(4, 2).T,
        "first by name": torch.randn(2),
        "nothing": torch.zeros(0, 4),
    }
    found = round_trip(tmp_path, tensors)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        bits = found[name].contiguous().view(torch.int32)
        assert torch.equal(bits, tensor.contiguous().view(torch.int32))


def test_the_spool_takes_the_read_only_views_that_come_from_a_record(tmp_path: Path):
    tensors = {"w": torch.randn(3, 2), "b": torch.tensor(2.0)}
    views = from_record(to_record(tensors), {"w": (3, 2), "b": ()})
    found = round_trip(tmp_path, views)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_part_without_tensors_is_empty(tmp_path: Path):
    assert list(round_trip(tmp_path, {})) == []


def test_silos_and_parts_are_kept_apart(tmp_path: Path):
    spool = Spool(tmp_path)
    for silo, value in (("a", 1.0), ("a-b", 2.0), ("a_b", 3.0)):
        for part, more in (("body", 0.0), ("embeddings", 0.5)):
            spool.put(silo, part, {"w": torch.tensor([value + more])})
    got = [
        spool.get(silo, part, {"w": (1,)})["w"].item()
        for silo in ("a", "a-b", "a_b")
        for part in ("body", "embeddings")
    ]
    assert got == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]


def test_what_is_done_to_a_spooled_tensor_does_not_reach_the_file(tmp_path: Path):
    shapes = {"w": (4,)}
    spool = Spool(tmp_path)
    spool.put("ant", "body", {"w": torch.ones(4)})
    spool.get("ant", "body", shapes)["w"].zero_()
    assert spool.get("ant", "body", shapes)["w"].tolist() == [1.0] * 4


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
@every_merge
@pytest.mark.parametrize("chunk", [1, 300, 1 << 20])
def test_encoded_deltas_merge_into_the_bits_of_what_they_decode_to(
    codec: str, how: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """They lie on disk as they came, and are decoded row by row as they are merged."""
    monkeypatch.setattr(merge, "_CHUNK_NUMBERS", chunk)
    shapes: Shapes = {"a": (3, 5), "b": (7,), "phi": (6, 2, 35), "z": (5, 129)}
    held_by = [torch.tensor([0, 1, 5]), None, torch.tensor([1, 2, 3, 5])]
    spool, plain, kept = Spool(tmp_path), [], []
    for i, rows in enumerate(held_by):
        own = {n: (len(rows), *s[1:]) if n == "phi" and rows is not None else s
               for n, s in shapes.items()}  # fmt: skip
        tensors = {n: encode(codec, torch.randn(s)) for n, s in own.items()}
        given = Encoded(codec, tensors, own)
        spool.put(f"silo {i}", "all", given)
        plain.append(Delta(dict(given), rows, 0.5 + i))
        kept.append(Delta(spool.get(f"silo {i}", "all", own), rows, 0.5 + i))
    found = merged(kept, shapes, {"phi"}, outer(how, 0.34))
    expected = merged(plain, shapes, {"phi"}, outer(how, 0.34))
    assert found.keys() == shapes.keys()
    assert all(torch.equal(found[name], expected[name]) for name in shapes)


def test_a_spooled_tensor_is_a_map_of_its_file_and_no_copy(tmp_path: Path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux shows what is mapped")
    found = round_trip(tmp_path, {"w": torch.ones(100_000), "x": torch.ones(100_000)})
    ranges = [line.split()[0] for line in maps.read_text().splitlines() if str(tmp_path) in line]
    assert len(ranges) == 1
    first, behind = (int(end, 16) for end in ranges[0].split("-"))
    assert all(first <= tensor.data_ptr() < behind for tensor in found.values())


# ---- what norm is usual -----------------------------------------------------------------------


def test_in_the_first_round_the_limit_comes_from_the_round_itself():
    assert Norms().median("body") is None
    assert Norms().limit("body", 4.0, [1.0, 2.0, 900.0]) == 8.0
    assert Norms().limit("body", 4.0, [3.0]) == 12.0


def test_later_the_limit_comes_from_all_norms_of_the_rounds_before():
    norms = Norms()
    norms.add("body", [1.0, 2.0])
    norms.add("body", [3.0, 10.0, 11.0])
    assert norms.median("body") == 3.0
    assert norms.limit("body", 2.0, [500.0, 500.0]) == 6.0
    assert norms.limit("embeddings", 2.0, [5.0]) == 10.0  # each part has its own


def test_rounds_of_long_ago_are_forgotten():
    norms = Norms()
    norms.add("body", [1e9] * 50)
    for _ in range(4):
        norms.add("body", [2.0])
    assert norms.median("body") == 1e9
    norms.add("body", [2.0])
    assert norms.median("body") == 2.0
    assert norms.rounds == {"body": [[2.0]] * 5}


@pytest.mark.parametrize("clip", [0.0, 4.0])
def test_there_is_no_limit_without_clipping_or_without_a_measure(clip: float):
    values = [1.0, 2.0] if clip == 0 else [0.0, 0.0]
    assert Norms().limit("body", clip, values) == math.inf


def test_rounds_in_which_nothing_moved_are_no_measure():
    norms = Norms()
    norms.add("body", [0.0, 0.0, 0.0])
    assert norms.limit("body", 4.0, [1.0, 2.0, 3.0]) == 8.0


def test_norms_come_back_from_what_a_checkpoint_keeps_of_them():
    norms = Norms()
    norms.add("body", [0.1, 0.2])
    again = Norms(norms.rounds)
    again.add("body", [0.3])
    assert norms.rounds == {"body": [[0.1, 0.2]]}  # and they share nothing
    assert again.rounds == {"body": [[0.1, 0.2], [0.3]]}
