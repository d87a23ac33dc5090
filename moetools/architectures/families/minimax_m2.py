"""MiniMax-M2: sigmoid scores, choice by score plus correction bias, renormalised."""

from collections.abc import Mapping
from typing import Any

from moetools.architectures.base import Architecture
from moetools.architectures.gguf_family import SIGMOID, GgufFamily
from moetools.architectures.mlx_family import MlxFamily


def _mlx_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rotary = int(head_dim * config.get("partial_rotary_factor", 1.0))
    return {"shared_intermediate_size": 0, "use_qk_norm": True, "rotary_dim": rotary}


ARCHITECTURE = Architecture(
    model_type="minimax_m2",
    correction_bias="e_score_correction_bias",
    scoring="sigmoid",
    count_keys=("num_local_experts", "num_experts"),
    width_keys=("intermediate_size",),
    mlx=MlxFamily(dense_layers=False, defaults=_mlx_defaults),
    gguf=GgufFamily(
        name="minimax-m2",
        own_head=True,
        fields={"intermediate_size": "add_expert_feed_forward_length"},
        computed=lambda _config: {"add_expert_gating_func": SIGMOID},
    ),
)
