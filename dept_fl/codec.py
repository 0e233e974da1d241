"""What tensors travel as: fp32, or fewer bits a number with a scale for each block.

The paper sends fp32. A silo that sends fewer bits keeps what rounding lost and adds it to its next
delta (error feedback: Seide et al. 2014; Karimireddy et al. 2019). Only what the last round loses
never arrives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

Shape = tuple[int, ...]

_BLOCK = 64  # numbers that share a scale
_SCALE_BYTES = 2  # bf16
ALIGNED = 8  # bytes: where numbers of any dtype may begin, so each of several tensors in one piece
_CHUNK_NUMBERS = 1 << 18  # of a tensor at a time, so that the steps in between stay in the cache


@dataclass(frozen=True)
class Form:
    """How a tensor lies on the wire: the array's dtype and shape."""

    dtype: torch.dtype
    shape: Shape

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Codec(Protocol):
    """Encodes a tensor of two axes or more, whose axes but the first are taken as one.

    Each row is encoded by itself: some rows of what is encoded are the encoded form of those rows.
    """

    def form(self, shape: Shape) -> Form: ...

    def encode(self, tensor: torch.Tensor, arrived: torch.Tensor | None) -> torch.Tensor:
        """Into `arrived` goes, where it is given, what `decode` makes of it."""
        ...

    def decode(self, encoded: torch.Tensor, shape: Shape) -> torch.Tensor:
        """fp32; numbers that no silo would send come out as NaN or infinity, never as an error."""
        ...


class Fp32:
    """As it is, without a copy."""

    def form(self, shape: Shape) -> Form:
        return Form(torch.float32, shape)

    def encode(self, tensor: torch.Tensor, arrived: torch.Tensor | None) -> torch.Tensor:
        if arrived is not None:
            arrived.copy_(tensor)
        return tensor

    def decode(self, encoded: torch.Tensor, shape: Shape) -> torch.Tensor:
        return encoded


