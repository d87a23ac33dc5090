"""How large a task's checkpoint will be, from the headers alone."""

import math

from moetools.architectures.base import Architecture
from moetools.checkpoint.reader import Checkpoint
from moetools.formats.reader import PackedCheckpoint


def expected_bytes(source: Checkpoint, arch: Architecture, keep: int, packed: PackedCheckpoint | None) -> int:
    """Bytes of all tensors when every MoE layer has `keep` experts; routers shrink as well, by next to nothing.

    Args:
        packed: the source, if its packed tensors stay as they are.
    """
    count = arch.num_experts(source.config)
    assert count is not None
    sizes = {
        name: info.nbytes if packed is None else packed.stored_bytes(name) for name, info in source.tensors.items()
    }
    experts = sum(size for name, size in sizes.items() if arch.part_of(name) == "experts")
    return sum(sizes.values()) - experts + experts * keep // count


def expected_parameters(source: Checkpoint, arch: Architecture, keep: int) -> int:
    """Parameters of such a checkpoint."""
    count = arch.num_experts(source.config)
    assert count is not None
    total = experts = 0
    for name, info in source.tensors.items():
        size = math.prod(info.shape)
        total += size
        experts += size if arch.part_of(name) == "experts" else 0
    return total - experts + experts * keep // count
