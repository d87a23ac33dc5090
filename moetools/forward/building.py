"""What config.json builds: transformers' own reading of it, the model without weights, and where its experts are."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moetools.architectures.base import Architecture, find_architecture
from moetools.architectures.building import (
    construction,
    decoder_path,
    from_config,
    stock_config,
    uses_experts_interface,
)
from moetools.architectures.weights import ExpertsLayout
from moetools.errors import UnsupportedModelError
from moetools.forward.experts import IMPLEMENTATION, register_experts
from moetools.forward.uneven import install as install_uneven


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    """Where the MoE block of a decoder layer is, and how its experts are stored.

    Attributes:
        block: path of the block inside the layer; empty where the layer itself holds router and experts.
    """

    block: str
    layout: ExpertsLayout

    def inside(self, path: str) -> str:
        """Path inside the layer of what has this path inside the block."""
        return f"{self.block}.{path}" if self.block else path


def empty_model(config: dict[str, Any], path: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    register_experts()
    install_uneven()
    parsed = stock_config(config, path, trust_remote_code)
    parsed._experts_implementation = IMPLEMENTATION
    # A config.json may switch these on; the family's forward would then look for layers that are not there.
    for extra_output in ("output_router_logits", "output_attentions", "output_hidden_states"):
        if getattr(parsed, extra_output, False):
            setattr(parsed, extra_output, False)
    # The core takes a model's output apart by name.
    parsed.return_dict = True
    with construction(path), torch.device("meta"):
        model = from_config(parsed, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval().requires_grad_(False)


def find_layers(model: Any, arch: Architecture, config: Mapping[str, Any]) -> tuple[str, dict[int, MoeLayer]]:
    """Path of the module that owns the decoder layers, and the layers with routed experts.

    Of an encoder-decoder model it is the root, and its experts are not looked for.
    """
    if arch.stacks:
        return "", {}
    owner = decoder_path(model, arch.model_type)
    if arch.problem is not None:
        return owner, {}
    found: dict[int, MoeLayer] = {}
    for index, layer in enumerate(model.get_submodule(owner).layers):
        for name, module in layer.named_modules():
            if name.split(".")[-1] == arch.experts and uses_experts_interface(module):
                found[index] = MoeLayer(block=name.rpartition(".")[0], layout=_layout(module))
    if arch.num_experts(config) is None:
        if found:
            # The modules have experts, so config.json has to count them: this refuses it.
            find_architecture(config)
        return owner, {}
    if not found:
        raise UnsupportedModelError(
            f"model_type '{arch.model_type}': no layer uses transformers' experts interface",
            hint="only Mixture-of-Experts families built on it can be handled",
        )
    return owner, found


def _layout(module: Any) -> ExpertsLayout:
    return ExpertsLayout(
        transposed=module.is_transposed,
        interleaved=not getattr(module, "is_concatenated", True),
        gated=module.has_gate,
    )
