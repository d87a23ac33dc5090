"""The modules of a folder for MLX: their names, the tensors they are made of, codes packed as MLX has them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from moetools.architectures.base import find_architecture
from moetools.architectures.engines import ENGINES
from moetools.architectures.mlx_family import MlxFamily
from moetools.architectures.pieces import Change, Piece, Rows, part_of_rows
from moetools.checkpoint.reader import Checkpoint
from moetools.errors import UnsupportedModelError, UserError
from moetools.formats.reader import PackedCheckpoint
from moetools.grids.base import Grid, Quantized
from moetools.grids.integer import Integer
from moetools.plugins import load_plugin, plugin_names

HEAD = "lm_head.weight"
GROUPS = (128, 64, 32)
"""Columns that may share a scale."""
MXFP4_GROUP, E8M0_BIAS = 32, 127
_BITS = (2, 3, 4, 5, 6, 8)
_FAMILIES = "moetools.architectures.families"
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(w[123]|(?:gate|up|down)_proj)\.weight$")
_ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_REWRITTEN = re.compile(r"\.kv_b_proj\.weight$")
"""Written plain: mlx-lm takes it apart, and would round packed ones anew."""
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of the folder, or the tensors of a packed one.

    Attributes:
        module: its name in mlx-lm, without `.weight`.
        parts: the tensors it is made of.
        kind: `quantization` of the module; None where it is written as it is.
        stacked: whether there is one part per expert.
        rows, transposed: see `Piece`.
        change: what becomes of its values.
    """

    module: str
    parts: tuple[str, ...]
    kind: dict[str, Any] | None
    stacked: bool = False
    rows: Rows = "all"
    transposed: bool = False
    change: Change | None = None

    @property
    def plain_name(self) -> str:
        """Name of the tensor where it is not packed: vectors and tensors of other names keep theirs."""
        weight = self.stacked or self.transposed or self.rows != "all" or self.parts[0].endswith(".weight")
        return f"{self.module}.weight" if weight and not self.module.endswith(".bias") else self.module


def mlx_family(config: Mapping[str, Any]) -> MlxFamily:
    """How mlx-lm has the family.

    Raises:
        UnsupportedModelError: it is not written.
    """
    arch = find_architecture(config)
    if arch.mlx is None:
        names = [name.replace("-", "_") for name in plugin_names(_FAMILIES)]
        written = [name for name in names if load_plugin(_FAMILIES, name, kind="model family").ARCHITECTURE.mlx]
        written += [name for name, engines in ENGINES.items() if "mlx" in engines]
        raise UnsupportedModelError(
            f"MLX: model_type '{arch.model_type}' is not written", hint=f"written: {', '.join(written)}"
        )
    return arch.mlx


def make_entries(source: Checkpoint, grids: Mapping[str, Grid]) -> list[list[Entry]]:
    """Everything that the folder holds, by layer; the last list holds what lies outside all layers.

    Raises:
        UserError: experts whose grids do not go together.
    """
    arch, config, family = find_architecture(source.config), source.config, mlx_family(source.config)
    count = arch.text(config)["num_hidden_layers"]
    found: list[list[Entry]] = [[] for _ in range(count + 1)]
    experts: dict[tuple[int, str], dict[int, str]] = {}
    for name in source.tensors:
        if arch.is_extra(name, config) or arch.predicts_more(name, config) or name.endswith("rotary_emb.inv_freq"):
            continue
        if family.dropped and re.fullmatch(family.dropped, name):
            continue
        layer = _LAYER.match(name)
        place = int(layer[1]) if layer else count
        if expert := _EXPERT.match(name):
            module = f"{expert[1]}.{family.experts}.{_ROLES.get(expert[3], expert[3])}"
            experts.setdefault((place, module), {})[int(expert[2])] = name
        elif pieces := [(piece, match[1]) for piece in family.pieces if (match := re.fullmatch(piece.tensor, name))]:
            found[place] += [_piece(source, name, piece, number, grids) for piece, number in pieces]
        else:
            change = next((change for pattern, change in family.changed if re.fullmatch(pattern, name)), None)
            kind = _kind(source, [name], grids)
            found[place].append(Entry(module=name.removesuffix(".weight"), parts=(name,), kind=kind, change=change))
            if family.own_head and HEAD not in source.tensors and name.endswith("embed_tokens.weight"):
                found[place].append(replace(found[place][-1], module="lm_head"))
    for (place, module), parts in experts.items():
        names = tuple(parts[number] for number in sorted(parts))
        found[place].append(Entry(module=module, parts=names, kind=_kind(source, names, grids), stacked=True))
    return found


def _piece(source: Checkpoint, name: str, piece: Piece, layer: str, grids: Mapping[str, Grid]) -> Entry:
    return Entry(
        module=piece.name.format(layer=layer).removesuffix(".weight"),
        parts=(name,),
        kind=_kind(source, [name], grids, transposed=piece.transposed),
        rows=piece.rows,
        transposed=piece.transposed,
    )


def columns_of(source: Checkpoint, name: str) -> int:
    """Input columns of a matrix on disk, which some families store transposed."""
    pieces = mlx_family(source.config).pieces
    turned = any(piece.transposed and re.fullmatch(piece.tensor, name) for piece in pieces)
    return source.tensors[name].shape[-2 if turned else -1]


