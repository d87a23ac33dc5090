"""moetools' own format: every tensor its own grid, as tight as the grid allows, each stream with a checksum.

`quantization_config` is

    {"quant_method": "moetools", "version": 1,
     "groups": [{"grid": {"kind": "integer", ...}, "dtype": "BF16", "shape": [O, I], "tensors": ["...weight", ...]}]}

and tensor `x.weight` of an `integer` grid lies on disk as the bytes `x.weight_integer` (see
`moetools.formats.payloads`); a 3-D tensor as one stream per matrix, `x_integer.0`, `x_integer.1`, ... Streams describe
themselves: `grid` in config.json only informs. Loading needs `import moetools.hf`, or `moetools quantize --expand`.
"""

import json
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moetools.checkpoint.headers import TensorInfo
from moetools.checkpoint.reader import Checkpoint
from moetools.checkpoint.tensor_bytes import TORCH_DTYPES
from moetools.errors import CheckpointError, UserError
from moetools.formats.base import Format, Packed
from moetools.formats.held import Held, hold
from moetools.formats.parts import FLOATS
from moetools.grids.base import Grid, Quantized, make_grid
from moetools.plugins import load_plugin, plugin_names

METHOD = "moetools"
VERSION = 1
PAYLOADS = "moetools.formats.payloads"
_TRANSPOSED = "_transposed"


