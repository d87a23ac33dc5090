"""A checkpoint before it is made: config.json and headers, on which everything runs that reads no weights."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetools.architectures.base import Architecture
from moetools.checkpoint.folder import SINGLE_NAME
from moetools.checkpoint.headers import DTYPE_BITS, encode_header
from moetools.checkpoint.reader import Checkpoint, natural_key
from moetools.formats.parts import read_prefix

_NOTED_BYTES = 64
_MARK = ".moetools-outline"
_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What a checkpoint will be.

    Attributes:
        config: its config.json.
        tensors: name -> (dtype as safetensors names it, shape).
        values: bytes of small tensors that say how others are read; all others read as zeros.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    values: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_nbytes(*one) for one in self.tensors.values())


def reduced_outline(source: Checkpoint, arch: Architecture, config: Mapping[str, Any], keep: int) -> Outline:
    """The checkpoint with `keep` experts in every layer: experts fewer, tensors of all experts and routers shorter.

    Args:
        config: with the new number of experts.
    """
    count = arch.num_experts(source.config)
    tensors = {}
    for name, info in source.tensors.items():
        shape, number = info.shape, _EXPERT.search(name)
        if arch.part_of(name) in ("experts", "router"):
            if number is not None and int(number[1]) >= keep:
                continue
            if number is None and shape[:1] == (count,):
                shape = (keep, *shape[1:])
        tensors[name] = (info.dtype, shape)
    # The sizes that packed tensors note beside themselves; those of all experts are alike.
    noted = [info for name, info in source.tensors.items() if name in tensors and name.endswith("weight_shape")]
    values = {info.name: read_prefix(info, info.nbytes) for info in noted if info.nbytes <= _NOTED_BYTES}
    return Outline(config=config, tensors=tensors, values=values)


def write_outline(outline: Outline, source: Checkpoint, folder: Path) -> None:
    """A folder that opens as the checkpoint, with the files that are no weights.

    The weights are a hole in the file: they read as zeros and take no space where the file system knows holes.
    """
    folder.mkdir(parents=True)
    (folder / _MARK).touch()
    for name in source.sidecar_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / name, folder / name)
    (folder / "config.json").write_text(json.dumps(dict(outline.config)))
    # Wide dtypes first: every tensor starts on a multiple of its element's size.
    names = sorted(outline.tensors, key=lambda name: (-DTYPE_BITS[outline.tensors[name][0]], natural_key(name)))
    header = encode_header([(name, *outline.tensors[name], _nbytes(*outline.tensors[name])) for name in names])
    with (folder / SINGLE_NAME).open("wb") as stream:
        stream.write(header)
        start = len(header)
        for tensor in names:
            if tensor in outline.values:
                stream.seek(start)
                stream.write(outline.values[tensor])
            start += _nbytes(*outline.tensors[tensor])
        stream.truncate(start)


def is_outline(folder: Path) -> bool:
    """Whether a checkpoint is one that `write_outline` made: its weights are zeros."""
    return (folder / _MARK).exists()


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8
