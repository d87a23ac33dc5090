"""What every record of a run says: versions, and the size of a checkpoint."""

import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from moetools import __version__
from moetools.architectures.base import find_architecture
from moetools.checkpoint.reader import Checkpoint


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    return {"moetools": __version__} | {name: version(name) for name in ("torch", "transformers", "safetensors")}


def describe_output(checkpoint: Checkpoint) -> dict[str, int]:
    """Sizes of a checkpoint, measured on its headers."""
    experts = find_architecture(checkpoint.config).num_experts(checkpoint.config)
    assert experts is not None
    return {
        "experts": experts,
        "parameters": sum(math.prod(info.shape) for info in checkpoint.tensors.values()),
        "bytes": checkpoint.total_bytes,
        "files": len(checkpoint.headers),
    }


def text_of_json(value: Mapping[str, Any]) -> str:
    """Indented JSON with a line break at its end."""
    return json.dumps(value, indent=2) + "\n"
