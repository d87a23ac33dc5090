"""ERNIE-4.5-MoE: softmax, choice by probability plus correction bias, renormalised; shared experts."""

from collections.abc import Mapping
from typing import Any

from moetools.architectures.base import Architecture
from moetools.architectures.dense import DenseFamily
from moetools.architectures.gguf_family import GgufFamily
from moetools.architectures.mlx_family import MlxFamily


def _computed(config: Mapping[str, Any]) -> dict[str, Any]:
    shared = config.get("moe_num_shared_experts") or 0
    return {
        "add_interleave_moe_layer_step": 1,
        "add_expert_shared_count": shared,
        "add_expert_shared_feed_forward_length": shared * config["moe_intermediate_size"],
    }


def _problem(config: Mapping[str, Any]) -> str | None:
    if config.get("moe_layer_interval", 1) != 1:
        return f"is written with experts in every layer behind the dense ones, not every {config['moe_layer_interval']}"
    return "has no biases in its linear layers" if config.get("use_bias") else None


ARCHITECTURE = Architecture(
    model_type="ernie4_5_moe",
    correction_bias="gate.moe_statics.e_score_correction_bias",
    count_keys=("moe_num_experts", "num_experts"),
    top_k_keys=("moe_k", "num_experts_per_tok"),
    extra_tensors=r"mtp",
    dense=DenseFamily(model_type="ernie4_5", class_name="Ernie4_5ForCausalLM"),
    mlx=MlxFamily(dropped=r"model\.layers\.\d+\.mlp\.moe_statics\.e_score_correction_bias"),
    gguf=GgufFamily(
        name="ernie4_5-moe",
        dense_layers=True,
        fields={"moe_intermediate_size": "add_expert_feed_forward_length"},
        computed=_computed,
        problem=_problem,
    ),
)
