"""How large a task's checkpoint will be, from the headers alone."""

import math

from moetools.architectures.base import Architecture
from moetools.checkpoint.reader import Checkpoint


def expected_bytes(source: Checkpoint, arch: Architecture, keep: int) -> int:
    """Bytes of all tensors when every MoE layer has `keep` experts; routers shrink as well, by next to nothing."""
    count = arch.num_experts(source.config)
    assert count is not None
    experts = sum(info.nbytes for name, info in source.tensors.items() if arch.part_of(name) == "experts")
    total = sum(info.nbytes for info in source.tensors.values())
    return total - experts + experts * keep // count


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
