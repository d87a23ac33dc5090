"""Matrices on an entropy grid as one byte string each: below one bit per weight.

Two layouts are read: chunks that are decoded in parallel (`chunks`), which is written, and the older lanes (`lanes`).
The first three bytes tell which one it is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moetools.errors import CheckpointError
from moetools.formats.entropy import chunks, lanes
from moetools.formats.entropy.bank import Bank
from moetools.formats.entropy.chunks import pack
from moetools.formats.entropy.streams import HINT, SUFFIX, blob_of
from moetools.grids.base import Params, Quantized

__all__ = ["SUFFIX", "Bank", "can_hold", "dense_many", "hold", "pack", "shape", "unpack", "unpack_many"]

_Named = tuple[str, Mapping[str, Tensor]]


def unpack(name: str, tensors: Mapping[str, Tensor]) -> Quantized:
    """The matrix again, as a batch of one: codes and steps exactly as packed, on the device of the bytes.

    Raises:
        CheckpointError: bytes are missing, damaged or not of this format; the message names the tensor.
    """
    return unpack_many([(name, tensors)])[0]


def unpack_many(named: Sequence[_Named]) -> list[Quantized]:
    """`unpack` of several matrices, which are decoded together: much faster than one by one.

    Raises:
        CheckpointError: as `unpack`.
    """
    return _by_layout(named, _unpack_chunks, lanes.unpack_many)


def dense_many(named: Sequence[_Named], dtype: torch.dtype) -> list[Tensor]:
    """The weights of several matrices, [O, I] each: code times step in fp32, rounded to `dtype`.

    Raises:
        CheckpointError: as `unpack`.
    """

    def of_chunks(some: Sequence[_Named]) -> list[Tensor]:
        return hold(some).dense([[number] for number in range(len(some))], dtype)

    def of_lanes(some: Sequence[_Named]) -> list[Tensor]:
        return [one.dequantize()[0].to(dtype) for one in lanes.unpack_many(some)]

    return _by_layout(named, of_chunks, of_lanes)


def hold(named: Sequence[_Named]) -> Bank:
    """Matrices of the chunked layout as they stay in memory, on the device of their bytes; checksums are checked here.

    Raises:
        CheckpointError: as `unpack`, but the code itself is not looked at.
    """
    bank = Bank.join([chunks.parse(name, tensors) for name, tensors in named])
    name, tensors = named[0]
    device = tensors[name + SUFFIX].device
    return bank.on({key: tensor.to(device) for key, tensor in bank.tensors.items()})


def can_hold(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a matrix is of the layout that `hold` takes."""
    return _magic(name, tensors) == chunks.MAGIC


def shape(name: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of a packed matrix, from its header alone; the checksum is not looked at.

    Raises:
        CheckpointError: bytes that are not of this format.
    """
    layout: Any = chunks if _magic(name, tensors) == chunks.MAGIC else lanes
    return layout.shape(name, tensors)


def _unpack_chunks(named: Sequence[_Named]) -> list[Quantized]:
    bank = hold(named)
    found = []
    for number, codes_OI in enumerate(bank.codes(range(len(named)))):
        params = Params(scale_BOG=bank.step_I(number).expand(1, *codes_OI.shape))
        found.append(Quantized(grid=bank.grids[number], codes_BOI=codes_OI[None], params=params))
    return found


def _by_layout(named: Sequence[_Named], of_chunks: Callable[..., list], of_lanes: Callable[..., list]) -> list[Any]:
    """One function for the matrices of each layout; the results in the order of the matrices."""
    found: dict[int, Any] = {}
    magics = [_magic(name, tensors) for name, tensors in named]
    for magic, function in ((chunks.MAGIC, of_chunks), (lanes.MAGIC, of_lanes)):
        some = [number for number, one in enumerate(magics) if one == magic]
        if some:
            found |= dict(zip(some, function([named[number] for number in some]), strict=True))
    return [found[number] for number in range(len(named))]


def _magic(name: str, tensors: Mapping[str, Tensor]) -> bytes:
    """The first three bytes, one of those of the two layouts."""
    magic = bytes(blob_of(name, tensors, 36)[:3].tolist())
    if magic not in (chunks.MAGIC, lanes.MAGIC):
        raise CheckpointError(f"tensor '{name + SUFFIX}' is no entropy-coded matrix of a known version", hint=HINT)
    return magic
