"""Which tensors of a checkpoint are parts of one packed tensor."""

import os
import struct
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moetools.checkpoint.headers import TensorInfo
from moetools.checkpoint.reader import Checkpoint
from moetools.errors import CheckpointError

FLOATS = ("BF16", "F16", "F32")
"""Dtypes (safetensors names) that scales have where they decide the dtype of the weights."""
_INCOMPLETE = "the checkpoint is incomplete; download it again"


def part_names(
    checkpoint: Checkpoint, main: str, needed: Sequence[str], *, optional: Sequence[str] = ()
) -> dict[str, dict[str, str]]:
    """Parts of every packed tensor: dense name -> part -> name on disk.

    Part `scale` of `x.weight` is `x.weight_scale`; the main part "" is `x.weight` itself, and a tensor is packed only
    if it has the first of `needed`.

    Raises:
        CheckpointError: a tensor that has its main part but not all of `needed`.
    """
    found: dict[str, dict[str, str]] = {}
    marker = f"_{main or needed[0]}"
    for name in checkpoint.tensors:
        if not name.endswith(f".weight{marker}"):
            continue
        dense = name.removesuffix(marker)
        names = {part: f"{dense}_{part}" if part else dense for part in (main, *needed, *optional)}
        missing = [names[part] for part in (main, *needed) if names[part] not in checkpoint.tensors]
        if missing:
            message = f"{checkpoint.path}: '{name}' has no '{missing[0]}' beside it"
            raise CheckpointError(message, hint=_INCOMPLETE)
        found[dense] = {part: disk for part, disk in names.items() if disk in checkpoint.tensors}
    return found


def suffixed_parts(
    checkpoint: Checkpoint, main: str, needed: Mapping[str, str], *, optional: Mapping[str, str] | None = None
) -> dict[str, dict[str, str]]:
    """Parts of every tensor whose parts have suffixes of their own: base name -> part -> name on disk.

    Args:
        main: suffix of the part "main", which a packed tensor has.
        needed, optional: part -> suffix.

    Raises:
        CheckpointError: a tensor that has its main part but not all of `needed`.
    """
    found = {}
    for name in checkpoint.tensors:
        if not name.endswith(main):
            continue
        base = name.removesuffix(main)
        names = {"main": name, **{part: base + suffix for part, suffix in {**needed, **(optional or {})}.items()}}
        missing = [names[part] for part in needed if names[part] not in checkpoint.tensors]
        if missing:
            message = f"{checkpoint.path}: '{name}' has no '{missing[0]}' beside it"
            raise CheckpointError(message, hint=_INCOMPLETE)
        found[base] = {part: disk for part, disk in names.items() if disk in checkpoint.tensors}
    return found


def matrix(checkpoint: Checkpoint, name: str, dtypes: Sequence[str]) -> TensorInfo:
    """The tensor `name`, which must be a matrix of one of some dtypes (safetensors names).

    Raises:
        CheckpointError: another number of dimensions, an empty one, or another dtype.
    """
    info = checkpoint.tensors[name]
    if len(info.shape) != 2 or 0 in info.shape or info.dtype not in dtypes:
        message = f"'{name}' is {info.dtype} {list(info.shape)}, not a matrix of {' or '.join(dtypes)}"
        raise CheckpointError(message, hint="config.json and the weights do not belong together; download them again")
    return info


def read_int64(info: TensorInfo, count: int) -> tuple[int, ...]:
    """The first `count` values of an int64 tensor, without torch.

    Raises:
        CheckpointError: another dtype, fewer values, or a file that cannot be read.
    """
    if info.dtype != "I64" or info.nbytes < 8 * count:
        raise CheckpointError(f"{info.file}: '{info.name}' is {info.dtype} {list(info.shape)}, not {count} int64")
    return struct.unpack(f"<{count}q", read_prefix(info, 8 * count))


def read_prefix(info: TensorInfo, count: int) -> bytes:
    """The first `count` bytes of a tensor.

    Raises:
        CheckpointError: a file that cannot be read or got shorter.
    """
    try:
        with info.file.open("rb") as stream:
            found = os.pread(stream.fileno(), count, info.offset)
    except OSError as error:
        raise CheckpointError(f"{info.file}: cannot be read: {error.strerror}") from error
    if len(found) != count:
        raise CheckpointError(f"{info.file}: '{info.name}' is cut off")
    return found


def finite_scale(name: str, scale: Tensor) -> Tensor:
    """The scales in fp32.

    Raises:
        CheckpointError: one is NaN or infinite.
    """
    values = scale.float()
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"packed tensor '{name}' is corrupt: a scale is not finite")
    return values


def model_dtype(checkpoint: Checkpoint) -> str:
    """The dtype (safetensors name) in which config.json wants the model; bfloat16 where it does not say."""
    configs = (checkpoint.config, checkpoint.config.get("text_config") or {})
    stated = str(next((one[key] for one in configs for key in ("dtype", "torch_dtype") if one.get(key)), None))
    return {"float32": "F32", "float16": "F16"}.get(stated.removeprefix("torch."), "BF16")


def torch_name(dtype: str) -> str:
    """`bfloat16` for `BF16`."""
    return {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(dtype, dtype)
