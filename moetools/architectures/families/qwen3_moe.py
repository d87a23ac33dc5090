"""Qwen3-MoE: softmax, renormalised if norm_topk_prob; no shared expert."""

from moetools.architectures.base import Architecture

ARCHITECTURE = Architecture(
    model_type="qwen3_moe",
)