class Own(Format):
    """Any mix of grids."""

    name: ClassVar[str] = "moetools"
    stock: ClassVar[bool] = False
    preference: ClassVar[int] = 9

    def accepts(self, grid: Grid) -> bool:
        return grid.kind in plugin_names(PAYLOADS)

    def pack(
        self,
        name: str,
        quantized: Quantized,
        dtype: torch.dtype = torch.bfloat16,  # noqa: ARG002
        *,
        transposed: bool = False,
    ) -> dict[str, Tensor]:
        """As `Format.pack`; also a batch of E matrices for a 3-D tensor.

        Args:
            transposed: the original is [E, I, O] (or [I, O]) on disk.
        """
        if not self.accepts(quantized.grid):
            raise ValueError(f"{self.name} cannot store {quantized.grid.describe()}")
        count = quantized.codes_BOI.shape[0]
        base = f"{name}_{quantized.grid.kind}{_TRANSPOSED * transposed}"
        streams = [_only(_payload(quantized.grid.kind).pack(name, quantized.matrix(index))) for index in range(count)]
        return {base: streams[0]} if count == 1 else {f"{base}.{index}": one for index, one in enumerate(streams)}

    def stored_bytes(self, grid: Grid, rows: int, columns: int) -> int:
        return _payload(grid.kind).stored_bytes(grid, rows, columns)

    def dequantize(self, quantized: Quantized, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "B O I"]:
        return quantized.dequantize().to(dtype)

    def config(self, grids: Mapping[str, Grid], source: Checkpoint) -> dict[str, Any]:
        groups: dict[str, dict[str, Any]] = {}
        for name, grid in grids.items():
            info = source.tensors[name]
            group = {"grid": grid.describe(), "dtype": info.dtype, "shape": list(info.shape)}
            groups.setdefault(json.dumps(group, sort_keys=True), group | {"tensors": []})["tensors"].append(name)
        return {"quant_method": METHOD, "version": VERSION, "groups": list(groups.values())}

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == METHOD

    def find(self, checkpoint: Checkpoint) -> list[Packed]:
        config = checkpoint.config["quantization_config"]
        if config.get("version") != VERSION:
            message = f"{checkpoint.path}: moetools' format version {config.get('version')!r}, known is {VERSION}"
            raise CheckpointError(message, hint="upgrade moetools")
        found: dict[str, Packed] = {}
        for group in config.get("groups") or []:
            try:
                grid, dtype, shape, names = _group(group)
            except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
                raise CheckpointError(f"{checkpoint.path}/config.json: malformed group of tensors: {error}") from error
            for name in names:
                if name in found or name in checkpoint.tensors:
                    raise CheckpointError(f"{checkpoint.path}/config.json: '{name}' is packed and stored twice")
                packed = _found(checkpoint, name, grid, dtype, shape)
                if packed is not None:
                    found[name] = packed
        return list(found.values())

    def unpack(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Quantized:
        return self._unpack_many([packed], tensors)[0]

    def read(self, packed: Packed, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.read_many([packed], tensors)[0]

    def better_together(self, packed: Packed) -> bool:
        assert packed.grid is not None
        return hasattr(_payload(packed.grid.kind), "unpack_many")

    def read_many(self, packed: Sequence[Packed], tensors: Mapping[str, Tensor]) -> list[Tensor]:
        found: dict[str, Tensor] = {}
        for (kind, dtype), some in _by_kind_and_dtype(packed).items():
            payload = _payload(kind)
            if hasattr(payload, "dense_many"):
                found |= _read_dense(payload, kind, TORCH_DTYPES[dtype], some, tensors)
            else:
                for one, quantized in zip(some, self._unpack_many(some, tensors), strict=True):
                    found[one.name] = _dense(one, self.dequantize(quantized, TORCH_DTYPES[dtype]))
        return [found[one.name] for one in packed]

    def hold(self, streams: Sequence[tuple[Packed, str]], tensors: Mapping[str, Tensor]) -> Held:
        """Single matrices that stay packed in memory, each by its tensor and the name of its stream on disk.

        Raises:
            CheckpointError: a checksum that is wrong, impossible contents, or another shape than config.json says.
        """
        named: list[tuple[str, str, Tensor]] = []
        for one, disk in streams:
            assert one.grid is not None
            _check_shape(one, _payload(one.grid.kind).shape(one.name, {f"{one.name}_{one.grid.kind}": tensors[disk]}))
            named.append((one.grid.kind, one.name, tensors[disk]))
        return hold(named)

    def _unpack_many(self, packed: Sequence[Packed], tensors: Mapping[str, Tensor]) -> list[Quantized]:
        kinds: dict[str, list[tuple[Packed, str]]] = {}
        for one in packed:
            assert one.grid is not None
            kinds.setdefault(one.grid.kind, []).extend((one, disk) for disk in one.parts.values())
        found: dict[str, list[Quantized]] = {}
        for kind, streams in kinds.items():
            named = [(one.name, {f"{one.name}_{kind}": tensors[disk]}) for one, disk in streams]
            for (one, _), (name, stream) in zip(streams, named, strict=True):
                _check_shape(one, _payload(kind).shape(name, stream))
            for (name, _), matrix in zip(named, _unpack_named(kind, named), strict=True):
                found.setdefault(name, []).append(matrix)
        return [Quantized.stack(found[one.name]) for one in packed]


def _by_kind_and_dtype(packed: Sequence[Packed]) -> dict[tuple[str, str], list[Packed]]:
    groups: dict[tuple[str, str], list[Packed]] = {}
    for one in packed:
        assert one.grid is not None
        groups.setdefault((one.grid.kind, one.dtype), []).append(one)
    return groups


def _read_dense(
    payload: ModuleType, kind: str, dtype: torch.dtype, packed: Sequence[Packed], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Dense tensors of a kind that is decoded without codes and scales in between; all streams together."""
    named = [(one.name, {f"{one.name}_{kind}": tensors[disk]}) for one in packed for disk in one.parts.values()]
    owners = [one for one in packed for _ in one.parts]
    for one, (name, stream) in zip(owners, named, strict=True):
        _check_shape(one, payload.shape(name, stream))
    matrices = iter(payload.dense_many(named, dtype))
    found = {}
    for one in packed:
        some = [next(matrices) for _ in one.parts]
        found[one.name] = _dense(one, some[0][None] if len(some) == 1 else torch.stack(some))
    return found


def _unpack_named(kind: str, named: Sequence[tuple[str, Mapping[str, Tensor]]]) -> list[Quantized]:
    payload = _payload(kind)
    if hasattr(payload, "unpack_many"):
        return payload.unpack_many(named)
    return [payload.unpack(name, streams) for name, streams in named]


def is_transposed(packed: Packed) -> bool:
    """Whether the matrices of a tensor are stored [O, I] and lie transposed in it."""
    return next(iter(packed.parts)).startswith(_TRANSPOSED.lstrip("_"))


def _dense(packed: Packed, value_BOI: Tensor) -> Tensor:
    turned = value_BOI.transpose(1, 2).contiguous() if is_transposed(packed) else value_BOI
    return turned.reshape(packed.shape)


def _group(group: Mapping[str, Any]) -> tuple[Grid, str, tuple[int, ...], list[str]]:
    """Grid, dtype, shape and names of a group of tensors; raises whatever its values lead to, or ValueError."""
    grid, dtype, shape, names = make_grid(group["grid"]), group["dtype"], tuple(group["shape"]), group["tensors"]
    if grid.kind not in plugin_names(PAYLOADS) or dtype not in FLOATS:
        raise ValueError(f"grid {grid.kind}, dtype {dtype}")
    if len(shape) not in (2, 3) or any(type(size) is not int or not 1 <= size < 2**31 for size in shape):
        raise ValueError(f"shape {list(shape)}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("tensors is no list of names")
    return grid, dtype, shape, names


def _check_shape(packed: Packed, stored: tuple[int, int]) -> None:
    """Compare before anything is decoded: what a stream says of its size is as long as its author likes."""
    shape = stored[::-1] if is_transposed(packed) else stored
    if shape != packed.shape[-2:]:
        raise CheckpointError(f"'{packed.name}' is {list(packed.shape)} in config.json and {list(shape)} on disk")


def _payload(kind: str) -> ModuleType:
    return load_plugin(PAYLOADS, kind, kind="packed kind of grid")


def _only(stream: Mapping[str, Tensor]) -> Tensor:
    (tensor,) = stream.values()
    return tensor


def _found(checkpoint: Checkpoint, name: str, grid: Grid, dtype: str, shape: tuple[int, ...]) -> Packed | None:
    count = shape[0] if len(shape) == 3 else 1
    if count > len(checkpoint.tensors) and not checkpoint.partial:
        raise CheckpointError(f"'{name}' is {list(shape)} in config.json, but there are not that many streams")
    for turned in ("", _TRANSPOSED):
        base = f"{name}_{grid.kind}{turned}"
        names = [base] if count == 1 else [f"{base}.{index}" for index in range(count)]
        if all(disk in checkpoint.tensors for disk in names):
            for disk in names:
                _check_stream(checkpoint.tensors[disk])
            label = turned.lstrip("_") or "plain"
            parts = {f"{label}.{index}": disk for index, disk in enumerate(names)}
            return Packed(name=name, shape=shape, dtype=dtype, parts=parts, grid=grid)
    if checkpoint.partial:
        return None
    raise CheckpointError(
        f"{checkpoint.path}: config.json says that '{name}' is packed, but '{name}_{grid.kind}' is missing",
        hint="the checkpoint is incomplete; download it again",
    )


def _check_stream(info: TensorInfo) -> None:
    if info.dtype != "U8" or len(info.shape) != 1:
        raise CheckpointError(f"'{info.name}' is {info.dtype} {list(info.shape)}, not a stream of bytes")


FORMAT = Own()
