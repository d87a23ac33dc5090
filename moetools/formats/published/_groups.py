"""Integers with a scale and a zero point for every group of inputs, as GPTQ and AWQ checkpoints share it.

Letters: I inputs, O outputs, G groups of inputs, R rows, W words of 32 bits, N numbers in a word.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moetools.checkpoint.headers import TensorInfo
from moetools.checkpoint.reader import Checkpoint
from moetools.errors import CheckpointError
from moetools.formats.base import Packed, UnknownPackingError
from moetools.formats.parts import FLOATS, matrix, model_dtype, suffixed_parts

WORD = 32
_PARTS = {"zeros": ".qzeros", "scales": ".scales"}


@dataclass(frozen=True, kw_only=True)
class Grouped(Packed):
    """A tensor of integers.

    Attributes:
        bits: of a code and of a zero point; they divide a word.
        group_size: neighbouring inputs that share scale and zero point where no `g_idx` says otherwise.
        zero_offset: what is added to a stored zero point.
    """

    bits: int
    group_size: int
    zero_offset: int = 0


def find_groups(
    checkpoint: Checkpoint, legal_bits: tuple[int, ...], *, along_inputs: bool, zero_offset: int = 0
) -> list[Packed]:
    """Every tensor that has `qweight`, `qzeros` and `scales`.

    Args:
        along_inputs: words of `qweight` hold neighbouring inputs, [I bits / 32, O] (GPTQ), not outputs (AWQ).

    Raises:
        UnknownPackingError: another width, or no group size.
        CheckpointError: naming the tensor whose parts do not fit together.
    """
    bits, size = _quantization(checkpoint.config["quantization_config"], legal_bits)
    found: list[Packed] = []
    for base, parts in suffixed_parts(checkpoint, ".qweight", _PARTS, optional={"g_idx": ".g_idx"}).items():
        words, zeros = matrix(checkpoint, parts["main"], ("I32",)), matrix(checkpoint, parts["zeros"], ("I32",))
        groups, outputs = matrix(checkpoint, parts["scales"], FLOATS).shape
        inputs = words.shape[0] * (WORD // bits if along_inputs else 1)
        group_size = inputs if size == -1 else size
        wide = outputs * bits // WORD
        if (
            outputs * bits % WORD
            or words.shape[1] != (outputs if along_inputs else wide)
            or inputs != groups * group_size
            or zeros.shape != (groups, wide)
            or not _fits(checkpoint.tensors.get(parts.get("g_idx", "")), inputs)
        ):
            shapes = ", ".join(f"{part} {list(checkpoint.tensors[disk].shape)}" for part, disk in parts.items())
            raise CheckpointError(f"'{base}': {shapes} do not fit {bits} bits in groups of {size}")
        found.append(
            Grouped(
                name=f"{base}.weight",
                shape=(outputs, inputs),
                dtype=model_dtype(checkpoint),
                parts=parts,
                grid=None,
                words=f"integer{bits} per {group_size} columns",
                bits=bits,
                group_size=group_size,
                zero_offset=zero_offset,
            )
        )
    return found


def decode_groups(
    packed: Grouped,
    codes_IO: Int[Tensor, "I O"],
    zero_GO: Int[Tensor, "G O"],
    scale_GO: Float[Tensor, "G O"],
    group_I: Int[Tensor, "I"],
) -> Float[Tensor, "O I"]:
    """s (q - z), with the scale and zero point of every input's group; a zero point wraps around as codes do.

    Raises:
        CheckpointError: a group that does not exist.
    """
    if int(group_I.min()) < 0 or int(group_I.max()) >= len(scale_GO):
        message = f"packed tensor '{packed.name}' is corrupt: g_idx is outside of its {len(scale_GO)} groups"
        raise CheckpointError(message)
    zero_GO = (zero_GO + packed.zero_offset) & ((1 << packed.bits) - 1)
    return ((codes_IO - zero_GO[group_I]) * scale_GO[group_I]).T


def numbers(words_RW: Int[Tensor, "R W"], bits: int) -> Int[Tensor, "R W N"]:
    """The numbers of every word, from its lowest bits."""
    shift_N = torch.arange(0, WORD, bits, dtype=torch.int32)
    return (words_RW[..., None] >> shift_N) & ((1 << bits) - 1)


def _quantization(config: Mapping[str, Any], legal_bits: tuple[int, ...]) -> tuple[int, int]:
    """Bits and group size; -1: one group."""
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    if type(bits) is not int or bits not in legal_bits or type(size) is not int or not (size == -1 or size > 0):
        legal = f"{' or '.join(map(str, legal_bits))} bits in whole groups"
        raise UnknownPackingError(f"weights of {bits} bits in groups of {size} are not read here; read are {legal}")
    return bits, size


def _fits(info: TensorInfo | None, inputs: int) -> bool:
    return info is None or (info.dtype in ("I32", "I64") and info.shape == (inputs,))
