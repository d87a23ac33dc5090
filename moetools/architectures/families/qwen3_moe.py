"""Qwen3-MoE: softmax, renormalised if norm_topk_prob; no shared expert."""

from moetools.architectures.base import Architecture
from moetools.architectures.dense import DenseFamily
from moetools.architectures.gguf_family import GgufFamily
from moetools.architectures.mlx_family import MlxFamily

ARCHITECTURE = Architecture(
    model_type="qwen3_moe",
    dense=DenseFamily(model_type="qwen3", class_name="Qwen3ForCausalLM"),
    gguf=GgufFamily(
        name="qwen3moe", normalised=True, fields={"moe_intermediate_size": "add_expert_feed_forward_length"}
    ),
    mlx=MlxFamily(lacks=("attention_bias",)),
)
