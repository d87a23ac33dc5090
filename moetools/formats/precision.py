"""How the parts of a checkpoint are stored, and what a change did to that."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from moetools.architectures.base import Architecture
from moetools.checkpoint.reader import Checkpoint
from moetools.formats.parts import torch_name
from moetools.formats.reader import PackedCheckpoint, grid_words


@dataclass(frozen=True, kw_only=True)
class PartPrecision:
    """How one part of a model is stored.

    Attributes:
        before, after: grids and dtypes, that of most bytes first.
    """

    before: str
    after: str

    @property
    def changed(self) -> bool:
        return self.before != self.after

    def to_json(self) -> dict[str, str | bool]:
        """JSON-able."""
        return {**asdict(self), "changed": self.changed}


def compare_precision(
    source: Checkpoint, output: Checkpoint | None, arch: Architecture, *, kept: bool
) -> dict[str, PartPrecision]:
    """Every part of a model (`Architecture.part_of`), before and after.

    Args:
        output: what was written; None where nothing is yet, and packed tensors are going to be `kept`, or decoded.
    """
    before = _storage(source, arch, decoded=False)
    after = _storage(source if output is None else output, arch, decoded=output is None and not kept)
    parts = sorted(before.keys() & after.keys())
    return {part: PartPrecision(before=before[part], after=after[part]) for part in parts}


def _storage(checkpoint: Checkpoint, arch: Architecture, *, decoded: bool) -> Mapping[str, str]:
    packed = checkpoint.packed if isinstance(checkpoint, PackedCheckpoint) and not decoded else {}
    sizes: dict[str, dict[str, int]] = {}
    for name, info in checkpoint.tensors.items():
        words = grid_words(packed[name]) if name in packed else torch_name(info.dtype)
        kinds = sizes.setdefault(arch.part_of(name), {})
        kinds[words] = kinds.get(words, 0) + info.nbytes
    return {part: ", ".join(sorted(kinds, key=lambda kind: (-kinds[kind], kind))) for part, kinds in sizes.items()}
