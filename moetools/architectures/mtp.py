"""Multi-token prediction (MTP): what a checkpoint has of the modules that draft further tokens."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moetools.architectures.base import Architecture
from moetools.architectures.config_check import counted_experts
from moetools.checkpoint.headers import TensorInfo


@dataclass(frozen=True, kw_only=True)
class MtpTensors:
    """What a checkpoint has for multi-token prediction.

    Attributes:
        names: of all tensors, on disk.
        experts: routed experts of its layers; 0 where those are dense.
    """

    names: tuple[str, ...]
    experts: int


def find_mtp(
    names: Iterable[str], tensors: Mapping[str, TensorInfo], arch: Architecture, config: Mapping[str, Any]
) -> MtpTensors | None:
    """The MTP tensors among those that stock transformers does not load (`names`); None where there are none.

    They are named as layers behind the last one that config.json counts (DeepSeek-V3, GLM-4.5), or as `mtp`
    (Qwen3-Next, Qwen3.5, Ernie 4.5).
    """
    found = tuple(name for name in names if arch.predicts_more(name, config))
    if not found:
        return None
    infos = {name: tensors[name] for name in found}
    return MtpTensors(names=found, experts=counted_experts(infos, arch))
