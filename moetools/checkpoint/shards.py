"""Writes safetensors files: one per unit, and the final shards by joining units byte by byte.

Joining never holds a tensor in memory and gives the file that writing all tensors at once would have given.
"""

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Self

from torch import Tensor

from moetools.checkpoint.headers import Header, TensorInfo, alignment_rank, encode_header
from moetools.checkpoint.tensor_bytes import header_entry, tensor_bytes
from moetools.errors import CheckpointError

_CHUNK_BYTES = 8 * 1024**2


def new_digest() -> Any:
    """Of content. SHA-256: processors have instructions for it, which no other digest of the standard library uses."""
    return hashlib.sha256(usedforsecurity=False)


def file_digest(file: Path) -> str:
    """Of a file's content. Raises OSError."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, new_digest).hexdigest()


class _Digested:
    """Writes to a stream and digests what is written; large pieces in a thread, while they are written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._digest = stream, new_digest()
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def write(self, data: Any) -> None:
        if self._last is not None:
            self._last.result()
            self._last = None
        if len(data) < _CHUNK_BYTES:
            self._digest.update(data)
        else:
            self._thread = self._thread or ThreadPoolExecutor(1)
            self._last = self._thread.submit(self._digest.update, data)
        self._stream.write(data)

    def finish(self) -> str:
        """fsyncs; returns the digest."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        if self._last is not None:
            self._last.result()
        return str(self._digest.hexdigest())


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str, str]:
    """Writes and fsyncs `file`; returns its size, the sha256 of its header and the digest of its content.

    Raises OSError.
    """
    entries = sorted((header_entry(*item) for item in tensors.items()), key=lambda entry: alignment_rank(entry[1]))
    header = encode_header(entries)
    with file.open("wb") as stream, _Digested(stream) as out:
        out.write(header)
        for name, *_ in entries:
            out.write(tensor_bytes(tensors[name]))
        return stream.tell(), hashlib.sha256(header).hexdigest(), out.finish()


def joined_header(parts: Sequence[Header]) -> tuple[bytes, list[TensorInfo]]:
    """The header of the file that holds the tensors of all `parts`, and these tensors in its order."""
    tensors = [info for part in parts for info in part.tensors]
    tensors.sort(key=lambda info: alignment_rank(info.dtype))
    return encode_header([(info.name, info.dtype, info.shape, info.nbytes) for info in tensors]), tensors


def join(parts: Sequence[Header], file: Path) -> str:
    """Writes and fsyncs the file that holds the tensors of all `parts`; returns the digest of its content.

    Raises:
        OSError: from the file system.
        CheckpointError: a part got shorter since its header was read.
    """
    header, tensors = joined_header(parts)
    with file.open("wb") as stream, _Digested(stream) as out:
        out.write(header)
        for part, infos in itertools.groupby(tensors, key=lambda info: info.file):
            with part.open("rb", buffering=0) as source:
                for info in infos:
                    _copy(source.fileno(), info, out)
        return out.finish()


def group_units(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Consecutive units per shard; a unit larger than `max_shard_bytes` gets a shard of its own."""
    groups: list[list[str]] = []
    room = -1
    for unit, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(unit)
        room -= size
    return groups


def shard_names(count: int) -> list[str]:
    """The names transformers gives to `count` shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _copy(source: int, info: TensorInfo, target: _Digested) -> None:
    position, end = info.offset, info.offset + info.nbytes
    while position < end:
        chunk = os.pread(source, min(_CHUNK_BYTES, end - position), position)
        if not chunk:
            raise CheckpointError(f"{info.file}: got shorter while '{info.name}' was copied from it")
        target.write(chunk)
        position += len(chunk)


def joined_size(parts: Sequence[Header]) -> tuple[int, str]:
    """Size of the file that `join` would write, and the sha256 of its header."""
    header, tensors = joined_header(parts)
    return len(header) + sum(info.nbytes for info in tensors), hashlib.sha256(header).hexdigest()