class Bf16:
    """The upper half of fp32, rounded; as int16, since numpy has no bf16."""

    def form(self, shape: Shape) -> Form:
        return Form(torch.int16, shape)

    def encode(self, tensor: torch.Tensor, arrived: torch.Tensor | None) -> torch.Tensor:
        rounded = tensor.to(torch.bfloat16)
        if arrived is not None:
            arrived.copy_(rounded)
        return rounded.view(torch.int16)

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

    def encode(self, tensor: torch.Tensor, arrived: torch.Tensor | None) -> torch.Tensor:
        numbers = tensor.reshape(len(tensor), -1)
        encoded = torch.empty(self.form(tuple(tensor.shape)).shape, dtype=torch.uint8)
        step = self._rows_at_once(numbers.shape[1])
        decoded = None if arrived is None else arrived.view(numbers.shape)
        for start in range(0, len(numbers), step):
            rows = slice(start, start + step)
            back = None if decoded is None else decoded[rows]
            self._encode(numbers[rows], encoded[rows], back)
        return encoded

    def _encode(
        self, numbers: torch.Tensor, into: torch.Tensor, arrived: torch.Tensor | None
    ) -> None:
        rows, width = numbers.shape
        scale, whole = self._rounded(numbers)
        into[:, : self._scales(width)] = scale.view(torch.uint8).view(rows, -1)
        codes = whole.view(rows, -1)[:, :width].to(torch.int8)
        if self.bits == 4:
            codes = functional.pad(codes, (0, width % 2)) & 15
            codes = codes[:, ::2] | (codes[:, 1::2] << 4)
        into[:, self._scales(width) :] = codes.view(torch.uint8)
        if arrived is not None:
            whole.add_(0.0)  # there is no code of -0
            arrived.copy_(whole.mul_(scale.float().unsqueeze(-1)).view(rows, -1)[:, :width])

    def _rounded(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks' scales, [rows, blocks], and whole numbers, [rows, blocks, 64]."""
        rows, width = numbers.shape
        blocks = functional.pad(numbers, (0, -width % _BLOCK)).view(rows, -1, _BLOCK)
        scale = (blocks.abs().amax(-1) / self._largest).to(torch.bfloat16)
        # A block of zeros has the scale 0; what is divided by the 1 instead is 0 as well.
        by = scale.float().masked_fill_(scale == 0, 1.0).unsqueeze(-1)
        return scale, (blocks / by).round_().clamp_(-self._largest, self._largest)

    def decode(self, encoded: torch.Tensor, shape: Shape) -> torch.Tensor:
        width = prod(shape[1:])
        numbers = torch.empty(shape[0], width)
        step = self._rows_at_once(width)
        for start in range(0, len(numbers), step):
            rows = slice(start, start + step)
            self._decode(encoded[rows], numbers[rows])
        return numbers.view(shape)

    def _decode(self, encoded: torch.Tensor, into: torch.Tensor) -> None:
        rows, width = into.shape
        missing = -width % _BLOCK  # of the last block
        scales, codes = encoded.split(
            [self._scales(width), encoded.shape[1] - self._scales(width)], 1
        )
        # Byte behind byte in memory of its own, where two can be read as one number.
        scale = scales.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
        scale = scale.float().unsqueeze(-1)
        codes = codes.view(torch.int8)
        numbers = torch.empty(rows, width + missing) if missing else into
        if self.bits == 8:
            blocks = functional.pad(codes, (0, missing)) if missing else codes
            torch.mul(blocks.unflatten(1, (-1, _BLOCK)), scale, out=_blocks(numbers, _BLOCK))
        else:
            pairs = functional.pad(codes, (0, missing // 2)) if missing else codes
            # Shifted up and down again, so that the fourth bit is the sign.
            for half, nibbles in enumerate(((pairs << 4) >> 4, pairs >> 4)):
                blocks = nibbles.unflatten(1, (-1, _BLOCK // 2))
                torch.mul(blocks, scale, out=_blocks(numbers, _BLOCK // 2, 2)[..., half])
        if missing:
            into.copy_(numbers[:, :width])

    def _rows_at_once(self, width: int) -> int:
        return max(1, _CHUNK_NUMBERS // max(width, 1))


def _blocks(numbers: torch.Tensor, *sizes: int) -> torch.Tensor:
    return numbers.view(len(numbers), -1, *sizes)


_CODECS: dict[str, Codec] = {
    "fp32": Fp32(),
    "bf16": Bf16(),
    "int8": Blockwise(8),
    "int4": Blockwise(4),
}


def _of(name: str, shape: Shape) -> Codec:
    """Vectors (norms, biases) are few numbers, and always travel as fp32."""
    return _CODECS[name] if len(shape) > 1 else _CODECS["fp32"]


def is_exact(codec: str, shape: Shape) -> bool:
    """Whether a tensor of this shape travels as it is: `encode` gives the same memory back."""
    return _of(codec, shape) is _CODECS["fp32"]


def form(codec: str, shape: Shape) -> Form:
    """How a tensor of this shape lies on the wire."""
    return _of(codec, shape).form(shape)


def encode(codec: str, tensor: torch.Tensor, arrived: torch.Tensor | None = None) -> torch.Tensor:
    """An fp32 tensor as it travels; what is not finite comes out as such when decoded.

    Args:
        arrived: of the same shape, contiguous; takes what `decode` makes of it.
    """
    return _of(codec, tuple(tensor.shape)).encode(tensor, arrived)


def decode(codec: str, encoded: torch.Tensor, shape: Shape) -> torch.Tensor:
    """An fp32 tensor of this shape. `encoded` must have its `form`."""
    return _of(codec, shape).decode(encoded, shape)


def rows_and_width(shape: Shape) -> tuple[int, int]:
    """Of a tensor as a matrix: its first axis, and all others as one."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


@dataclass(frozen=True, eq=False)
class Encoded(Mapping[str, torch.Tensor]):
    """fp32 tensors by name that lie in memory as they travel, and are decoded when asked for.

    Attributes:
        tensors: encoded.
        shapes: of what they decode to.
    """

    codec: str
    tensors: Mapping[str, torch.Tensor]
    shapes: Mapping[str, Shape]

    def __getitem__(self, name: str) -> torch.Tensor:
        return decode(self.codec, self.tensors[name], self.shapes[name])

    def __contains__(self, name: object) -> bool:
        return name in self.tensors  # without decoding it

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def rows(self, name: str, first: int, behind: int) -> torch.Tensor:
        """[behind - first, width]: some rows of a tensor as a matrix."""
        shape, encoded = self.shapes[name], self.tensors[name]
        if len(shape) < 2:  # fp32
            return encoded.reshape(-1, 1)[first:behind]
        count = behind - first
        rows = decode(self.codec, encoded[first:behind], (count, *shape[1:]))
        return rows.reshape(count, prod(shape[1:]))

    def only(self, names: Iterable[str]) -> Encoded:
        chosen = {name: self.tensors[name] for name in names}
        return Encoded(self.codec, chosen, {name: self.shapes[name] for name in chosen})

    def packed(self) -> Iterator[memoryview | bytes]:
        """The bytes of all, in the order of their names; see `packed_bytes`."""
        for name in sorted(self):
            numbers = self.tensors[name].contiguous().numpy().reshape(-1).view(np.uint8)
            yield numbers.data
            yield bytes(_filled(len(numbers)) - len(numbers))

    @classmethod
    def unpacked(cls, codec: str, packed: torch.Tensor, shapes: Mapping[str, Shape]) -> Encoded:
        """Views of what `packed` gave, [packed_bytes] uint8."""
        tensors, start = {}, 0
        for name in sorted(shapes):
            lies = form(codec, shapes[name])
            own = packed[start : start + lies.bytes]
            tensors[name] = own.view(lies.dtype).view(lies.shape)
            start += _filled(lies.bytes)
        return cls(codec, tensors, shapes)


def packed_bytes(codec: str, shapes: Mapping[str, Shape]) -> int:
    """Of encoded tensors one behind the other, each of which begins at a multiple of 8."""
    return sum(_filled(form(codec, shape).bytes) for shape in shapes.values())


def _filled(size: int) -> int:
    return size + -size % ALIGNED


def encoded(tensors: Mapping[str, torch.Tensor]) -> Encoded:
    """Tensors as `Encoded`, as fp32 where they are not yet."""
    if isinstance(tensors, Encoded):
        return tensors
    return Encoded("fp32", tensors, {name: tuple(t.shape) for name, t in tensors.items()})
