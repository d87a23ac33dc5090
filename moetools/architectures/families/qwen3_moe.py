"""Qwen3-MoE: softmax, renormalised if norm_topk_prob; no shared expert."""

from moetools.architectures.base import Architecture
from moetools.architectures.dense import DenseFamily

ARCHITECTURE = Architecture(
    model_type="qwen3_moe",
    dense=DenseFamily(model_type="qwen3", class_name="Qwen3ForCausalLM"),
)
