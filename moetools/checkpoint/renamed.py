"""Some tensors of a checkpoint under other names, as a checkpoint of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moetools.checkpoint.reader import Checkpoint, Lazy, natural_key

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class RenamedCheckpoint(Checkpoint):
    """Tensors of `source` by new names; path, headers, fingerprint and sidecars are the source's.

    Attributes:
        source: holds the tensors, packed or not.
        origin: name here -> name there.
    """

    source: Checkpoint
    origin: Mapping[str, str]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors as the source gives them."""
        wanted = {name: self.origin[self._info(name).name] for name in dict.fromkeys(names)}
        found = self.source.read(wanted.values())
        return {name: found[old] for name, old in wanted.items()}

    def read_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As they lie on disk, by their names there."""
        return self.source.read_stored(self.origin[name] for name in names)

    def decode_bytes(self, names: Iterable[str]) -> int:
        """As of the source."""
        return self.source.decode_bytes(self.origin[name] for name in names)

    def slices(self, names: Iterable[str]) -> dict[str, Lazy]:
        """Lazy values as the source gives them."""
        wanted = {name: self.origin[self._info(name).name] for name in names}
        found = self.source.slices(wanted.values())
        return {name: found[old] for name, old in wanted.items()}


def renamed(source: Checkpoint, origin: Mapping[str, str], config: dict[str, Any]) -> RenamedCheckpoint:
    """The tensors that `origin` names, with the config.json of the model they make."""
    infos = {name: replace(source.tensors[origin[name]], name=name) for name in sorted(origin, key=natural_key)}
    return RenamedCheckpoint(source.path, config, infos, source.headers, source, origin)
