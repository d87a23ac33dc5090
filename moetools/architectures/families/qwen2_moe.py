"""Qwen1.5/2-MoE: softmax, renormalised only if norm_topk_prob; one gated shared expert."""

from moetools.architectures.base import Architecture

ARCHITECTURE = Architecture(
    model_type="qwen2_moe",
    disk_parts=((r"shared_expert_gate", "shared experts"),),
)
