"""What tensors travel as: fp32, or fewer bits a number with a scale for each block.

The paper sends fp32. A silo that sends fewer bits keeps what rounding lost and adds it to its next
delta (error feedback: Seide et al. 2014; Karimireddy et al. 2019). Only what the last round loses
never arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

Shape = tuple[int, ...]

_BLOCK = 64  # numbers that share a scale
_SCALE_BYTES = 2  # bf16
_CHUNK_NUMBERS = 1 << 18  # of a tensor at a time, so that the steps in between stay in the cache


@dataclass(frozen=True)
class Form:
    """How a tensor lies on the wire: the array's dtype and shape."""

    dtype: torch.dtype
    shape: Shape

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(str(self.dtype).removeprefix("torch."))

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Codec(Protocol):
    """Encodes a tensor of two axes or more, whose axes but the first are taken as one.

    Each row is encoded by itself: some rows of what is encoded are the encoded form of those rows.
    """

    def form(self, shape: Shape) -> Form: ...

    def encode(self, tensor: torch.Tensor) -> torch.Tensor: ...

    def decode(self, encoded: torch.Tensor, shape: Shape) -> torch.Tensor:
        """fp32; numbers that no silo would send come out as NaN or infinity, never as an error."""
        ...


class Fp32:
    """As it is, without a copy."""

    def form(self, shape: Shape) -> Form:
        return Form(torch.float32, shape)

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def decode(self, encoded: torch.Tensor, shape: Shape) -> torch.Tensor:
        return encoded


class Bf16:
    """The upper half of fp32, rounded; as int16, since numpy has no bf16."""

    def form(self, shape: Shape) -> Form:
        return Form(torch.int16, shape)

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.bfloat16).view(torch.int16)

    def decode(self, encoded: torch.Tensor, shape: Shape) -> torch.Tensor:
        return encoded.view(torch.bfloat16).float()


@dataclass(frozen=True)
class Blockwise:
    """Signed whole numbers of 4 or 8 bits times the scale of their block, in bytes.

    A row of d numbers is ceil(d / 64) scales in bf16, then its numbers; two of 4 bits in a byte,
    the first one low. The largest number of a block is 7 or 127 times the scale.
    """

    bits: int

    @property
    def _largest(self) -> int:
        return int(2 ** (self.bits - 1)) - 1

    def form(self, shape: Shape) -> Form:
        rows, width = shape[0], prod(shape[1:])
        return Form(torch.uint8, (rows, self._scales(width) + -(-width * self.bits // 8)))

    def _scales(self, width: int) -> int:
        """Bytes of a row's scales."""
        return -(-width // _BLOCK) * _SCALE_BYTES

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        numbers = tensor.reshape(len(tensor), -1)
        encoded = torch.empty(self.form(tuple(tensor.shape)).shape, dtype=torch.uint8)
        step = self._rows_at_once(numbers.shape[1])
        for into, part in zip(encoded.split(step), numbers.split(step), strict=True):
            self._encode(part, into)
        return encoded

    def _encode(self, numbers: torch.Tensor, into: torch.Tensor) -> None:
        rows, width = numbers.shape
        blocks = functional.pad(numbers, (0, -width % _BLOCK)).view(rows, -1, _BLOCK)
        scale = (blocks.abs().amax(-1) / self._largest).to(torch.bfloat16)
        into[:, : self._scales(width)] = scale.view(torch.uint8).view(rows, -1)
        # A block of zeros has the scale 0; what is divided by the 1 instead is 0 as well.
        by = scale.float().masked_fill_(scale == 0, 1.0).unsqueeze(-1)
        whole = (blocks / by).round_().clamp_(-self._largest, self._largest)
        codes = whole.view(rows, -1)[:, :width].to(torch.int8)
        if self.bits == 4:
            codes = functional.pad(codes, (0, width % 2)) & 15
            codes = codes[:, ::2] | (codes[:, 1::2] << 4)
        into[:, self._scales(width) :] = codes.view(torch.uint8)

    def decode(self, encoded: torch.Tensor, shape: Shape) -> torch.Tensor:
        width = prod(shape[1:])
        numbers = torch.empty(shape[0], width)
        step = self._rows_at_once(width)
        for part, into in zip(encoded.split(step), numbers.split(step), strict=True):
            self._decode(part, into)
        return numbers.view(shape)

    def _decode(self, encoded: torch.Tensor, into: torch.Tensor) -> None:
        rows, width = into.shape
        scales, codes = encoded.split(
            [self._scales(width), encoded.shape[1] - self._scales(width)], 1
        )
        scale = _packed(scales).view(torch.bfloat16).float()
        codes = _packed(codes).view(torch.int8)
        if self.bits == 4:  # shifted up and down again, so that the fourth bit is the sign
            codes = torch.stack([(codes << 4) >> 4, codes >> 4], dim=-1).view(rows, -1)[:, :width]
        blocks = functional.pad(codes.float(), (0, -width % _BLOCK)).view(rows, -1, _BLOCK)
        into.copy_((blocks * scale.unsqueeze(-1)).view(rows, -1)[:, :width])

    def _rows_at_once(self, width: int) -> int:
        return max(1, _CHUNK_NUMBERS // max(width, 1))


def _packed(part: torch.Tensor) -> torch.Tensor:
    """Byte behind byte in memory of its own, where two can be read as one number."""
    return part.clone(memory_format=torch.contiguous_format)


_CODECS: dict[str, Codec] = {
    "fp32": Fp32(),
    "bf16": Bf16(),
    "int8": Blockwise(8),
    "int4": Blockwise(4),
}


def _of(name: str, shape: Shape) -> Codec:
    """Vectors (norms, biases) are few numbers, and always travel as fp32."""
    return _CODECS[name] if len(shape) > 1 else _CODECS["fp32"]


def form(codec: str, shape: Shape) -> Form:
    """How a tensor of this shape lies on the wire."""
    return _of(codec, shape).form(shape)


def encode(codec: str, tensor: torch.Tensor) -> torch.Tensor:
    """An fp32 tensor as it travels; what is not finite comes out as such when decoded."""
    return _of(codec, tuple(tensor.shape)).encode(tensor)


def decode(codec: str, encoded: torch.Tensor, shape: Shape) -> torch.Tensor:
    """An fp32 tensor of this shape. `encoded` must have its `form`."""
    return _of(codec, shape).decode(encoded, shape)


def through(codec: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it arrives, at the cost of a copy."""
    return decode(codec, encode(codec, tensor), tuple(tensor.shape))
