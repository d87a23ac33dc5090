"""Opens a model folder from its headers alone and reads tensors when asked. `open_checkpoint` needs no torch."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetools.checkpoint import folder
from moetools.checkpoint.headers import Header, TensorInfo, read_header
from moetools.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checkpoint", "Lazy", "TensorInfo", "natural_key", "open_checkpoint"]

_LOG = logging.getLogger(__name__)
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, eq=False)
class Lazy:
    """A tensor that looks like a lazy value of the safetensors library; `take` reads it."""

    info: TensorInfo
    take: Callable[[str], Tensor]

    def __getitem__(self, index: Any) -> Tensor:
        return self.take(self.info.name)[index]

    def get_shape(self) -> list[int]:
        return list(self.info.shape)

    def get_dtype(self) -> str:
        return self.info.dtype


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model folder whose headers were read and checked.

    Attributes:
        path: the folder as it was given.
        config: config.json as it is.
        tensors: every tensor by name, in natural order (layer 9 before layer 10).
        headers: header of every weight file, by its name relative to `path`, sorted.
        partial: it is still being written, and config.json speaks of tensors that are not there yet.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    headers: Mapping[str, Header]
    partial: bool = field(default=False, kw_only=True)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors in the dtype they have on disk, in memory of their own, in the order asked for.

        Raises:
            CheckpointError: no such tensor; the file changed or vanished since the checkpoint was opened; a dtype that
                torch does not have (6-bit floats).
        """
        from moetools.checkpoint.tensor_bytes import read_tensor

        infos = [self._info(name) for name in dict.fromkeys(names)]
        by_file: dict[Path, list[TensorInfo]] = {}
        for info in sorted(infos, key=lambda info: info.offset):
            by_file.setdefault(info.file, []).append(info)
        found: dict[str, Tensor] = {}
        for file, here in by_file.items():
            try:
                with file.open("rb", buffering=0) as stream:
                    found |= {info.name: read_tensor(stream, info) for info in here}
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
        return {info.name: found[info.name] for info in infos}

    def read_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors as they lie on disk; those of a packed checkpoint under the names of their parts."""
        return self.read(names)

    def decode_bytes(self, names: Iterable[str]) -> int:  # noqa: ARG002 - of packed ones
        """Most bytes that are in memory beside the dense tensors while the named ones are read with `slices`."""
        return 0

    def slices(self, names: Iterable[str]) -> dict[str, Lazy]:
        """Lazy values as transformers' loader takes them; all of a tensor is read at each access.

        Nothing is mapped: a file that gets shorter while a mapping of it is in use ends the process.

        Raises:
            CheckpointError: no such tensor; at an access, see `read`.
        """
        return {name: Lazy(self._info(name), self._take) for name in names}

    def sidecar_files(self) -> list[Path]:
        """Relative paths of all files to carry over: tokenizer, chat templates, generation config, licence, code.

        Raises:
            CheckpointError: a link that leads nowhere.
        """
        return folder.sidecar_files(self.path)

    def fingerprint(self) -> str:
        """sha256 (hex) over config.json, all headers, and the first, middle and last 4 KiB of every tensor.

        Cheap at any size; a change that spares all sampled bytes goes unnoticed.

        Raises:
            CheckpointError: a file that cannot be read or got shorter.
        """
        digest = hashlib.sha256()
        try:
            digest.update((self.path / "config.json").read_bytes())
            for name, header in self.headers.items():
                digest.update(f"\0{name}\0{header.digest}\0".encode())
                with (self.path / name).open("rb") as stream:
                    for info in header.tensors:
                        for start, length in _sampled(info):
                            digest.update(_pread(stream.fileno(), info.file, start, length))
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror} ({error.filename})") from error
        return digest.hexdigest()

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Size and time of the last change (ns) of config.json and every weight file: what a fingerprint may miss.

        A file that vanished has none.
        """
        files = {name: self.path / name for name in ("config.json", *self.headers)}
        found = {name: file.stat() for name, file in files.items() if file.exists()}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}

    def _take(self, name: str) -> Tensor:
        return self.read([name])[name]

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor '{name}' among the {len(self.tensors)} of this model")
        return self.tensors[name]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens the model folder `path` and checks everything that can be checked without reading weights.

    Raises:
        CheckpointError: missing or not a folder; no config.json; no weights, pickled weights; malformed index; missing,
            truncated or corrupt shards; a tensor in another shard than the index says, or in two; an adapter.
    """
    path = Path(path)
    try:
        folder.check_folder(path)
        if (path / folder.ADAPTER_NAME).is_file():
            _LOG.warning("%s: holds an adapter (%s), which is neither used nor carried over", path, folder.ADAPTER_NAME)
        config = folder.read_json_object(path / "config.json")
        names, weight_map = folder.weight_files(path)
        headers = {name: read_header(path / name) for name in names}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror} ({error.filename})") from error
    tensors = _collect(path, headers, weight_map)
    return Checkpoint(path, config, tensors, headers)


def natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key that orders the numbers in names by value."""
    pieces = re.split(r"0*([0-9]+)", name)
    # Longer numbers are larger; int() would refuse the absurdly long ones of a hostile file.
    return tuple((len(piece), piece) if index % 2 else (0, piece) for index, piece in enumerate(pieces))


def _collect(path: Path, headers: Mapping[str, Header], weight_map: Mapping[str, str] | None) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for name, header in headers.items():
        for info in header.tensors:
            if info.name in found:
                other = found[info.name].file.name
                message = f"{path}: tensor '{info.name}' is in both '{other}' and '{name}'"
                raise CheckpointError(message, hint="remove files that belong to another version of the model")
            said = (weight_map or {}).get(info.name, name)
            if said != name:
                message = f"{path / name}: holds tensor '{info.name}', but {folder.INDEX_NAME} says '{said}'"
                raise CheckpointError(message, hint="index and shards are of different versions; download again")
            found[info.name] = info
    _say_what_differs(path, found, weight_map)
    return {name: found[name] for name in sorted(found, key=natural_key)}


def _say_what_differs(path: Path, found: Mapping[str, TensorInfo], weight_map: Mapping[str, str] | None) -> None:
    """Stock transformers loads all that the index' files hold; what it then lacks is refused where a model is built."""
    if weight_map is None:
        return
    unnamed = [name for name in found if name not in weight_map]
    if unnamed:
        _LOG.warning("%s: %s does not name %s; loaded as stock does", path, folder.INDEX_NAME, _first_of(unnamed))
    absent = [name for name in weight_map if name not in found]
    if absent:
        _LOG.warning("%s: no file holds %s, which %s names", path, _first_of(absent), folder.INDEX_NAME)


def _first_of(names: list[str]) -> str:
    return f"tensor '{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _sampled(info: TensorInfo) -> list[tuple[int, int]]:
    """(offset, length) of the bytes of a tensor that go into the fingerprint."""
    if info.nbytes <= 3 * _SAMPLE_BYTES:
        return [(info.offset, info.nbytes)]
    middle = info.offset + (info.nbytes - _SAMPLE_BYTES) // 2
    last = info.offset + info.nbytes - _SAMPLE_BYTES
    return [(start, _SAMPLE_BYTES) for start in (info.offset, middle, last)]


def _pread(descriptor: int, file: Path, start: int, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        more = os.pread(descriptor, length - len(found), start + len(found))
        if not more:
            raise CheckpointError(f"{file}: {length} bytes expected at {start}, {len(found)} found: it got shorter")
        found += more
    return bytes(found)
