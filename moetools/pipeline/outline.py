"""A checkpoint before it is made: config.json and headers, on which everything runs that reads no weights."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetools.architectures.base import Architecture
from moetools.checkpoint.folder import SINGLE_NAME
from moetools.checkpoint.headers import DTYPE_BITS, encode_header
from moetools.checkpoint.reader import Checkpoint, natural_key

_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What a checkpoint will be.

    Attributes:
        config: its config.json.
        tensors: name -> (dtype as safetensors names it, shape).
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

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
    return Outline(config=config, tensors=tensors)


def write_outline(outline: Outline, source: Checkpoint, folder: Path) -> None:
    """A folder that opens as the checkpoint, with the files that are no weights.

    The weights are a hole in the file: they read as zeros and take no space where the file system knows holes.
    """
    folder.mkdir(parents=True)
    for name in source.sidecar_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / name, folder / name)
    (folder / "config.json").write_text(json.dumps(dict(outline.config)))
    # Wide dtypes first: every tensor starts on a multiple of its element's size.
    names = sorted(outline.tensors, key=lambda name: (-DTYPE_BITS[outline.tensors[name][0]], natural_key(name)))
    header = encode_header([(name, *outline.tensors[name], _nbytes(*outline.tensors[name])) for name in names])
    with (folder / SINGLE_NAME).open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + outline.nbytes)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8
