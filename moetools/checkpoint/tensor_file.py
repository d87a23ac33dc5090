"""A safetensors file beside a model: token ids, statistics, routers, a cache. It is read into memory, never mapped.

A mapped file that gets shorter while it is read ends the process with SIGBUS; a read one ends in an error.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from moetools.checkpoint.headers import TensorInfo, read_header
from moetools.checkpoint.tensor_bytes import read_tensor
from moetools.errors import CheckpointError


@dataclass(frozen=True)
class TensorFile:
    """A file whose header was read and checked.

    Attributes:
        tensors: by name.
        metadata: the texts of its header.
    """

    file: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Some of the tensors, or all.

        Raises:
            CheckpointError: there is no such tensor, torch has no such dtype, or the file changed since it was opened.
        """
        return self._read([self._info(name) for name in (self.tensors if names is None else names)])

    def rows(self, names: Iterable[str], start: int, count: int) -> tuple[Tensor, ...]:
        """`count` rows of some tensors, from `start` on.

        Raises:
            CheckpointError: as `read`.
        """
        parts = []
        for info in map(self._info, names):
            row = info.nbytes // info.shape[0]
            shape = (count, *info.shape[1:])
            parts.append(replace(info, shape=shape, nbytes=count * row, offset=info.offset + start * row))
        return tuple(self._read(parts).values())

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.file}: no tensor '{name}'")
        return self.tensors[name]

    def _read(self, infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
        try:
            with self.file.open("rb", buffering=0) as stream:
                return {info.name: read_tensor(stream, info) for info in infos}
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be read: {error.strerror}") from error


def open_tensor_file(file: Path) -> TensorFile:
    """Reads and checks the header.

    Raises:
        CheckpointError: see `read_header`.
    """
    header = read_header(file)
    return TensorFile(file, {info.name: info for info in header.tensors}, header.metadata)
