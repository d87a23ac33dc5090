"""What both layouts of entropy-coded matrices share: numbers of few bits, frequencies, and words for what is wrong."""

from collections.abc import Mapping
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from moetools.errors import CheckpointError
from moetools.grids.entropy import OCTAVE, scale_factors

SUFFIX = "_entropy"
HINT = "download or write this checkpoint again"


class ImpossibleError(Exception):
    """What a section says cannot be; turned into a `CheckpointError` that names the tensor."""


def require(condition: bool, otherwise: str) -> None:
    """Raises ImpossibleError unless the condition holds."""
    if not condition:
        raise ImpossibleError(otherwise)


def damaged(name: str, what: str) -> CheckpointError:
    """The error for a matrix whose bytes cannot be decoded."""
    return CheckpointError(f"tensor '{name + SUFFIX}' is damaged: {what}", hint=HINT)


def bad_end(names: list[str]) -> NoReturn:
    """Raises the error for code whose decoder did not end where its encoder began."""
    listed = ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    raise CheckpointError(f"the code of {listed} does not end where it should: it is damaged", hint=HINT)


def blob_of(name: str, tensors: Mapping[str, Tensor], least: int) -> Tensor:
    """The bytes of a matrix, at least so many.

    Raises:
        CheckpointError: they are missing, too few, or not bytes.
    """
    key = name + SUFFIX
    if key not in tensors:
        raise CheckpointError(f"tensor '{key}' is missing", hint=HINT)
    blob = tensors[key]
    if blob.dtype != torch.uint8 or blob.dim() != 1 or len(blob) < least:
        raise CheckpointError(f"tensor '{key}' is too short or no string of bytes", hint=HINT)
    return blob


def both_signs(half_KA: Tensor, total: int) -> Tensor:
    """Frequencies of the codes -highest ... highest from those of 1 ... highest; code 0 has the rest of `total`."""
    zero_K1 = total - 2 * half_KA.sum(1, keepdim=True)
    return torch.cat([half_KA.flip(1), zero_K1, half_KA], 1)


def exponents(scale_OI: Tensor) -> tuple[Tensor, float]:
    """k [I] and step so that the steps are exactly step * 2^(k / 4)."""
    if not scale_OI.numel():
        return torch.zeros(scale_OI.shape[1], dtype=torch.int64), 1.0
    step_I = scale_OI[0]
    exponent_I = ((step_I / step_I[0]).log2() * OCTAVE).round().long()
    made = step_I[0] * scale_factors(exponent_I)
    assert torch.equal(made, step_I), "steps that EntropyGrid.fit did not make"
    return exponent_I, float(step_I[0])


def table_bits(tables: int) -> int:
    """Bits of the number of one of so many tables."""
    return max(0, tables - 1).bit_length()


def pack_offsets(value: Tensor) -> tuple[int, int, bytes]:
    """Least value, bits of the largest difference to it, and the differences, packed."""
    if not len(value):
        return 0, 0, b""
    least = int(value.min())
    width = int(value.max() - least).bit_length()
    return least, width, pack_bits(value - least, width)


def pack_bits(value: Tensor, width: int) -> bytes:
    """Numbers of `width` bits each, least significant bit first."""
    bits = (value.cpu()[:, None] >> torch.arange(width)) & 1
    return np.packbits(bits.numpy().astype(np.uint8), bitorder="little").tobytes()


def leb128(value: int) -> bytes:
    """Seven bits a byte, least significant first; the high bit says that more follow."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + leb128(value >> 7)


class Sections:
    """Reads the sections of a matrix one after the other."""

    def __init__(self, data: bytes, start: int) -> None:
        self.data, self.place = data, start

    @property
    def left(self) -> int:
        """Bytes that were not read yet."""
        return len(self.data) - self.place

    def packed(self, count: int, width: int) -> Tensor:
        """Inverse of `pack_bits`, int64."""
        size = (count * width + 7) // 8
        flat = np.unpackbits(self.numbers(size, "u1").numpy(), bitorder="little")[: count * width]
        return (torch.from_numpy(flat.reshape(count, width)).long() << torch.arange(width)).sum(1)

    def leb128(self, count: int, most: int) -> Tensor:
        """Inverse of `leb128`, int64, for numbers of up to `most`."""
        values = []
        for _ in range(count):
            value = shift = 0
            byte = 128
            while byte & 128:
                require(self.left > 0 and shift < 28, "its tables are cut off")
                byte = self.data[self.place]
                value |= (byte & 127) << shift
                shift, self.place = shift + 7, self.place + 1
            require(value <= most, "a frequency is too large")
            values.append(value)
        return torch.tensor(values, dtype=torch.int64)

    def numbers(self, count: int, dtype: str) -> Tensor:
        """`count` numbers of a numpy dtype, as int64 unless they are bytes."""
        return torch.from_numpy(self.array(count, dtype).astype(np.uint8 if dtype == "u1" else np.int64))

    def array(self, count: int, dtype: str) -> np.ndarray:
        """The same as they are, without a copy."""
        require(count * np.dtype(dtype).itemsize <= self.left, "it is cut off")
        found = np.frombuffer(self.data, dtype, count, self.place)
        self.place += found.nbytes
        return found

    def align(self, size: int) -> None:
        """Pass over the zeros before the next multiple of `size` bytes."""
        more = -self.place % size
        require(not any(self.array(more, "u1")), "there are bytes between its sections")
