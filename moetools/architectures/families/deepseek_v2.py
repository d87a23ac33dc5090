"""DeepSeek-V2: softmax, greedy or group-limited choice, scaled by routed_scaling_factor; shared experts."""

from collections.abc import Mapping
from typing import Any

from moetools.architectures.base import Architecture
from moetools.architectures.dense import DenseFamily
from moetools.architectures.gguf_family import (
    GROUPED_ROUTER,
    LATENT_PIECES,
    SOFTMAX,
    GgufFamily,
    latent_attention,
    latent_problem,
)
from moetools.architectures.mlx_family import MlxFamily


def _problem(config: Mapping[str, Any]) -> str | None:
    if config.get("topk_method") == "group_limited_greedy" and config.get("topk_group") != config.get("n_group"):
        return "scores a group by its best two experts, DeepSeek-V2 by its best one"
    return latent_problem(config)


ARCHITECTURE = Architecture(
    model_type="deepseek_v2",
    count_keys=("n_routed_experts", "num_experts"),
    dense=DenseFamily(own_keys=("first_k_dense_replace",)),
    gguf=GgufFamily(
        name="deepseek2",
        dense_layers=True,
        yarn=True,
        fields={key: add for key, add in GROUPED_ROUTER.items() if key != "norm_topk_prob"},
        computed=lambda config: {**latent_attention(config), "add_expert_gating_func": SOFTMAX},
        problem=_problem,
        pieces=LATENT_PIECES,
    ),
    mlx=MlxFamily(own_head=True, needs=("rope_scaling",)),
)
