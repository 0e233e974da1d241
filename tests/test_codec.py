"""Codecs: what arrives is what hand and formula say, and what is lost is never lost for good."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dept_fl.codec import Encoded, decode, encode, encoded, form
from dept_fl.config import CODECS

every_codec = pytest.mark.parametrize("codec", CODECS)
shapes = st.sampled_from(
    [(1, 1), (3, 2), (2, 63), (2, 64), (5, 65), (3, 7, 11), (70, 129), (4,), ()]
)


def through(codec: str, tensor: torch.Tensor) -> torch.Tensor:
    """What arrives: as the encoder tells it, and as the decoder makes it of the bytes."""
    arrived = torch.empty(tensor.shape)
    bytes_ = encode(codec, tensor, arrived)
    decoded = decode(codec, bytes_, tuple(tensor.shape))
    assert torch.equal(arrived.view(torch.int32), decoded.view(torch.int32)) or not bool(
        torch.isfinite(decoded).all()
    )
    assert torch.equal(torch.isfinite(arrived), torch.isfinite(decoded))
    return decoded


def test_four_bits_by_hand():
    """Largest 14: scale 2 (bf16 0x4000). 14, -14, 3, 5.2, 0.9 are 7, -7, 2 (1.5 to even), 3, 0."""
    row = torch.tensor([[14.0, -14.0, 3.0, 5.2, 0.9]])
    made = encode("int4", row)
    assert made.dtype == torch.uint8
    # The scale, low byte first; then pairs, the first number low: 9 is -7 in four bits.
    assert made.tolist() == [[0x00, 0x40, 0x97, 0x32, 0x00]]
    assert through("int4", row).tolist() == [[14.0, -14.0, 4.0, 6.0, 0.0]]


def test_eight_bits_by_hand():
    """Largest 254: scale 2. Each row has a scale of its own."""
    rows = torch.tensor([[254.0, -3.0, 1.1], [127.0, 0.4, -126.6]])
    made = encode("int8", rows)
    assert made.tolist() == [[0x00, 0x40, 127, 254, 1], [0x80, 0x3F, 127, 0, 129]]
    assert through("int8", rows).tolist() == [[254.0, -4.0, 2.0], [127.0, 0.0, -127.0]]


def test_sixteen_bits_are_the_upper_half_of_fp32():
    row = torch.tensor([[1.0, 1.0 + 2**-9, 3e38]])
    assert through("bf16", row).tolist() == [[1.0, 1.0, float(torch.tensor(3e38).bfloat16())]]


def test_blocks_of_64_have_their_own_scale():
    row = torch.full((1, 128), 1e-6)
    row[0, 64:] = 1e6
    assert torch.allclose(through("int4", row), row, rtol=4e-3)


@every_codec
@given(shape=shapes, seed=st.integers(0, 1 << 30), power=st.integers(-30, 30))
@settings(max_examples=60, deadline=None)
def test_what_was_decoded_once_is_not_changed_again(
    codec: str, shape: tuple[int, ...], seed: int, power: int
):
    """So that silo, wire and server have the same numbers, whoever of them encodes."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    lies = form(codec, shape)
    made = encode(codec, tensor)
    assert (made.dtype, tuple(made.shape)) == (lies.dtype, lies.shape)
    once = through(codec, tensor)
    assert once.shape == tensor.shape
    assert once.dtype == torch.float32
    assert torch.equal(through(codec, once), once)
    assert torch.equal(encode(codec, once), made)


@pytest.mark.parametrize(("codec", "steps"), [("int4", 7), ("int8", 127)])
def test_no_number_moves_by_more_than_half_a_step(codec: str, steps: int):
    tensor = torch.randn(9, 200, generator=torch.Generator().manual_seed(0))
    error = (through(codec, tensor) - tensor).abs()
    for start in range(0, 200, 64):
        block = tensor[:, start : start + 64].abs().amax(1, keepdim=True)
        # Half a step of a scale that bf16 rounds by 2^-8 at most, and the largest by that too.
        limit = block / steps * 0.5 * (1 + 2**-8) + block * 2**-8
        assert bool((error[:, start : start + 64] <= limit).all())


@every_codec
@pytest.mark.parametrize("shape", [(6, 5), (6, 130), (6, 3, 50), (6,)])
def test_rows_of_what_is_encoded_are_the_encoded_rows(codec: str, shape: tuple[int, ...]):
    """TRIM's silos get the rows of one change that was encoded for all."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([1, 2, 5])
    made = encode(codec, tensor)
    assert torch.equal(encode(codec, tensor[rows]), made[rows])


def test_large_tensors_are_encoded_in_pieces_without_a_seam():
    tensor = torch.randn(5, 100_000, generator=torch.Generator().manual_seed(2))
    whole = through("int4", tensor)
    for i in range(5):
        assert torch.equal(through("int4", tensor[i : i + 1])[0], whole[i])


@pytest.mark.parametrize(("codec", "ratio"), [("bf16", 2.0), ("int8", 3.879), ("int4", 7.52)])
def test_bytes_of_a_matrix(codec: str, ratio: float):
    made = form(codec, (512, 2048))
    assert 512 * 2048 * 4 / made.bytes == pytest.approx(ratio, rel=2e-3)


def test_vectors_travel_as_they_are():
    vector = torch.tensor([1.0 + 2**-20, -7.3])
    for codec in CODECS:
        assert torch.equal(through(codec, vector), vector)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_as_such(codec: str, bad: float):
    """Else a diverged silo's update would look like a good one."""
    tensor = torch.ones(3, 70)
    tensor[1, 3] = bad
    assert not bool(torch.isfinite(through(codec, tensor)).all())


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=20, deadline=None)
def test_any_bytes_can_be_decoded(codec: str, seed: int):
    """A hostile silo's: values may be absurd, and are judged as values."""
    made = form(codec, (4, 100))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 256, (made.bytes,), generator=generator, dtype=torch.uint8)
    encoded = drawn.view(made.dtype).view(made.shape)
    assert decode(codec, encoded, (4, 100)).shape == (4, 100)


# ---- tensors that lie in memory as they travel --------------------------------------------------


@every_codec
def test_encoded_tensors_are_decoded_as_a_whole_or_by_rows(codec: str):
    tensors = {"w": torch.randn(70, 3, 43), "b": torch.randn(5), "s": torch.tensor(2.0)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    made = Encoded(codec, {name: encode(codec, t) for name, t in tensors.items()}, shapes)
    assert list(made) == ["w", "b", "s"] and len(made) == 3
    for name, shape in shapes.items():
        assert torch.equal(made[name], through(codec, tensors[name]))
        matrix = made[name].reshape(shape[0] if shape else 1, -1)
        for first, behind in ((0, len(matrix)), (0, 1), (len(matrix) // 2, len(matrix)), (1, 1)):
            assert torch.equal(made.rows(name, first, behind), matrix[first:behind])
    assert list(made.only(["b"])) == ["b"]
    assert torch.equal(made.only(["b"])["b"], tensors["b"])


def test_plain_tensors_are_encoded_as_fp32_without_a_copy():
    tensors = {"w": torch.randn(3, 2)}
    made = encoded(tensors)
    assert made.codec == "fp32" and made["w"].data_ptr() == tensors["w"].data_ptr()
    assert encoded(made) is made