def _kind(
    source: Checkpoint, names: Sequence[str], grids: Mapping[str, Grid], *, transposed: bool = False
) -> dict[str, Any] | None:
    """`quantization` of a module: the widest codes and the smallest groups of its parts; None for plain ones."""
    chosen = [grids.get(name) for name in names]
    if None in chosen or _REWRITTEN.search(names[0]):
        # A plain expert beside packed ones makes all of them plain.
        return None
    kinds = {grid.kind for grid in chosen if grid is not None}
    if kinds == {"mxfp4"}:
        return {"group_size": MXFP4_GROUP, "bits": 4, "mode": "mxfp4"}
    if "mxfp4" in kinds:
        raise UserError(f"MLX: integers and mxfp4 among the experts of '{names[0]}'", hint="one scheme for all experts")
    columns = source.tensors[names[0]].shape[-2 if transposed else -1]
    integers = [grid for grid in chosen if isinstance(grid, Integer)]
    bits = max(min(one for one in _BITS if one >= grid.bits) for grid in integers)
    return {"group_size": min(group_of(grid, columns) for grid in integers), "bits": bits, "mode": "affine"}


def group_of(grid: Integer, columns: int) -> int:
    """Columns that share a scale in MLX; 0 where it has no such groups."""
    size = grid.group_size or columns
    return next((group for group in GROUPS if size % group == 0 and columns % group == 0), 0)


def tensors_of(source: Checkpoint, entry: Entry) -> dict[str, Tensor]:
    """What is written for an entry, by name."""
    if entry.kind is None:
        return {entry.plain_name: plain_values(source, entry)}
    matrices = [_matrix(source, one, name, entry.kind) for name, one in quantized_parts(source, entry)]
    several = len(matrices) > 1 or entry.stacked
    keys = matrices[0]
    return {
        f"{entry.module}.{key}": torch.stack([one[key] for one in matrices]) if several else matrices[0][key]
        for key in keys
    }


def plain_values(source: Checkpoint, entry: Entry) -> Tensor:
    """The values of an entry that is not packed."""
    values = [_arranged(entry, source.read([name])[name]) for name in entry.parts]
    return torch.stack(values) if entry.stacked else values[0]


def _arranged(entry: Entry, value: Tensor) -> Tensor:
    value = value.mT if entry.transposed else value
    if entry.rows != "all":
        # Biases of all experts are [E, rows], matrices [E, rows, columns].
        axis = -1 if entry.module.endswith(".bias") else -2
        value = value.index_select(axis, part_of_rows(entry.rows, value.shape[axis]))
    if entry.change is not None:
        value = entry.change(value).to(value.dtype)
    return value.contiguous()


def quantized_parts(source: Checkpoint, entry: Entry) -> list[tuple[str, Quantized]]:
    """The matrices of a packed entry, one by one, with the tensors on disk that they are of."""
    assert isinstance(source, PackedCheckpoint)
    found = []
    for name in entry.parts:
        quantized = source.quantized(name)
        quantized = quantized.rows(part_of_rows(entry.rows, quantized.codes_BOI.shape[1]))
        found += [(name, quantized.matrix(index)) for index in range(len(quantized.codes_BOI))]
    return found


def _matrix(source: Checkpoint, quantized: Quantized, name: str, kind: Mapping[str, Any]) -> dict[str, Tensor]:
    codes_OI, scale_OG = quantized.codes_BOI[0], quantized.params.scale_BOG[0]
    if kind["mode"] == "mxfp4":
        exponent_OG = torch.frexp(scale_OG).exponent - 1 + E8M0_BIAS
        return {"weight": words_of(codes_OI, 4), "scales": exponent_OG.to(torch.uint8)}
    half = 1 << (kind["bits"] - 1)
    repeats = (quantized.grid.group_size or codes_OI.shape[1]) // kind["group_size"]
    scale_OG = scale_OG.repeat_interleave(repeats, dim=1).to(_scale_dtype(source, name))
    raised_OI = (codes_OI.short() + half).to(torch.uint8)
    return {"weight": words_of(raised_OI, kind["bits"]), "scales": scale_OG, "biases": -half * scale_OG}


def _scale_dtype(source: Checkpoint, name: str) -> torch.dtype:
    assert isinstance(source, PackedCheckpoint)
    grid = source.packed[name].grid
    assert isinstance(grid, Integer)
    return getattr(torch, grid.scale_dtype)


def words_of(codes_OI: UInt8[Tensor, "O I"], bits: int) -> Tensor:
    """Codes packed densely into 32-bit words, lowest bits first: uint32 [O, I * bits / 32]."""
    rows, columns = codes_OI.shape
    spread = np.unpackbits(codes_OI.contiguous().numpy()[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(spread.reshape(rows, columns * bits), axis=1, bitorder="little")
    return torch.from_numpy(packed).view(torch.uint32)


def codes_of(words_OW: Tensor, bits: int) -> UInt8[Tensor, "O I"]:
    """What `words_of` packed."""
    rows = words_OW.shape[0]
    spread = np.unpackbits(words_OW.contiguous().view(torch.uint8).numpy(), axis=1, bitorder="little")
    codes = np.packbits(spread.reshape(rows, -1, bits), axis=-1, bitorder="little")
    return torch.from_numpy(codes[..., 0])
