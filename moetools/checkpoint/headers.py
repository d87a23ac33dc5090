"""The header of a safetensors file: read and checked, or written. Needs neither torch nor safetensors.

A file is 8 bytes (little-endian length of the header), a JSON header, and the tensors' bytes back to back without gaps.
The checks are those of the format's own reader and happen when a checkpoint is opened, before any weight is read.
"""

import hashlib
import itertools
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetools.errors import CheckpointError

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of every dtype name the format knows."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a longer header means that the first 8 bytes are not a header length."""

MAX_NAME_CHARACTERS = 1000
"""Of a tensor's name; real ones have at most a few dozen."""

MAX_DIMENSIONS = 64
"""Of a tensor's shape; torch has no more."""

DOWNLOAD_HINT = "the download is incomplete or damaged; download this file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: key in the file.
        dtype: the format's name, such as "BF16" (see `DTYPE_BITS`).
        shape: logical shape; F4 and F6 count elements, not bytes.
        nbytes: bytes on disk.
        file: the safetensors file.
        offset: position of the first byte, counted from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


@dataclass(frozen=True)
class Header:
    """The header of one file.

    Attributes:
        tensors: in the order of their bytes.
        file_bytes: size of the whole file.
        digest: sha256 (hex) of the first 8 bytes and the JSON.
        metadata: the texts under `__metadata__`.
    """

    tensors: tuple[TensorInfo, ...]
    file_bytes: int
    digest: str
    metadata: Mapping[str, str]


def read_header(file: Path) -> Header:
    """Reads and checks the header of `file`.

    Raises:
        CheckpointError: unreadable, empty, truncated or corrupt; unknown dtype; byte ranges that overlap or leave gaps.
    """
    try:
        with file.open("rb") as stream:
            file_bytes = stream.seek(0, 2)
            stream.seek(0)
            prefix = stream.read(8)
            length = _header_length(file, prefix, file_bytes)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    entries, metadata = _parse_json(file, raw)
    tensors = sorted(
        (_tensor_info(file, name, entry, 8 + length) for name, entry in entries.items()),
        key=lambda info: (info.offset, info.nbytes),
    )
    _check_contiguous(file, tensors, 8 + length, file_bytes)
    return Header(tuple(tensors), file_bytes, hashlib.sha256(prefix + raw).hexdigest(), metadata)


def encode_header(tensors: Sequence[tuple[str, str, Sequence[int], int]]) -> bytes:
    """The bytes before the first tensor of a file that holds `tensors`: (name, dtype, shape, nbytes), in this order.

    Padded with spaces so that the first tensor lies on a multiple of 8 bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + nbytes]}
        start += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def alignment_rank(dtype: str) -> int:
    """Sort key that puts wide dtypes first, so that every tensor of a file starts on a multiple of its element size."""
    return -DTYPE_BITS[dtype]


def _header_length(file: Path, prefix: bytes, file_bytes: int) -> int:
    if prefix == b"version ":
        raise CheckpointError(
            f"{file}: a Git LFS pointer, not the weights", hint="run 'git lfs pull' in the model folder"
        )
    if file_bytes < 8:
        raise CheckpointError(f"{file}: {file_bytes} bytes is too short for a safetensors file", hint=DOWNLOAD_HINT)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        message = f"{file}: header length {length} exceeds the format's limit of {MAX_HEADER_BYTES} bytes"
        raise CheckpointError(message, hint="this is not a safetensors file, or " + DOWNLOAD_HINT)
    if 8 + length > file_bytes:
        message = f"{file}: truncated: the header needs {8 + length} bytes, the file has {file_bytes}"
        raise CheckpointError(message, hint=DOWNLOAD_HINT)
    return length


def _parse_json(file: Path, raw: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of the header without `__metadata__`, and that."""
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not valid JSON: {error}", hint=DOWNLOAD_HINT) from error
    if not isinstance(header, dict) or not raw.startswith(b"{"):
        raise CheckpointError(f"{file}: the header is not a JSON object", hint=DOWNLOAD_HINT)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(f"{file}: __metadata__ in the header must map text to text", hint=DOWNLOAD_HINT)
    return header, metadata or {}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    "".join(found).encode()  # a lone surrogate is legal JSON for Python, not for the format
    if len(found) != len(pairs):
        raise ValueError("the same key occurs twice")
    return found


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        message = f"{file}: tensor '{name}': the header entry must have exactly dtype, shape and data_offsets"
        raise CheckpointError(message, hint=DOWNLOAD_HINT)
    if len(name) > MAX_NAME_CHARACTERS:
        message = f"{file}: a tensor's name has {len(name)} characters: '{name[:40]}...'"
        raise CheckpointError(message, hint=DOWNLOAD_HINT)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        message = f"{file}: tensor '{name}': unknown dtype {repr(dtype)[:40]}; legal: {', '.join(DTYPE_BITS)}"
        raise CheckpointError(message, hint="upgrade moetools if this dtype is new to the format")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        message = f"{file}: tensor '{name}': illegal shape {str(shape)[:80]} or data_offsets {str(offsets)[:80]}"
        raise CheckpointError(message, hint=DOWNLOAD_HINT)
    elements = [1, *itertools.accumulate(shape, operator.mul)]
    nbytes, bits_over = divmod(elements[-1] * DTYPE_BITS[dtype], 8)
    if bits_over or nbytes != offsets[1] - offsets[0] or max(elements) >= 2**63:
        span = offsets[1] - offsets[0]
        message = f"{file}: tensor '{name}': {dtype} {shape} does not fit the {span} bytes of its data_offsets"
        raise CheckpointError(message, hint=DOWNLOAD_HINT)
    return TensorInfo(name, dtype, tuple(shape), nbytes, file, data_start + offsets[0])


def _sizes(value: Any) -> bool:
    # type() and not isinstance(): JSON's true is an int for isinstance.
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )


def _check_contiguous(file: Path, tensors: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    end = data_start
    for info in tensors:
        if info.offset != end:
            kind = "overlaps the tensor before it" if info.offset < end else "leaves a gap before it"
            message = f"{file}: tensor '{info.name}' starts at byte {info.offset}, not {end}: it {kind}"
            raise CheckpointError(message, hint=DOWNLOAD_HINT)
        end += info.nbytes
    if end != file_bytes:
        kind = "truncated" if file_bytes < end else "has bytes that belong to no tensor"
        message = f"{file}: {kind}: the header describes {end} bytes, the file has {file_bytes}"
        raise CheckpointError(message, hint=DOWNLOAD_HINT)
