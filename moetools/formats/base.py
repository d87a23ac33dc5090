"""What every quantized layout gives: reading, and for those written here packing and the entry in config.json.

A format packs one tensor `model.layers.0.mlp.experts.3.up_proj.weight` into several, whose names begin with that name
(`..._packed`, `..._scale`), and says in `quantization_config` how to read them. Shape letters as in
`moetools.grids.base`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.errors import CheckpointError
from moetools.grids.base import Grid, Quantized
from moetools.plugins import load_plugin, plugin_names

LAYOUTS = "moetools.formats.layouts"
PUBLISHED = "moetools.formats.published"
"""Layouts that others write and that are only read here."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One quantized tensor as it lies on disk.

    Attributes:
        name: the dense tensor's name, which is also the original checkpoint's.
        shape: the dense tensor's, [O, I] or [B, O, I].
        dtype: the dtype (safetensors name) a stock loader gives the dense tensor.
        parts: name on disk by what it holds ("packed", "scale", ...), as the layout calls it.
        grid: the values it can take; None where only the payload itself says, or there is no grid for it here.
        words: what it holds, for reports, where `grid` is None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: Mapping[str, str]
    grid: Grid | None
    words: str = "of other kinds"


class UnknownPackingError(CheckpointError):
    """Weights packed in a way that no format here reads."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="start from the unquantized checkpoint")


class Layout(ABC):
    """A way to pack weights that can be read. Subclasses are stateless, one per file.

    Attributes:
        name: the plug-in's name, `pack-quantized`.
        stock: whether stock transformers or vLLM load it; the others need `import moetools.hf`.
        working_bytes: per value of the matrix that is decoded, beside its parts and the dense one; measured.
    """

    name: ClassVar[str]
    stock: ClassVar[bool] = True
    working_bytes: ClassVar[int] = 20

    @abstractmethod
    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a `quantization_config` describes this layout."""

    def fits(self, names: Collection[str]) -> bool:  # noqa: ARG002 - for layouts that share a `quantization_config`
        """Whether tensors of these names are of this layout, rather than of another that matches as well."""
        return False

    @abstractmethod
    def find(self, checkpoint: Checkpoint) -> list[Packed]:
        """Every packed tensor of a checkpoint, from config.json and headers (and a few bytes where they do not tell).

        Raises:
            UnknownPackingError: a variant of the layout that is not read here.
            CheckpointError: parts that are missing or do not fit together.
        """

    @abstractmethod
    def read(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Tensor:
        """The dense tensor of `packed.shape` and `packed.dtype` from the parts' tensors (by name on disk).

        Raises:
            CheckpointError: corrupt or impossible contents, naming the tensor.
        """

    def stock_problem(self, packed: Packed) -> str:  # noqa: ARG002 - for layouts of which stock loads a part
        """Why stock transformers loads this tensor wrong on a CPU; empty where it does not."""
        return ""

    def better_together(self, packed: Packed) -> bool:  # noqa: ARG002 - for layouts that override it
        """Whether decoding this tensor with others of its kind (`read_many`) is much faster than alone."""
        return False

    def read_many(self, packed: Sequence[Packed], tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """`read` of several."""
        return [self.read(one, tensors) for one in packed]


class Format(Layout):
    """A layout that is written too.

    Attributes:
        preference: among those that store a grid the lowest is the default.
    """

    preference: ClassVar[int] = 0

    @abstractmethod
    def accepts(self, grid: Grid) -> bool:
        """Whether tensors of this grid can be stored."""

    @abstractmethod
    def pack(self, name: str, quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """The tensors to write instead of tensor `name`, on the CPU.

        Args:
            quantized: one matrix, as a batch of one.
            dtype: the original tensor's on disk.

        Raises:
            ValueError: a grid that the layout does not accept.
            UserError: a shape that it cannot store.
        """

    def stored_bytes(self, grid: Grid, rows: int, columns: int) -> int:
        """Bytes of what `pack` makes of a matrix; an estimate where they depend on the codes (entropy coding)."""
        return math.ceil(grid.storage_bits(rows, columns) / 8)

    @abstractmethod
    def dequantize(self, quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "B O I"]:
        """The weights that a stock loader makes of what `pack` wrote, rounded as it rounds."""

    @abstractmethod
    def config(self, grids: Mapping[str, Grid], source: Checkpoint) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Args:
            grids: grid of every quantized tensor, by its name.
            source: the original checkpoint; what is not in `grids` stays as it is there.
        """

    @abstractmethod
    def unpack(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Quantized:
        """Codes and scales from the parts' tensors (by name on disk).

        Raises:
            CheckpointError: corrupt or impossible contents, naming the tensor.
        """

    def read(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Tensor:
        dense = self.dequantize(self.unpack(packed, tensors), TORCH_DTYPES[packed.dtype])
        return dense.to(TORCH_DTYPES[packed.dtype]).reshape(packed.shape)


def load_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UserError: no such format; the hint names the closest one.
    """
    return load_plugin(LAYOUTS, name, kind="format").FORMAT


def formats() -> list[Format]:
    """All formats, by name."""
    return [load_format(name) for name in plugin_names(LAYOUTS)]


def default_format(grid: Grid) -> Format:
    """The format that most loaders read among those that store `grid`; moetools' own where no stock one does."""
    return min((one for one in formats() if one.accepts(grid)), key=lambda one: (one.preference, one.name))


_REFUSED = {
    "bitsandbytes": "bitsandbytes makes such codes while it loads a checkpoint, for kernels of its own; that one holds "
    "more, and is what engines load",
}
"""Why a `quant_method` is not read, where that is known."""


def find_layout(config: Mapping[str, Any], names: Collection[str] = ()) -> Layout:
    """The layout that a `quantization_config` describes.

    Args:
        names: of the tensors, where they are known: they tell layouts apart that have the same config.

    Raises:
        UnknownPackingError: none of ours.
    """
    published = [load_plugin(PUBLISHED, name, kind="layout").LAYOUT for name in plugin_names(PUBLISHED)]
    found: list[Layout] = [one for one in [*formats(), *published] if one.matches(config)]
    if not found:
        method, layout = config.get("quant_method"), config.get("format")
        what = f"quant_method '{method}'" if method else "no quant_method"
        what += f", format '{layout}'" if layout else ""
        read = ", ".join([*plugin_names(LAYOUTS), *plugin_names(PUBLISHED)])
        reason = _REFUSED.get(str(method), f"read are {read}")
        message = f"the weights are packed as {what}, which is not read here; {reason}"
        raise UnknownPackingError(message)
    return next((one for one in found if one.fits(names)), found[0])


def only_matrix(quantized: Quantized) -> Quantized:
    """`quantized` on the CPU; raises ValueError unless it is one matrix."""
    if quantized.codes_BOI.shape[0] != 1:
        raise ValueError(f"one matrix at a time, got a batch of {quantized.codes_BOI.shape[0]}")
    return quantized
