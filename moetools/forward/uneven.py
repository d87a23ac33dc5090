"""Models whose layers have different numbers of experts: what config.json says, and how transformers builds them.

Stock transformers gives every layer the same number. A config.json with the key `EXPERTS_PER_LAYER`, {"3": 6, ...},
says which layers have fewer; its ordinary count is the largest. After `install` every model with that key is built with
MoE blocks of the right sizes, so `from_pretrained`, `save_pretrained` and `from_config` work as always. Models without
the key are not touched.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moetools.architectures.base import find_architecture
from moetools.architectures.config_check import EXPERTS_PER_LAYER
from moetools.errors import CheckpointError, UserError

_MARK = "_moetools_uneven"


def experts_by_layer(config: Mapping[str, Any]) -> dict[int, int]:
    """Layers with a number of experts of their own, from config.json; empty for an even model.

    Raises:
        CheckpointError: the key holds something else than layers and numbers.
    """
    listed = config.get(EXPERTS_PER_LAYER) or {}
    try:
        found = {int(layer): int(count) for layer, count in listed.items()}
    except (AttributeError, TypeError, ValueError):
        raise CheckpointError(f"config.json: {EXPERTS_PER_LAYER} does not hold a number per layer") from None
    if any(count < 1 for count in found.values()):
        raise CheckpointError(f"config.json: {EXPERTS_PER_LAYER} leaves a layer without experts")
    return found


def refuse_uneven(config: Mapping[str, Any], what: str) -> None:
    """Refuse a model whose layers have different numbers of experts.

    Raises:
        UserError: it is one; `what` says what does not work on it.
    """
    if experts_by_layer(config):
        raise UserError(
            f"{what} needs equally many experts in every layer; config.json has {EXPERTS_PER_LAYER}",
            hint="start from the original",
        )


def install() -> None:
    """Teach transformers to build such models; calling it again changes nothing."""
    original = PreTrainedModel.post_init
    if hasattr(original, _MARK):
        return

    def post_init(self: Any) -> None:
        layers = getattr(self, "layers", None)
        if isinstance(layers, nn.ModuleList) and getattr(self.config, EXPERTS_PER_LAYER, None):
            _resize(layers, self.config)
        original(self)

    setattr(post_init, _MARK, True)
    PreTrainedModel.post_init = post_init


def _resize(layers: nn.ModuleList, config: Any) -> None:
    """Replace the MoE blocks of the listed layers by blocks with their own number of experts."""
    described = config.to_dict()
    arch = find_architecture(described)
    for index, count in experts_by_layer(described).items():
        if index >= len(layers):
            raise CheckpointError(f"config.json: {EXPERTS_PER_LAYER} names layer {index} of {len(layers)} layers")
        own = copy.deepcopy(config)
        for key in arch.count_keys:
            if hasattr(own, key):
                setattr(own, key, count)
        rebuilt = type(layers[index])(own, index)
        for name, child in rebuilt.named_children():
            if any(path.split(".")[-1] == arch.experts.split(".")[-1] for path, _ in child.named_modules()):
                setattr(layers[index], name, child)
